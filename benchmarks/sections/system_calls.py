"""Which system calls a 4 KiB read makes in an asyncio program, counted by strace.

What a short run makes is taken from what a longer one makes, so that starting does not count.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks import files, rivals
from benchmarks.harness import Cell, Outcome, measure, output_of, own
from benchmarks.programs import system_calls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness import Setting

__all__ = ["count", "parse", "per_operation", "section"]

FEW: Final = 10 * system_calls.GATHERED
MANY: Final = 60 * system_calls.GATHERED


def parse(summary: str) -> Counter[str]:
    """Calls by name, from what `strace -c` writes.

    Raises:
        ValueError: it is something else.
    """
    calls: Counter[str] = Counter()
    rules = 0
    for line in summary.splitlines():
        words = line.split()
        if words and set(words[0]) == {"-"}:
            rules += 1
        elif rules == 1:
            # % time, seconds, usecs/call, calls, perhaps errors, name
            calls[words[-1]] += int(words[3])
    if rules < 2:
        raise ValueError(f"not a summary of strace: {summary!r}")
    return calls


def count(command: Sequence[str]) -> Counter[str]:
    """Run a command under strace.

    Raises:
        ProgramError, OSError: it, or strace, failed.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        output_of(["strace", "-f", "-qq", "-c", "-o", file.name, *command])
        return parse(file.read())


def per_operation(few: Counter[str], many: Counter[str], more: int) -> dict[str, float]:
    """System calls of one operation: of all names, and by name, the most frequent first."""
    each = {name: (many[name] - few[name]) / more for name in many}
    # Less than one in a thousand is the interpreter's own, such as growing its heap.
    kept = [(name, calls) for name, calls in each.items() if calls >= 0.001]
    return {
        "calls": sum(calls for _, calls in kept),
        **dict(sorted(kept, key=lambda item: -item[1])),
    }


def turn(program: str, kind: str, pace: str, path: str) -> dict[str, float]:
    """Count what one program does."""
    few, many = (
        count(own("system_calls", program=program, kind=kind, pace=pace, path=path, operations=n))
        for n in (FEW, MANY)
    )
    return per_operation(few, many, MANY - FEW)


def section(setting: Setting) -> Outcome:
    """Count."""
    outcome = Outcome(missing=rivals.missing("strace", "caio"))
    if rivals.why_not("strace"):
        return outcome
    with files.temporary_file(setting.folder, 16 << 20) as path:
        files.warm(path, direct=False)
        cells = [
            Cell(
                f"{kind}, {pace}", f"{program}/{way}", partial(turn, program, kind, pace, str(path))
            )
            for kind in system_calls.KINDS
            for pace in system_calls.PACES
            for program, way in (("rawaio", "File.pread"), ("caio", "linux_aio"))
            if rivals.why_not(program) is None
        ]
        outcome.add(measure(cells, 1, setting.say))
    return outcome

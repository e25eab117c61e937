"""Which system calls an operation makes in an asyncio program.

    python benchmarks/system_calls.py [--folder F] [--json FILE]

Reads blocks of 4 KiB, one after another, and 64 at a time by `gather`, direct and from the page
cache, under strace; with rawaio, and from the page cache with caio 0.12.10 (linux_aio) too. What a
short run makes is taken from what a longer one makes, so that starting does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

# A plain checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rawaio
from benchmarks import files, harness

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

NBYTES: Final = files.BLOCK
GATHERED: Final = 64
CAIO_VERSION: Final = "0.12.10"
FILE_NBYTES: Final = 16 << 20
FEW: Final = 10 * GATHERED
MANY: Final = 60 * GATHERED


# -- what is counted, each in a process of its own -----------------------------------------------


async def reads(
    read: Callable[[int], Awaitable[bytes]], offsets: Iterator[int], at_a_time: int
) -> None:
    if at_a_time == 1:
        for offset in offsets:
            check(await read(offset))
        return
    while batch := list(islice(offsets, at_a_time)):
        for data in await asyncio.gather(*map(read, batch)):
            check(data)


def check(data: bytes) -> None:
    if len(data) != NBYTES:
        raise OSError(f"{len(data)} bytes instead of {NBYTES}")


async def rawaio_reads(path: Path, offsets: Iterator[int], at_a_time: int, *, direct: bool) -> None:
    async with rawaio.open(path, direct=direct, engine="aio") as file:

        def read(offset: int) -> Awaitable[bytes]:
            return file.pread(NBYTES, offset)

        await reads(read, offsets, at_a_time)


async def caio_reads(path: Path, offsets: Iterator[int], at_a_time: int) -> None:
    from caio.linux_aio_asyncio import AsyncioContext

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    async with AsyncioContext() as context:

        def read(offset: int) -> Awaitable[bytes]:
            return context.read(NBYTES, fd, offset)

        await reads(read, offsets, at_a_time)
    os.close(fd)


def work(name: str, path: Path, operations: int) -> None:
    """Do one of `NAMES`, in this process."""
    kind, program, pace = name.split("/")
    offsets = islice(cycle(files.random_offsets(path.stat().st_size)), operations)
    at_a_time = GATHERED if pace == "gather" else 1

    async def main() -> None:
        if program == "caio":
            await caio_reads(path, offsets, at_a_time)
        else:
            await rawaio_reads(path, offsets, at_a_time, direct=kind == "direct")

    asyncio.run(main())


NAMES: Final = (
    "direct/rawaio/one by one",
    "direct/rawaio/gather",
    "cached/rawaio/one by one",
    "cached/rawaio/gather",
    "cached/caio/one by one",
    "cached/caio/gather",
)


# -- putting it together -------------------------------------------------------------------------


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


def count(name: str, path: Path, operations: int) -> Counter[str]:
    """Run one of `NAMES` under strace.

    Raises:
        ProgramError, OSError: it, or strace, failed.
    """
    script = str(Path(__file__).resolve())
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as file:
        command = ["strace", "-f", "-qq", "-c", "-o", file.name, sys.executable, script]
        harness.output_of([*command, "--work", name, str(path), str(operations)])
        return parse(file.read())


def per_operation(few: Counter[str], many: Counter[str], more: int) -> dict[str, float]:
    """System calls of one operation, by name, the most frequent first."""
    each = {name: (many[name] - few[name]) / more for name in many}
    # Less than one in a thousand is the interpreter's own, such as growing its heap.
    kept = [(name, calls) for name, calls in each.items() if calls >= 0.001]
    return dict(sorted(kept, key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class Report:
    """What is written as JSON. Calls for each operation, by name of the way and of the call."""

    benchmark: str
    where: dict[str, object]
    nbytes: int
    gathered: int
    calls: dict[str, dict[str, float]]
    missing: list[str]


def measure(path: Path) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Calls for each operation, by name, and what is missing."""
    calls: dict[str, dict[str, float]] = {}
    missing: list[str] = []
    absent = harness.version_of("caio", CAIO_VERSION)
    if absent is not None:
        missing.append(f"caio: {absent}")
    for name in NAMES:
        if absent is not None and "/caio/" in name:
            continue
        harness.say(name)
        few, many = (count(name, path, operations) for operations in (FEW, MANY))
        calls[name] = per_operation(few, many, MANY - FEW)
    return calls, missing


def render(report: Report) -> str:
    """What a terminal shows."""
    width = max(map(len, report.calls), default=0)
    lines = [harness.render_machine(report.where), ""]
    lines += [f"system calls for each read; gather: of {report.gathered}"]
    for name, calls in report.calls.items():
        each = ", ".join(f"{call} {n:.3g}" for call, n in calls.items())
        lines.append(f"{name:{width}}{sum(calls.values()):8.2f}   {each}")
    lines += ["", *(f"missing: {reason}" for reason in report.missing)]
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print; 0, or 1 when a program failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="where the file is made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        name, path, operations = arguments.work
        work(name, Path(path), int(operations))
        return 0
    if shutil.which("strace") is None:
        print("system_calls: strace is not installed", file=sys.stderr)
        return 1
    try:
        with files.temporary_file(arguments.folder, FILE_NBYTES) as path:
            files.warm(path, direct=False)
            calls, missing = measure(path)
    except (harness.ProgramError, OSError, ValueError) as error:
        print(f"system_calls: {error}", file=sys.stderr)
        return 1
    report = Report("system_calls", harness.machine(), NBYTES, GATHERED, calls, missing)
    print(render(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

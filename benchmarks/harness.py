"""Measuring: programs take turns, each in a process of its own.

There are two ways of taking a program's time:

- `by_difference`: from outside, by the same clock for a program in C and one in Python. A program
  is run with two numbers of operations, and what the longer run takes more is the time of the
  operations that it does more: start, imports and set-up cancel out. The shorter run that counts is
  the lowest of all rounds, or else its noise would make figures too low. Processor time is user and
  system time of the program and its children, as wait4(2) gives it.
- `by_report`: the program says itself what it did, in what time.

A program that fails is left out from then on, and its reason told.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from benchmarks.figures import Columns, Figures

    _T = TypeVar("_T")
    #: What one turn gave, by name.
    Turn = Mapping[str, float]

__all__ = [
    "Cell",
    "Outcome",
    "ProgramError",
    "Setting",
    "Usage",
    "by_difference",
    "by_report",
    "environment",
    "in_turn",
    "measure",
    "output_of",
    "own",
    "usage_of",
]

ROOT: Final = Path(__file__).resolve().parents[1]
# The shorter run tells what starting costs; all else that it does only adds to the noise.
_SHORTER: Final = 8
_NO_BYTECODE: Final = "PYTHONDONTWRITEBYTECODE"


class ProgramError(Exception):
    """A program failed; the message has what it said."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How to measure."""

    folder: Path  # where files are made
    quick: bool = False
    loop: str = "asyncio"
    say: Callable[[str], object] = field(default=lambda text: None, compare=False)

    def pick(self, quick: _T, full: _T) -> _T:
        """The one or the other."""
        return quick if self.quick else full


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run took."""

    wall_s: float
    cpu_s: float


def columns(turns: Sequence[Turn]) -> Columns:
    """By metric, what each turn gave."""
    return {metric: [turn[metric] for turn in turns] for metric in turns[0]}


@dataclass(frozen=True, slots=True)
class Cell:
    """One program at one task."""

    group: str
    name: str
    turn: Callable[[], Turn]
    figures: Callable[[Sequence[Turn]], Columns] = columns


@dataclass(slots=True)
class Outcome:
    """What a section found."""

    figures: Figures = field(default_factory=dict[str, "dict[str, Columns]"])
    missing: list[str] = field(default_factory=list[str])  # each with its reason
    failed: bool = False  # one of rawaio's own is missing

    def add(self, other: Outcome) -> None:
        """Have all that another has, too."""
        for group, names in other.figures.items():
            self.figures.setdefault(group, {}).update(names)
        self.missing += other.missing
        self.failed = self.failed or other.failed


# -- processes -----------------------------------------------------------------------------------


@cache
def environment() -> dict[str, str]:
    """What programs are run with: ours, this checkout, and a place for bytecode of their own."""
    folder = tempfile.TemporaryDirectory(prefix="rawaio-benchmark-")
    atexit.register(folder.cleanup)
    kept = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": folder.name}


def own(module: str, **arguments: object) -> list[str]:
    """The command that runs a module of `benchmarks.programs`."""
    return [sys.executable, "-m", "benchmarks.programs", module, json.dumps(arguments)]


def output_of(command: Sequence[str]) -> str:
    """Run a command to its end; what it printed.

    Raises:
        ProgramError: its exit status is not 0.
        OSError: it cannot be started.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise ProgramError(f"{' '.join(command)}: status {done.returncode}\n{said}")
    return done.stdout


def usage_of(command: Sequence[str]) -> Usage:
    """Run a command to its end; the time of it and of its children.

    Raises:
        ProgramError: its exit status is not 0.
        OSError: it cannot be started.
    """
    began = time.perf_counter()
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
        ) as process,
    ):
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        wall_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()
            raise ProgramError(f"{' '.join(command)}: status {process.returncode}\n{said}")
        return Usage(wall_s, usage.ru_utime + usage.ru_stime)


# -- turns ---------------------------------------------------------------------------------------


def per_operation(short_s: Sequence[float], long_s: Sequence[float], more: int) -> list[float]:
    """Microseconds for each of the operations that the longer runs did more, by round.

    Raises:
        ProgramError: a longer run took no longer: too few operations to measure anything.
    """
    start = min(short_s)
    if min(long_s) <= start:
        raise ProgramError(f"{more} more operations took no more than {start:.3f} s; measure more")
    return [1e6 * (seconds - start) / more for seconds in long_s]


def by_difference(
    group: str,
    name: str,
    command: Callable[[int], Sequence[str]],
    operations: int,
    usage: Callable[[Sequence[str]], Usage] = usage_of,
) -> Cell:
    """A program that is run with two numbers of operations; cpu_us and wall_us."""
    shorter = operations // _SHORTER

    def turn() -> Turn:
        short, long = usage(command(shorter)), usage(command(operations))
        return {
            "short_wall_s": short.wall_s,
            "short_cpu_s": short.cpu_s,
            "long_wall_s": long.wall_s,
            "long_cpu_s": long.cpu_s,
        }

    def figures(turns: Sequence[Turn]) -> Columns:
        by = columns(turns)
        return {
            f"{clock}_us": per_operation(
                by[f"short_{clock}_s"], by[f"long_{clock}_s"], operations - shorter
            )
            for clock in ("cpu", "wall")
        }

    return Cell(group, name, turn, figures)


def by_report(
    group: str,
    name: str,
    command: Sequence[str],
    read: Callable[[str], Turn] = json.loads,
    output: Callable[[Sequence[str]], str] = output_of,
) -> Cell:
    """A program that prints its figures."""
    return Cell(group, name, lambda: read(output(command)))


def in_turn(things: Sequence[_T], rounds: int) -> Iterator[tuple[int, _T]]:
    """Each thing once a round, with the round's number; each round begins with another one."""
    for round_ in range(rounds):
        first = round_ % max(len(things), 1)
        for thing in (*things[first:], *things[:first]):
            yield round_, thing


def reason_of(error: Exception) -> str:
    """Of all that a program said, the line that says why it failed."""
    lines = str(error).splitlines()
    return lines[-1] if lines else type(error).__name__


def measure(
    cells: Sequence[Cell], rounds: int, say: Callable[[str], object] = lambda text: None
) -> Outcome:
    """Run all in turn. What fails is missing, with the reason."""
    outcome = Outcome()
    turns: dict[Cell, list[Turn]] = {cell: [] for cell in cells}

    def leave_out(cell: Cell, error: Exception) -> None:
        outcome.missing.append(f"{cell.group}, {cell.name}: {reason_of(error)}")
        outcome.failed = outcome.failed or cell.name.startswith("rawaio/")

    for round_, cell in in_turn(cells, rounds):
        if cell not in turns:
            continue
        say(f"{cell.group}, round {round_ + 1} of {rounds}: {cell.name}")
        try:
            turns[cell].append(cell.turn())
        except (ProgramError, OSError, ValueError, LookupError) as error:
            leave_out(cell, error)
            del turns[cell]
    for cell, each in turns.items():
        try:
            figures: Columns = cell.figures(each)
        except ProgramError as error:
            leave_out(cell, error)
        else:
            outcome.figures.setdefault(cell.group, {})[cell.name] = figures
    return outcome

"""Paired measurements of processor time: programs take turns, and are compared round by round.

A program is run with two numbers of operations. What a longer run takes more than a shorter one is
the time of the operations that it does more: start, imports and set-up cancel out. The shorter run
that counts is the lowest of all rounds, or else its noise would make figures too low. Time is user
and system time of the program and its children, as wait4(2) gives it, so that a program in C and
one in Python are measured from outside by the same clock.

Ratios are taken within a round, where both ran under the same conditions, and their median counts.
Beside it stands the ratio of the lowest figures of all rounds: what other programs and other
virtual machines do to a run only ever adds to it.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_T = TypeVar("_T")

__all__ = [
    "Program",
    "ProgramError",
    "Ratio",
    "Rival",
    "best",
    "compare",
    "cpu_seconds",
    "environment",
    "in_turn",
    "machine",
    "output_of",
    "render_machine",
    "render_rival",
    "render_seconds",
    "run",
    "say",
    "version_of",
]


# The shorter run tells what starting costs; all else that it does only adds to the noise.
_SHORTER: Final = 8
_NO_BYTECODE: Final = "PYTHONDONTWRITEBYTECODE"


class ProgramError(Exception):
    """A program failed; the message has what it said."""


@dataclass(frozen=True, slots=True)
class Program:
    """Something to measure."""

    name: str
    command: Callable[[int], Sequence[str]]  # from a number of operations
    operations: int  # of the longer run

    @property
    def shorter(self) -> int:
        """Operations of the shorter run."""
        return self.operations // _SHORTER


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the one takes what the other takes."""

    lowest: float  # of all rounds
    median: float
    highest: float
    of_lowest: float  # the one's lowest figure to the other's


@dataclass(frozen=True, slots=True)
class Rival:
    """What rawaio is compared with."""

    name: str
    stands_for_it: str  # its best configuration
    budget: float | None  # of rawaio's figures: at most so many times the rival's
    aim: float | None
    ratios: dict[str, Ratio]  # by the name of rawaio's way


@cache
def environment() -> dict[str, str]:
    """What programs are run with: ours, and a place for bytecode, or each would compile anew."""
    folder = tempfile.TemporaryDirectory(prefix="rawaio-benchmark-")
    atexit.register(folder.cleanup)
    kept = {name: value for name, value in os.environ.items() if name != _NO_BYTECODE}
    return {**kept, "PYTHONPYCACHEPREFIX": folder.name}


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


def cpu_seconds(command: Sequence[str]) -> float:
    """Run a command to its end; user and system time of it and of its children.

    Raises:
        ProgramError: its exit status is not 0.
        OSError: it cannot be started.
    """
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
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode(errors="replace").strip()
            raise ProgramError(f"{' '.join(command)}: status {process.returncode}\n{said}")
        return usage.ru_utime + usage.ru_stime


def per_operation(short_s: Sequence[float], long_s: Sequence[float], more: int) -> list[float]:
    """Seconds for each of the operations that the longer runs did more, by round.

    Raises:
        ProgramError: a longer run took no longer: too few operations to measure anything.
    """
    start = min(short_s)
    if min(long_s) <= start:
        raise ProgramError(f"{more} more operations took no more than {start:.3f} s; measure more")
    return [(seconds - start) / more for seconds in long_s]


def run(
    programs: Sequence[Program],
    rounds: int,
    measure: Callable[[Sequence[str]], float] = cpu_seconds,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, list[float]]:
    """Seconds for each operation, by name and round. Each round begins with another program.

    Raises:
        ProgramError, OSError: a program failed.
    """
    short_s: dict[str, list[float]] = {program.name: [] for program in programs}
    long_s: dict[str, list[float]] = {program.name: [] for program in programs}
    for round_, program in in_turn(programs, rounds):
        say(f"round {round_ + 1} of {rounds}: {program.name}")
        short_s[program.name].append(measure(program.command(program.shorter)))
        long_s[program.name].append(measure(program.command(program.operations)))
    return {
        program.name: per_operation(
            short_s[program.name], long_s[program.name], program.operations - program.shorter
        )
        for program in programs
    }


def in_turn(things: Sequence[_T], rounds: int) -> Iterator[tuple[int, _T]]:
    """Each thing once a round, with the round's number; each round begins with another one."""
    for round_ in range(rounds):
        first = round_ % max(len(things), 1)
        for thing in (*things[first:], *things[:first]):
            yield round_, thing


def compare(one: Sequence[float], other: Sequence[float]) -> Ratio:
    """Ratios of one to the other, round by round.

    Raises:
        ValueError: not the same number of rounds, or none.
    """
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    if not ratios:
        raise ValueError("no rounds")
    return Ratio(
        min(ratios), statistics.median(ratios), max(ratios), of_lowest=min(one) / min(other)
    )


def best(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Of several configurations of one program, the one with the lowest figure in any round."""
    return min(names, key=lambda name: min(seconds[name]))


def machine() -> dict[str, object]:
    """Where the figures come from."""
    return {
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load": os.getloadavg()[0],
        "executable": os.path.basename(sys.executable),
    }


def version_of(package: str, wanted: str) -> str | None:
    """Why an installed package is not the version to compare with; None when it is."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (pip install {package}=={wanted})"
    return None if version == wanted else f"version {version} instead of {wanted}"


# -- what a terminal shows -----------------------------------------------------------------------


def say(text: str) -> None:
    """Tell on a terminal what is going on."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def render_machine(where: Mapping[str, object]) -> str:
    """One line about `machine`."""
    return ", ".join(f"{key} {value}" for key, value in where.items())


def render_seconds(title: str, seconds: Mapping[str, Sequence[float]], width: int) -> list[str]:
    """A table of microseconds: by name the lowest, the median and the highest of all rounds."""
    lines = ["", title, f"{'':{width}}   lowest   median  highest"]
    for name, rounds in seconds.items():
        figures = (min(rounds), statistics.median(rounds), max(rounds))
        lines.append(f"{name:{width}}" + "".join(f"{1e6 * f:9.3f}" for f in figures))
    return lines


def render_rival(rival: Rival, width: int) -> list[str]:
    """A table of ratios to a rival, with what becomes of the budget."""
    title = f"times {rival.stands_for_it}"
    if rival.budget is not None:
        title += f" (at most {rival.budget}, aim {rival.aim})"
    lines = ["", title, f"{'':{width}}   lowest   median  highest  of lowest"]
    for name, ratio in rival.ratios.items():
        times = (ratio.lowest, ratio.median, ratio.highest, ratio.of_lowest)
        text = f"{name:{width}}" + "".join(f"{t:9.2f}" for t in times)
        if rival.budget is not None and rival.aim is not None:
            reached = "aim" if ratio.median <= rival.aim else "within"
            text += "    " + ("OVER" if ratio.median > rival.budget else reached)
        lines.append(text)
    return lines

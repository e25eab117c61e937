"""Figures by group, name and metric, one for each round; and what is made of them.

A name is a program and its way, as in "rawaio/batch/ring". Ratios are taken within a round, where
both ran under the same conditions, and their median counts. Beside it stands the ratio of the best
figures of all rounds: what other programs and other virtual machines do to a run only ever makes
it worse.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "METRICS",
    "Columns",
    "Figures",
    "Metric",
    "Spread",
    "best",
    "compare",
    "matching",
    "metric",
    "program_of",
    "rivals_in",
    "spread",
]

#: By metric, a figure for each round.
Columns = dict[str, list[float]]
#: By group and name.
Figures = dict[str, dict[str, Columns]]


@dataclass(frozen=True, slots=True)
class Metric:
    """What a figure is of."""

    title: str
    digits: int
    higher_is_better: bool = False


METRICS: Final = {
    "cpu_us": Metric("us of processor time for each", 3),
    "wall_us": Metric("us of time for each", 3),
    "iops": Metric("operations a second", 0, higher_is_better=True),
    "mib_s": Metric("MiB a second", 0, higher_is_better=True),
    "p50_us": Metric("us, median latency", 1),
    "p99_us": Metric("us, latency at p99", 1),
    "late_p50_ms": Metric("ms late, median", 2),
    "late_p99_ms": Metric("ms late, p99", 2),
    "late_p999_ms": Metric("ms late, p99.9", 2),
    "late_max_ms": Metric("ms late, at most", 2),
    "ms": Metric("ms", 2),
    "cpu_ms": Metric("ms of processor time", 2),
    "modules": Metric("modules", 0),
    "python_bytes": Metric("bytes of Python's for each", 0),
    "resident_bytes": Metric("bytes of resident memory for each", 0),
    "calls": Metric("system calls for each", 3),
}


def metric(name: str) -> Metric:
    """What a metric is; one that is not in the table is a system call."""
    return METRICS.get(name) or Metric(f"{name} for each", 3)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure, or what it is beside another, over all rounds."""

    lowest: float
    median: float
    highest: float
    of_best: float  # from the best figures of all rounds


def spread(rounds: Sequence[float], *, higher_is_better: bool = False) -> Spread:
    """The spread of the rounds.

    Raises:
        ValueError: there are none.
    """
    if not rounds:
        raise ValueError("no rounds")
    the_best = max(rounds) if higher_is_better else min(rounds)
    return Spread(min(rounds), statistics.median(rounds), max(rounds), the_best)


def compare(
    one: Sequence[float],
    other: Sequence[float],
    *,
    higher_is_better: bool = False,
    difference: bool = False,
) -> Spread:
    """Ratios of one to the other, or differences, round by round.

    Raises:
        ValueError: not the same number of rounds, or none.
    """

    def beside(a: float, b: float) -> float:
        return a - b if difference else a / b

    rounds = [beside(a, b) for a, b in zip(one, other, strict=True)]
    each = spread(rounds)
    the_best = max if higher_is_better else min
    return Spread(each.lowest, each.median, each.highest, beside(the_best(one), the_best(other)))


def best(group: Mapping[str, Columns], names: Iterable[str], of: str) -> str | None:
    """Of several ways the one with the best median of a metric; None when none has it."""
    medians = {name: statistics.median(group[name][of]) for name in names if of in group[name]}
    if not medians:
        return None
    choose = max if metric(of).higher_is_better else min
    return choose(medians, key=lambda name: medians[name])


def matching(group: Mapping[str, Columns], patterns: Iterable[str]) -> list[str]:
    """The names that one of the patterns is for; "*" stands for anything."""
    wanted = list(patterns)
    return [name for name in group if any(fnmatchcase(name, pattern) for pattern in wanted)]


def program_of(name: str) -> str:
    """The program, without the way."""
    return name.partition("/")[0]


def rivals_in(group: Mapping[str, Columns], of: str) -> dict[str, str]:
    """By program that is not rawaio, the way of it that stands for it: its best."""
    programs = dict.fromkeys(program_of(name) for name in group)
    chosen = {
        program: best(group, matching(group, [f"{program}/*"]), of)
        for program in programs
        if program != "rawaio"
    }
    return {program: name for program, name in chosen.items() if name is not None}

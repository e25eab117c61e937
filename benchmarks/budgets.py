"""What is to be reached, of docs/design.md, and what becomes of it.

The median of the rounds is judged, as it is shown: to two digits behind the point, so that what is
no more than the last of them is no excess, and "lower" is 0.99 times. Of several ways
of rawaio's the best counts for a row, and is named in it; other ways stand below it without a
verdict. What rawaio is measured by is the best way of a rival.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from benchmarks.figures import Spread, best, compare, matching, metric, spread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.figures import Columns
    from benchmarks.harness import Outcome

__all__ = ["BUDGETS", "Beside", "Budget", "Row", "Side", "judge", "rows"]


@dataclass(frozen=True, slots=True)
class Side:
    """Ways of one group; "*" stands for anything."""

    group: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """A row of the table."""

    row: str
    section: str
    metric: str
    ours: Side
    theirs: Side | None  # None: the figure itself is judged
    budget: float
    aim: float | None
    unit: Literal["x", "ms", "modules"] = "x"  # "x" is a ratio
    beside: tuple[str, ...] = ()  # ways of rawaio that are told without a verdict

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return metric(self.metric).higher_is_better


_NULL_SINGLE: Final = ("rawaio/batch/*", "rawaio/plugged/*", "rawaio/window/*")
_NULL_BESIDE: Final = ("rawaio/batch+offset/ring", "rawaio/plugged+offset/ring")
_BULK_BESIDE: Final = ("rawaio/bulk, lengths/ring", "rawaio/bulk, buffers/ring")
_FIO: Final = ("fio libaio/*",)
_DIRECT: Final = ("rawaio/*",)
_LOOP_DEPTH: Final = 128  # what File.pread_many has
_PLAIN: Final = ("rawaio/IOContext", "rawaio/File.pread")


def _null(row: str, names: tuple[str, ...], budget: float, aim: float) -> Budget:
    return Budget(
        row,
        "null",
        "cpu_us",
        Side("read 512", names),
        Side("read 512", _FIO),
        budget,
        aim,
        beside=_NULL_BESIDE if names == _NULL_SINGLE else _BULK_BESIDE,
    )


def _iops(depth: int, budget: float, aim: float) -> Budget:
    group = f"depth {depth}"
    return Budget(
        f"direct 4 KiB random reads, IOPS against fio: depth {depth}",
        "direct",
        "iops",
        Side(group, _DIRECT),
        Side(group, _FIO),
        budget,
        aim,
        beside=(*_PLAIN, "rawaio/File.pread_many") if depth == _LOOP_DEPTH else _PLAIN,
    )


def _growth(what: str, name: str) -> Budget:
    return Budget(
        f"{what}, processor time, depth 1024 against 32",
        "growth",
        "cpu_us",
        Side("depth 1024", (name,)),
        Side("depth 32", (name,)),
        1.0,
        0.99,  # lower, in what is shown
    )


def _heartbeat(row: str, group: str) -> Budget:
    return Budget(
        f"heartbeat of 1 ms beside {row}, p99.9",
        "heartbeat",
        "late_p999_ms",
        Side(group, ("rawaio/*",)),
        None,
        20.0,
        None,
        unit="ms",
    )


BUDGETS: Final = (
    _null("bulk, null work, against fio's libaio engine", ("rawaio/bulk/*",), 1.1, 1.0),
    _null("one reused Request at a time, null work, against fio", _NULL_SINGLE, 2.5, 2.0),
    Budget(
        "the same against python-libaio with reused blocks",
        "null",
        "cpu_us",
        Side("read 512", _NULL_SINGLE),
        Side("read 512", ("python-libaio/*",)),
        0.5,
        0.33,
        beside=_NULL_BESIDE,
    ),
    Budget(
        "asyncio pread, cached 4 KiB, 32 tasks, against caio's best mode",
        "asyncio",
        "cpu_us",
        Side("cached", ("rawaio/pread",)),
        Side("cached", ("caio/*",)),
        0.4,
        0.25,
        beside=("rawaio/preadinto",),
    ),
    Budget(
        "asyncio pread_many, the same work, against the same",
        "asyncio",
        "cpu_us",
        Side("cached", ("rawaio/pread_many*",)),
        Side("cached", ("caio/*",)),
        0.25,
        0.2,
        beside=("rawaio/pread_many*",),
    ),
    Budget(
        "asyncio pread, direct 4 KiB, 32 tasks, against a thread pool of os.preadv",
        "asyncio",
        "cpu_us",
        Side("direct", ("rawaio/pread",)),
        Side("direct", ("executor/*",)),
        0.25,
        0.15,
        beside=("rawaio/preadinto", "rawaio/pread_many*"),
    ),
    _iops(32, 0.95, 1.0),
    _iops(128, 0.95, 1.0),
    _iops(1, 0.85, 0.95),
    _iops(8, 0.85, 0.95),
    Budget(
        "the same, bulk, processor time against fio: depth 32",
        "direct",
        "cpu_us",
        Side("depth 32", ("rawaio/IOContext, bulk*",)),
        Side("depth 32", _FIO),
        1.0,
        0.7,
        beside=_PLAIN,
    ),
    Budget(
        "direct 1 MiB sequential, bandwidth against fio: depth 4",
        "sequential",
        "mib_s",
        Side("depth 4", ("rawaio/*",)),
        Side("depth 4", _FIO),
        0.97,
        0.99,
        beside=("rawaio/IOContext", "rawaio/File.*"),
    ),
    _growth("single requests, null work", "rawaio/IOContext"),
    _growth("bulk, null work", "rawaio/IOContext, bulk"),
    Budget(
        "`import rawaio`, more than `python -S -c pass`",
        "startup",
        "ms",
        Side("startup", ("rawaio/import",)),
        Side("startup", ("python/*",)),
        15.0,
        10.0,
        unit="ms",
    ),
    Budget(
        "modules of asyncio that it imports",
        "startup",
        "modules",
        Side("asyncio's modules", ("rawaio/import",)),
        None,
        0.0,
        0.0,
        unit="modules",
    ),
    _heartbeat("a cold buffered read", "cold"),
    _heartbeat("direct writes that extend", "extend"),
    _heartbeat("64 direct reads at once", "queued"),
)


@dataclass(frozen=True, slots=True)
class Beside:
    """What a way reaches, without a verdict."""

    name: str
    reached: Spread


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a budget."""

    row: str
    unit: str
    at_least: bool
    budget: float
    aim: float | None
    verdict: str
    reached: Spread | None = None  # None: it could not be measured
    ours: str | None = None
    theirs: str | None = None
    beside: list[Beside] = field(default_factory=list[Beside])


def judge(budget: Budget, median: float) -> str:
    """What becomes of a budget, of what was reached."""
    reached = round(median, 2)
    behind = budget.budget - reached if budget.at_least else reached - budget.budget
    if behind > 0:
        if budget.unit == "x":
            return f"BEHIND by {100 * behind / budget.budget:.0f} %"
        return f"BEHIND by {behind:.2f} {budget.unit}"
    if budget.aim is None:
        return "within"
    there = reached >= budget.aim if budget.at_least else reached <= budget.aim
    return "aim" if there else "within"


def _reached(
    budget: Budget, ours: Mapping[str, Columns], name: str, theirs: list[float] | None
) -> Spread:
    rounds = ours[name][budget.metric]
    if theirs is None:
        return spread(rounds, higher_is_better=budget.at_least)
    return compare(rounds, theirs, higher_is_better=budget.at_least, difference=budget.unit != "x")


def _why_not(side: Side, section: str, outcomes: Mapping[str, Outcome]) -> str:
    """Why there is nothing of a side."""
    if section not in outcomes:
        return f"not measured: the section {section} was not run"
    program = side.names[0].partition("/")[0]
    reasons = [reason for reason in outcomes[section].missing if program.split()[0] in reason]
    return f"not measured: {'; '.join(reasons) or f'no figures of {program}, {side.group}'}"


def row_of(budget: Budget, outcomes: Mapping[str, Outcome]) -> Row:
    """What became of one of them."""

    def row(verdict: str) -> Row:
        return Row(budget.row, budget.unit, budget.at_least, budget.budget, budget.aim, verdict)

    figures = outcomes[budget.section].figures if budget.section in outcomes else {}
    ours = figures.get(budget.ours.group, {})
    name = best(ours, matching(ours, budget.ours.names), budget.metric)
    if name is None:
        return row(_why_not(budget.ours, budget.section, outcomes))
    rounds: list[float] | None = None
    rival: str | None = None
    if budget.theirs is not None:
        theirs = figures.get(budget.theirs.group, {})
        rival = best(theirs, matching(theirs, budget.theirs.names), budget.metric)
        if rival is None:
            return row(_why_not(budget.theirs, budget.section, outcomes))
        rounds = theirs[rival][budget.metric]
        if budget.theirs.group != budget.ours.group:
            rival = f"{rival}, {budget.theirs.group}"
    reached = _reached(budget, ours, name, rounds)
    others = [other for other in matching(ours, budget.beside) if other != name]
    return Row(
        budget.row,
        budget.unit,
        budget.at_least,
        budget.budget,
        budget.aim,
        judge(budget, reached.median),
        reached,
        name,
        rival,
        [Beside(other, _reached(budget, ours, other, rounds)) for other in others],
    )


def rows(outcomes: Mapping[str, Outcome]) -> list[Row]:
    """The table."""
    return [row_of(budget, outcomes) for budget in BUDGETS]

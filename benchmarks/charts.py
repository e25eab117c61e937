"""Charts of what was measured, as SVG: cost by engine, depth, growth, heartbeat.

A point is the median of the rounds, and a bar beside it reaches from the lowest to the highest.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from benchmarks.figures import METRICS, best, matching, program_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.figures import Columns, Figures

__all__ = ["CHARTS", "DEPTH_LINES", "GROWTH_LINES", "draw", "why_not"]

_RAWAIO: Final = "#1f6f8b"
_OTHERS: Final = "#b8b8b8"
_LINES: Final = ("#1f6f8b", "#e07a1f", "#3a923a", "#b23b3b", "#7d5ba6", "#6b6b6b", "#c2a400")
_MARKS: Final = "os^Dv<>"
#: What is drawn of direct reads; of a pattern, the best way at each depth.
DEPTH_LINES: Final = (
    "rawaio/IOContext",
    "rawaio/IOContext, bulk*",
    "rawaio/File.pread",
    "rawaio/File.pread_many",
    "fio libaio/*",
    "fio io_uring/*",
    "threads/*",
)
#: By what there are more and more of: a title, and what is drawn.
GROWTH_LINES: Final = {
    "depth": ("no work: 512 bytes of /dev/zero", ["rawaio/IOContext", "rawaio/IOContext, bulk"]),
    "files": ("File.pread, 4 KiB, 32 tasks", ["rawaio/cached", "rawaio/direct"]),
    "tasks": ("File.pread, 4 KiB, one file", ["rawaio/cached", "rawaio/direct"]),
}
# Beyond the least and the most that is shown, this part of it.
_MARGIN: Final = 1.25
# From here on, numbers are written with commas between thousands.
_WHOLE: Final = 1000
# How late a heartbeat may be.
_LATE_MS: Final = 20.0


def why_not() -> str | None:
    """Why nothing can be drawn; None when it can."""
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install matplotlib)"
    return None


# -- pieces --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Points:
    """Medians, and how far below and above them the rounds reach."""

    medians: list[float]
    below: list[float]
    above: list[float]


def points(columns: Iterable[Sequence[float]]) -> Points:
    """Of each of them."""
    rounds = list(columns)
    medians = [statistics.median(each) for each in rounds]
    below = [median - min(each) for median, each in zip(medians, rounds, strict=True)]
    above = [max(each) - median for median, each in zip(medians, rounds, strict=True)]
    return Points(medians, below, above)


def of_metric(group: Mapping[str, Columns], metric: str) -> dict[str, list[float]]:
    """By name, the rounds of a metric, where there are any."""
    return {name: columns[metric] for name, columns in group.items() if metric in columns}


def ticks(lowest: float, highest: float) -> tuple[list[float], list[str]]:
    """1, 2, 5, 10, ... within what is shown, and how they are written."""
    exponents = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    every = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    shown = [tick for tick in every if lowest <= tick <= highest]
    return shown, [f"{tick:g}" if tick < _WHOLE else f"{tick:,.0f}" for tick in shown]


def range_of(rounds: Iterable[Sequence[float]]) -> tuple[float, float]:
    """A range on a logarithmic axis in which all have their place.

    Raises:
        ValueError: there are none.
    """
    values = [value for each in rounds for value in each]
    return min(values) / _MARGIN, max(values) * _MARGIN


def bars(axes: Axes, rounds: Mapping[str, Sequence[float]], title: str, label: str) -> None:
    """A bar for each name, the least at the top."""
    names = sorted(rounds, key=lambda name: statistics.median(rounds[name]), reverse=True)
    each = points(rounds[name] for name in names)
    colors = [_RAWAIO if program_of(name) == "rawaio" else _OTHERS for name in names]
    axes.barh(names, each.medians, xerr=[each.below, each.above], color=colors, capsize=2)
    lowest, highest = range_of(rounds.values())
    axes.set_xscale("log")
    axes.set_xlim(lowest, highest * _MARGIN)  # room for what is written beside the bars
    for place, (median, above) in enumerate(zip(each.medians, each.above, strict=True)):
        axes.text(median + above, place, f"  {median:.3g}", ha="left", va="center", fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_xticks(*ticks(lowest, highest))
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(axis="x", which="both", alpha=0.25)


def lines(
    axes: Axes, series: Mapping[str, Mapping[int, Sequence[float]]], labels: tuple[str, str]
) -> None:
    """A line for each name that has any, over the numbers; a name has its colour by its place."""
    for i, (name, by_number) in enumerate(series.items()):
        if not by_number:
            continue
        each = points(by_number.values())
        axes.errorbar(
            list(by_number),
            each.medians,
            yerr=[each.below, each.above],
            label=name,
            color=_LINES[i % len(_LINES)],
            marker=_MARKS[i % len(_MARKS)],
            capsize=2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    numbers = sorted({number for by_number in series.values() for number in by_number})
    axes.set_xticks([], minor=True)
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    bounds = range_of(rounds for by_number in series.values() for rounds in by_number.values())
    axes.set_ylim(*bounds)
    axes.set_yticks([], minor=True)
    axes.set_yticks(*ticks(*bounds))
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)


def by_number(
    figures: Figures, prefix: str, metric: str, names: Sequence[str]
) -> dict[str, dict[int, list[float]]]:
    """Of groups such as "depth 8", by name and number, the rounds of a metric.

    A name may be a pattern: then the best of those that it is for, at each number. Empty when there
    is nothing of any of them.
    """
    found: dict[str, dict[int, list[float]]] = {
        name.replace("/*", ", best way"): {} for name in names
    }
    for group, ways in figures.items():
        words, _, number = group.rpartition(" ")
        if words != prefix:
            continue
        for name, by_label in zip(names, found.values(), strict=True):
            if (chosen := best(ways, matching(ways, [name]), metric)) is not None:
                by_label[int(number)] = ways[chosen][metric]
    return found if any(found.values()) else {}


def side_by_side(figure: Figure, n: int, width: float, height: float) -> list[Axes]:
    """So many axes in a row."""
    figure.set_size_inches(width * n, height)
    return list(figure.subplots(1, n, squeeze=False)[0])


# -- charts --------------------------------------------------------------------------------------


def cost(sections: Mapping[str, Figures], figure: Figure) -> bool:
    """Processor time of an operation, by engine."""
    wanted = {
        "no work: 512 bytes of /dev/zero, depth 32": ("null", "read 512"),
        "asyncio, cached 4 KiB, 32 tasks": ("asyncio", "cached"),
        "asyncio, direct 4 KiB, 32 tasks": ("asyncio", "direct"),
    }
    panels = {
        title: of_metric(sections.get(section, {}).get(group, {}), "cpu_us")
        for title, (section, group) in wanted.items()
    }
    panels = {title: rounds for title, rounds in panels.items() if rounds}
    if not panels:
        return False
    label = "us of processor time for each operation"
    row = side_by_side(figure, len(panels), 6.5, 4.5)
    for axes, (title, rounds) in zip(row, panels.items(), strict=True):
        bars(axes, rounds, title, label)
    return True


def depth(sections: Mapping[str, Figures], figure: Figure) -> bool:
    """IOPS and latency of direct reads, by depth."""
    figures = sections.get("direct", {})
    panels = {
        "direct 4 KiB random reads": ("depth", "iops", "operations a second"),
        "their latency": ("latency, depth", "p99_us", "us, latency at p99"),
    }
    series = {
        title: (by_number(figures, prefix, metric, DEPTH_LINES), label)
        for title, (prefix, metric, label) in panels.items()
    }
    series = {title: each for title, each in series.items() if each[0]}
    if not series:
        return False
    row = side_by_side(figure, len(series), 6.5, 5)
    for axes, (title, (each, label)) in zip(row, series.items(), strict=True):
        lines(axes, each, ("depth", label))
        axes.set_title(title)
    return True


def growth(sections: Mapping[str, Figures], figure: Figure) -> bool:
    """Processor time of an operation, where there are many."""
    figures = sections.get("growth", {})
    series = {
        what: (title, by_number(figures, what, "cpu_us", names))
        for what, (title, names) in GROWTH_LINES.items()
    }
    series = {what: each for what, each in series.items() if each[1]}
    if not series:
        return False
    row = side_by_side(figure, len(series), 5, 4.5)
    for axes, (what, (title, each)) in zip(row, series.items(), strict=True):
        lines(axes, each, (what, "us of processor time for each operation"))
        axes.set_title(title)
    return True


def heartbeat(sections: Mapping[str, Figures], figure: Figure) -> bool:
    """How late a heartbeat is."""
    late = {
        f"{group}: {name}": columns
        for group, names in sections.get("heartbeat", {}).items()
        for name, columns in names.items()
    }
    if not late:
        return False
    (axes,) = side_by_side(figure, 1, 8, 0.6 * len(late) + 1.5)
    shown = ("late_p50_ms", "late_p99_ms", "late_p999_ms")
    height = 0.8 / len(shown)
    places = [float(-i) for i in range(len(late))]
    for i, metric in enumerate(shown):
        each = points(columns[metric] for columns in late.values())
        axes.barh(
            [place - i * height for place in places],
            each.medians,
            height=height,
            xerr=[each.below, each.above],
            label=METRICS[metric].title,
            color=_LINES[i],
            capsize=2,
        )
    axes.axvline(_LATE_MS, color="black", linestyle="--", label=f"{_LATE_MS:g} ms")
    axes.set_yticks([place - height for place in places], list(late))
    bounds = range_of(columns[metric] for columns in late.values() for metric in shown)
    axes.set_xscale("log")
    axes.set_xlim(*bounds)
    axes.set_xticks([], minor=True)
    axes.set_xticks(*ticks(*bounds))
    axes.set_xlabel("ms by which a heartbeat of 1 ms is late")
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.legend(fontsize=8)
    return True


#: By the name of the file: draws, when there are figures for it.
CHARTS: Final[dict[str, Callable[[Mapping[str, Figures], Figure], bool]]] = {
    "cost.svg": cost,
    "depth.svg": depth,
    "growth.svg": growth,
    "heartbeat.svg": heartbeat,
}


def draw(sections: Mapping[str, Figures], folder: Path) -> list[Path]:
    """Draw what there are figures for; the files.

    Raises:
        OSError: a file cannot be written.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    for name, chart in CHARTS.items():
        figure = Figure(layout="constrained")
        if chart(sections, figure):
            path = folder / name
            figure.savefig(path)
            drawn.append(path)
    return drawn

"""What a terminal shows."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from benchmarks.figures import compare, matching, metric, program_of, rivals_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.budgets import Row
    from benchmarks.figures import Columns, Figures, Spread

__all__ = ["render_budgets", "render_group", "render_machine", "render_section", "table"]

# What a rival is compared by.
_COMPARED = ("iops", "mib_s", "cpu_us", "p99_us", "late_p999_ms")


def table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Columns side by side; those named begin at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def render_machine(where: Mapping[str, str]) -> str:
    """One line about the machine."""
    return ", ".join(f"{key} {value}" for key, value in where.items())


def in_round_brackets(median: str, lowest: str, highest: str) -> str:
    """A median, and where the rounds were."""
    return f"{median} ({lowest}..{highest})"


def figure(rounds: Sequence[float], digits: int) -> str:
    """A figure with its rounds."""
    median, lowest, highest = (f"{of(rounds):.{digits}f}" for of in (statistics.median, min, max))
    return median if len(rounds) == 1 else in_round_brackets(median, lowest, highest)


def ratio(each: Spread) -> str:
    """A ratio with its rounds."""
    return in_round_brackets(*(f"{x:.2f}" for x in (each.median, each.lowest, each.highest)))


def metrics_of(group: Mapping[str, Columns]) -> list[str]:
    """All metrics that there are in a group."""
    return list(dict.fromkeys(name for columns in group.values() for name in columns))


def render_group(group: Mapping[str, Columns]) -> list[str]:
    """Figures: a line for each name, a column for each metric."""
    metrics = metrics_of(group)
    lines = [["", *(metric(each).title for each in metrics)]]
    for name, columns in group.items():
        lines.append(
            [name]
            + [
                figure(columns[each], metric(each).digits) if each in columns else ""
                for each in metrics
            ]
        )
    return table(lines)


def render_rivals(group: Mapping[str, Columns]) -> list[str]:
    """Ratios of each of rawaio's ways to the best of each rival's, by metric."""
    lines: list[str] = []
    for each in metrics_of(group):
        chosen = rivals_in(group, each) if each in _COMPARED else {}
        ours = [name for name in matching(group, ["rawaio/*"]) if each in group[name]]
        if not chosen or not ours:
            continue
        rows = [[f"{metric(each).title}, times", *chosen.values()]]
        rows += [
            [name]
            + [ratio(compare(group[name][each], group[rival][each])) for rival in chosen.values()]
            for name in ours
        ]
        lines += ["", *table(rows)]
    return lines


def render_section(name: str, title: str, figures: Figures) -> str:
    """All that a section found."""
    lines = ["", f"== {name}: {title}"]
    # Groups in which rawaio stands alone, by their metrics: one table for all of them.
    alone: dict[tuple[str, ...], dict[str, Columns]] = {}
    for group, names in figures.items():
        if all(program_of(each) == "rawaio" for each in names):
            rows = alone.setdefault(tuple(metrics_of(names)), {})
            rows.update({f"{group}, {each}": columns for each, columns in names.items()})
        else:
            lines += ["", f"-- {group}", *render_group(names), *render_rivals(names)]
    for rows in alone.values():
        lines += ["", *render_group(rows)]
    return "\n".join(lines)


def limit(value: float | None) -> str:
    """A budget or an aim."""
    return "" if value is None else f"{value:g}"


def render_budgets(rows: Sequence[Row]) -> str:
    """The table of budgets."""
    lines = [["budget", "reached (lowest..highest)", "best to best", "budget", "aim", "verdict"]]
    for row in rows:
        bound = f"{'>=' if row.at_least else '<='} {limit(row.budget)}"
        if row.reached is None:
            lines.append([row.row, "", "", bound, limit(row.aim), row.verdict])
            continue
        unit = f" {row.unit}"
        lines.append(
            [
                row.row,
                ratio(row.reached) + unit,
                f"{row.reached.of_best:.2f}",
                bound,
                limit(row.aim),
                row.verdict,
            ]
        )
        if row.theirs is not None:
            lines.append([f"    {row.ours} to {row.theirs}", "", "", "", "", ""])
        lines += [
            [
                f"    {each.name}",
                ratio(each.reached) + unit,
                f"{each.reached.of_best:.2f}",
                "",
                "",
                "",
            ]
            for each in row.beside
        ]
    return "\n".join(table(lines, left=(0, 5)))

"""Figures beside those of an earlier report."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from benchmarks.figures import metric
from benchmarks.render import table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.harness import Outcome
    from benchmarks.report import Earlier

__all__ = ["render_comparison", "render_differences"]

# These differ each time.
_ALWAYS: Final = ("began", "load")


def render_differences(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """What is different about the machine, or about how it was measured."""
    return [
        f"differs: {key} was {then.get(key, 'not told')}, is {now.get(key, 'not told')}"
        for key in dict.fromkeys([*then, *now])
        if key not in _ALWAYS and now.get(key) != then.get(key)
    ]


def beside(now: list[float] | None, then: list[float] | None, digits: int) -> list[str]:
    """Two medians and their ratio; nothing for what there was not."""
    medians = [statistics.median(rounds) if rounds else None for rounds in (then, now)]
    shown = ["" if each is None else f"{each:.{digits}f}" for each in medians]
    before, after = medians
    times = f"{after / before:.2f}" if before and after is not None else ""
    return [*shown, times]


def render_comparison(
    where: Mapping[str, str], outcomes: Mapping[str, Outcome], earlier: Earlier
) -> str:
    """Each figure of both: what it was, what it is, and how many times that."""
    lines = ["", "== beside the earlier report, medians"]
    lines += render_differences(where, earlier.where)
    for section, outcome in outcomes.items():
        old = earlier.outcomes.get(section)
        if old is None:
            lines.append(f"the earlier report has nothing of {section}")
            continue
        for group in dict.fromkeys([*old.figures, *outcome.figures]):
            before, after = old.figures.get(group, {}), outcome.figures.get(group, {})
            rows = [["", "was", "is", "times"]]
            for name in dict.fromkeys([*before, *after]):
                then, now = before.get(name, {}), after.get(name, {})
                rows += [
                    [
                        f"{name}: {metric(each).title}",
                        *beside(now.get(each), then.get(each), metric(each).digits),
                    ]
                    for each in dict.fromkeys([*then, *now])
                ]
            lines += ["", f"-- {section}, {group}", *table(rows)]
    return "\n".join(lines)

"""What is written as JSON, and read again to be compared with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from benchmarks.budgets import Row

__all__ = ["Earlier", "load", "save"]


@dataclass(frozen=True, slots=True)
class Earlier:
    """What an earlier report has to be compared with."""

    where: dict[str, str]
    outcomes: dict[str, Outcome]


def save(
    path: Path,
    where: Mapping[str, str],
    outcomes: Mapping[str, Outcome],
    rows: list[Row],
    took_s: Mapping[str, float],
) -> None:
    """Write everything."""
    report = {
        "where": dict(where),
        "took_s": dict(took_s),
        "sections": {name: asdict(outcome) for name, outcome in outcomes.items()},
        "budgets": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def load(path: Path) -> Earlier:
    """Read what `save` has written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    report: Any = json.loads(path.read_text("utf-8"))
    try:
        outcomes = {name: Outcome(**section) for name, section in report["sections"].items()}
        return Earlier(report["where"], outcomes)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a report of the benchmarks: {error!r}") from None

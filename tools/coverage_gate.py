"""Fail when less of the package is covered than was agreed.

    coverage json && python tools/coverage_gate.py coverage.json

Reads coverage.py's JSON report, measured with branches, and prints a row for each module of
the package: lines and branches together, as coverage.py counts them. The modules without any
input or output of their own need all of it; each of the others needs 95 %. Exit status 1 when
one has less, and when one of the first kind is not in the report at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "rawaio"
PURE = ("lifecycle.py", "polling.py", "queue.py", "request.py", "ring.py", "slab.py")
NEEDED_PURE = 100.0
NEEDED = 95.0


class Module(NamedTuple):
    """How much of a module is covered, and where it is not."""

    path: str
    covered: int
    total: int
    needed: float
    gaps: str

    @property
    def percent(self) -> float:
        """Of lines and branches together; an empty module is covered."""
        return 100 * self.covered / self.total if self.total else 100.0

    @property
    def enough(self) -> bool:
        """Whether it may stay so. Not rounded: 99.96 % is not 100 %."""
        return self.percent >= self.needed


def gaps(file: dict[str, Any]) -> str:
    """The lines never run, and the branches `from->to` never taken between lines that ran."""
    missing: set[int] = set(file["missing_lines"])
    executed: list[int] = file["executed_lines"]
    runs: list[list[int]] = []
    previous_missing = False
    for line in sorted(missing.union(executed)):
        if line in missing:
            if previous_missing:
                runs[-1][1] = line
            else:
                runs.append([line, line])
        previous_missing = line in missing
    lines = [f"{first}-{last}" if first < last else f"{first}" for first, last in runs]
    branches = [
        f"{start}->{end if end > 0 else 'exit'}"
        for start, end in file["missing_branches"]
        if missing.isdisjoint((start, end))
    ]
    return ", ".join(lines + branches)


def modules(report: dict[str, Any]) -> list[Module]:
    """The package's modules, by path.

    Raises:
        ValueError: the report has no branches, or lacks one of the pure modules.
    """
    if not report["meta"]["branch_coverage"]:
        raise ValueError("the report was measured without branches")
    pure = {f"{PACKAGE}/{name}" for name in PURE}
    found: list[Module] = []
    for path, file in sorted(report["files"].items()):
        if path.startswith(f"{PACKAGE}/"):
            summary = file["summary"]
            found.append(
                Module(
                    path,
                    summary["covered_lines"] + summary["covered_branches"],
                    summary["num_statements"] + summary["num_branches"],
                    NEEDED_PURE if path in pure else NEEDED,
                    gaps(file),
                )
            )
    if absent := pure.difference(module.path for module in found):
        raise ValueError(f"not in the report: {', '.join(sorted(absent))}")
    return found


def main(arguments: list[str]) -> int:
    """Print the table; return the exit status."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = modules(json.loads(Path(arguments[0]).read_text("utf-8")))
    except (OSError, ValueError) as error:
        print(f"coverage gate: {error}")
        return 1

    print(f"{'covered':>9} {'needed':>7}  module")
    for module in found:
        # Cut, not rounded: what falls short must not look as if it did not.
        percent = int(module.percent * 100) / 100
        print(f"{percent:>8.2f}% {module.needed:>6.0f}%  {module.path}", end="")
        print("" if module.enough else f"  TOO LOW: {module.gaps}")
    short = [module.path for module in found if not module.enough]
    if short:
        print(f"coverage gate: too low: {', '.join(short)}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

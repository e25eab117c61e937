"""Measure what rawaio costs, beside others, and say what becomes of the budgets.

Everything runs in turn, in processes of its own, on files that are made in the folder and removed.
A tmpfs has no O_DIRECT, or no disk. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import budgets, comparison, files, machine, render, report, rivals
from benchmarks.harness import Outcome, ProgramError, Setting

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SECTIONS", "main"]

#: By name, the module of `benchmarks.sections`.
SECTIONS: Final = {
    "null": "null",
    "asyncio": "asyncio_reads",
    "direct": "direct",
    "sequential": "sequential",
    "writes": "writes",
    "growth": "growth",
    "startup": "startup",
    "heartbeat": "heartbeat",
    "system-calls": "system_calls",
    "threads": "threads",
}


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    found = argparse.ArgumentParser(
        prog="python3 -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    found.add_argument(
        "--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS)
    )
    found.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    found.add_argument("--compare", type=Path, metavar="FILE", help="a report to stand beside")
    found.add_argument("--charts", type=Path, metavar="FOLDER", help="draw what was measured")
    found.add_argument(
        "--folder", type=Path, default=Path(), metavar="F", help="where files are made"
    )
    found.add_argument("--loop", choices=files.LOOPS, default="asyncio", help="the event loop")
    return found


class Progress:
    """Tells on a terminal what is going on, in one line."""

    def __init__(self) -> None:
        self.section = ""
        self._shown = sys.stderr.isatty()

    def say(self, text: str) -> None:
        """Tell what is going on in this section."""
        if self._shown:
            print(f"\r\x1b[K{self.section}: {text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave the line to others."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def measure(
    names: Sequence[str], setting: Setting, progress: Progress
) -> tuple[dict[str, Outcome], dict[str, float]]:
    """Run sections and show what they found; that, and how long each took."""
    outcomes: dict[str, Outcome] = {}
    took_s: dict[str, float] = {}
    for name in names:
        progress.section = name
        module = import_module(f"benchmarks.sections.{SECTIONS[name]}")
        began = time.perf_counter()
        try:
            outcome: Outcome = module.section(setting)
        except (ProgramError, OSError, ValueError) as error:
            outcome = Outcome(missing=[f"all of it: {error}"], failed=True)
        took_s[name] = time.perf_counter() - began
        outcomes[name] = outcome
        progress.clear()
        title = (module.__doc__ or "").partition("\n")[0]
        print(render.render_section(name, title, outcome.figures), flush=True)
    return outcomes, took_s


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when something of rawaio's failed."""
    usage = parser()
    arguments = usage.parse_args(argv)
    # Before anything is measured, what would be found out too late.
    for folder in (arguments.folder, arguments.json.parent if arguments.json else Path()):
        if not folder.is_dir():
            usage.error(f"{folder}: no such folder")
    if arguments.charts:
        from benchmarks import charts

        if (reason := charts.why_not()) is not None:
            usage.error(f"--charts: {reason}")
    if arguments.loop == "uvloop" and (reason := rivals.why_not("uvloop")) is not None:
        usage.error(f"--loop uvloop: {reason}")
    try:
        earlier = report.load(arguments.compare) if arguments.compare else None
    except (OSError, ValueError) as error:
        usage.error(f"--compare: {error}")
    progress = Progress()
    setting = Setting(arguments.folder, arguments.quick, arguments.loop, progress.say)
    where = machine.describe(setting)
    print(render.render_machine(where))
    outcomes, took_s = measure(arguments.only or list(SECTIONS), setting, progress)
    rows = budgets.rows(outcomes)
    if arguments.json:
        report.save(arguments.json, where, outcomes, rows, took_s)
    if arguments.charts:
        from benchmarks import charts

        charts.draw({name: each.figures for name, each in outcomes.items()}, arguments.charts)
    if earlier is not None:
        print(comparison.render_comparison(where, outcomes, earlier))
    print(f"\n== what became of the budgets\n\n{render.render_budgets(rows)}\n")
    print("took: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took_s.items()))
    for name, outcome in outcomes.items():
        for reason in outcome.missing:
            print(f"missing: {name}, {reason}")
    return int(any(outcome.failed for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

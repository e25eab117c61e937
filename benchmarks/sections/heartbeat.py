"""How late a heartbeat of 1 ms is while files are read and written in the same event loop.

Of fewer than a thousand beats, as in quick runs, the latest one is the 99.9th percentile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks import files, rivals
from benchmarks.figures import program_of
from benchmarks.harness import Cell, Outcome, by_report, measure, own
from benchmarks.programs import heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.harness import Setting, Turn

__all__ = ["section"]

_QUICK: Final = heartbeat.Size(read=128 << 20, written=64 << 20, seconds=1.0)
_FULL: Final = heartbeat.Size(read=1 << 30, written=256 << 20, seconds=2.0)


def cell(group: str, name: str, path: Path, size: heartbeat.Size, loop: str) -> Cell:
    """One way, on a file that is not in the page cache, or on a new one."""
    target = path.with_name("written") if group == "extend" else path
    command = own(
        "heartbeat",
        group=group,
        name=name,
        path=str(target),
        loop=loop,
        read=size.read,
        written=size.written,
        seconds=size.seconds,
    )
    beat: Callable[[], Turn] = by_report(group, name, command).turn

    def turn() -> Turn:
        files.drop_cache(path)
        try:
            return beat()
        finally:
            path.with_name("written").unlink(missing_ok=True)

    return Cell(group, name, turn)


def section(setting: Setting) -> Outcome:
    """Measure."""
    outcome = Outcome(missing=rivals.missing("caio"))
    size = setting.pick(_QUICK, _FULL)
    with files.temporary_file(setting.folder, size.read) as path:
        files.drop_cache(path)
        files.warm(path, direct=True)
        cells = [
            cell(group, name, path, size, setting.loop)
            for group, names in heartbeat.WAYS.items()
            for name in names
            if rivals.why_not(program_of(name)) is None
        ]
        outcome.add(measure(cells, setting.pick(2, 5), setting.say))
    return outcome

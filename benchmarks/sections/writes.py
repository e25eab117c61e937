"""Overwrites of 4 KiB of an allocated file, at random: direct, into the page cache, and synced.

- direct: 32 at a time, with fio and threads beside;
- buffered: 32 tasks of an asyncio program, beside other libraries;
- synced: 4 tasks, each write on stable storage before the next; beside it fio's four jobs, which
  call fdatasync after each write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks import files, fio, rivals
from benchmarks.figures import program_of
from benchmarks.harness import Outcome, by_report, measure, own
from benchmarks.programs import task_writes
from benchmarks.programs.transfers import Job
from benchmarks.sections.timed import fio_cells, own_cells

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.harness import Cell, Setting

__all__ = ["DEPTH", "section"]

DEPTH: Final = 32
_MIB: Final = 1 << 20
_DIRECT: Final = (
    "rawaio/IOContext",
    "rawaio/IOContext, bulk",
    "rawaio/File.pwrite",
    "rawaio/File.pwrite_many",
    "threads/os.pwritev",
)


def task_cells(group: str, path: Path, loop: str, seconds: float) -> list[Cell]:
    """Ways of `benchmarks.programs.task_writes` that can be measured here."""
    return [
        by_report(
            group,
            name,
            own("task_writes", group=group, name=name, path=str(path), loop=loop, seconds=seconds),
        )
        for name in task_writes.WAYS[group]
        if rivals.why_not(program_of(name)) is None
    ]


def synced_by_fio(path: Path, seconds: float) -> list[Cell]:
    """The same by fio; none where there is no fio."""
    if rivals.why_not("fio"):
        return []
    jobs = [f"--numjobs={task_writes.TASKS['synced']}", "--group_reporting", "--fdatasync=1"]
    command = fio.timed_command(
        "libaio",
        jobs,
        path=str(path),
        depth=1,
        seconds=seconds,
        nbytes=task_writes.NBYTES,
        pattern="randwrite",
    )
    return [by_report("synced", "fio libaio/direct, fdatasync", command, fio.read)]


def section(setting: Setting) -> Outcome:
    """Measure."""
    outcome = Outcome(missing=rivals.missing("fio", "caio", "aiofiles"))
    rounds, seconds = setting.pick(2, 5), setting.pick(0.3, 0.5)
    with files.temporary_file(setting.folder, setting.pick(64, 256) * _MIB) as path:
        files.drop_cache(path)
        files.warm(path, direct=True)
        job = Job(path, DEPTH, seconds, writes=True)
        cells = [*own_cells("direct", job, _DIRECT, setting.loop), *fio_cells("direct", job)]
        outcome.add(measure(cells, rounds, setting.say))
    with files.temporary_file(setting.folder, 64 * _MIB) as path:
        files.warm(path, direct=False)
        cells = task_cells("buffered", path, setting.loop, seconds)
        outcome.add(measure(cells, rounds, setting.say))
        cells = task_cells("synced", path, setting.loop, seconds) + synced_by_fio(path, seconds)
        outcome.add(measure(cells, rounds, setting.say))
    return outcome

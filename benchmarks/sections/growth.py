"""What becomes of an operation's cost, and of its memory, where there are many.

- depth: 512 bytes of /dev/zero, by single requests and by bulk, at depth 1 to 1024;
- files: `File.pread` of 4 KiB by 32 tasks, from 1 to 1000 open files, cached and direct;
- tasks: the same from one file, by 1 to 100000 tasks;
- memory: bytes for each operation that is pending, in flight, waiting or under way.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks import files
from benchmarks.harness import Cell, Outcome, by_report, measure, output_of, own
from benchmarks.programs import memory
from benchmarks.programs.transfers import Job
from benchmarks.sections.timed import own_cells

if TYPE_CHECKING:
    from benchmarks.harness import Setting

__all__ = ["DEPTHS", "FILES", "TASKS", "group_of", "section"]

DEPTHS: Final = (1, 8, 32, 128, 1024)
FILES: Final = (1, 10, 100, 1000)
TASKS: Final = (1, 32, 1000, 10_000, 100_000)
_QUICK_TASKS: Final = TASKS[:-1]
_MIB: Final = 1 << 20
_NULL_NBYTES: Final = 512
# Of a bulk call, at each depth the same: more than any depth.
_PER_CALL: Final = 8192
# Of each task, so that beginning and ending are no large part of what it does.
_READS: Final = 3
_PREAD: Final = "rawaio/File.pread"
_KINDS: Final = {"cached": False, "direct": True}


def group_of(what: str, n: int) -> str:
    """What a group of figures is called."""
    return f"{what} {n}"


def by_depth(setting: Setting) -> list[Cell]:
    """Single requests and bulk, all depths in one turn."""
    ways = ("rawaio/IOContext", "rawaio/IOContext, bulk")
    cells: list[Cell] = []
    for depth in DEPTHS:
        job = Job(
            Path("/dev/zero"),
            depth,
            setting.pick(0.2, 0.4),
            nbytes=_NULL_NBYTES,
            direct=False,
            per_call=_PER_CALL,
        )
        cells += own_cells(group_of("depth", depth), job, ways, setting.loop)
    return cells


def by_files(folder: Path, setting: Setting) -> list[Cell]:
    """The same reads, from more and more files."""
    return [
        by_report(
            group_of("files", n),
            f"rawaio/{kind}",
            own(
                "many_files",
                path=str(folder),
                n=n,
                loop=setting.loop,
                seconds=setting.pick(0.2, 0.4),
                direct=direct,
            ),
        )
        for n in FILES
        for kind, direct in _KINDS.items()
    ]


def by_tasks(path: Path, setting: Setting) -> list[Cell]:
    """The same reads, by more and more tasks."""
    cells: list[Cell] = []
    for n in setting.pick(_QUICK_TASKS, TASKS):
        for kind, direct in _KINDS.items():
            job = Job(path, n, setting.pick(0.2, 0.4), direct=direct, least=_READS)
            (cell,) = own_cells(group_of("tasks", n), job, [_PREAD], setting.loop)
            cells.append(replace(cell, name=f"rawaio/{kind}"))
    return cells


def of_memory(path: Path, setting: Setting) -> list[Cell]:
    """Python's memory and the process's, of each kind of operation."""

    def turn(name: str, n: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for resident in (False, True):
            command = own("memory", name=name, path=str(path), n=n, resident=resident)
            found.update(json.loads(output_of(command)))
        return found

    most = setting.pick(_QUICK_TASKS, TASKS)[-1]
    return [
        Cell("memory", name, partial(turn, name, min(n, most)))
        for name, (_, n) in memory.KINDS.items()
    ]


def section(setting: Setting) -> Outcome:
    """Measure."""
    outcome = measure(by_depth(setting), setting.pick(3, 7), setting.say)
    with tempfile.TemporaryDirectory(dir=setting.folder, prefix="rawaio-benchmark-") as name:
        folder = Path(name)
        for i in range(max(FILES)):
            files.make_file(folder / f"{i:06}", 64 << 10, sync=False)
        os.sync()  # all of them in one go
        for path in folder.iterdir():
            files.drop_cache(path)
            files.warm(path, direct=True)
            files.warm(path, direct=False)
        outcome.add(measure(by_files(folder, setting), setting.pick(2, 5), setting.say))
    with files.temporary_file(setting.folder, 64 * _MIB) as path:
        files.warm(path, direct=False)
        outcome.add(measure(by_tasks(path, setting), setting.pick(2, 3), setting.say))
        outcome.add(measure(of_memory(path, setting), 1, setting.say))
    return outcome

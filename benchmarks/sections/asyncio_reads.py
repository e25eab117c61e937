"""What a 4 KiB read costs in an asyncio program, cached and direct, beside other libraries."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks import files, rivals
from benchmarks.figures import program_of
from benchmarks.harness import Outcome, by_difference, measure, own
from benchmarks.programs import asyncio_reads

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.harness import Cell, Setting

__all__ = ["section"]

_MIB: Final = 1 << 20
# Some tenths of a second of work for each; in quick runs half of it. Tasks share it alike, and
# calls of pread_many are whole, in the shorter run, too.
_OPERATIONS: Final = {
    "cached/rawaio": 131_072,
    "cached/caio": 32_768,
    "cached/aiofiles": 2_560,
    "cached/to_thread": 5_120,
    "direct/rawaio": 32_768,
    "direct/caio": 32_768,
    "direct/executor": 5_120,
    "direct/threads": 10_240,
}


def command(group: str, name: str, path: Path, loop: str, operations: int) -> list[str]:
    return own(
        "asyncio_reads", group=group, name=name, path=str(path), loop=loop, operations=operations
    )


def cells(group: str, path: Path, setting: Setting) -> list[Cell]:
    """What can be measured here of a group."""
    part = setting.pick(2, 1)
    return [
        by_difference(
            group,
            name,
            partial(command, group, name, path, setting.loop),
            _OPERATIONS[f"{group}/{program_of(name)}"] // part,
        )
        for name in asyncio_reads.WAYS[group]
        if rivals.why_not(program_of(name)) is None
    ]


def section(setting: Setting) -> Outcome:
    """Measure."""
    outcome = Outcome(missing=rivals.missing("caio", "aiofiles"))
    rounds = setting.pick(3, 7)
    with files.temporary_file(setting.folder, 64 * _MIB) as path:
        files.warm(path, direct=False)
        outcome.add(measure(cells("cached", path, setting), rounds, setting.say))
    with files.temporary_file(setting.folder, setting.pick(64, 256) * _MIB) as path:
        files.drop_cache(path)
        files.warm(path, direct=True)
        outcome.add(measure(cells("direct", path, setting), rounds, setting.say))
    return outcome

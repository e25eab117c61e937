"""Random direct reads of 4 KiB at several depths: IOPS, processor time, latency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks import files, rivals
from benchmarks.harness import Outcome, measure
from benchmarks.programs.transfers import Job
from benchmarks.sections.timed import fio_cells, own_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness import Setting

__all__ = ["DEPTHS", "group_of", "section"]

DEPTHS: Final = (1, 8, 32, 128)
_MIB: Final = 1 << 20
_WAYS: Final = (
    "rawaio/IOContext",
    "rawaio/IOContext, polling",
    "rawaio/IOContext, bulk",
    "rawaio/IOContext, bulk, portions",
    "rawaio/IOContext, bulk, polling",
    "rawaio/File.pread",
    "rawaio/File.pread, polling",
    "rawaio/File.preadinto",
    "rawaio/File.pread_many",
    "threads/os.preadv",
)
# Of one operation there are no portions, and File.pread_many has the depth of a whole loop.
_ONLY_AT: Final = {
    "rawaio/IOContext, bulk, portions": DEPTHS[1:],
    "rawaio/File.pread_many": DEPTHS[-1:],
}
# Where each read can be timed without much being added to it.
_LATENCY: Final = (
    "rawaio/IOContext",
    "rawaio/IOContext, polling",
    "rawaio/File.pread",
    "threads/os.preadv",
)


def group_of(depth: int, *, latency: bool = False) -> str:
    """What a group of figures is called."""
    return f"{'latency, ' * latency}depth {depth}"


def ways_at(depth: int) -> Sequence[str]:
    """What is run at a depth."""
    return [way for way in _WAYS if depth in _ONLY_AT.get(way, DEPTHS)]


def section(setting: Setting) -> Outcome:
    """Measure."""
    outcome = Outcome(missing=rivals.missing("fio"))
    rounds, seconds = setting.pick(2, 5), setting.pick(0.3, 0.5)
    with files.temporary_file(setting.folder, setting.pick(64, 256) * _MIB) as path:
        files.drop_cache(path)
        files.warm(path, direct=True)
        for depth in DEPTHS:
            group, job = group_of(depth), Job(path, depth, seconds)
            cells = [*own_cells(group, job, ways_at(depth), setting.loop), *fio_cells(group, job)]
            outcome.add(measure(cells, rounds, setting.say))
        for depth in DEPTHS:
            group = group_of(depth, latency=True)
            job = Job(path, depth, seconds, latency=True)
            cells = [*own_cells(group, job, _LATENCY, setting.loop), *fio_cells(group, job)]
            outcome.add(measure(cells, setting.pick(1, 2), setting.say))
    return outcome

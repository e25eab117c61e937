"""A file read from its beginning to its end, direct, 1 MiB at a time: bandwidth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks import files, rivals
from benchmarks.harness import Outcome, measure
from benchmarks.programs.transfers import Job
from benchmarks.sections.timed import fio_cells, own_cells

if TYPE_CHECKING:
    from benchmarks.harness import Setting

__all__ = ["DEPTHS", "NBYTES", "section"]

NBYTES: Final = 1 << 20
DEPTHS: Final = (1, 4, 16)
_BULK: Final = "rawaio/IOContext, bulk"  # of no use at depth 1
# File.pread_many has the depth of a whole loop, and stands everywhere beside the others.
_WAYS: Final = (
    "rawaio/IOContext",
    "rawaio/File.stream",
    "rawaio/File.preadinto",
    "rawaio/File.pread_many",
)


def section(setting: Setting) -> Outcome:
    """Measure."""
    outcome = Outcome(missing=rivals.missing("fio"))
    with files.temporary_file(setting.folder, setting.pick(128, 512) * NBYTES) as path:
        files.drop_cache(path)
        files.warm(path, direct=True)
        for depth in DEPTHS:
            group, seconds = f"depth {depth}", setting.pick(0.3, 0.5)
            job = Job(path, depth, seconds, nbytes=NBYTES, sequential=True)
            ways = [*_WAYS, _BULK] if depth > 1 else _WAYS
            cells = [*own_cells(group, job, ways, setting.loop), *fio_cells(group, job)]
            outcome.add(measure(cells, setting.pick(2, 5), setting.say))
    return outcome

"""What an operation costs when there is no work behind it, beside fio and python-libaio.

512 bytes of /dev/zero are read, and 512 bytes and 1 byte written to /dev/null, at depth 32. Of fio
the configuration of each engine that is best here, by some rounds of reads before the others,
stands for it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks import fio, rivals
from benchmarks.figures import program_of, rivals_in
from benchmarks.harness import Outcome, by_difference, measure, own
from benchmarks.programs import null

if TYPE_CHECKING:
    from benchmarks.harness import Cell, Setting

__all__ = ["GROUPS", "TRIAL", "section"]

#: By group: how many bytes, and whether they are written.
GROUPS: Final = {"read 512": (512, False), "write 512": (512, True), "write 1": (1, True)}
TRIAL: Final = "configurations of fio, read 512"
#: Of rawaio, by group. A write goes the same ways as a read: some of them say what there is to be
#: said. A reap by io_getevents is the same in all of them.
OURS: Final = {
    "read 512": [
        *(f"rawaio/{way}/ring" for way in null.RAWAIO),
        "rawaio/batch/io_getevents",
        "rawaio/bulk/io_getevents",
    ],
    "write 512": ["rawaio/batch/ring", "rawaio/bulk/ring"],
    "write 1": ["rawaio/batch/ring", "rawaio/bulk/ring"],
}
# Some tenths of a second of work for each: short, so that what is compared is not far apart. Whole
# batches, and whole bulk calls, in the shorter run, too.
_QUICK: Final = {"rawaio": 131_072, "fio": 262_144, "python-libaio": 65_536}
_FULL: Final = {"rawaio": 262_144, "fio": 524_288, "python-libaio": 98_304}
_TIMES_OF_BULK: Final = 2  # as many as fio


def operations(name: str, setting: Setting) -> int:
    """How many a program does in a longer run."""
    each = setting.pick(_QUICK, _FULL)[program_of(name).split()[0]]
    return _TIMES_OF_BULK * each if name.startswith("rawaio/bulk") else each


def own_command(name: str, group: str, n: int) -> list[str]:
    nbytes, writes = GROUPS[group]
    return own("null", name=name, nbytes=nbytes, writes=writes, operations=n)


def fio_command(options: list[str], group: str, n: int) -> list[str]:
    nbytes, writes = GROUPS[group]
    return fio.null_command(options, nbytes, null.DEPTH, writes=writes, operations=n)


def section(setting: Setting) -> Outcome:
    """Measure."""
    ways = {} if rivals.why_not("fio") else fio.null_ways(null.DEPTH)
    libaio = [] if rivals.why_not("python-libaio") else [f"python-libaio/{w}" for w in null.LIBAIO]

    def cell(name: str, group: str, label: str) -> Cell:
        command = (
            partial(fio_command, ways[name], group)
            if name in ways
            else partial(own_command, name, group)
        )
        return by_difference(label, name, command, operations(name, setting))

    outcome = Outcome(missing=rivals.missing("fio", "python-libaio"))
    cells = [cell(name, "read 512", TRIAL) for name in ways]
    outcome.add(measure(cells, setting.pick(2, 3), setting.say))
    chosen = rivals_in(outcome.figures.get(TRIAL, {}), "cpu_us").values()
    for group, ours in OURS.items():
        names = [*ours, *libaio, *chosen] if group == "read 512" else [*ours, *chosen]
        cells = [cell(name, group, group) for name in names]
        outcome.add(measure(cells, setting.pick(3, 7), setting.say))
    return outcome

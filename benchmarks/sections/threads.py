"""How throughput grows with threads, each with an IOContext of its own.

Reads 512 bytes of /dev/zero, which completes inside io_submit: single requests, in batches of 32;
and `pread_many`, 8192 at a time. By one thread, two, and as many as there are CPUs; and beside them
as many processes with one thread each, which share no interpreter and tell what the machine gives.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from benchmarks.harness import Cell, by_report, measure, own
from benchmarks.programs.threads import KINDS, MANY, WAYS

if TYPE_CHECKING:
    from benchmarks.harness import Outcome, Setting

__all__ = ["cells", "section"]

# Of each thread: half a second of work or so.
_OPERATIONS: Final = {"requests": 256_000, "many": 64 * MANY}
_QUICK: Final = 4


def cells(setting: Setting, cpus: int) -> list[Cell]:
    """One thread, two, and one for each CPU; and as many processes."""
    found: list[Cell] = []
    for way in WAYS:
        operations = _OPERATIONS[way] // setting.pick(_QUICK, 1)
        for n in sorted({1, 2, cpus}):
            for kind in KINDS if n > 1 else KINDS[:1]:
                command = own("threads", kind=kind, way=way, n=n, operations=operations)
                found.append(by_report(way, f"rawaio/{kind} {n}", command))
    return found


def section(setting: Setting) -> Outcome:
    """Measure."""
    threads = cells(setting, len(os.sched_getaffinity(0)))
    return measure(threads, setting.pick(3, 11), setting.say)

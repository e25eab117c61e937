"""Threads, each with an IOContext of its own, and beside them as many processes.

Throughput is by the clock, from the first begun to the last ended; processor time is that of the
threads. With the GIL threads take turns in Python, and only system calls run at the same time.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import rawaio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["KINDS", "MANY", "WAYS", "Span", "figures", "run"]

DEPTH: Final = 32
NBYTES: Final = 512
MANY: Final = 8192
KINDS: Final = ("threads", "processes")


@dataclass(frozen=True, slots=True)
class Span:
    """What one thread took."""

    begun: float
    ended: float
    cpu: float


def requests(context: rawaio.IOContext, fd: int, operations: int) -> None:
    batch = [rawaio.Request.pread(fd, rawaio.aligned_buffer(NBYTES), 0) for _ in range(DEPTH)]
    for _ in range(operations // DEPTH):
        context.submit(*batch)
        for completion in context.reap(min_nr=DEPTH):
            check(completion.res)


def check(res: int) -> None:
    if res != NBYTES:
        raise OSError(f"res is {res}, not {NBYTES}")


def many(context: rawaio.IOContext, fd: int, operations: int) -> None:
    offsets = array("q", range(0, MANY * NBYTES, NBYTES))
    out = rawaio.aligned_buffer(MANY * NBYTES)
    for _ in range(operations // MANY):
        context.pread_many(fd, offsets, NBYTES, out)


WAYS: Final[dict[str, Callable[[rawaio.IOContext, int, int], None]]] = {
    "requests": requests,
    "many": many,
}


def measure(way: str, operations: int, begin: Callable[[], object]) -> Span:
    """Do them in this thread, when begin returns; what it was used for before does not count."""
    run = WAYS[way]
    fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with rawaio.IOContext(DEPTH) as context:
            run(context, fd, max(MANY, DEPTH))
            begin()
            cpu, begun = time.thread_time(), time.perf_counter()
            run(context, fd, operations)
            ended = time.perf_counter()
            return Span(begun, ended, time.thread_time() - cpu)
    finally:
        os.close(fd)


def in_threads(way: str, n: int, operations: int) -> list[Span]:
    """Do so many operations in each of n threads."""
    spans: list[Span] = []
    barrier = threading.Barrier(n)

    def run() -> None:
        try:
            spans.append(measure(way, operations, barrier.wait))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(spans) != n:
        raise RuntimeError(f"{n - len(spans)} of {n} threads failed")
    return spans


def in_processes(way: str, n: int, operations: int) -> list[Span]:
    """Do so many operations in each of n processes."""
    ready, go, told = os.pipe(), os.pipe(), os.pipe()
    children: list[int] = []
    for _ in range(n):
        pid = os.fork()
        if pid == 0:
            _child(way, operations, ready, go, told)
        children.append(pid)
    for fd in (ready[1], go[0], told[1]):
        os.close(fd)
    with open(ready[0], "rb") as waiting:
        all_ready = waiting.read(n)
    os.close(go[1])  # all at once
    with open(told[0], encoding="ascii") as lines:
        spans = [Span(*map(float, line.split())) for line in lines]
    failed = [pid for pid in children if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    if failed or len(all_ready) != n or len(spans) != n:
        raise RuntimeError(f"{len(failed)} of {n} processes failed")
    return spans


def _child(
    way: str, operations: int, ready: tuple[int, int], go: tuple[int, int], told: tuple[int, int]
) -> None:
    status = 1
    try:
        for fd in (ready[0], go[1], told[0]):
            os.close(fd)

        def begin() -> None:
            os.write(ready[1], b"x")
            os.close(ready[1])
            os.read(go[0], 1)  # the end of the pipe: no byte comes

        span = measure(way, operations, begin)
        # The clock is one for the whole machine. A line is short enough to be written whole.
        os.write(told[1], f"{span.begun!r} {span.ended!r} {span.cpu!r}\n".encode())
        status = 0
    finally:
        os._exit(status)


def work(kind: str, way: str, n: int, operations: int) -> list[Span]:
    """Do so many operations in each of n threads, or processes."""
    return (in_threads if kind == "threads" else in_processes)(way, n, operations)


def figures(spans: Sequence[Span], operations: int) -> dict[str, float]:
    """Microseconds and operations a second, of all together; operations: of each."""
    total = operations * len(spans)
    wall_s = max(span.ended for span in spans) - min(span.begun for span in spans)
    return {
        "iops": total / wall_s,
        "wall_us": 1e6 * wall_s / total,
        "cpu_us": 1e6 * sum(span.cpu for span in spans) / total,
    }


def run(kind: str, way: str, n: int, operations: int) -> dict[str, float]:
    """Measure one."""
    return figures(work(kind, way, n, operations), operations)

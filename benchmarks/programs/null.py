"""Operations with no work behind them: reads of /dev/zero, writes to /dev/null, at depth 32.

They complete inside io_submit, so that what is measured is the way in and out, in user space and in
the kernel. rawaio is measured in several ways of use, through the ring and through io_getevents:

- batch: `submit(*requests)` with all 32, `reap(min_nr=32)`;
- plugged: `with plugged():`, `submit(request)` one by one, `reap(min_nr=32)`;
- window: `reap(min_nr=1)`, and what has completed is submitted again at once, one by one, plugged;
- batch+offset, plugged+offset: the same, each request with a new offset;
- bulk: `pread_many` or `pwrite_many`, many thousands a call, from one buffer;
- bulk, lengths: the same, each operation with a length of its own;
- bulk, buffers: the same, each operation with a buffer of its own.

Another way is a function and a line in `RAWAIO`, and is measured from then on; its verdict is a row
of `benchmarks.budgets`. What does many thousands a call has a name that begins with "bulk".
"""

from __future__ import annotations

import os
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import rawaio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BULK", "DEPTH", "LIBAIO", "MECHANISMS", "RAWAIO", "Null", "run"]

DEPTH: Final = 32
#: Operations of one bulk call.
BULK: Final = 8192
MECHANISMS: Final = {"ring": False, "io_getevents": True}


@dataclass(frozen=True, slots=True)
class Null:
    """What is done: so many bytes read or written, so many times."""

    fd: int
    nbytes: int
    writes: bool
    operations: int

    @property
    def batches(self) -> range:
        """One for each batch of `DEPTH`."""
        return range(self.operations // DEPTH)

    def requests(self) -> list[rawaio.Request]:
        """As many as are under way at a time."""
        make = rawaio.Request.pwrite if self.writes else rawaio.Request.pread
        return [make(self.fd, rawaio.aligned_buffer(self.nbytes), 0) for _ in range(DEPTH)]


def short(res: int, nbytes: int) -> OSError:
    return OSError(f"res is {res}, not {nbytes}")


def batch(context: rawaio.IOContext, job: Null, *, move: bool = False) -> None:
    requests, nbytes = job.requests(), job.nbytes
    offsets = count(0, nbytes)
    for _ in job.batches:
        if move:
            for request in requests:
                request.offset = next(offsets)
        context.submit(*requests)
        for completion in context.reap(min_nr=DEPTH):
            if completion.res != nbytes:
                raise short(completion.res, nbytes)


def plugged(context: rawaio.IOContext, job: Null, *, move: bool = False) -> None:
    requests, nbytes = job.requests(), job.nbytes
    submit = context.submit
    offsets = count(0, nbytes)
    for _ in job.batches:
        with context.plugged():
            for request in requests:
                if move:
                    request.offset = next(offsets)
                submit(request)
        for completion in context.reap(min_nr=DEPTH):
            if completion.res != nbytes:
                raise short(completion.res, nbytes)


def window(context: rawaio.IOContext, job: Null) -> None:
    submit, nbytes = context.submit, job.nbytes
    submit(*job.requests())
    left = job.operations - DEPTH
    while left > 0:
        completions = context.reap(min_nr=1)
        with context.plugged():
            for completion in completions:
                if completion.res != nbytes:
                    raise short(completion.res, nbytes)
                submit(completion.request)
        left -= len(completions)
    for completion in context.drain():
        if completion.res != nbytes:
            raise short(completion.res, nbytes)


def bulk(context: rawaio.IOContext, job: Null, *, shape: str = "one size") -> None:
    n, nbytes = min(BULK, job.operations), job.nbytes
    offsets = array("q", range(0, n * nbytes, nbytes))
    memory = rawaio.aligned_buffer(n * nbytes)
    many: Callable[..., object] = context.pwrite_many if job.writes else context.pread_many
    where = "data" if job.writes else "out"
    sizes: dict[str, dict[str, Any]] = {
        "one size": {where: memory, "nbytes": nbytes},
        "lengths": {where: memory, "lengths": array("q", [nbytes]) * n},
        "buffers": {where: [memory[i : i + nbytes] for i in offsets]},
    }
    for _ in range(job.operations // n):
        many(job.fd, offsets, **sizes[shape])


def libaio_batch(job: Null, *, move: bool = False) -> None:
    import libaio

    mode = libaio.AIOBLOCK_MODE_WRITE if job.writes else libaio.AIOBLOCK_MODE_READ
    nbytes = job.nbytes
    blocks = [libaio.AIOBlock(mode, job.fd, [rawaio.aligned_buffer(nbytes)]) for _ in range(DEPTH)]
    offsets = count(0, nbytes)
    with libaio.AIOContext(DEPTH) as context:
        for _ in job.batches:
            if move:
                for block in blocks:
                    block.offset = next(offsets)
            if context.submit(blocks) != DEPTH:
                raise OSError("not all blocks were submitted")
            for _block, res, _res2 in context.getEvents(min_nr=DEPTH, nr=DEPTH):
                if res != nbytes:
                    raise short(res, nbytes)


RAWAIO: Final[dict[str, Callable[[rawaio.IOContext, Null], None]]] = {
    "batch": batch,
    "batch+offset": partial(batch, move=True),
    "plugged": plugged,
    "plugged+offset": partial(plugged, move=True),
    "window": window,
    "bulk": bulk,
    "bulk, lengths": partial(bulk, shape="lengths"),
    "bulk, buffers": partial(bulk, shape="buffers"),
}
LIBAIO: Final[dict[str, Callable[[Null], None]]] = {
    "batch": libaio_batch,
    "batch+offset": partial(libaio_batch, move=True),
}


def run(name: str, nbytes: int, *, writes: bool, operations: int) -> dict[str, float]:
    """Do one of them; its time is taken from outside."""
    with ExitStack() as stack:
        path, flags = ("/dev/null", os.O_WRONLY) if writes else ("/dev/zero", os.O_RDONLY)
        fd = os.open(path, flags | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        job = Null(fd, nbytes, writes, operations)
        program, way, *mechanism = name.split("/")
        if program == "python-libaio":
            LIBAIO[way](job)
            return {}
        force_syscalls = MECHANISMS[mechanism[0]]
        context = stack.enter_context(rawaio.IOContext(DEPTH, force_syscalls=force_syscalls))
        RAWAIO[way](context, job)
        if context.statistics().mechanism != mechanism[0]:
            raise OSError(f"there is no ring to read here: {context.why_not_ring}")
        return {}

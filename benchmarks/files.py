"""Files for benchmarks: made, warmed, dropped from the page cache; and the loops that read them."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from contextlib import contextmanager
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import rawaio

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Iterator

    from rawaio.polling import PollingRule

    _T = TypeVar("_T")

__all__ = [
    "BLOCK",
    "LOOPS",
    "drop_cache",
    "expected",
    "make_file",
    "polling_rule",
    "random_offsets",
    "run_in_loop",
    "share",
    "temporary_file",
    "warm",
]

BLOCK: Final = 4096
LOOPS: Final = ("asyncio", "uvloop")
_PIECE: Final = 1 << 20


def expected(offset: int) -> bytes:
    """How the block at an offset begins."""
    return offset.to_bytes(8, "little")


@cache
def _noise() -> bytes:
    return random.Random(0).randbytes(_PIECE)


def make_file(path: Path, nbytes: int, *, sync: bool = True) -> None:
    """Make a file of blocks of noise, each of which begins with its own offset.

    sync: it is on the disk when this returns.
    """
    noise = bytearray(_noise())
    with path.open("xb", buffering=0) as file:
        for start in range(0, nbytes, _PIECE):
            for at in range(0, _PIECE, BLOCK):
                noise[at : at + 8] = expected(start + at)
            file.write(memoryview(noise)[: min(_PIECE, nbytes - start)])
        if sync:
            os.fsync(file.fileno())


@contextmanager
def temporary_file(folder: Path, nbytes: int) -> Generator[Path]:
    """A file as `make_file` makes it, which is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="rawaio-benchmark-") as name:
        path = Path(name, "file")
        make_file(path, nbytes)
        yield path


def warm(path: Path, *, direct: bool) -> None:
    """Read all of a file once: into the page cache, or past it, for the host's sake."""
    buffer = rawaio.aligned_buffer(_PIECE)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
    try:
        for offset in range(0, os.fstat(fd).st_size, _PIECE):
            os.preadv(fd, [buffer], offset)
    finally:
        os.close(fd)


def drop_cache(path: Path) -> None:
    """Take a file out of the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def random_offsets(nbytes: int, n: int = 8192, block: int = BLOCK) -> list[int]:
    """Offsets of whole blocks, at random, the same each time."""
    return random.Random(1).choices(range(0, nbytes - block + 1, block), k=n)


def share(offsets: list[int], operations: int, workers: int) -> list[Iterator[int]]:
    """For each worker its part of so many operations; each begins at another place."""
    step = len(offsets) // workers
    return [
        islice(cycle(offsets[i * step :] + offsets[: i * step]), operations // workers)
        for i in range(workers)
    ]


def polling_rule() -> PollingRule:
    """Whose ceiling is above what a virtual disk takes: beyond it nothing is polled for."""
    from rawaio.polling import PollingParameters, WeightedRule

    return WeightedRule(PollingParameters(max_ns=200_000))


def run_in_loop(main: Callable[[], Coroutine[object, object, _T]], loop: str) -> _T:
    """`asyncio.run` on one of `LOOPS`, or on rawaio's "polling" loop."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    elif loop == "polling":
        from rawaio.loops.polling import polling_loop

        factory = partial(polling_loop, polling_rule())
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())

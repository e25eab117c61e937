"""How much memory an operation takes while it is pending, and while it is under way.

- Request: made, and nothing else;
- pending: submitted, and held back by `plugged`;
- in flight: with the kernel, and not reaped;
- task: an asyncio task that waits for a future, for what is not rawaio's;
- waiting: a task in `File.pread` that has no place in the kernel yet;
- under way: a task in `File.pread` that has one, with the buffer that its 4 KiB go to.

Python's memory is what tracemalloc counts; resident memory is that of the process, in another run,
as tracemalloc needs some itself. Neither has what the kernel keeps for itself.
"""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rawaio
from benchmarks import files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

__all__ = ["KINDS", "run"]

NBYTES: Final = files.BLOCK


def resident_nbytes() -> int:
    """How much memory this process has."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def held() -> int:
    """How much memory there is now, by tracemalloc when it runs."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else resident_nbytes()


@contextmanager
def zero() -> Generator[int]:
    fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def made(n: int, path: Path) -> int:
    """Of n requests that were made."""
    del path
    buffer = rawaio.aligned_buffer(NBYTES)
    with zero() as fd:
        before = held()
        requests = [rawaio.Request.pread(fd, buffer, 0) for _ in range(n)]
        taken = held() - before
    del requests
    return taken


def pending(n: int, path: Path) -> int:
    """What n pending requests take more than requests that were made."""
    del path
    buffer = rawaio.aligned_buffer(NBYTES)
    with zero() as fd, rawaio.IOContext(32, max_batch=n + 1, max_pending=n + 1) as context:
        requests = [rawaio.Request.pread(fd, buffer, 0) for _ in range(n)]
        with context.plugged():
            before = held()
            for request in requests:
                context.submit(request)
            taken = held() - before
            found = context.statistics()
            if found.in_flight or found.in_queue != n:
                raise OSError(f"not pending: {found}")
        context.drain()
    return taken


def in_flight(n: int, path: Path) -> int:
    """What n requests in flight take more than requests that were made."""
    del path
    buffer = rawaio.aligned_buffer(NBYTES)
    with zero() as fd, rawaio.IOContext(n, max_batch=n) as context:
        requests = [rawaio.Request.pread(fd, buffer, 0) for _ in range(n)]
        before = held()
        context.submit(*requests)
        taken = held() - before
        found = context.statistics()
        if found.in_flight != n:
            raise OSError(f"not in flight: {found}")
        context.drain()
    return taken


async def while_they_wait(n: int, wait: Callable[[], Awaitable[object]]) -> int:
    """What n tasks take while each of them waits."""

    async def task() -> None:
        await wait()

    before = held()
    tasks = [asyncio.create_task(task()) for _ in range(n)]
    await asyncio.sleep(0)
    taken = held() - before
    tracemalloc.stop()  # ending them needs no counting
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return taken


def on_futures(n: int, path: Path) -> int:
    """Of n tasks that wait for nothing of rawaio's."""
    del path

    async def main() -> int:
        return await while_they_wait(n, asyncio.get_running_loop().create_future)

    return asyncio.run(main())


def in_pread(n: int, path: Path) -> int:
    """Of n tasks that read."""

    async def main() -> int:
        async with rawaio.open(path, engine="aio") as file:
            await file.pread(NBYTES, 0)  # what the first read makes is not meant
            return await while_they_wait(n, lambda: file.pread(NBYTES, 0))

    return asyncio.run(main())


#: By name, what is held, and of how many operations.
KINDS: Final[dict[str, tuple[Callable[[int, Path], int], int]]] = {
    "rawaio/Request": (made, 20_000),
    "rawaio/IOContext, pending": (pending, 20_000),
    "rawaio/IOContext, in flight": (in_flight, 4096),
    "rawaio/File.pread, waiting": (in_pread, 100_000),
    "rawaio/File.pread, under way": (in_pread, 128),
    "asyncio/a task and its future": (on_futures, 100_000),
}


def run(name: str, path: str, n: int, *, resident: bool) -> dict[str, float]:
    """Hold n of one of `KINDS`; bytes for each."""
    hold, _ = KINDS[name]
    if not resident:
        tracemalloc.start()
    taken = hold(n, Path(path))
    return {f"{'resident' if resident else 'python'}_bytes": taken / n}

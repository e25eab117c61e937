"""Overwrites of 4 KiB in an asyncio program, at random, for so many seconds.

- buffered: into the page cache, by 32 tasks. rawaio with direct=False; caio in each of its modes;
  aiofiles, a file for each task, seek and write; asyncio.to_thread(os.pwrite).
- synced: each on stable storage before the next, by 4 tasks. rawaio, direct and buffered, with
  fdatasync after each, or dsync=True; asyncio.to_thread, os.pwrite and os.fdatasync in one call;
  aiofiles, and os.fdatasync by asyncio.to_thread.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rawaio
from benchmarks import files, rivals
from benchmarks.programs.watch import Watch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    #: Writes one block at an offset; how many bytes.
    Write = Callable[[int], Awaitable[int]]
    #: What all tasks share.
    Writer = Callable[[Path], AbstractAsyncContextManager[Callable[[], Write]]]

__all__ = ["NBYTES", "TASKS", "WAYS", "check", "run"]

NBYTES: Final = files.BLOCK
TASKS: Final = {"buffered": 32, "synced": 4}
_DATA: Final = bytes(NBYTES)


def check(nbytes: int) -> None:
    if nbytes != NBYTES:
        raise OSError(f"{nbytes} bytes instead of {NBYTES}")


@asynccontextmanager
async def rawaio_writes(
    path: Path, *, direct: bool = False, dsync: bool = False, sync: bool = False
) -> AsyncGenerator[Callable[[], Write]]:
    async with rawaio.open(path, "r+", direct=direct, engine="aio") as file:

        def task() -> Write:
            memory = rawaio.aligned_buffer(NBYTES)

            def plain(offset: int) -> Awaitable[int]:
                return file.pwrite(memory, offset, dsync=dsync)

            async def synced(offset: int) -> int:
                nbytes = await file.pwrite(memory, offset)
                await file.fdatasync()
                return nbytes

            return synced if sync else plain

        yield task


@asynccontextmanager
async def caio_writes(path: Path, *, mode: str) -> AsyncGenerator[Callable[[], Write]]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        async with rivals.caio_context(mode) as ctx:

            def task() -> Write:
                return lambda offset: ctx.write(_DATA, fd, offset)

            yield task
    finally:
        os.close(fd)


@asynccontextmanager
async def aiofiles_writes(path: Path, *, sync: bool = False) -> AsyncGenerator[Callable[[], Write]]:
    import aiofiles

    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(aiofiles.open(path, "r+b", buffering=0))
            for _ in range(max(TASKS.values()))
        ]

        def task() -> Write:
            file = opened.pop()

            async def write(offset: int) -> int:
                await file.seek(offset)
                nbytes = await file.write(_DATA)
                if sync:
                    await asyncio.to_thread(os.fdatasync, file.fileno())
                return nbytes

            return write

        yield task


@asynccontextmanager
async def to_thread_writes(
    path: Path, *, sync: bool = False
) -> AsyncGenerator[Callable[[], Write]]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def synced(offset: int) -> int:
        nbytes = os.pwrite(fd, _DATA, offset)
        os.fdatasync(fd)
        return nbytes

    def task() -> Write:
        if sync:
            return lambda offset: asyncio.to_thread(synced, offset)
        return lambda offset: asyncio.to_thread(os.pwrite, fd, _DATA, offset)

    try:
        yield task
    finally:
        os.close(fd)


#: By group and name.
WAYS: Final[dict[str, dict[str, Writer]]] = {
    "buffered": {
        "rawaio/File.pwrite": rawaio_writes,
        **{f"caio/{mode}": partial(caio_writes, mode=mode) for mode in rivals.CAIO},
        "aiofiles/seek, write": aiofiles_writes,
        "to_thread/os.pwrite": to_thread_writes,
    },
    "synced": {
        "rawaio/direct, fdatasync": partial(rawaio_writes, direct=True, sync=True),
        "rawaio/direct, dsync": partial(rawaio_writes, direct=True, dsync=True),
        "rawaio/buffered, fdatasync": partial(rawaio_writes, sync=True),
        "rawaio/buffered, dsync": partial(rawaio_writes, dsync=True),
        "aiofiles/write, fdatasync": partial(aiofiles_writes, sync=True),
        "to_thread/os.pwrite, os.fdatasync": partial(to_thread_writes, sync=True),
    },
}


def run(group: str, name: str, path: str, loop: str, seconds: float) -> dict[str, float]:
    """Do one of `WAYS`; what it took, by metric."""
    where = Path(path)
    watch = Watch(seconds)
    offsets = cycle(files.random_offsets(where.stat().st_size))

    async def main() -> None:
        async with WAYS[group][name](where) as writer:

            async def task(write: Write) -> None:
                for offset in watch.each(offsets):
                    check(await write(offset))

            writes = [writer() for _ in range(TASKS[group])]
            with watch.running():
                await asyncio.gather(*map(task, writes))

    files.run_in_loop(main, loop)
    return watch.figures(NBYTES)

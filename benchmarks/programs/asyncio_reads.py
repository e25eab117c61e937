"""Reads of 4 KiB in an asyncio program: 32 tasks, each one after another, at random.

- cached: a file in the page cache. rawaio with direct=False: pread, preadinto, and one task with
  pread_many, 32 or 1024 blocks a call; caio in each of its modes, eager and deferred; aiofiles, a
  file for each task, seek and read; asyncio.to_thread(os.pread).
- direct: a file past the page cache. The same of rawaio; caio; run_in_executor(os.preadv) on 32
  threads with aligned buffers; and, without any asyncio, 32 threads that call os.preadv in a loop.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rawaio
from benchmarks import files, rivals

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

__all__ = ["NBYTES", "TASKS", "WAYS", "check", "run"]

TASKS: Final = 32
NBYTES: Final = files.BLOCK


def check(data: bytes | memoryview, nbytes: int, offset: int) -> None:
    if nbytes != NBYTES:
        raise OSError(f"{nbytes} of {len(data)} bytes at {offset}")


async def together(
    task: Callable[[Iterator[int]], Awaitable[None]], shares: Sequence[Iterator[int]]
) -> None:
    await asyncio.gather(*map(task, shares))


async def rawaio_pread(path: Path, shares: list[Iterator[int]], *, direct: bool) -> None:
    async with rawaio.open(path, direct=direct, engine="aio") as file:

        async def task(offsets: Iterator[int]) -> None:
            for offset in offsets:
                data = await file.pread(NBYTES, offset)
                check(data, len(data), offset)

        await together(task, shares)


async def rawaio_preadinto(path: Path, shares: list[Iterator[int]], *, direct: bool) -> None:
    async with rawaio.open(path, direct=direct, engine="aio") as file:

        async def task(offsets: Iterator[int]) -> None:
            buffer = rawaio.aligned_buffer(NBYTES)
            for offset in offsets:
                check(buffer, await file.preadinto(buffer, offset), offset)

        await together(task, shares)


async def rawaio_pread_many(
    path: Path, shares: list[Iterator[int]], *, direct: bool, batch: int
) -> None:
    async with rawaio.open(path, direct=direct, engine="aio") as file:
        buffer = rawaio.aligned_buffer(NBYTES * batch)
        every = chain.from_iterable(zip(*shares, strict=True))
        while offsets := list(islice(every, batch)):
            nbytes = NBYTES * len(offsets)
            await file.pread_many(offsets, NBYTES, buffer[:nbytes])  # all of it, or BulkError
            check(buffer[nbytes - NBYTES : nbytes], NBYTES, offsets[-1])


async def caio_read(
    path: Path, shares: list[Iterator[int]], *, mode: str, direct: bool = False
) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT * direct)
    async with rivals.caio_context(mode) as ctx:

        async def task(offsets: Iterator[int]) -> None:
            for offset in offsets:
                data = await ctx.read(NBYTES, fd, offset)
                check(data, len(data), offset)

        await together(task, shares)
    os.close(fd)


async def aiofiles_read(path: Path, shares: list[Iterator[int]]) -> None:
    import aiofiles

    async def task(offsets: Iterator[int]) -> None:
        async with aiofiles.open(path, "rb", buffering=0) as file:
            for offset in offsets:
                await file.seek(offset)
                data = await file.read(NBYTES)
                check(data, len(data), offset)

    await together(task, shares)


async def to_thread_pread(path: Path, shares: list[Iterator[int]]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    async def task(offsets: Iterator[int]) -> None:
        for offset in offsets:
            data = await asyncio.to_thread(os.pread, fd, NBYTES, offset)
            check(data, len(data), offset)

    await together(task, shares)
    os.close(fd)


async def executor_preadv(path: Path, shares: list[Iterator[int]]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(len(shares)) as pool:

        async def task(offsets: Iterator[int]) -> None:
            buffer = rawaio.aligned_buffer(NBYTES)
            for offset in offsets:
                n = await loop.run_in_executor(pool, os.preadv, fd, [buffer], offset)
                check(buffer, n, offset)

        await together(task, shares)
    os.close(fd)


async def threads_preadv(path: Path, shares: list[Iterator[int]]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def task(offsets: Iterator[int]) -> None:
        buffer = rawaio.aligned_buffer(NBYTES)
        for offset in offsets:
            check(buffer, os.preadv(fd, [buffer], offset), offset)

    threads = [threading.Thread(target=task, args=(offsets,)) for offsets in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)


def rawaio_ways(
    *, direct: bool
) -> dict[str, Callable[[Path, list[Iterator[int]]], Awaitable[None]]]:
    return {
        "rawaio/pread": partial(rawaio_pread, direct=direct),
        "rawaio/preadinto": partial(rawaio_preadinto, direct=direct),
        "rawaio/pread_many, 32": partial(rawaio_pread_many, direct=direct, batch=32),
        "rawaio/pread_many, 1024": partial(rawaio_pread_many, direct=direct, batch=1024),
    }


#: By group and name.
WAYS: Final[dict[str, dict[str, Callable[[Path, list[Iterator[int]]], Awaitable[None]]]]] = {
    "cached": {
        **rawaio_ways(direct=False),
        **{f"caio/{mode}": partial(caio_read, mode=mode) for mode in rivals.CAIO},
        "aiofiles/seek, read": aiofiles_read,
        "to_thread/os.pread": to_thread_pread,
    },
    "direct": {
        **rawaio_ways(direct=True),
        "caio/linux_aio": partial(caio_read, mode="linux_aio", direct=True),
        "executor/os.preadv": executor_preadv,
        "threads/os.preadv": threads_preadv,
    },
}


def run(group: str, name: str, path: str, loop: str, operations: int) -> dict[str, float]:
    """Do one of `WAYS`; its time is taken from outside."""
    where = Path(path)
    shares = files.share(files.random_offsets(where.stat().st_size), operations, TASKS)

    async def main() -> None:
        await WAYS[group][name](where, shares)

    files.run_in_loop(main, loop)
    return {}

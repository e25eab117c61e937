"""Reads of 4 KiB in an asyncio program, for strace to count the system calls of.

Blocks are read one after another, and 64 at a time by `gather`, direct and from the page cache, by
rawaio and by caio (linux_aio).
"""

from __future__ import annotations

import asyncio
import os
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rawaio
from benchmarks import files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = ["GATHERED", "KINDS", "PACES", "check", "run"]

NBYTES: Final = files.BLOCK
GATHERED: Final = 64
KINDS: Final = ("direct", "cached")
PACES: Final = {"one by one": 1, "gather": GATHERED}


async def reads(
    read: Callable[[int], Awaitable[bytes]], offsets: Iterator[int], at_a_time: int
) -> None:
    if at_a_time == 1:
        for offset in offsets:
            check(await read(offset))
        return
    while batch := list(islice(offsets, at_a_time)):
        for data in await asyncio.gather(*map(read, batch)):
            check(data)


def check(data: bytes) -> None:
    if len(data) != NBYTES:
        raise OSError(f"{len(data)} bytes instead of {NBYTES}")


async def rawaio_reads(path: Path, offsets: Iterator[int], at_a_time: int, *, direct: bool) -> None:
    async with rawaio.open(path, direct=direct, engine="aio") as file:

        def read(offset: int) -> Awaitable[bytes]:
            return file.pread(NBYTES, offset)

        await reads(read, offsets, at_a_time)


async def caio_reads(path: Path, offsets: Iterator[int], at_a_time: int, *, direct: bool) -> None:
    from caio.linux_aio_asyncio import AsyncioContext

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT * direct)
    async with AsyncioContext() as context:

        def read(offset: int) -> Awaitable[bytes]:
            return context.read(NBYTES, fd, offset)

        await reads(read, offsets, at_a_time)
    os.close(fd)


def run(program: str, kind: str, pace: str, path: str, operations: int) -> dict[str, float]:
    """Read so many blocks; what it does is counted from outside."""
    where = Path(path)
    offsets = islice(cycle(files.random_offsets(where.stat().st_size)), operations)
    direct = kind == "direct"
    read = caio_reads if program == "caio" else rawaio_reads

    async def main() -> None:
        await read(where, offsets, PACES[pace], direct=direct)

    asyncio.run(main())
    return {}

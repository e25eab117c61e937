"""How late a heartbeat of 1 ms is while files are read and written in the same event loop.

A task sleeps for 1 ms, again and again; its lateness is what the loop kept it waiting. Beside it:

- idle: nothing, for what the loop and the machine make late by themselves;
- cold: a buffered file that is not in the page cache is read, 1 MiB at a time, by 8 tasks;
- extend: a file is written by direct writes of 1 MiB that extend it, by 8 tasks;
- queued: 64 direct reads of 1 MiB are begun at once, again and again.

By rawaio, by caio (linux_aio), and by asyncio.to_thread (os.pread, os.preadv, os.pwrite). Modules
are imported before the heart begins to beat.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rawaio
from benchmarks import files
from benchmarks.programs.watch import percentile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

__all__ = ["PERIOD_S", "WAYS", "Size", "beats", "check", "late_figures", "run"]

PERIOD_S: Final = 0.001
PIECE: Final = 1 << 20
TASKS: Final = 8
QUEUED: Final = 64


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to do."""

    read: int  # bytes, of the file that is read
    written: int  # bytes
    seconds: float  # at least, of idle and queued


async def beat(late_s: list[float]) -> None:
    """Note how late each beat is, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        late_s.append(clock() - due)


def check(nbytes: int) -> None:
    if nbytes != PIECE:
        raise OSError(f"{nbytes} bytes instead of {PIECE}")


async def by_tasks(
    offsets: Iterable[int], transfer: Callable[[int], Awaitable[int]], tasks: int = TASKS
) -> None:
    source: Iterator[int] = iter(offsets)

    async def task() -> None:
        for offset in source:
            check(await transfer(offset))

    await asyncio.gather(*(task() for _ in range(tasks)))


async def at_once(transfers: Callable[[], Iterable[Awaitable[int]]], seconds: float) -> None:
    clock = asyncio.get_running_loop().time
    end = clock() + seconds
    while clock() < end:
        for nbytes in await asyncio.gather(*transfers()):
            check(nbytes)


async def rawaio_cold(path: Path, size: Size) -> None:
    async with rawaio.open(path, direct=False, engine="aio") as file:

        async def read(offset: int) -> int:
            return len(await file.pread(PIECE, offset))

        await by_tasks(range(0, size.read, PIECE), read)


async def rawaio_extend(path: Path, size: Size) -> None:
    memory = rawaio.aligned_buffer(PIECE)
    async with rawaio.open(path, "w", engine="aio") as file:

        async def write(offset: int) -> int:
            return await file.pwrite(memory, offset)

        await by_tasks(range(0, size.written, PIECE), write)


async def rawaio_queued(path: Path, size: Size) -> None:
    buffers = [rawaio.aligned_buffer(PIECE) for _ in range(QUEUED)]
    async with rawaio.open(path, engine="aio") as file:

        def reads() -> Iterable[Awaitable[int]]:
            return (file.preadinto(buffer, PIECE * i) for i, buffer in enumerate(buffers))

        await at_once(reads, size.seconds)


async def caio_cold(path: Path, size: Size) -> None:
    from caio.linux_aio_asyncio import AsyncioContext

    with ExitStack() as stack:
        fd = opened(stack, path, os.O_RDONLY)
        async with AsyncioContext() as ctx:

            async def read(offset: int) -> int:
                return len(await ctx.read(PIECE, fd, offset))

            await by_tasks(range(0, size.read, PIECE), read)


async def caio_extend(path: Path, size: Size) -> None:
    from caio.linux_aio_asyncio import AsyncioContext

    with ExitStack() as stack:
        fd = opened(stack, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        data = bytes(PIECE)
        async with AsyncioContext() as ctx:

            async def write(offset: int) -> int:
                return await ctx.write(data, fd, offset)

            await by_tasks(range(0, size.written, PIECE), write)


async def caio_queued(path: Path, size: Size) -> None:
    from caio.linux_aio_asyncio import AsyncioContext

    with ExitStack() as stack:
        fd = opened(stack, path, os.O_RDONLY | os.O_DIRECT)
        async with AsyncioContext() as ctx:

            async def read(offset: int) -> int:
                return len(await ctx.read(PIECE, fd, offset))

            def reads() -> Iterable[Awaitable[int]]:
                return (read(PIECE * i) for i in range(QUEUED))

            await at_once(reads, size.seconds)


async def to_thread_cold(path: Path, size: Size) -> None:
    with ExitStack() as stack:
        fd = opened(stack, path, os.O_RDONLY)

        async def read(offset: int) -> int:
            return len(await asyncio.to_thread(os.pread, fd, PIECE, offset))

        await by_tasks(range(0, size.read, PIECE), read)


async def to_thread_extend(path: Path, size: Size) -> None:
    with ExitStack() as stack:
        fd = opened(stack, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        memory = rawaio.aligned_buffer(PIECE)

        async def write(offset: int) -> int:
            return await asyncio.to_thread(os.pwrite, fd, memory, offset)

        await by_tasks(range(0, size.written, PIECE), write)


async def to_thread_queued(path: Path, size: Size) -> None:
    with ExitStack() as stack:
        fd = opened(stack, path, os.O_RDONLY | os.O_DIRECT)
        buffers = [rawaio.aligned_buffer(PIECE) for _ in range(QUEUED)]

        def reads() -> Iterable[Awaitable[int]]:
            return (
                asyncio.to_thread(os.preadv, fd, [buffer], PIECE * i)
                for i, buffer in enumerate(buffers)
            )

        await at_once(reads, size.seconds)


def opened(stack: ExitStack, path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, fd)
    return fd


async def idle(path: Path, size: Size) -> None:
    await asyncio.sleep(size.seconds)


#: By group and name.
WAYS: Final[dict[str, dict[str, Callable[[Path, Size], Awaitable[None]]]]] = {
    "idle": {"nothing/else": idle},
    "cold": {
        "rawaio/File": rawaio_cold,
        "caio/linux_aio": caio_cold,
        "to_thread/os.pread": to_thread_cold,
    },
    "extend": {
        "rawaio/File": rawaio_extend,
        "caio/linux_aio": caio_extend,
        "to_thread/os.pwrite": to_thread_extend,
    },
    "queued": {
        "rawaio/File": rawaio_queued,
        "caio/linux_aio": caio_queued,
        "to_thread/os.preadv": to_thread_queued,
    },
}


def beats(group: str, name: str, path: Path, size: Size, loop: str) -> list[float]:
    """Do one of `WAYS`; how late each beat was, in seconds."""
    late_s: list[float] = []
    import_module("rawaio.file")
    import_module("rawaio.loops.asyncio")
    if name.startswith("caio/"):
        import_module("caio.linux_aio_asyncio")

    async def main() -> None:
        heart = asyncio.create_task(beat(late_s))
        await asyncio.sleep(10 * PERIOD_S)
        late_s.clear()  # what starting took is not meant
        try:
            await WAYS[group][name](path, size)
            # A loop that stood still all the time has its beat now.
            await asyncio.sleep(2 * PERIOD_S)
        finally:
            heart.cancel()

    files.run_in_loop(main, loop)
    return late_s


def late_figures(late_s: Sequence[float]) -> dict[str, float]:
    """How late the beats were."""
    return {
        "late_p50_ms": 1e3 * percentile(late_s, 0.5),
        "late_p99_ms": 1e3 * percentile(late_s, 0.99),
        "late_p999_ms": 1e3 * percentile(late_s, 0.999),
        "late_max_ms": 1e3 * max(late_s),
    }


def run(group: str, name: str, path: str, loop: str, **size: float) -> dict[str, float]:
    """Do one of `WAYS`; how late its beats were."""
    what = Size(int(size["read"]), int(size["written"]), size["seconds"])
    return late_figures(beats(group, name, Path(path), what, loop))

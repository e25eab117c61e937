"""What a 4 KiB read costs in an asyncio program, beside other libraries.

    python benchmarks/asyncio_reads.py [--quick] [--uvloop] [--folder F] [--json FILE]

32 tasks read blocks at random, each one after another, and the processor time of each read is
taken, user and system, of the process with all its threads. Two files of the current folder:

- cached: in the page cache. rawaio with direct=False: pread, preadinto, and one task with
  pread_many, 32 or 1024 blocks a call; caio 0.12.10 in each of its modes, eager and deferred;
  aiofiles 25.1.0, a file for each task, seek and read; asyncio.to_thread(os.pread).
- direct: on the disk. The same of rawaio; run_in_executor(os.preadv) on 32 threads with aligned
  buffers; and, without any asyncio, 32 threads that call os.preadv in a loop.

Of caio the mode that is best here stands for it. What is missing is said at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

# A plain checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rawaio
from benchmarks import files, harness

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from caio.asyncio_base import AsyncioContextBase

TASKS: Final = 32
NBYTES: Final = files.BLOCK
VERSIONS: Final = {"caio": "0.12.10", "aiofiles": "25.1.0"}
FILE_NBYTES: Final = {"cached": 64 << 20, "direct": 256 << 20}
QUICK_FILE_NBYTES: Final = 64 << 20
ROUNDS: Final = 15
QUICK_ROUNDS: Final = 3
_SINGLE: Final = ("pread", "preadinto")
_MANY: Final = ("pread_many, 32", "pread_many, 1024")
# Which of rawaio's ways are compared with whom; the design's budget, at most so many times the
# rival's time, and what is aimed at.
COMPARISONS: Final[list[tuple[str, tuple[str, ...], float | None, float | None]]] = [
    ("cached/caio", _SINGLE, 0.4, 0.25),
    ("cached/caio", _MANY, 0.25, 0.2),
    ("cached/aiofiles", (*_SINGLE, *_MANY), None, None),
    ("cached/to_thread", (*_SINGLE, *_MANY), None, None),
    ("direct/executor", (*_SINGLE, *_MANY), 0.25, 0.15),
    ("direct/threads", (*_SINGLE, *_MANY), None, None),
]
# Some tenths of a second of work for each.
OPERATIONS: Final = {
    "cached/rawaio": 128_000,
    "cached/caio": 32_000,
    "cached/aiofiles": 2_560,
    "cached/to_thread": 5_120,
    "direct/rawaio": 32_000,
    "direct/executor": 5_120,
    "direct/threads": 10_240,
}


# -- what is measured, each in a process of its own ----------------------------------------------


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
    path: Path, shares: list[Iterator[int]], *, module: str, deferred: bool
) -> None:
    context: type[AsyncioContextBase] = import_module(f"caio.{module}_asyncio").AsyncioContext
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    async with context(deferred=deferred) as ctx:

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


WAYS: Final[dict[str, Callable[[Path, list[Iterator[int]]], Awaitable[None]]]] = {
    "cached/rawaio/pread": partial(rawaio_pread, direct=False),
    "cached/rawaio/preadinto": partial(rawaio_preadinto, direct=False),
    "cached/rawaio/pread_many, 32": partial(rawaio_pread_many, direct=False, batch=32),
    "cached/rawaio/pread_many, 1024": partial(rawaio_pread_many, direct=False, batch=1024),
    **{
        f"cached/caio/{module}{' deferred' * deferred}": partial(
            caio_read, module=module, deferred=deferred
        )
        for module in ("linux_aio", "linux_uring", "thread_aio")
        for deferred in ((False, True) if module != "thread_aio" else (False,))
    },
    "cached/aiofiles/seek, read": aiofiles_read,
    "cached/to_thread/os.pread": to_thread_pread,
    "direct/rawaio/pread": partial(rawaio_pread, direct=True),
    "direct/rawaio/preadinto": partial(rawaio_preadinto, direct=True),
    "direct/rawaio/pread_many, 32": partial(rawaio_pread_many, direct=True, batch=32),
    "direct/rawaio/pread_many, 1024": partial(rawaio_pread_many, direct=True, batch=1024),
    "direct/executor/os.preadv": executor_preadv,
    "direct/threads/os.preadv": threads_preadv,
}


def work(name: str, path: Path, operations: int, loop: str) -> None:
    """Do one of the programs, in this process."""
    shares = files.share(files.random_offsets(path.stat().st_size), operations, TASKS)

    async def main() -> None:
        await WAYS[name](path, shares)

    files.run_in_loop(main, loop)


# -- putting it together -------------------------------------------------------------------------


def kind_of(name: str) -> str:
    """What file it reads."""
    return name.partition("/")[0]


def program_of(name: str) -> str:
    """Kind and program, without the way."""
    return name.rpartition("/")[0]


def command(name: str, path: Path, loop: str, operations: int) -> list[str]:
    script = str(Path(__file__).resolve())
    return [sys.executable, script, "--work", name, str(path), loop, str(operations)]


def find_programs(paths: dict[str, Path], loop: str) -> tuple[list[harness.Program], list[str]]:
    """What can be measured here, and what is missing, each with the reason. Tries each once."""
    programs: list[harness.Program] = []
    missing: list[str] = []
    absent: dict[str, str] = {}
    for package, version in VERSIONS.items():
        if (reason := harness.version_of(package, version)) is not None:
            absent[package] = reason
            missing.append(f"{package}: {reason}")
    for name in WAYS:
        if program_of(name).partition("/")[2] in absent:
            continue
        run = partial(command, name, paths[kind_of(name)], loop)
        try:
            harness.output_of(run(TASKS))
        except harness.ProgramError as error:
            missing.append(f"{name}: {str(error).splitlines()[-1]}")
        else:
            programs.append(harness.Program(name, run, OPERATIONS[program_of(name)]))
    return programs, missing


@dataclass(frozen=True, slots=True)
class Report:
    """What is written as JSON. Seconds are by name and round."""

    benchmark: str
    where: dict[str, object]
    loop: str
    tasks: int
    nbytes: int
    operations: dict[str, int]
    seconds_per_operation: dict[str, list[float]]
    rivals: list[harness.Rival]
    missing: list[str]


def make_report(seconds: dict[str, list[float]], missing: list[str], loop: str) -> Report:
    """Compare each of rawaio's ways with each rival's best."""
    rivals: list[harness.Rival] = []
    for rival, ways, budget, aim in COMPARISONS:
        names = [name for name in seconds if program_of(name) == rival]
        if not names:
            continue
        best = min(names, key=lambda name: statistics.median(seconds[name]))
        own = [f"{kind_of(rival)}/rawaio/{way}" for way in ways]
        ratios = {
            name: harness.compare(seconds[name], seconds[best]) for name in own if name in seconds
        }
        if ratios:
            rivals.append(harness.Rival(rival, best, budget, aim, ratios))
    return Report(
        benchmark="asyncio_reads",
        where=harness.machine(),
        loop=loop,
        tasks=TASKS,
        nbytes=NBYTES,
        operations=OPERATIONS,
        seconds_per_operation=seconds,
        rivals=rivals,
        missing=missing,
    )


def render(report: Report) -> str:
    """What a terminal shows."""
    width = max(map(len, report.seconds_per_operation), default=0)
    lines = [f"{harness.render_machine(report.where)}, {report.loop}, {report.tasks} tasks"]
    title = f"us of processor time for each read of {report.nbytes} bytes"
    lines += harness.render_seconds(title, report.seconds_per_operation, width)
    for rival in report.rivals:
        lines += harness.render_rival(rival, width)
    lines += ["", *(f"missing: {reason}" for reason in report.missing)]
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when a program failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a smaller file")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's loop")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files are made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        name, path, loop, operations = arguments.work
        work(name, Path(path), int(operations), loop)
        return 0
    loop = "uvloop" if arguments.uvloop else "asyncio"
    cached_nbytes, direct_nbytes = (
        QUICK_FILE_NBYTES if arguments.quick else nbytes for nbytes in FILE_NBYTES.values()
    )
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    with (
        files.temporary_file(arguments.folder, cached_nbytes) as cached,
        files.temporary_file(arguments.folder, direct_nbytes) as direct,
    ):
        files.warm(cached, direct=False)
        files.drop_cache(direct)
        try:
            files.warm(direct, direct=True)
            programs, missing = find_programs({"cached": cached, "direct": direct}, loop)
            seconds = harness.run(programs, rounds, say=harness.say)
        except (harness.ProgramError, OSError) as error:
            print(f"asyncio_reads: {error}", file=sys.stderr)
            return 1
    report = make_report(seconds, missing, loop)
    print(render(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How late a heartbeat of 1 ms is while files are read and written in the same event loop.

    python benchmarks/heartbeat.py [--quick] [--uvloop] [--folder F] [--json FILE]

A task sleeps for 1 ms, again and again; its lateness is what the loop kept it waiting. Beside it:

- idle: nothing, for what the loop and the machine make late by themselves;
- cold: a buffered file that is not in the page cache is read, 1 MiB at a time, by 8 tasks;
- extend: a file is written by direct writes of 1 MiB that extend it, by 8 tasks;
- queued: 64 direct reads of 1 MiB are begun at once, again and again.

By rawaio, by caio 0.12.10 (linux_aio), and by asyncio.to_thread (os.pread, os.preadv, os.pwrite).
What one of them cannot do is said at the end. Of each round the 99.9th percentile is taken; the
median of them is to be at most 20 ms. Modules are imported before the heart begins to beat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

# A plain checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rawaio
from benchmarks import files, harness

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

PERIOD_S: Final = 0.001
AT_MOST_S: Final = 0.020  # late, at the 99.9th percentile
PIECE: Final = 1 << 20
TASKS: Final = 8
QUEUED: Final = 64
CAIO_VERSION: Final = "0.12.10"
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to do in one round."""

    read: int  # bytes, of the file that is read
    written: int  # bytes
    seconds: float  # at least, of idle and queued


FULL: Final = Size(read=1 << 30, written=256 << 20, seconds=4.0)
QUICK: Final = Size(read=128 << 20, written=64 << 20, seconds=1.0)


# -- what is measured, each in a process of its own ----------------------------------------------


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


WAYS: Final[dict[str, Callable[[Path, Size], Awaitable[None]]]] = {
    "idle/nothing": idle,
    "cold/rawaio": rawaio_cold,
    "cold/caio": caio_cold,
    "cold/to_thread": to_thread_cold,
    "extend/rawaio": rawaio_extend,
    "extend/caio": caio_extend,
    "extend/to_thread": to_thread_extend,
    "queued/rawaio": rawaio_queued,
    "queued/caio": caio_queued,
    "queued/to_thread": to_thread_queued,
}


def work(name: str, path: Path, size: Size, loop: str) -> list[float]:
    """Do one of them in this process; how late each beat was, in seconds."""
    late_s: list[float] = []
    import_module("rawaio.file")
    import_module("rawaio.loops.asyncio")
    if name.endswith("/caio"):
        import_module("caio.linux_aio_asyncio")

    async def main() -> None:
        heart = asyncio.create_task(beat(late_s))
        await asyncio.sleep(10 * PERIOD_S)
        late_s.clear()  # what starting took is not meant
        try:
            await WAYS[name](path, size)
            # A loop that stood still all the time has its beat now.
            await asyncio.sleep(2 * PERIOD_S)
        finally:
            heart.cancel()

    files.run_in_loop(main, loop)
    return late_s


# -- putting it together -------------------------------------------------------------------------


def percentile(values: Sequence[float], part: float) -> float:
    """The lowest value that part of all values do not exceed (nearest rank).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(math.ceil(part * len(values)), 1) - 1]


@dataclass(frozen=True, slots=True)
class Figures:
    """How late the heart beat, in seconds: of the beats of all rounds, and of each round."""

    beats: int
    p50: float
    p99: float
    p999: float
    highest: float
    p999_of_rounds: list[float]

    @property
    def verdict(self) -> str:
        """Where the median of the rounds' 99.9th percentiles is."""
        return "ahead" if statistics.median(self.p999_of_rounds) <= AT_MOST_S else "BEHIND"


def summarize(rounds: Sequence[Sequence[float]]) -> Figures:
    """Figures of all rounds of one way."""
    every = [late_s for late in rounds for late_s in late]
    return Figures(
        beats=len(every),
        p50=percentile(every, 0.5),
        p99=percentile(every, 0.99),
        p999=percentile(every, 0.999),
        highest=max(every),
        p999_of_rounds=[percentile(late, 0.999) for late in rounds],
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What is written as JSON. Figures are by name."""

    benchmark: str
    where: dict[str, object]
    loop: str
    size: Size
    period_s: float
    at_most_s: float
    figures: dict[str, Figures]
    missing: list[str]


def command(name: str, path: Path, size: Size, loop: str) -> list[str]:
    sizes = [str(size.read), str(size.written), str(size.seconds)]
    return [sys.executable, str(Path(__file__).resolve()), "--work", name, str(path), loop, *sizes]


def measure(
    folder: Path, size: Size, rounds: int, loop: str
) -> tuple[dict[str, Figures], list[str]]:
    """Figures by name, and what is missing, each with the reason.

    Raises:
        ProgramError: rawaio's failed.
    """
    late: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    missing: list[str] = []
    if (reason := harness.version_of("caio", CAIO_VERSION)) is not None:
        missing.append(f"caio: {reason}")
        late = {name: rounds for name, rounds in late.items() if not name.endswith("/caio")}
    with files.temporary_file(folder, size.read) as path:
        files.drop_cache(path)
        files.warm(path, direct=True)
        for round_, name in harness.in_turn(list(late), rounds):
            if name not in late:
                continue
            harness.say(f"round {round_ + 1} of {rounds}: {name}")
            files.drop_cache(path)
            target = path.with_name("written") if name.startswith("extend/") else path
            try:
                late[name].append(json.loads(harness.output_of(command(name, target, size, loop))))
            except harness.ProgramError as error:
                if name.endswith("/rawaio"):
                    raise
                missing.append(f"{name}: {str(error).splitlines()[-1]}")
                del late[name]
            target.with_name("written").unlink(missing_ok=True)
    return {name: summarize(each) for name, each in late.items()}, missing


def render(report: Report) -> str:
    """What a terminal shows."""
    width = max(map(len, report.figures), default=0)
    lines = [
        f"{harness.render_machine(report.where)}, {report.loop}",
        "",
        f"ms by which a heartbeat of {1e3 * report.period_s:g} ms is late",
        f"at p99.9 (median of the rounds) at most {1e3 * report.at_most_s:g}",
        f"{'':{width}}  beats      p50      p99    p99.9      max   p99.9 of the rounds",
    ]
    lines += [render_row(name, figures, width) for name, figures in report.figures.items()]
    lines += ["", *(f"missing: {reason}" for reason in report.missing)]
    return "\n".join(lines).rstrip()


def render_row(name: str, figures: Figures, width: int) -> str:
    times = (figures.p50, figures.p99, figures.p999, figures.highest)
    each = figures.p999_of_rounds
    low, median, high = (1e3 * f(each) for f in (min, statistics.median, max))
    return (
        f"{name:{width}}{figures.beats:7}"
        + "".join(f"{1e3 * time:9.2f}" for time in times)
        + f"   {low:.2f}, {median:.2f}, {high:.2f}   {figures.verdict}"
    )


def as_json(report: Report) -> Mapping[str, object]:
    """The report with the verdicts."""
    verdicts = {name: figures.verdict for name, figures in report.figures.items()}
    return {**asdict(report), "verdicts": verdicts}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when a program failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller files")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's loop")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the files are made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--work", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        name, path, loop, read, written, seconds = arguments.work
        size = Size(int(read), int(written), float(seconds))
        print(json.dumps(work(name, Path(path), size, loop)))
        return 0
    loop = "uvloop" if arguments.uvloop else "asyncio"
    size = QUICK if arguments.quick else FULL
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    try:
        figures, missing = measure(arguments.folder, size, rounds, loop)
    except (harness.ProgramError, OSError) as error:
        print(f"heartbeat: {error}", file=sys.stderr)
        return 1
    report = Report(
        "heartbeat", harness.machine(), loop, size, PERIOD_S, AT_MOST_S, figures, missing
    )
    print(render(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(report), indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

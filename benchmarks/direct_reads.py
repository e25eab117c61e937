"""Random direct reads of 4 KiB at several depths: IOPS, and what each costs.

    python benchmarks/direct_reads.py [--quick] [--uvloop] [--folder F] [--json FILE]

One file, which has been read once, and depth 1, 8, 32, 128. In turn:

- IOContext: a window of requests; what has completed is submitted again at once, as a batch;
- bulk: IOContext.pread_many, at depths above 1; File.pread_many, at the depth of a loop, 128;
- File: that many tasks that call pread; and preadinto;
- polling: the same, looking for completions for a while before sleeping (never on uvloop);
- fio with its libaio engine: as it is by default, and in batches of up to the depth;
- threads: that many, each of which calls os.preadv in a loop.

Each says itself how many reads it made, in what time, and with how much processor time (user and
system; the whole process, of fio its job). Of fio the way that has more IOPS here stands for it.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import os
import shutil
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

# A plain checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rawaio
from benchmarks import files, harness
from rawaio.polling import WeightedRule

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from rawaio.polling import PollingRule

DEPTHS: Final = (1, 8, 32, 128)
NBYTES: Final = files.BLOCK
FILE_NBYTES: Final = 256 << 20
QUICK_FILE_NBYTES: Final = 64 << 20
ROUNDS: Final = 9
QUICK_ROUNDS: Final = 2
SECONDS: Final = 1.0
QUICK_SECONDS: Final = 0.3
# Of docs/design.md, by depth: at least so many times fio's IOPS, and what is aimed at.
BUDGETS: Final = {1: (0.85, 0.95), 8: (0.85, 0.95), 32: (0.95, 1.0), 128: (0.95, 1.0)}
# Operations of one bulk call: much more than any depth, so that the queue is full most of the time.
_BULK: Final = 1024


@dataclass(frozen=True, slots=True)
class Run:
    """What one program did in one turn."""

    operations: int
    wall_s: float
    cpu_s: float

    @property
    def iops(self) -> float:
        """Reads a second."""
        return self.operations / self.wall_s

    @property
    def cpu_us(self) -> float:
        """Processor time of each read, in microseconds."""
        return 1e6 * self.cpu_s / self.operations


# -- what is measured, each in a process of its own ----------------------------------------------


class Watch:
    """How long to go on, and how much was done."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.operations = 0
        self.end = 0.0
        self.wall_s = self.cpu_s = 0.0

    @contextmanager
    def running(self) -> Generator[None]:
        """The time that counts."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        self.end = wall_s + self.seconds
        yield
        self.wall_s = time.perf_counter() - wall_s
        self.cpu_s = time.process_time() - cpu_s

    def offsets(self, source: Iterator[int]) -> Generator[int]:
        """Offsets until the time is over, for one who has a read under way at a time."""
        clock = time.perf_counter
        for operations, offset in enumerate(source):
            if clock() >= self.end:
                self.operations += operations
                return
            yield offset


def check(nbytes: int) -> None:
    if nbytes != NBYTES:
        raise OSError(f"{nbytes} bytes instead of {NBYTES}")


@contextmanager
def opened(path: Path) -> Generator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def context_window(
    path: Path, depth: int, offsets: Iterator[int], watch: Watch, *, rule: PollingRule | None = None
) -> None:
    with opened(path) as fd, rawaio.IOContext(depth, max_batch=depth, polling=rule) as context:
        requests = [
            rawaio.Request.pread(fd, rawaio.aligned_buffer(NBYTES), next(offsets))
            for _ in range(depth)
        ]
        submit, reap, clock = context.submit, context.reap, time.perf_counter
        with watch.running():
            while True:
                submit(*requests)
                completions = reap(1)
                watch.operations += len(completions)
                requests.clear()
                for request, res, _ in completions:
                    check(res)
                    request.offset = next(offsets)
                    requests.append(request)
                if clock() >= watch.end:
                    break
            watch.operations += len(context.drain())


def context_polling(path: Path, depth: int, offsets: Iterator[int], watch: Watch) -> None:
    context_window(path, depth, offsets, watch, rule=WeightedRule())


def context_bulk(path: Path, depth: int, offsets: Iterator[int], watch: Watch) -> None:
    out = rawaio.aligned_buffer(NBYTES * _BULK)
    with opened(path) as fd, rawaio.IOContext(depth, max_batch=depth) as context, watch.running():
        while time.perf_counter() < watch.end:
            context.pread_many(fd, list(islice(offsets, _BULK)), NBYTES, out)
            watch.operations += _BULK


async def file_pread(path: Path, depth: int, offsets: Iterator[int], watch: Watch) -> None:
    async with rawaio.open(path, engine="aio") as file:

        async def task() -> None:
            for offset in watch.offsets(offsets):
                check(len(await file.pread(NBYTES, offset)))

        with watch.running():
            await asyncio.gather(*(task() for _ in range(depth)))


async def file_preadinto(path: Path, depth: int, offsets: Iterator[int], watch: Watch) -> None:
    async with rawaio.open(path, engine="aio") as file:

        async def task() -> None:
            buffer = rawaio.aligned_buffer(NBYTES)
            for offset in watch.offsets(offsets):
                check(await file.preadinto(buffer, offset))

        with watch.running():
            await asyncio.gather(*(task() for _ in range(depth)))


async def file_bulk(path: Path, depth: int, offsets: Iterator[int], watch: Watch) -> None:
    del depth  # is rawaio's own
    out = rawaio.aligned_buffer(NBYTES * _BULK)
    async with rawaio.open(path, engine="aio") as file:
        with watch.running():
            while time.perf_counter() < watch.end:
                await file.pread_many(list(islice(offsets, _BULK)), NBYTES, out)
                watch.operations += _BULK


def threads_preadv(path: Path, depth: int, offsets: Iterator[int], watch: Watch) -> None:
    lock = threading.Lock()

    def task(source: Iterator[int]) -> None:
        buffer = rawaio.aligned_buffer(NBYTES)
        operations = 0
        for offset in source:
            if time.perf_counter() >= watch.end:
                break
            check(os.preadv(fd, [buffer], offset))
            operations += 1
        with lock:
            watch.operations += operations

    with opened(path) as fd:
        order = list(islice(offsets, 8192))
        step = len(order) // depth
        threads = [
            threading.Thread(target=task, args=(cycle(order[i * step :] + order[: i * step]),))
            for i in range(depth)
        ]
        with watch.running():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


WAYS: Final[dict[str, Callable[[Path, int, Iterator[int], Watch], Any]]] = {
    "rawaio/IOContext": context_window,
    "rawaio/IOContext, polling": context_polling,
    "rawaio/IOContext, bulk": context_bulk,
    "rawaio/File.pread": file_pread,
    "rawaio/File.pread, polling": file_pread,
    "rawaio/File.preadinto": file_preadinto,
    "rawaio/File.pread_many": file_bulk,
    "threads/os.preadv": threads_preadv,
}
# File.pread_many has a depth of its own, that of a whole loop.
ONLY_AT: Final = {"rawaio/File.pread_many": DEPTHS[-1:], "rawaio/IOContext, bulk": DEPTHS[1:]}


def work(name: str, path: Path, depth: int, seconds: float, loop: str) -> Run:
    """Do one of our programs, in this process."""
    offsets = cycle(files.random_offsets(path.stat().st_size, 1 << 16))
    watch = Watch(seconds)
    way = WAYS[name]
    if inspect.iscoroutinefunction(way):

        async def main() -> None:
            await way(path, depth, offsets, watch)

        files.run_in_loop(main, "polling" if name.endswith(", polling") else loop)
    else:
        way(path, depth, offsets, watch)
    return Run(watch.operations, watch.wall_s, watch.cpu_s)


def own_command(name: str, path: Path, depth: int, seconds: float, loop: str) -> list[str]:
    script = str(Path(__file__).resolve())
    return [sys.executable, script, "--work", name, str(path), str(depth), str(seconds), loop]


def own_run(output: str) -> Run:
    return Run(**json.loads(output))


def fio_options(name: str, depth: int) -> list[str]:
    if name == "fio/default":
        return []
    return [
        f"--iodepth_batch_submit={depth}",
        "--iodepth_batch_complete_min=1",
        f"--iodepth_batch_complete_max={depth}",
    ]


# Each way in which fio could be faster.
FIO: Final = ("fio/default", "fio/batches")


def fio_command(name: str, path: Path, depth: int, seconds: float) -> list[str]:
    return [
        "fio",
        "--name=reads",
        "--ioengine=libaio",
        f"--filename={path}",
        "--readonly",
        "--rw=randread",
        "--norandommap",
        "--direct=1",
        f"--bs={NBYTES}",
        f"--iodepth={depth}",
        "--thread",
        "--gtod_reduce=1",
        "--time_based",
        f"--runtime={round(1e3 * seconds)}ms",
        "--output-format=json",
        *fio_options(name, depth),
    ]


def fio_run(output: str) -> Run:
    """What fio says of its one job."""
    job = json.loads(output[output.index("{") :])["jobs"][0]
    wall_s = job["read"]["runtime"] / 1e3
    # Of the job's whole time, in percent.
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return Run(job["read"]["total_ios"], wall_s, cpu_s)


# -- putting it together -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One program at one depth, to be run."""

    name: str
    depth: int
    command: Sequence[str]
    read: Callable[[str], Run]


def find_cells(path: Path, seconds: float, loop: str) -> tuple[list[Cell], list[str]]:
    """What can be measured here, and what is missing, each with the reason."""
    missing: list[str] = []
    cells = [
        Cell(name, depth, own_command(name, path, depth, seconds, loop), own_run)
        for depth in DEPTHS
        for name in WAYS
        if depth in ONLY_AT.get(name, DEPTHS)
    ]
    if shutil.which("fio"):
        cells += [
            Cell(name, depth, fio_command(name, path, depth, seconds), fio_run)
            for depth in DEPTHS
            for name in FIO
            if depth > 1 or name == "fio/default"
        ]
    else:
        missing.append("fio: not installed")
    return cells, missing


def measure(cells: Sequence[Cell], rounds: int) -> dict[int, dict[str, list[Run]]]:
    """Runs by depth and name, in turn.

    Raises:
        ProgramError, OSError: a program failed.
    """
    runs: dict[int, dict[str, list[Run]]] = {depth: {} for depth in DEPTHS}
    for depth in DEPTHS:
        here = [cell for cell in cells if cell.depth == depth]
        for round_, cell in harness.in_turn(here, rounds):
            harness.say(f"depth {depth}, round {round_ + 1} of {rounds}: {cell.name}")
            run = cell.read(harness.output_of(cell.command))
            if not run.operations:
                raise harness.ProgramError(f"{cell.name} at depth {depth} has read nothing")
            runs[depth].setdefault(cell.name, []).append(run)
    return runs


@dataclass(frozen=True, slots=True)
class Comparison:
    """One of rawaio's ways at one depth, beside a rival: how many times its figures."""

    depth: int
    name: str
    rival: str
    iops: harness.Ratio
    cpu: harness.Ratio
    verdict: str


@dataclass(frozen=True, slots=True)
class Report:
    """What is written as JSON. Runs are by depth and name, in the order of the rounds."""

    benchmark: str
    where: dict[str, object]
    loop: str
    nbytes: int
    seconds: float
    runs: dict[int, dict[str, list[Run]]]
    comparisons: list[Comparison]
    missing: list[str]


def compare(runs: dict[int, dict[str, list[Run]]]) -> list[Comparison]:
    """Each of rawaio's ways with the best of fio, and with threads, at each depth."""
    comparisons: list[Comparison] = []
    for depth, by_name in runs.items():
        for rival in ("fio", "threads"):
            names = [name for name in by_name if name.partition("/")[0] == rival]
            if not names:
                continue
            best = max(names, key=lambda name: statistics.median(iops_of(by_name[name])))
            for name, own in by_name.items():
                if name.partition("/")[0] != "rawaio":
                    continue
                iops = harness.compare(iops_of(own), iops_of(by_name[best]))
                cpu = harness.compare(cpu_of(own), cpu_of(by_name[best]))
                verdict = judge(iops.median, depth) if rival == "fio" else ""
                comparisons.append(Comparison(depth, name, best, iops, cpu, verdict))
    return comparisons


def iops_of(runs: Sequence[Run]) -> list[float]:
    return [run.iops for run in runs]


def cpu_of(runs: Sequence[Run]) -> list[float]:
    return [run.cpu_us for run in runs]


def judge(ratio: float, depth: int) -> str:
    """What becomes of the budget, of a ratio of IOPS."""
    budget, aim = BUDGETS[depth]
    return "aim" if ratio >= aim else "within" if ratio >= budget else "BELOW"


def render(report: Report) -> str:
    """What a terminal shows."""
    names = {name for by_name in report.runs.values() for name in by_name}
    width = max(map(len, names), default=0)
    lines = [f"{harness.render_machine(report.where)}, {report.loop}"]
    for depth, by_name in report.runs.items():
        if not by_name:
            continue
        lines += ["", f"depth {depth}: IOPS, and us of processor time for each read"]
        lines += [f"{'':{width}}   lowest   median  highest     lowest   median  highest"]
        for name, runs in by_name.items():
            iops = "".join(f"{f(iops_of(runs)):9.0f}" for f in (min, statistics.median, max))
            cpu = "".join(f"{f(cpu_of(runs)):9.2f}" for f in (min, statistics.median, max))
            lines.append(f"{name:{width}}{iops}  {cpu}")
        for each in report.comparisons:
            if each.depth == depth:
                lines.append(
                    f"{each.name} has {each.iops.median:.2f} times the IOPS of {each.rival} at "
                    f"{each.cpu.median:.2f} times the processor time   {each.verdict}".rstrip()
                )
    budgets = ", ".join(f"{depth}: {least} (aim {aim})" for depth, (least, aim) in BUDGETS.items())
    lines += ["", f"IOPS are to be, times fio's, at depth {budgets}"]
    lines += [f"missing: {reason}" for reason in report.missing]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when a program failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a smaller file")
    parser.add_argument("--uvloop", action="store_true", help="on uvloop instead of asyncio's loop")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the file is made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        name, path, depth, seconds, loop = arguments.work
        print(json.dumps(asdict(work(name, Path(path), int(depth), float(seconds), loop))))
        return 0
    loop = "uvloop" if arguments.uvloop else "asyncio"
    nbytes = QUICK_FILE_NBYTES if arguments.quick else FILE_NBYTES
    seconds = QUICK_SECONDS if arguments.quick else SECONDS
    try:
        with files.temporary_file(arguments.folder, nbytes) as path:
            files.drop_cache(path)
            files.warm(path, direct=True)
            cells, missing = find_cells(path, seconds, loop)
            runs = measure(cells, QUICK_ROUNDS if arguments.quick else ROUNDS)
    except (harness.ProgramError, OSError) as error:
        print(f"direct_reads: {error}", file=sys.stderr)
        return 1
    report = Report(
        "direct_reads", harness.machine(), loop, NBYTES, seconds, runs, compare(runs), missing
    )
    print(render(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

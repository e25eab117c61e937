"""How throughput grows with threads, each with an IOContext of its own.

    python benchmarks/threads.py [--quick] [--json FILE]

Reads 512 bytes of /dev/zero, which completes inside io_submit, in two ways:

- requests: `submit(*requests)` with 32, `reap(min_nr=32)`, and again;
- many: `pread_many`, 8192 at a time.

One thread, two, and as many as there are CPUs, and beside them as many processes with one thread
each: they share no interpreter, and tell what the machine gives. Throughput is by the clock, from
the first begun to the last ended; processor time is that of the threads. Each round's figures are
compared with one thread's of the same round.

With the GIL threads take turns in Python, and only system calls run at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

# A plain checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rawaio
from benchmarks import harness

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEPTH: Final = 32
NBYTES: Final = 512
MANY: Final = 8192
# Of each thread: half a second of work or so.
OPERATIONS: Final = {"requests": 256_000, "many": 64 * MANY}
ROUNDS: Final = 11
QUICK_ROUNDS: Final = 3
KINDS: Final = ("threads", "processes")


@dataclass(frozen=True, slots=True)
class Span:
    """What one thread took."""

    begun: float
    ended: float
    cpu: float


# -- what is measured, in a process of its own ---------------------------------------------------


def requests(context: rawaio.IOContext, fd: int, operations: int) -> None:
    batch = [rawaio.Request.pread(fd, rawaio.aligned_buffer(NBYTES), 0) for _ in range(DEPTH)]
    for _ in range(operations // DEPTH):
        context.submit(*batch)
        for completion in context.reap(min_nr=DEPTH):
            check(completion.res)


def check(res: int) -> None:
    if res != NBYTES:
        raise OSError(f"res is {res}, not {NBYTES}")


def many(context: rawaio.IOContext, fd: int, operations: int) -> None:
    offsets = array("q", range(0, MANY * NBYTES, NBYTES))
    out = rawaio.aligned_buffer(MANY * NBYTES)
    for _ in range(operations // MANY):
        context.pread_many(fd, offsets, NBYTES, out)


WAYS: Final[dict[str, Callable[[rawaio.IOContext, int, int], None]]] = {
    "requests": requests,
    "many": many,
}


def measure(way: str, operations: int, begin: Callable[[], object]) -> Span:
    """Do them in this thread, when begin returns; what it was used for before does not count."""
    run = WAYS[way]
    fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with rawaio.IOContext(DEPTH) as context:
            run(context, fd, max(MANY, DEPTH))
            begin()
            cpu, begun = time.thread_time(), time.perf_counter()
            run(context, fd, operations)
            ended = time.perf_counter()
            return Span(begun, ended, time.thread_time() - cpu)
    finally:
        os.close(fd)


def in_threads(way: str, n: int, operations: int) -> list[Span]:
    """Do so many operations in each of n threads."""
    spans: list[Span] = []
    barrier = threading.Barrier(n)

    def run() -> None:
        try:
            spans.append(measure(way, operations, barrier.wait))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(spans) != n:
        raise RuntimeError(f"{n - len(spans)} of {n} threads failed")
    return spans


def in_processes(way: str, n: int, operations: int) -> list[Span]:
    """Do so many operations in each of n processes."""
    ready, go, told = os.pipe(), os.pipe(), os.pipe()
    children: list[int] = []
    for _ in range(n):
        pid = os.fork()
        if pid == 0:
            _child(way, operations, ready, go, told)
        children.append(pid)
    for fd in (ready[1], go[0], told[1]):
        os.close(fd)
    with open(ready[0], "rb") as waiting:
        all_ready = waiting.read(n)
    os.close(go[1])  # all at once
    with open(told[0], encoding="ascii") as lines:
        spans = [Span(*map(float, line.split())) for line in lines]
    failed = [pid for pid in children if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    if failed or len(all_ready) != n or len(spans) != n:
        raise RuntimeError(f"{len(failed)} of {n} processes failed")
    return spans


def _child(
    way: str, operations: int, ready: tuple[int, int], go: tuple[int, int], told: tuple[int, int]
) -> None:
    status = 1
    try:
        for fd in (ready[0], go[1], told[0]):
            os.close(fd)

        def begin() -> None:
            os.write(ready[1], b"x")
            os.close(ready[1])
            os.read(go[0], 1)  # the end of the pipe: no byte comes

        span = measure(way, operations, begin)
        # The clock is one for the whole machine. A line is short enough to be written whole.
        os.write(told[1], f"{span.begun!r} {span.ended!r} {span.cpu!r}\n".encode())
        status = 0
    finally:
        os._exit(status)


def work(kind: str, way: str, n: int, operations: int) -> list[Span]:
    """Do so many operations in each of n threads, or processes."""
    return (in_threads if kind == "threads" else in_processes)(way, n, operations)


# -- putting it together -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """Seconds for each operation of all together."""

    wall: float
    cpu: float


def figure(spans: Sequence[Span], operations: int) -> Figure:
    """operations: of each."""
    total = operations * len(spans)
    wall = max(span.ended for span in spans) - min(span.begun for span in spans)
    return Figure(wall / total, sum(span.cpu for span in spans) / total)


@dataclass(frozen=True, slots=True)
class Program:
    """Something to measure."""

    kind: str
    way: str
    n: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.way}/{self.kind} {self.n}"

    @property
    def alone(self) -> str:
        """The name of what it is compared with."""
        return f"{self.way}/threads 1"


def find_programs() -> list[Program]:
    """One thread, two, and one for each CPU; and as many processes."""
    numbers = sorted({2, len(os.sched_getaffinity(0))} - {1})
    return [
        program
        for way in WAYS
        for program in (
            Program("threads", way, 1),
            *(Program(kind, way, n) for n in numbers for kind in KINDS),
        )
    ]


def run(program: Program) -> Figure:
    """Measure one in an interpreter of its own.

    Raises:
        ProgramError: it failed.
    """
    operations = OPERATIONS[program.way]
    command = [sys.executable, str(Path(__file__).resolve()), "--work", program.kind, program.way]
    answer = harness.output_of([*command, str(program.n), str(operations)])
    return figure([Span(*span) for span in json.loads(answer)], operations)


@dataclass(frozen=True, slots=True)
class Report:
    """What is written as JSON. Seconds are for each operation, by name and round."""

    benchmark: str
    where: dict[str, object]
    gil: bool
    nbytes: int
    operations: dict[str, int]
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    #: Times the throughput, and the processor time of an operation, of one thread.
    throughput: dict[str, harness.Ratio]
    cost: dict[str, harness.Ratio]


def has_gil() -> bool:
    """Whether threads take turns."""
    enabled: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
    return enabled


def make_report(programs: Sequence[Program], figures: dict[str, list[Figure]]) -> Report:
    """Compare each with one thread."""
    wall = {name: [figure.wall for figure in rounds] for name, rounds in figures.items()}
    cpu = {name: [figure.cpu for figure in rounds] for name, rounds in figures.items()}
    more = [program for program in programs if program.n > 1]
    return Report(
        benchmark="threads",
        where=harness.machine(),
        gil=has_gil(),
        nbytes=NBYTES,
        operations=OPERATIONS,
        wall=wall,
        cpu=cpu,
        throughput={p.name: harness.compare(wall[p.alone], wall[p.name]) for p in more},
        cost={p.name: harness.compare(cpu[p.name], cpu[p.alone]) for p in more},
    )


def render(report: Report) -> str:
    """What a terminal shows."""
    width = max(map(len, report.wall))
    gil = "the GIL is on: threads take turns in Python" if report.gil else "there is no GIL"
    lines = [harness.render_machine(report.where), gil]
    lines += harness.render_seconds("us by the clock for each read of all", report.wall, width)
    lines += harness.render_seconds("us of processor time for each read", report.cpu, width)
    for what, ratios in (("throughput", report.throughput), ("processor time", report.cost)):
        rival = harness.Rival(what, f"one thread: {what}", None, None, ratios)
        lines += harness.render_rival(rival, width)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when a program failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--work", nargs=4, metavar=("KIND", "WAY", "N", "OPERATIONS"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args(argv)
    if arguments.work:
        kind, way, n, operations = arguments.work
        spans = work(kind, way, int(n), int(operations))
        print(json.dumps([[span.begun, span.ended, span.cpu] for span in spans]))
        return 0
    programs = find_programs()
    rounds = QUICK_ROUNDS if arguments.quick else ROUNDS
    figures: dict[str, list[Figure]] = {program.name: [] for program in programs}
    try:
        for round_, program in harness.in_turn(programs, rounds):
            harness.say(f"round {round_ + 1} of {rounds}: {program.name}")
            figures[program.name].append(run(program))
    except harness.ProgramError as error:
        print(f"threads: {error}", file=sys.stderr)
        return 1
    report = make_report(programs, figures)
    print(render(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a request costs: one `Request` at a time, used again and again, with no work behind it.

    python benchmarks/null_requests.py [--quick] [--json FILE]

Reads 512 bytes of /dev/zero at depth 32 and takes the processor time of each read, beside fio's
libaio engine (C) and python-libaio 0.9.5 (ctypes) with blocks that are used again. /dev/zero
completes inside io_submit, so that what is measured is the way in and out, in user space and in
the kernel. Of fio and of python-libaio the configuration that is best here, by some rounds before
the others, stands for it.

rawaio is measured in several ways of use, through the ring and through io_getevents:

- batch: `submit(*requests)` with all 32, `reap(min_nr=32)`;
- plugged: `with plugged():`, `submit(request)` one by one, `reap(min_nr=32)`;
- window: `reap(min_nr=1)`, and what has completed is submitted again at once, one by one, plugged;
- batch+offset, plugged+offset: the same, each request with a new offset.

fio comes as the package fio; python-libaio by `pip install libaio==0.9.5`, with libaio's headers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
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
LIBAIO_VERSION: Final = "0.9.5"
# A few tenths of a second of work for each: short, so that what is compared is not far apart.
OPERATIONS: Final = {"rawaio": 256_000, "fio": 512_000, "python-libaio": 96_000}
ROUNDS: Final = 15
QUICK_ROUNDS: Final = 5
# Before these, to find each rival's best configuration.
TRIAL_ROUNDS: Final = 3
# Of docs/design.md: at most so many times the rival's time, and what is aimed at.
BUDGETS: Final = {"fio": (2.5, 2.0), "python-libaio": (0.5, 0.33)}


# -- what is measured, each in a process of its own ----------------------------------------------


def rawaio_requests(fd: int) -> list[rawaio.Request]:
    return [rawaio.Request.pread(fd, rawaio.aligned_buffer(NBYTES), 0) for _ in range(DEPTH)]


def rawaio_batch(context: rawaio.IOContext, fd: int, operations: int) -> None:
    requests = rawaio_requests(fd)
    for _ in range(operations // DEPTH):
        context.submit(*requests)
        for completion in context.reap(min_nr=DEPTH):
            check(completion.res)


def rawaio_batch_offset(context: rawaio.IOContext, fd: int, operations: int) -> None:
    requests = rawaio_requests(fd)
    offsets = count(0, NBYTES)
    for _ in range(operations // DEPTH):
        for request in requests:
            request.offset = next(offsets)
        context.submit(*requests)
        for completion in context.reap(min_nr=DEPTH):
            check(completion.res)


def rawaio_plugged(context: rawaio.IOContext, fd: int, operations: int) -> None:
    requests = rawaio_requests(fd)
    submit = context.submit
    for _ in range(operations // DEPTH):
        with context.plugged():
            for request in requests:
                submit(request)
        for completion in context.reap(min_nr=DEPTH):
            check(completion.res)


def rawaio_plugged_offset(context: rawaio.IOContext, fd: int, operations: int) -> None:
    requests = rawaio_requests(fd)
    submit = context.submit
    offsets = count(0, NBYTES)
    for _ in range(operations // DEPTH):
        with context.plugged():
            for request in requests:
                request.offset = next(offsets)
                submit(request)
        for completion in context.reap(min_nr=DEPTH):
            check(completion.res)


def rawaio_window(context: rawaio.IOContext, fd: int, operations: int) -> None:
    submit = context.submit
    submit(*rawaio_requests(fd))
    left = operations - DEPTH
    while left > 0:
        completions = context.reap(min_nr=1)
        with context.plugged():
            for completion in completions:
                check(completion.res)
                submit(completion.request)
        left -= len(completions)
    for completion in context.drain():
        check(completion.res)


def check(res: int) -> None:
    if res != NBYTES:
        raise OSError(f"res is {res}, not {NBYTES}")


def libaio_batch(fd: int, operations: int, *, move: bool = False) -> None:
    import libaio

    blocks = [
        libaio.AIOBlock(libaio.AIOBLOCK_MODE_READ, fd, [rawaio.aligned_buffer(NBYTES)])
        for _ in range(DEPTH)
    ]
    offsets = count(0, NBYTES)
    with libaio.AIOContext(DEPTH) as context:
        for _ in range(operations // DEPTH):
            if move:
                for block in blocks:
                    block.offset = next(offsets)
            if context.submit(blocks) != DEPTH:
                raise OSError("not all blocks were submitted")
            for _block, res, _res2 in context.getEvents(min_nr=DEPTH, nr=DEPTH):
                check(res)


RAWAIO: Final[dict[str, Callable[[rawaio.IOContext, int, int], None]]] = {
    "batch": rawaio_batch,
    "batch+offset": rawaio_batch_offset,
    "plugged": rawaio_plugged,
    "plugged+offset": rawaio_plugged_offset,
    "window": rawaio_window,
}
MECHANISMS: Final = {"ring": False, "io_getevents": True}
LIBAIO: Final[dict[str, Callable[[int, int], None]]] = {
    "batch": libaio_batch,
    "batch+offset": partial(libaio_batch, move=True),
}


def work(name: str, operations: int) -> None:
    """Do one of our programs, in this process."""
    with ExitStack() as stack:
        fd = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        program, way, *mechanism = name.split("/")
        if program == "python-libaio":
            LIBAIO[way](fd, operations)
            return
        force_syscalls = MECHANISMS[mechanism[0]]
        context = stack.enter_context(rawaio.IOContext(DEPTH, force_syscalls=force_syscalls))
        RAWAIO[way](context, fd, operations)
        if context.statistics().mechanism != mechanism[0]:
            raise OSError(f"there is no ring to read here: {context.why_not_ring}")


def own_command(name: str, operations: int) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--work", name, str(operations)]


def fio_command(options: Sequence[str], operations: int) -> list[str]:
    return [
        "fio",
        "--name=null",
        "--ioengine=libaio",
        "--filename=/dev/zero",
        "--rw=read",
        f"--bs={NBYTES}",
        f"--iodepth={DEPTH}",
        f"--iodepth_batch_submit={DEPTH}",
        "--thread",
        f"--size={NBYTES * operations}",
        f"--number_ios={operations}",
        "--output-format=terse",
        *options,
    ]


# Each way in which fio could be cheaper; its defaults are the first.
FIO: Final = {
    f"fio/{'ring' if reap else 'io_getevents'}, min {least}{', gtod_reduce' if gtod else ''}": [
        f"--iodepth_batch_complete_min={least}",
        f"--iodepth_batch_complete_max={DEPTH}",
        *(["--userspace_reap"] if reap else []),
        *(["--gtod_reduce=1"] if gtod else []),
    ]
    for reap in (False, True)
    for least in (1, DEPTH)
    for gtod in (False, True)
}


# -- putting it together -------------------------------------------------------------------------


def find_programs() -> tuple[list[harness.Program], list[str]]:
    """What can be measured here, and which rivals are missing, each with the reason."""

    def add(name: str, command: Callable[[int], Sequence[str]]) -> None:
        programs.append(harness.Program(name, command, OPERATIONS[name.partition("/")[0]]))

    programs: list[harness.Program] = []
    missing: list[str] = []
    for way in RAWAIO:
        for mechanism in MECHANISMS:
            name = f"rawaio/{way}/{mechanism}"
            add(name, partial(own_command, name))
    if shutil.which("fio"):
        for name, options in FIO.items():
            add(name, partial(fio_command, options))
    else:
        missing.append("fio: not installed")
    if (reason := harness.version_of("libaio", LIBAIO_VERSION)) is None:
        for way in LIBAIO:
            name = f"python-libaio/{way}"
            add(name, partial(own_command, name))
    else:
        missing.append(f"python-libaio: {reason}")
    return programs, missing


@dataclass(frozen=True, slots=True)
class Report:
    """What is written as JSON. Seconds are by name and round."""

    benchmark: str
    where: dict[str, object]
    depth: int
    nbytes: int
    operations: dict[str, int]
    seconds_per_operation_trial: dict[str, list[float]]
    seconds_per_operation: dict[str, list[float]]
    rivals: list[harness.Rival]
    missing: list[str]


def choose(trial: dict[str, list[float]]) -> dict[str, str]:
    """The best configuration of each rival that is there."""
    groups = {rival: [name for name in trial if belongs(name, rival)] for rival in BUDGETS}
    return {rival: harness.best(trial, group) for rival, group in groups.items() if group}


def belongs(name: str, program: str) -> bool:
    return name.partition("/")[0] == program


def make_report(
    missing: list[str],
    chosen: dict[str, str],
    trial: dict[str, list[float]],
    seconds: dict[str, list[float]],
) -> Report:
    """Compare each of rawaio's ways with each rival's best."""
    rivals = [
        harness.Rival(
            rival,
            best,
            *BUDGETS[rival],
            {
                name: harness.compare(rounds, seconds[best])
                for name, rounds in seconds.items()
                if belongs(name, "rawaio")
            },
        )
        for rival, best in chosen.items()
    ]
    return Report(
        benchmark="null_requests",
        where=harness.machine(),
        depth=DEPTH,
        nbytes=NBYTES,
        operations=OPERATIONS,
        seconds_per_operation_trial=trial,
        seconds_per_operation=seconds,
        rivals=rivals,
        missing=missing,
    )


def render(report: Report) -> str:
    """What a terminal shows."""
    width = max(map(len, (*report.seconds_per_operation, *report.seconds_per_operation_trial)))
    lines = [harness.render_machine(report.where)]
    what = "us of processor time for each read"
    for when, seconds in (
        ("configurations of rivals", report.seconds_per_operation_trial),
        ("paired rounds", report.seconds_per_operation),
    ):
        lines += harness.render_seconds(f"{what}, {when}", seconds, width)
    for rival in report.rivals:
        lines += harness.render_rival(rival, width)
    lines += ["", *(f"missing: {reason}" for reason in report.missing)]
    return "\n".join(lines).rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0, or 1 when a program failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--work", nargs=2, metavar=("NAME", "OPERATIONS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        name, operations = arguments.work
        work(name, int(operations))
        return 0
    programs, missing = find_programs()
    rivals = [program for program in programs if not belongs(program.name, "rawaio")]
    try:
        trial = harness.run(rivals, TRIAL_ROUNDS, say=harness.say)
        chosen = choose(trial)
        paired = [p for p in programs if p not in rivals or p.name in chosen.values()]
        seconds = harness.run(paired, QUICK_ROUNDS if arguments.quick else ROUNDS, say=harness.say)
    except harness.ProgramError as error:
        print(f"null_requests: {error}", file=sys.stderr)
        return 1
    report = make_report(missing, chosen, trial, seconds)
    print(render(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(report), indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

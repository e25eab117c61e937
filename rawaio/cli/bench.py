"""`python3 -m rawaio bench`: random direct reads, by rawaio and by `os.preadv`, side by side.

Measuring gives `Slice`s, which `summarize` makes into `Cell`s, which `render_text` and
`render_json` show. Every engine reads the same blocks in the same order. The time of a cell is cut
into rounds, and in each round every engine has its turn, so that a disk that becomes faster or
slower does so for all of them.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import math
import os
import platform
import random
import resource
import stat
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Final, Protocol

import rawaio
from rawaio.geometry import find_geometry

from ._path import mount_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from typing import TextIO

__all__ = [
    "BenchError",
    "Cell",
    "Report",
    "Settings",
    "Slice",
    "Target",
    "add_arguments",
    "render_json",
    "render_text",
    "run",
    "summarize",
]

# A slice lasts this long at most, which bounds the latencies that are kept one by one.
_LONGEST_SLICE_S: Final = 1.0
# So many turns for every engine at least; the spread between them tells what the figures are worth.
_FEWEST_ROUNDS: Final = 4
# So many submits per look whether the thread slept inside: a look costs as much as a read's own
# Python part.
_SUBMITS_PER_LOOK: Final = 16
# Above this share of the calls looked at, "submit blocks" is "yes". One in a hundred may fall
# asleep for reasons of its own: a page fault, a lock of the file.
_BLOCKED_SHARE: Final = 0.05
# Blocks before the order repeats. Keeping more would not make the order any more random to a disk.
_MOST_BLOCKS: Final = 1 << 16
# Bits of a latency that are kept: a step of less than 1 %, and at most some thousand steps.
_LATENCY_BITS: Final = 8
_CHUNK: Final = 1 << 20
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
# File systems without a disk.
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


class BenchError(Exception):
    """Why there is nothing to measure; the message is for the user."""


# -- what is asked -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure."""

    path: str | None  # None: a temporary file in the current directory
    seconds: float  # in each cell
    depths: tuple[int, ...]
    block_size: int  # bytes
    size: int  # bytes: of the temporary file, or of the beginning of path that is read
    seed: int

    @property
    def rounds(self) -> int:
        """Turns of every engine in each of its cells."""
        return max(_FEWEST_ROUNDS, math.ceil(self.seconds / _LONGEST_SLICE_S))


def parse_size(text: str) -> int:
    """Bytes, from a number with an optional k, M, G or T (powers of 1024).

    Raises:
        ArgumentTypeError: something else, or not above 0.
    """
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    digits = number.rstrip("kmgt")
    unit = _UNITS.get(number[len(digits) :])
    if unit is None or not _is_number(digits):
        raise argparse.ArgumentTypeError(
            f"a number above 0 with an optional k, M, G or T is needed, not {text!r}"
        )
    return int(digits) * unit


def parse_depths(text: str) -> tuple[int, ...]:
    """Depths, from numbers with commas between them; each once, in the order given.

    Raises:
        ArgumentTypeError: something else, or a number below 1.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(map(_is_number, words)):
        raise argparse.ArgumentTypeError(
            f"numbers above 0 with commas between them are needed, not {text!r}"
        )
    return tuple(dict.fromkeys(map(int, words)))


def parse_seconds(text: str) -> float:
    """Seconds above 0.

    Raises:
        ArgumentTypeError: something else.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 is needed, not {text!r}")
    return seconds


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a file or a block device to read, which is never written to; "
        "without it a temporary file is made in the current directory",
    )
    parser.add_argument(
        "--seconds",
        type=parse_seconds,
        default=1.0,
        help="how long each engine is measured at each depth (default: %(default)s)",
    )
    parser.add_argument(
        "--depths",
        type=parse_depths,
        default=(1, 8, 32, 128),
        metavar="N,N,...",
        help="how many reads are under way at a time (default: 1,8,32,128)",
    )
    parser.add_argument(
        "--block-size",
        type=parse_size,
        default=4096,
        metavar="BYTES",
        help="bytes in each read (default: 4k)",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default=256 << 20,
        metavar="BYTES",
        help="size of the temporary file; of PATH, how much of its beginning is read "
        "(default: 256M)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the order of the blocks (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


# -- what is read --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """An open file and what is known of it."""

    fd: int
    path: str
    kind: str  # "temporary file", "file" or "block device"
    file_system: str  # "" when not known
    direct: bool  # opened with O_DIRECT
    memory_alignment: int  # bytes, of buffers
    nr_blocks: int  # that are read, from the beginning
    warnings: tuple[str, ...]


def _describe(fd: int, path: str, kind: str, size: int, settings: Settings) -> Target:
    """Find out how the file can be read; leaves fd with O_DIRECT set if it can be."""
    mount = None if kind == "block device" else mount_of(fd)
    file_system = mount.file_system if mount else ""
    block_size = settings.block_size
    on = f" on {file_system}" if file_system else ""
    warnings: list[str] = []
    memory_alignment = 1
    direct = True
    try:
        geometry = find_geometry(fd)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        direct = False
        warnings.append(
            f"no direct I/O{on}: these are buffered reads, mostly of memory, "
            "and native AIO does them inside io_submit"
        )
    else:
        memory_alignment = geometry.memory_alignment
        if geometry.source != "assumed" and block_size % geometry.read_offset_alignment:
            raise BenchError(
                f"direct reads of {path} are of multiples of {geometry.read_offset_alignment} "
                f"bytes, which --block-size {block_size} is not"
            )
        if file_system in _IN_MEMORY:
            warnings.append(
                f"{file_system} keeps its files in memory: there is no disk in these figures"
            )
    nr_blocks = min(size, settings.size) // block_size
    if nr_blocks == 0:
        raise BenchError(
            f"{path} has {min(size, settings.size)} bytes to read, less than one block of "
            f"{block_size}"
        )
    return Target(fd, path, kind, file_system, direct, memory_alignment, nr_blocks, tuple(warnings))


@contextmanager
def existing_target(path: str, settings: Settings) -> Generator[Target]:
    """Open a file or a block device, for reading only.

    Raises:
        BenchError: it is something else, or shorter than a block.
        OSError: stat's, open's.
    """
    # Before opening: to open a FIFO would wait, to open a tape would wind it.
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BenchError(f"{path} is neither a regular file nor a block device")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kind = "file" if stat.S_ISREG(mode) else "block device"
        yield _describe(fd, path, kind, os.lseek(fd, 0, os.SEEK_END), settings)
    finally:
        os.close(fd)


@contextmanager
def temporary_target(directory: str, settings: Settings, progress: Progress) -> Generator[Target]:
    """Make a file without a name, which is gone when it is closed, whatever ends the process.

    Raises:
        BenchError: not enough space.
        OSError: of any of the calls that make it.
    """
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < settings.size:
        raise _no_space(directory, settings.size, free)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        # Bytes that neither a file system nor a disk can keep in less space than they take.
        noise = random.Random(settings.seed)
        for start in range(0, settings.size, _CHUNK):
            progress.show(f"writing {format_size(settings.size)}", start / settings.size)
            data = noise.randbytes(min(_CHUNK, settings.size - start))
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise _no_space(directory, settings.size, start) from None
        progress.show("fsync", 1.0)
        os.fsync(file.fileno())
        yield _describe(file.fileno(), directory, "temporary file", settings.size, settings)


def _no_space(directory: str, wanted: int, free: int) -> BenchError:
    return BenchError(
        f"a temporary file of {format_size(wanted)} does not fit in {directory}, where "
        f"{format_size(free)} are free; take a smaller --size, another directory, or an "
        "existing file as PATH"
    )


def warm(target: Target, settings: Settings, progress: Progress) -> None:
    """Read all the blocks once, in order: hosts of virtual disks serve a first read slowly."""
    span = target.nr_blocks * settings.block_size
    chunk = max(_CHUNK // settings.block_size, 1) * settings.block_size
    buffer = rawaio.aligned_buffer(chunk, max(target.memory_alignment, 4096))
    for start in range(0, span, chunk):
        progress.show(f"reading {format_size(span)} once", start / span)
        wanted = min(chunk, span - start)
        _check_length(os.preadv(target.fd, [buffer[:wanted]], start), wanted)


def _check_length(got: int, wanted: int) -> None:
    if got != wanted:
        raise BenchError(f"a read gave {got} bytes instead of {wanted}; is the file being changed?")


def choose_offsets(nr_blocks: int, block_size: int, seed: int) -> list[int]:
    """Offsets of blocks at random, in bytes; the same for the same arguments."""
    choice = random.Random(seed)
    return choice.choices(
        range(0, nr_blocks * block_size, block_size), k=min(4 * nr_blocks, _MOST_BLOCKS)
    )


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slice:
    """What one engine did in one turn."""

    operations: int
    wall_ns: int
    cpu_ns: int  # user and system, of the whole process
    latencies_ns: Counter[int]  # how many operations took how long, as `count_latencies` has it
    submit_ns: int = 0  # of wall_ns, inside submit
    submit_looks: int = 0  # calls of submit that were looked at
    submit_sleeps: int = 0  # of these, calls in which the thread was put to sleep
    ring_reaps: int = 0
    syscall_reaps: int = 0
    waits: int = 0


class Engine(Protocol):
    """A way to read, at one depth."""

    @property
    def name(self) -> str:
        """What it is called in JSON."""
        ...

    @property
    def label(self) -> str:
        """What it is called in the table."""
        ...

    @property
    def depth(self) -> int:
        """How many reads it keeps under way."""
        ...

    def run(self, offsets: Sequence[int], seconds: float) -> Slice:
        """Read at the offsets, over and over, until the time is over."""
        ...


class AIOEngine:
    """rawaio: a window of requests, each submitted again as soon as it has completed."""

    def __init__(
        self, target: Target, block_size: int, context: rawaio.IOContext, depth: int, name: str
    ) -> None:
        self.name = f"rawaio-{name}"
        self.label = f"rawaio, {name}"
        self.depth = depth
        self.context = context
        self._block_size = block_size
        alignment = max(target.memory_alignment, 4096)
        self._requests = [
            rawaio.Request.pread(target.fd, rawaio.aligned_buffer(block_size, alignment), 0)
            for _ in range(depth)
        ]

    def run(self, offsets: Sequence[int], seconds: float) -> Slice:
        """Read at the offsets, over and over, until the time is over."""
        submit, reap, clock = self.context.submit, self.context.reap, time.perf_counter_ns
        block_size = self._block_size
        latencies: array[int] = array("Q")
        calls = looks = sleeps = slept = submit_ns = 0
        position = cycle(offsets)
        batch: list[rawaio.Request] = self._requests
        for request in batch:
            request.offset = next(position)
        earlier = self.context.statistics()
        cpu_start = time.process_time_ns()
        now = start = clock()
        end = start + round(seconds * 1e9)
        free_since = dict.fromkeys(batch, now)
        while True:
            look = calls % _SUBMITS_PER_LOOK == 0
            calls += 1
            if look:
                looks += 1
                slept = _sleeps()
            before = clock()
            submit(*batch)
            submit_ns += clock() - before
            if look and _sleeps() != slept:
                sleeps += 1
            completions = reap(1)
            now = clock()
            if now >= end:
                break
            batch = []
            for completion in completions:
                if completion.res != block_size:
                    _check_length(completion.result(), block_size)
                request = completion.request
                latencies.append(now - free_since[request])
                free_since[request] = now
                request.offset = next(position)
                batch.append(request)
        completions += self.context.drain()
        now = clock()
        cpu_ns = time.process_time_ns() - cpu_start
        for completion in completions:
            _check_length(completion.result(), block_size)
            latencies.append(now - free_since[completion.request])
        later = self.context.statistics()
        return Slice(
            operations=len(latencies),
            wall_ns=now - start,
            cpu_ns=cpu_ns,
            latencies_ns=count_latencies(latencies),
            submit_ns=submit_ns,
            submit_looks=looks,
            submit_sleeps=sleeps,
            ring_reaps=later.ring_reaps - earlier.ring_reaps,
            syscall_reaps=later.syscall_reaps - earlier.syscall_reaps,
            waits=later.waits - earlier.waits,
        )


def count_latencies(latencies_ns: Iterable[int]) -> Counter[int]:
    """How often each latency occurs, in ns, rounded down to its first 8 bits."""
    return Counter(
        ns >> shift << shift
        for ns in latencies_ns
        for shift in (max(ns.bit_length() - _LATENCY_BITS, 0),)
    )


def _sleeps() -> int:
    """How often this thread has given the processor away to wait for something."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class PreadvEngine:
    """`os.preadv` in as many threads as the depth; at depth 1 in the caller's own."""

    def __init__(
        self, target: Target, block_size: int, pool: ThreadPoolExecutor, depth: int
    ) -> None:
        self.name = "os.preadv" if depth == 1 else "os.preadv-threads"
        self.label = "os.preadv" if depth == 1 else f"os.preadv, {depth} threads"
        self.depth = depth
        self._fd = target.fd
        self._block_size = block_size
        self._pool = pool
        alignment = max(target.memory_alignment, 4096)
        self._buffers = [rawaio.aligned_buffer(block_size, alignment) for _ in range(depth)]

    def run(self, offsets: Sequence[int], seconds: float) -> Slice:
        """Read at the offsets, over and over, until the time is over."""
        latencies: array[int]
        if self.depth == 1:
            cpu_start = time.process_time_ns()
            start = time.perf_counter_ns()
            latencies = self._read(self._buffers[0], offsets, start + round(seconds * 1e9))
        else:
            # The threads are there before the time begins.
            gate = threading.Event()
            end = 0

            def work(i: int) -> array[int]:
                gate.wait()
                return self._read(self._buffers[i], offsets[i :: self.depth] or offsets, end)

            try:
                futures = [self._pool.submit(work, i) for i in range(self.depth)]
                cpu_start = time.process_time_ns()
                start = time.perf_counter_ns()
                end = start + round(seconds * 1e9)
            finally:
                gate.set()  # or the pool would wait for them for ever
            latencies = array("Q")
            for future in futures:
                latencies.extend(future.result())
        wall_ns = time.perf_counter_ns() - start
        cpu_ns = time.process_time_ns() - cpu_start
        return Slice(len(latencies), wall_ns, cpu_ns, count_latencies(latencies))

    def _read(self, buffer: memoryview, offsets: Sequence[int], end: int) -> array[int]:
        preadv, clock = os.preadv, time.perf_counter_ns
        fd, block_size, buffers = self._fd, self._block_size, [buffer]
        latencies: array[int] = array("Q")
        position = cycle(offsets)
        now = clock()
        while True:
            got = preadv(fd, buffers, next(position))
            if got != block_size:
                _check_length(got, block_size)
            before, now = now, clock()
            latencies.append(now - before)
            if now >= end:
                return latencies


def make_engines(
    target: Target, settings: Settings, contexts: Sequence[rawaio.IOContext], stack: ExitStack
) -> list[list[Engine]]:
    """The engines of each depth; contexts are in the order of `open_contexts`."""
    result: list[list[Engine]] = []
    block_size = settings.block_size
    for depth, ring, syscalls in zip(settings.depths, contexts[::2], contexts[1::2], strict=True):
        pool = stack.enter_context(ThreadPoolExecutor(depth))
        result.append(
            [
                AIOEngine(target, block_size, ring, depth, "ring"),
                AIOEngine(target, block_size, syscalls, depth, "io_getevents"),
                PreadvEngine(target, block_size, pool, depth),
            ]
        )
    return result


def open_contexts(settings: Settings, stack: ExitStack) -> list[rawaio.IOContext]:
    """Two contexts for each depth: one that reads the ring if it can, one that does not.

    Raises: as `IOContext`.
    """
    return [
        stack.enter_context(rawaio.IOContext(depth, max_batch=depth, force_syscalls=force_syscalls))
        for depth in settings.depths
        for force_syscalls in (False, True)
    ]


def measure(
    engines: Sequence[Sequence[Engine]],
    offsets: Sequence[int],
    settings: Settings,
    progress: Progress,
) -> list[Cell]:
    """Give every engine its turn in each round; a cell for each of them, in their order."""
    seconds = settings.seconds / settings.rounds
    slices: dict[Engine, list[Slice]] = {engine: [] for group in engines for engine in group}
    nr_turns = len(slices) * settings.rounds
    turn = 0
    for round_ in range(settings.rounds):
        for group in engines:
            # Nobody is always the first, who finds the disk as the depth before has left it.
            first = round_ % len(group)
            for engine in (*group[first:], *group[:first]):
                progress.show(f"depth {engine.depth}, {engine.label}", turn / nr_turns)
                slices[engine].append(engine.run(offsets, seconds))
                turn += 1
    return [summarize(engine, turns) for engine, turns in slices.items()]


# -- figures -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One engine at one depth."""

    engine: str
    label: str
    depth: int
    operations: int
    seconds: float
    iops: float
    iops_of_rounds: tuple[float, ...]
    cpu_us_per_operation: float
    latency_us_p50: float
    latency_us_p99: float
    reaped: str  # "ring", "io_getevents", shares of both, or "" where nothing is reaped
    ring_reaps: int
    syscall_reaps: int
    waits: int
    submit_share: float | None  # of the time, inside submit; None where nothing is submitted
    submit_sleep_share: float | None  # of the submits looked at, those that slept
    submit_blocked: bool | None

    @property
    def spread(self) -> float:
        """How far the round that is furthest from the IOPS is from them, as a share of them."""
        return max(abs(iops - self.iops) for iops in self.iops_of_rounds) / self.iops


def percentile(counts: Counter[int], share: float) -> int:
    """The smallest value that this share of all the values, 0 to 1, do not exceed.

    Raises:
        ValueError: there are no values.
    """
    rank = share * counts.total()
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= rank:
            return value
    raise ValueError("no values")


def summarize(engine: Engine, slices: Sequence[Slice]) -> Cell:
    """What an engine did in all its turns. Every engine has read something in each turn."""
    operations = sum(s.operations for s in slices)
    wall_ns = sum(s.wall_ns for s in slices)
    latencies: Counter[int] = Counter()
    for s in slices:
        latencies.update(s.latencies_ns)
    ring_reaps = sum(s.ring_reaps for s in slices)
    syscall_reaps = sum(s.syscall_reaps for s in slices)
    submit_share = sleep_share = blocked = None
    if looks := sum(s.submit_looks for s in slices):
        submit_share = sum(s.submit_ns for s in slices) / wall_ns
        sleep_share = sum(s.submit_sleeps for s in slices) / looks
        blocked = sleep_share > _BLOCKED_SHARE
    return Cell(
        engine=engine.name,
        label=engine.label,
        depth=engine.depth,
        operations=operations,
        seconds=wall_ns / 1e9,
        iops=operations / wall_ns * 1e9,
        iops_of_rounds=tuple(s.operations / s.wall_ns * 1e9 for s in slices),
        cpu_us_per_operation=sum(s.cpu_ns for s in slices) / operations / 1e3,
        latency_us_p50=percentile(latencies, 0.50) / 1e3,
        latency_us_p99=percentile(latencies, 0.99) / 1e3,
        reaped=describe_reaps(ring_reaps, syscall_reaps),
        ring_reaps=ring_reaps,
        syscall_reaps=syscall_reaps,
        waits=sum(s.waits for s in slices),
        submit_share=submit_share,
        submit_sleep_share=sleep_share,
        submit_blocked=blocked,
    )


def describe_reaps(ring_reaps: int, syscall_reaps: int) -> str:
    """Where completions were read: "ring", "io_getevents", shares of both, or nowhere."""
    if ring_reaps and syscall_reaps:
        return f"ring {ring_reaps / (ring_reaps + syscall_reaps):.1%}, else io_getevents"
    return "ring" if ring_reaps else "io_getevents" if syscall_reaps else ""


@dataclass(frozen=True, slots=True)
class Report:
    """All that is shown."""

    rawaio: str  # its version
    machine: str
    cpus: int
    kernel: str
    python: str
    path: str
    kind: str
    file_system: str
    direct: bool
    span: int  # bytes of the file that the reads are spread over
    block_size: int
    seconds: float
    rounds: int
    seed: int
    why_not_ring: str | None  # why rawaio read no ring here; None: it did
    warnings: tuple[str, ...]
    cells: tuple[Cell, ...]


def make_report(
    target: Target, settings: Settings, why_not_ring: str | None, cells: Iterable[Cell]
) -> Report:
    """Put the cells together with where and how they were measured."""
    return Report(
        rawaio=rawaio.__version__,
        machine=platform.machine(),
        cpus=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        path=target.path,
        kind=target.kind,
        file_system=target.file_system,
        direct=target.direct,
        span=target.nr_blocks * settings.block_size,
        block_size=settings.block_size,
        seconds=settings.seconds,
        rounds=settings.rounds,
        seed=settings.seed,
        why_not_ring=why_not_ring,
        warnings=target.warnings,
        cells=tuple(cells),
    )


# -- showing -------------------------------------------------------------------------------------


def format_size(nbytes: int) -> str:
    """Bytes in the largest unit that they are at least one of, as in "4 KiB"."""
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def format_us(microseconds: float) -> str:
    """Three digits, and no fewer than there are before the point."""
    digits = 2 if microseconds < 9.995 else 1 if microseconds < 99.95 else 0
    return f"{microseconds:,.{digits}f}"


_HEADINGS: Final = (
    "depth",
    "engine",
    "IOPS",
    "spread",
    "CPU us",
    "p50 us",
    "p99 us",
    "reaped from",
    "submit blocks",
)
_LEFT: Final = frozenset({"engine", "reaped from", "submit blocks"})
_EXPLANATION: Final = f"""\
IOPS: reads a second. spread: how far the round furthest from that was from it.
CPU us: processor time of this process for each read, user and system; measuring is part of it.
p50, p99 us: in that time half, and 99 of 100, of the reads were done, counted from the moment
their place in the queue was free.
reaped from: where completions were read; to read the ring takes no system call.
submit blocks: "yes" when more than {_BLOCKED_SHARE:.0%} of the calls put the thread to sleep, which
asynchronous I/O is meant to avoid. In brackets: the share of the time spent inside submit.

Disks are noisy: most are shared, cached by their host, or held to a rate, so figures of another
run, disk or hour cannot be compared with these. Compare rows of the same depth, and take no
difference for real that is smaller than the spread.
"""


def _row(cell: Cell) -> tuple[str, ...]:
    blocked = ""
    if cell.submit_share is not None:
        blocked = f"{'yes' if cell.submit_blocked else 'no'} ({cell.submit_share:.0%})"
    return (
        str(cell.depth),
        cell.label,
        f"{cell.iops:,.0f}",
        f"{cell.spread:.0%}",
        format_us(cell.cpu_us_per_operation),
        format_us(cell.latency_us_p50),
        format_us(cell.latency_us_p99),
        cell.reaped or "-",
        blocked or "-",
    )


def render_text(report: Report) -> str:
    """What a terminal shows."""
    how = "direct" if report.direct else "buffered"
    where = report.path
    if report.kind == "temporary file":
        where = f"a temporary file in {where}"
    if report.file_system:
        where += f" ({report.file_system})"
    block_size, span = format_size(report.block_size), format_size(report.span)
    system = f"Linux {report.kernel} {report.machine}, {report.cpus} CPUs"
    lines = [
        f"rawaio {report.rawaio}, {report.python}, {system}",
        f"Random {how} reads of {block_size} from {span} of {where},",
        f"{report.seconds:g} s for each row, in {report.rounds} rounds, seed {report.seed}.",
        "",
    ]
    rows = [_HEADINGS, *map(_row, report.cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    depth = report.cells[0].depth if report.cells else 0
    for i, row in enumerate(rows):
        if i and report.cells[i - 1].depth != depth:
            depth = report.cells[i - 1].depth
            lines.append("")
        texts = (
            text.ljust(width) if heading in _LEFT else text.rjust(width)
            for text, width, heading in zip(row, widths, _HEADINGS, strict=True)
        )
        lines.append("  ".join(texts).rstrip())
    lines += ["", _EXPLANATION.rstrip("\n")]
    if report.why_not_ring:
        lines += ["", f"rawaio read no ring: {report.why_not_ring}"]
    lines += [f"Warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def render_json(report: Report) -> str:
    """One object: the fields of `Report`, with an object for each cell."""
    return json.dumps(asdict(report), indent=2)


class Progress:
    """One line that says what is going on, on a terminal; nothing elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on = stream.isatty()
        self._shown = ""

    def show(self, doing: str, share: float) -> None:
        """Replace the line. share: of the work that is done, 0 to 1."""
        text = f"{share:4.0%} {doing}"
        if self._on and text != self._shown:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
            self._shown = text

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = ""


# -- the command ---------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, or 1 when there is nothing to measure or no way to.

    Can block: for as long as it measures.
    """
    settings = Settings(
        path=arguments.path,
        seconds=arguments.seconds,
        depths=arguments.depths,
        block_size=arguments.block_size,
        size=arguments.size,
        seed=arguments.seed,
    )
    progress = Progress(sys.stderr)
    try:
        report = bench(settings, progress)
    except (BenchError, rawaio.UnsupportedError, OSError) as error:
        progress.clear()
        for line in (f"rawaio bench: {error}", *getattr(error, "__notes__", ())):
            print(line, file=sys.stderr)
        return 1
    finally:
        progress.clear()
    print(render_json(report) if arguments.json else render_text(report))
    return 0


def bench(settings: Settings, progress: Progress) -> Report:
    """Do it all. Can block: for as long as it measures.

    Raises:
        BenchError: nothing to measure.
        UnsupportedError, OSError: as `IOContext`, or from the file.
    """
    with ExitStack() as stack:
        # First, so that nobody waits for a file that cannot be read.
        contexts = open_contexts(settings, stack)
        if settings.path is None:
            target = temporary_target(os.getcwd(), settings, progress)
        else:
            target = existing_target(settings.path, settings)
        opened = stack.enter_context(target)
        # Their reads end before the file is closed.
        for context in contexts:
            stack.callback(context.close)
        warm(opened, settings, progress)
        engines = make_engines(opened, settings, contexts, stack)
        offsets = choose_offsets(opened.nr_blocks, settings.block_size, settings.seed)
        cells = measure(engines, offsets, settings, progress)
        return make_report(opened, settings, contexts[0].why_not_ring, cells)

"""The ways to read that `rawaio bench` compares."""

from __future__ import annotations

import os
import resource
import threading
import time
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Final, Protocol

import rawaio

from ._bench_target import check_length

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import ExitStack

    from ._bench_settings import Settings
    from ._bench_target import Target

__all__ = [
    "AIOEngine",
    "Engine",
    "PreadvEngine",
    "Slice",
    "count_latencies",
    "make_engines",
    "open_contexts",
]

# So many submits per look whether the thread slept inside: a look costs as much as a read's own
# Python part.
_SUBMITS_PER_LOOK: Final = 16
# Bits of a latency that are kept: a step of less than 1 %, and at most some thousand steps.
_LATENCY_BITS: Final = 8


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
                    check_length(completion.result(), block_size)
                request = completion.request
                latencies.append(now - free_since[request])
                free_since[request] = now
                request.offset = next(position)
                batch.append(request)
        completions += self.context.drain()
        now = clock()
        cpu_ns = time.process_time_ns() - cpu_start
        for completion in completions:
            check_length(completion.result(), block_size)
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
                check_length(got, block_size)
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

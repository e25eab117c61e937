"""The ring with a second process: one that produces events, and one that watches head.

Both have the ring in shared memory, and run at the same time as the test where there are two CPUs.
"""

from __future__ import annotations

import json
import os
import platform
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import repeat

import pytest

from rawaio.ring import CompletionRing, Ordering, libatomic_fence
from tests.support import HEAD, ROOT, TAIL, FakeRing

# i, nr and count are arguments; the event's four fields are all different.
PRODUCER = """
import mmap, os, platform, sys
from rawaio.ring import libatomic_fence

fd, nr, count = map(int, sys.argv[1:])
fence = libatomic_fence() if platform.machine() != "x86_64" else lambda: None
memory = mmap.mmap(fd, os.fstat(fd).st_size)
words = memoryview(memory).cast("I")
events = memoryview(memory)[32 : 32 + 32 * nr].cast("q")
tail = words[3]
for i in range(count):
    after = (tail + 1) % nr
    while after == words[2]:
        os.sched_yield()
    events[4 * tail] = i
    events[4 * tail + 1] = i + 1
    events[4 * tail + 2] = -i
    events[4 * tail + 3] = 7 * i
    fence()
    words[3] = tail = after
"""

# Head only grows; so a value below the one before was never stored.
SAMPLER = """
import json, mmap, os, sys
from itertools import repeat

fd = int(sys.argv[1])
memory = mmap.mmap(fd, os.fstat(fd).st_size)
words = memoryview(memory).cast("I")
stop, seen = len(words) - 1, len(words) - 2
load = words.__getitem__
samples = wrong = moved = last = 0
print("started", flush=True)
while not words[stop]:
    batch = [last, *map(load, repeat(2, 2048))]
    samples += 2048
    moved += batch[1] != batch[-1]
    if batch != sorted(batch):
        wrong += 1
        words[seen] = 1
    last = max(batch)
print(json.dumps([samples, moved, wrong]))
"""

STOP, SEEN = -1, -2  # the last words of the memory, behind the ring
PUBLICATIONS = 2_000_000


@contextmanager
def second_process(
    program: str, fd: int, *arguments: int
) -> Generator[subprocess.Popen[str], None, None]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(fd), *map(str, arguments)],
        pass_fds=[fd],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@contextmanager
def shared_ring(nr: int, *, room: int | None = None) -> Generator[tuple[FakeRing, int], None, None]:
    fd = os.memfd_create("ring")
    try:
        yield FakeRing(nr, fd=fd, room=room), fd
    finally:
        os.close(fd)


def orderings() -> list[tuple[Ordering, Callable[[], object] | None]]:
    """Those that this machine's loads and stores are kept in order by."""
    found: list[tuple[Ordering, Callable[[], object] | None]] = []
    if platform.machine() == "x86_64":
        found.append((Ordering.TSO, None))
    fence = libatomic_fence()
    if fence is not None:
        found.append((Ordering.FENCE, fence))
    return found


@pytest.mark.parametrize("ordering", [Ordering.TSO, Ordering.FENCE])
@pytest.mark.parametrize("nr", [2, 3, 8])
def test_every_event_of_another_process_arrives_once_and_in_order(
    nr: int, ordering: Ordering
) -> None:
    chosen = next((o for o in orderings() if o[0] is ordering), None)
    if chosen is None:
        pytest.skip(f"no {ordering.name} on this machine")
    count = 2500 * nr  # thousands of times round
    with shared_ring(nr) as (fake, fd):
        ring = CompletionRing(fake.address, ordering=chosen)
        rng = random.Random(nr)
        expected = 0
        with second_process(PRODUCER, fd, nr, count) as producer:
            while expected < count:
                n = ring.peek()
                if n == 0:
                    assert producer.poll() is None or ring.peek(), "the producer has ended"
                    os.sched_yield()
                    continue
                ahead = range(expected, expected + n)
                assert ring.decode(n) == [(i, i + 1, -i, 7 * i) for i in ahead]
                assert ring.columns(n) == (
                    list(ahead),
                    [-i for i in ahead],
                    [7 * i for i in ahead],
                )
                n = rng.randint(0, n)
                ring.commit(n)
                expected += n
        assert producer.returncode == 0
        assert ring.peek() == 0


class Watched:
    """A word that a second process samples all the time."""

    def __init__(self, fake: FakeRing, process: subprocess.Popen[str]) -> None:
        self.fake, self.process = fake, process

    @property
    def seen(self) -> bool:
        """Whether a value was seen that is not to be there."""
        return bool(self.fake.words[SEEN])

    def end(self) -> tuple[int, int, int]:
        """Number of samples, of batches of them in which the value has changed, of wrong ones."""
        self.fake.words[STOP] = 1
        output, _ = self.process.communicate()
        assert self.process.returncode == 0
        samples, moved, wrong = json.loads(output)
        return samples, moved, wrong


@contextmanager
def watched_ring() -> Generator[Watched, None, None]:
    # So large that head does not wrap, and hardly any of it is ever touched.
    nr = PUBLICATIONS + 2
    with shared_ring(nr, room=(32 * nr // 4096 + 2) * 4096) as (fake, fd):
        fake.words[HEAD], fake.words[TAIL] = 1, nr - 1
        with second_process(SAMPLER, fd) as sampler:
            assert sampler.stdout is not None
            assert sampler.stdout.readline() == "started\n"
            yield Watched(fake, sampler)


@contextmanager
def untraced() -> Generator[None, None, None]:
    """Without coverage's tracer, with which a loop takes ten times as long."""
    before = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(before)


def test_another_process_never_sees_a_head_that_was_not_stored() -> None:
    with watched_ring() as watched:
        ring = CompletionRing(watched.fake.address, ordering=(Ordering.TSO, None))
        assert ring.peek() == PUBLICATIONS
        commit = ring.commit
        with untraced():
            for n in repeat(1, PUBLICATIONS):
                commit(n)
        assert watched.fake.words[HEAD] == PUBLICATIONS + 1
        samples, _, wrong = watched.end()
        assert samples > 0
        assert wrong == 0


def test_the_sampler_sees_the_zero_that_pack_into_stores_first() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU: two processes are never at it at the same time")
    with watched_ring() as watched:
        memory = watched.fake.memory
        pack_into = struct.Struct("=I").pack_into
        with untraced():
            for head in range(2, 10 * PUBLICATIONS):
                pack_into(memory, 4 * HEAD, head)
                if watched.seen:
                    break
        _, moved, wrong = watched.end()
        if not wrong and not moved:
            pytest.skip("the other process was never given a CPU of its own")
        assert wrong > 0

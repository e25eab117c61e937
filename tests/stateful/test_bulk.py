"""A lane beside a kernel that completes in any order, takes what it likes, and refuses at will.

The kernel reads the iocbs that io_submit is given and remembers them; a completion does what the
operation says, in memory. So an index, an address, a length or an offset that is not right shows in
the bytes, and an operation that is lost, or started twice, in the count.
"""

from __future__ import annotations

import ctypes
import errno
import random
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rawaio
from rawaio import bulk, syscalls
from rawaio.bulk import Bulk, BulkLane
from rawaio.busypoll import BusyPoll
from rawaio.pieces import Pieces
from rawaio.polling import HandlerPolling
from rawaio.ring import CompletionRing, Ordering
from rawaio.syscalls import Opcode
from tests.support import FakeRing, passed

WINDOW = 24
FD = 77
FLAGS = 8
CONTENT = random.Random(5).randbytes(1 << 16)
IOCB = struct.Struct("=QIiHhIQQqQII")


class AnyOrder:
    """io_submit, io_getevents and the ring, by chance."""

    def __init__(self, seed: int, bad: dict[int, int], lagging: set[int]) -> None:
        """bad: errno by offset; positive, of the event; negative, of io_submit.

        lagging: offsets of what completes when nothing else does.
        """
        #: Where completions are, for a lane that looks at it; set by `perform`.
        self.ring: FakeRing | None = None
        self.random = random.Random(seed)
        self.bad = bad
        self.lagging = lagging
        self.started: Counter[int] = Counter()
        #: Those that io_submit failed with, which it may be asked more than once.
        self.refused: set[int] = set()
        self.in_flight: list[tuple[int, int, int, int, int, int]] = []
        self.most = 0
        #: How many were in flight, how many more were offered, and behind which one they end.
        self.offers: list[tuple[int, int, int]] = []
        #: How many each io_getevents waited for, how many were in flight, how many had been
        #: started, and whether that was by the last io_submit.
        self.waits: list[tuple[int, int, int, bool]] = []
        self.took = False
        self.file = bytearray(CONTENT)
        self.numbers = syscalls.numbers()

    def __call__(self, number: Any, ctx_id: Any, *arguments: Any) -> int:
        del ctx_id
        if passed(number) == self.numbers.io_submit:
            before = len(self.started) + len(self.refused)
            result = self.submit(passed(arguments[0]), passed(arguments[1]))
            self.took = len(self.started) + len(self.refused) > before
            if self.ring is not None:
                self.run_on(self.ring)
            return result
        assert passed(number) == self.numbers.io_getevents
        min_nr, nr, buffer, timeout = arguments
        begun = len(self.started) + len(self.refused)
        self.waits.append((passed(min_nr), len(self.in_flight), begun, self.took))
        assert not passed(timeout)
        return self.getevents(passed(min_nr), passed(nr), buffer)

    def run_on(self, ring: FakeRing) -> None:
        """Complete some, behind an io_submit."""
        chance = self.pace()
        if chance >= 0.8:
            return
        if chance >= 0.6:
            self.random.shuffle(self.in_flight)
        self.in_flight.sort(key=lambda one: one[4] in self.lagging)
        n = len(self.in_flight)
        if 0.5 <= chance < 0.7:
            n = self.random.randint(0, n)
        self.produce(ring, n)

    def pace(self) -> float:
        """Below 0.5, all complete when they are submitted, and in order."""
        return self.random.random()

    def produce(self, ring: FakeRing, n: int) -> None:
        for one in self.in_flight[:n]:
            ring.produce(struct.unpack("=QQqq", self.complete(one)))
        del self.in_flight[:n]

    def submit(self, nr: int, pointers: int) -> int:
        assert nr > 0
        begun = len(self.started) + len(self.refused)
        self.offers.append((len(self.in_flight), nr, begun + nr))
        chance = self.random.random()
        if chance < 0.1:
            ctypes.set_errno(self.random.choice([errno.EAGAIN, errno.EINTR]))
            return -1
        accepted = 0
        for at in (ctypes.c_uint64 * nr).from_address(pointers):
            data, key, flags, opcode, prio, fd, buf, nbytes, offset, reserved, *signal = (
                IOCB.unpack(ctypes.string_at(at, IOCB.size))
            )
            assert (key, flags, prio, fd, reserved, signal) == (0, FLAGS, 0, FD, 0, [0, 0])
            assert data & 0xFFFF_FFFF == nbytes
            failure = -self.bad.get(offset, 0)
            if failure > 0:
                if accepted:
                    break
                self.refused.add(data >> 32)
                ctypes.set_errno(failure)
                return -1
            self.started[data >> 32] += 1
            self.in_flight.append((data, opcode, buf, nbytes, offset, at))
            accepted += 1
            if chance < 0.4 and self.random.random() < 0.2:
                break
        self.most = max(self.most, len(self.in_flight))
        return accepted

    def getevents(self, min_nr: int, nr: int, buffer: Any) -> int:
        ring = self.ring
        there = 0 if ring is None else len(ring)
        assert min_nr <= len(self.in_flight) + there, "it would wait for ever"
        if not min_nr or self.random.random() < 0.1:
            interrupted = self.random.random() < 0.5
            # Of 0 events it says nothing, and what was said before is not of them.
            ctypes.set_errno(errno.EINTR if interrupted else errno.EFAULT)
            return -1 if interrupted else 0
        self.random.shuffle(self.in_flight)
        self.in_flight.sort(key=lambda one: one[4] in self.lagging)
        n = self.random.randint(max(min_nr, there), min(nr, len(self.in_flight) + there))
        if ring is None:
            events = b"".join(map(self.complete, self.in_flight[:n]))
            del self.in_flight[:n]
        else:
            self.produce(ring, n - there)
            events = b"".join(ring.consume() for _ in range(n))
        ctypes.memmove(buffer, events, len(events))
        return n

    def complete(self, operation: tuple[int, int, int, int, int, int]) -> bytes:
        data, opcode, buf, nbytes, offset, at = operation
        failure = self.bad.get(offset, 0)
        if failure > 0:
            return struct.pack("=QQqq", data, at, -failure, 0)
        if opcode == Opcode.PREAD:
            part = self.file[offset : offset + nbytes]
            ctypes.memmove(buf, bytes(part), len(part))
            done = len(part)
        else:
            self.file[offset : offset + nbytes] = ctypes.string_at(buf, nbytes)
            done = nbytes
        return struct.pack("=QQqq", data, at, done, 0)


class Looking:
    """A rule by which a lane looks as long as something completes meanwhile, by chance."""

    def __init__(self) -> None:
        self.kernel: AnyOrder | None = None
        #: How often something has completed while it looked.
        self.found = 0

    @property
    def poll_ns(self) -> int:
        kernel = self.kernel
        assert kernel is not None
        assert kernel.ring is not None
        assert not len(kernel.ring), "it looks although there is something"
        kernel.random.shuffle(kernel.in_flight)
        n = kernel.random.randint(0, len(kernel.in_flight))
        kernel.produce(kernel.ring, n)
        self.found += n > 0
        return 1 << 60 if n else 0

    def add(self) -> HandlerPolling:
        return HandlerPolling()

    def remove(self, handler: HandlerPolling) -> None:
        raise AssertionError(handler)

    def adjust(self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int) -> None:
        assert 0 <= block_ns <= now_ns


#: The rings of lanes that look at one, and the rules of those that look before they sleep.
RINGS: dict[BulkLane, FakeRing] = {}
RULES: dict[BulkLane, Looking] = {}


def lane_on(ring: FakeRing, portion: int | None = None, rule: Looking | None = None) -> BulkLane:
    """A lane that looks at this ring, and not at its context's."""
    made = BulkLane(WINDOW, portion=portion)
    if rule is not None:
        made._busy, made._part = BusyPoll(rule), 1
        RULES[made] = rule
    made._ring.close()
    made._ring = CompletionRing(ring.address, ordering=(Ordering.TSO, None))
    made._ring_words = made._ring.events
    made._use_ring = True
    RINGS[made] = ring
    return made


@pytest.fixture(
    scope="module",
    params=[
        (way, portion)
        for way in ("io_getevents", "ring", "polled ring")
        for portion in (None, 1, 5, WINDOW)
    ],
    ids="{0[0]}, portion {0[1]}".format,
)
def lane(request: pytest.FixtureRequest) -> Iterator[BulkLane]:
    """One for all, so that each job comes after others of all kinds."""
    way, portion = request.param
    if way == "polled ring":
        made = lane_on(FakeRing(2 * WINDOW + 3), portion, Looking())
    elif way == "ring":
        made = lane_on(FakeRing(2 * WINDOW + 3), portion)
    else:
        made = BulkLane(WINDOW, portion=portion, force_syscalls=True)
    assert made._portion == (portion or WINDOW)
    # Without a pause: this kernel's shortage is over at once.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "_RETRY_S", 0)
        yield made
    made.close()
    RULES.pop(made, None)
    if made in RINGS:
        RINGS.pop(made).close()


def perform(lane: BulkLane, kernel: AnyOrder, job: Bulk) -> None:
    raw, lane._raw = lane._raw, kernel
    kernel.ring = RINGS.get(lane)
    if lane in RULES:
        RULES[lane].kernel = kernel
    calls = lane.io_submit_calls
    try:
        lane.begin(job)
        lane._rounds(job)
        lane.end()
    finally:
        lane._raw = raw
    assert lane.io_submit_calls - calls == len(kernel.offers)
    assert not kernel.in_flight
    assert kernel.started == Counter(set(range(job.total)) - kernel.refused)
    assert kernel.refused <= job.failures.keys()
    assert kernel.most <= WINDOW
    busy = [(nr, stop) for in_flight, nr, stop in kernel.offers if in_flight]
    assert all(nr <= lane._portion for nr, _ in busy)
    # Without portions a system call is for several, but for the end of a stretch and of the job.
    part = lane._part
    assert all(nr >= part or not stop % bulk._STRETCH or stop == job.total for nr, stop in busy)
    for min_nr, in_flight, started, took in kernel.waits:
        assert min_nr <= part
        # Nobody waits while there is something to start.
        assert not (min_nr and took) or in_flight > lane.window - part or started == job.total


def expected_read(offset: int, length: int, bad: dict[int, int]) -> tuple[int, bytes]:
    """An errno, and the bytes."""
    failure = abs(bad.get(offset, 0))
    return failure, b"" if failure else CONTENT[offset : offset + length]


ERRORS = st.sampled_from([errno.EIO, -errno.EBADF, -errno.EINVAL, errno.EAGAIN])
SIZES = st.sampled_from([1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 200, 511, 512, 513, 1300])


@pytest.mark.parametrize("shape", ["equal", "packed", "scattered"])
@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 1 << 30), st.dictionaries(st.integers(0, 1299), ERRORS, max_size=5))
def test_reads(lane: BulkLane, shape: str, count: int, seed: int, faults: dict[int, int]) -> None:
    chance = random.Random(seed)
    # Some behind the end, and each at an offset of its own, which tells it from the others.
    offsets = chance.sample(range(len(CONTENT) + 100), count)
    lengths = [chance.choice([0, 1, 5, 64]) for _ in offsets]
    bad = {offsets[i]: failure for i, failure in faults.items() if i < count}
    kernel = AnyOrder(seed, bad, set(chance.sample(offsets, min(count, 3))))
    buffers: Any
    if shape == "equal":
        lengths = [17] * count
        memory = bytearray(17 * count)
        pieces = Pieces(offsets, memory, 17, reading=True)
        buffers = [memoryview(memory)[17 * i : 17 * i + 17] for i in range(count)]
    elif shape == "packed":
        pieces = Pieces(offsets, None, lengths=lengths, reading=True)
        assert pieces.made is not None
        starts = [sum(lengths[:i]) for i in range(count)]
        view = memoryview(pieces.made)
        buffers = [view[a : a + n] for a, n in zip(starts, lengths, strict=True)]
    else:
        buffers = [bytearray(n) for n in lengths]
        pieces = Pieces(offsets, buffers, reading=True)
    job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
    perform(lane, kernel, job)
    wrong: dict[int, tuple[int, int]] = {}
    for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        failure, data = expected_read(offset, length, bad)
        assert buffers[i][: len(data)] == data
        assert not any(buffers[i][len(data) :])
        if failure or len(data) < length:
            wrong[i] = failure, len(data)
    if not wrong:
        job.check()
        return
    with pytest.raises(rawaio.BulkError) as caught:
        job.check()
    told = caught.value
    assert {i: (told.errors[i], told.counts[i]) for i in told.indexes} == wrong
    assert told.total == count
    assert (f"of {count} operations of 17 bytes" in str(told)) == (shape == "equal")


@pytest.mark.parametrize("lengths_given", [False, True], ids=["buffers", "packed"])
@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(0, 1 << 30))
def test_writes(lane: BulkLane, lengths_given: bool, count: int, seed: int) -> None:
    chance = random.Random(seed)
    places = chance.sample(range(len(CONTENT) // 32), count)
    offsets = [32 * place for place in places]
    data = [chance.randbytes(chance.randrange(33)) for _ in offsets]
    kernel = AnyOrder(seed, {}, set(offsets[:2]))
    expected = bytearray(CONTENT)
    for offset, part in zip(offsets, data, strict=True):
        expected[offset : offset + len(part)] = part
    pieces = (
        Pieces(offsets, b"".join(data), lengths=list(map(len, data)), reading=False)
        if lengths_given
        else Pieces(offsets, data, reading=False)
    )
    job = Bulk(Opcode.PWRITE, FD, pieces, rw_flags=FLAGS)
    perform(lane, kernel, job)
    job.check()
    assert kernel.file == expected


@pytest.mark.parametrize("count", [8191, 8192, 8193, 8704, 13000])
def test_jobs_of_one_stretch_and_of_several(lane: BulkLane, count: int) -> None:
    late = {3, 511, 512, count - 1}
    kernel = AnyOrder(count, dict.fromkeys(late, errno.EIO), late)
    pieces = Pieces(range(count), bytearray(count), 1, reading=True)
    job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
    perform(lane, kernel, job)
    assert {i for i, res in job.failures.items() if res == -errno.EIO} == late


def test_an_operation_that_lags_behind_many_stretches(lane: BulkLane) -> None:
    """Its index is still its own, in the upper half of 32 bits too, and the window goes on."""
    count = (1 << 16) + 3 * bulk._STRETCH
    offsets = list(range(count))
    late = {7, 600, 40_000, 65_535, 65_536, 66_000}
    kernel = AnyOrder(1, dict.fromkeys(late, errno.EIO), late)
    pieces = Pieces(offsets, bytearray(count), 1, reading=True)
    job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
    perform(lane, kernel, job)
    assert {i for i, res in job.failures.items() if res == -errno.EIO} == late
    assert job.failures.keys() - late == set(range(len(CONTENT), count)) - late
    # And what comes next begins at 0 again.
    kernel = AnyOrder(2, {5: errno.EIO}, {5})
    job = Bulk(Opcode.PREAD, FD, Pieces(range(9), bytearray(9), 1, reading=True), rw_flags=FLAGS)
    perform(lane, kernel, job)
    assert job.failures == {5: -errno.EIO}


class AtOnce(AnyOrder):
    """All is complete when io_submit returns, and all is seen by the next look."""

    def submit(self, nr: int, pointers: int) -> int:
        self.random.seed(0)  # which neither refuses nor takes a part
        return super().submit(nr, pointers)

    def getevents(self, min_nr: int, nr: int, buffer: Any) -> int:
        self.random.seed(0)
        return super().getevents(len(self.in_flight), nr, buffer)

    def pace(self) -> float:
        return 0


def test_what_completes_at_once_is_soon_submitted_in_whole_windows(lane: BulkLane) -> None:
    count = 4 * bulk._STRETCH
    kernel = AtOnce(0, {}, set())
    pieces = Pieces(range(count), bytearray(count), 1, reading=True)
    job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
    perform(lane, kernel, job)
    nrs = [nr for _, nr, _ in kernel.offers]
    assert nrs[0] == lane._portion
    assert nrs[6:20] == [WINDOW] * 14
    job.check()


def test_what_has_completed_has_its_successor_before_it_is_looked_at() -> None:
    """Of a lane that looks at the ring: the device works while the events are read."""
    rule = Looking()
    with closing(lane_on(FakeRing(2 * WINDOW + 3), 1, rule)) as lane:
        ring = RINGS.pop(lane)
        lane.window = 1
        rule.kernel = kernel = Late(1 << 60)
        kernel.ring = ring
        there: list[int] = []

        def asked(number: Any, ctx_id: Any, *arguments: Any) -> int:
            if passed(number) == kernel.numbers.io_submit:
                there.append(len(ring))
                return kernel(number, ctx_id, *arguments)
            ring_is_empty = not len(ring)
            assert ring_is_empty
            return kernel(number, ctx_id, *arguments)

        lane._raw = asked
        pieces = Pieces(range(200), bytearray(200), 1, reading=True)
        job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
        lane.begin(job)
        lane._rounds(job)
        lane.end()
        job.check()
        assert kernel.most == 1
        assert there[0] == 0
        assert there.count(1) >= rule.found - 1 > 20
        RULES.pop(lane)
    ring.close()


class Late(AtOnce):
    """Nothing of the first so many operations is complete when io_submit returns."""

    def __init__(self, first: int) -> None:
        super().__init__(0, {}, set())
        self.first = first

    def pace(self) -> float:
        return 1 if len(self.started) <= self.first else 0


def test_what_is_as_expected_is_not_looked_at_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a job like the one before, from its first window on; until one is not so."""
    lane = lane_on(FakeRing(2 * WINDOW + 3))
    submit = BulkLane.submit
    calls = 0

    def counted(lane: BulkLane, most: int | None = None, completed: int = 0) -> int:
        nonlocal calls
        calls += 1
        return submit(lane, most, completed)

    def submits(kernel: AnyOrder, count: int, nbytes: int = 1) -> int:
        """How many there are outside of the short way."""
        nonlocal calls
        calls = 0
        offsets = [i % len(CONTENT) // 2 for i in range(count)]
        pieces = Pieces(offsets, bytearray(nbytes * count), nbytes, reading=True)
        job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
        perform(lane, kernel, job)
        assert len(job.failures) == sum(offset in kernel.bad for offset in offsets)
        return calls

    def at_once(*bad: int) -> AnyOrder:
        return AtOnce(0, dict.fromkeys(bad, errno.EIO), set())

    monkeypatch.setattr(BulkLane, "submit", counted)
    count = 10 * WINDOW
    with closing(lane):
        assert submits(at_once(), count) == 1
        assert lane._indexed == (0, count)  # it is of use to the next
        assert submits(at_once(), count) == 0
        assert submits(at_once(), 5) == 1
        assert lane._indexed == (0, count)
        assert submits(at_once(), count) == 0
        # Looked at before the next window.
        assert submits(AtOnce(0, {60: errno.EIO}, set()), count) == 5
        assert submits(at_once(), count) == 1
        # Of another length.
        assert submits(at_once(), count, 2) == 1
        assert submits(at_once(), count, 2) == 0
        # In stretches, whose ends are none of windows; the slab is larger then.
        many = bulk._WHOLE + 2 * bulk._STRETCH
        ends = many // bulk._STRETCH
        assert submits(at_once(), many) == ends + 1
        assert submits(at_once(), many) == ends
        many = 2 * (1 << 16) + bulk._STRETCH  # what an index's lower half has not
        assert submits(at_once(), many) == many // bulk._STRETCH
        # Whole again, where the last stretch was the first that anything was expected of.
        assert submits(Late(bulk._WHOLE), bulk._WHOLE, 3) > bulk._WHOLE // WINDOW
        assert submits(Late(bulk._WHOLE), bulk._WHOLE + bulk._STRETCH, 3) > bulk._WHOLE // WINDOW
        assert len(lane._expected) == 32 * bulk._STRETCH
        assert submits(at_once(), bulk._WHOLE, 3) == 1
    RINGS.pop(lane).close()


@pytest.mark.parametrize("way", ["io_getevents", "ring"])
def test_what_is_refused_is_asked_once(way: str) -> None:
    """But for the first, by a lane that hoped it would go as before."""
    lane = lane_on(FakeRing(99)) if way == "ring" else BulkLane(WINDOW, force_syscalls=True)
    count = 5 * WINDOW
    with closing(lane):
        for bad, more in (({}, 0), (dict.fromkeys(range(count), -errno.EBADF), way == "ring")):
            kernel = AtOnce(0, bad, set())
            pieces = Pieces(range(count), bytearray(count), 1, reading=True)
            job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
            perform(lane, kernel, job)
            assert len(job.failures) == len(bad)
            assert len(kernel.offers) <= max(len(bad), 10) + more
    if way == "ring":
        RINGS.pop(lane).close()


def test_no_pause_for_what_is_refused(lane: BulkLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause is for a kernel that is short of something, and only when nothing comes back."""
    monkeypatch.delattr(time, "sleep")
    count = 100
    kernel = AtOnce(0, dict.fromkeys(range(count), -errno.EBADF), set())
    pieces = Pieces(range(count), bytearray(count), 1, reading=True)
    job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
    perform(lane, kernel, job)
    assert job.failures == dict.fromkeys(range(count), -errno.EBADF)


@pytest.mark.parametrize(
    ("window", "portion", "part"),
    [(1, None, 1), (1, 5, 1), (2, 1, 1), (8, 40, 4), (8, 8, 4), (8, 7, 1), (8, None, 1), (2, 2, 1)],
)
def test_narrow_windows(window: int, portion: int | None, part: int) -> None:
    lane = BulkLane(window, portion=portion, force_syscalls=True)
    assert lane._portion == min(portion or window, window)
    assert lane._part == part
    offsets = list(range(0, 300, 3))
    kernel = AnyOrder(7, {30: errno.EIO}, {0})
    pieces = Pieces(offsets, bytearray(3 * len(offsets)), 3, reading=True)
    job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
    perform(lane, kernel, job)
    lane.close()
    assert kernel.most == window
    assert job.failures == {10: -errno.EIO}


def test_a_short_stretch_where_the_lower_half_begins_again(lane: BulkLane) -> None:
    """Its upper half is written, although nothing but the last stretch needs one."""
    begun = 1 << 16
    kernel = AtOnce(0, {}, set())
    pieces = Pieces(range(begun + 7), bytearray(begun + 7), 1, reading=True)
    job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
    raw, lane._raw = lane._raw, kernel
    kernel.ring = RINGS.get(lane)
    try:
        lane.begin(job)
        job.next = job.finished = begun
        lane._rounds(job)
        lane.end()
    finally:
        lane._raw = raw
    assert kernel.started == Counter(range(begun, begun + 7))
    assert job.failures == dict.fromkeys(range(begun, begun + 7), 0)
    # Nor is it what a later job has, not even behind a shorter one.
    for count in (3, 7):
        pieces = Pieces(range(count), bytearray(count), 1, reading=True)
        job = Bulk(Opcode.PREAD, FD, pieces, rw_flags=FLAGS)
        perform(lane, AtOnce(0, {}, set()), job)
        job.check()


@pytest.mark.parametrize(
    ("failure", "gone"), [(errno.EAGAIN, 0), (errno.EINTR, 0), (errno.EBADF, 1)]
)
def test_a_submit_says_how_many_it_is_rid_of(lane: BulkLane, failure: int, gone: int) -> None:
    def fails(*arguments: Any) -> int:
        del arguments
        ctypes.set_errno(failure)
        return -1

    raw, lane._raw = lane._raw, fails
    job = Bulk(Opcode.PREAD, FD, Pieces([0, 1], bytearray(2), 1, reading=True))
    try:
        lane.begin(job)
        assert lane.submit(0) == lane.collect() == 0
        assert lane.submit() == job.next == job.finished == gone
        job.next = job.finished = job.total
        assert lane.submit() == 0
        lane.end()
    finally:
        lane._raw = raw
    assert job.failures == ({0: -failure} if gone else {})


def test_an_io_getevents_that_is_interrupted_brings_nothing(lane: BulkLane) -> None:
    def interrupted(*arguments: Any) -> int:
        del arguments
        ctypes.set_errno(errno.EINTR)
        return -1

    raw, lane._raw = lane._raw, interrupted
    lane.begin(Bulk(Opcode.PREAD, FD, Pieces([0], bytearray(1), 1, reading=True)))
    try:
        assert lane._wait(0) == 0
    finally:
        lane._raw = raw
        lane.end()


def test_an_error_of_io_getevents_is_raised(lane: BulkLane) -> None:
    def fails(*arguments: Any) -> int:
        del arguments
        ctypes.set_errno(errno.EFAULT)
        return -1

    raw, lane._raw = lane._raw, fails
    job = Bulk(Opcode.PREAD, FD, Pieces([0], bytearray(1), 1, reading=True))
    try:
        lane.begin(job)
        with pytest.raises(OSError, match="io_getevents") as caught:
            lane._wait(0)
        lane.end()
    finally:
        lane._raw = raw
    assert caught.value.errno == errno.EFAULT

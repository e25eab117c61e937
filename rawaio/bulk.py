"""L2: many operations on one file, whole columns at a time.

A lane is a kernel context of its own, with nothing in it but the operations of one job, so an event
needs no table to be understood. Each iocb carries, in `aio_data`, its index in the upper half and
its length in the lower: an event is of an operation that was whole when its lower half is that of
its `res`. So a run of events is compared with itself in one step, in whatever order they come, and
the upper half names those that were not whole. Where a window completes while it is submitted, in
order, its events are known beforehand, and it is one comparison of bytes.

The iocbs lie in one slab, a stretch of the job at a time. The constant fields are written once a
job, and a few columns once a stretch: offsets, addresses and indexes; lengths, where they differ.
A batch is a part of the stretch, and io_submit is told where in the pointers it begins.

Laws:

- Every operation runs to its end; none is started twice. A job ends when all have ended.
- At most `window` are in flight, and as long as there are more, about that many; or half as many at
  least, where the least processor time is asked for.
- Memory that the kernel has is kept: the lane owns its job until nothing is in flight; whatever is
  raised in between, io_destroy waits for the kernel before the memory is let go.
- On the path where all is well there is neither an object nor a line of Python per operation.

A lane belongs to one thread at a time. What strikes it from outside, between two bytecodes, may
leave it with a wrong count: it is to be closed then, and is of no other use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import time
import weakref
from array import array
from functools import cache

from . import syscalls
from .errors import BulkError, ClosedError
from .kernel import Kernel
from .queue import _GIL
from .request import fileno_of
from .ring import CompletionRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from .busypoll import BusyPoll
    from .pieces import Pieces
    from .protocols import HasFileno

__all__ = ["Bulk", "BulkLane"]

_IOCB: Final = struct.Struct("=QIiHhIQQqQII")
assert _IOCB.size == ctypes.sizeof(syscalls.iocb)
_EVENT: Final = struct.Struct("=QQqq")
_EVENT_SIZE: Final = _EVENT.size
assert ctypes.sizeof(syscalls.io_event) == _EVENT_SIZE
# Words of an iocb and of an event: of 64 bits, and the halves of 32 bits.
_BUF, _NBYTES, _OFFSET = 3, 4, 5
_LENGTH, _RES = 0, 4
# And the quarters of 16 bits of an index.
_LOW, _HIGH = 2, 3
# How many iocbs are filled at a time. All of a job, when it has no more than _WHOLE operations, of
# one length: the next one like it finds everything but its offsets written. Of others so many that
# the slab stays in the cache, and much more than a batch. They begin at multiples of a power of
# two, so that the lower half of no index overflows in one.
_WHOLE: Final = 8192
_STRETCH: Final = 512
# Without portions, a batch is at least this part of the window, and so is what is waited for: a
# system call is made for several operations, and the device never runs dry. Sparing, it has half of
# them to do meanwhile.
_PART: Final = 8
_PART_SPARING: Final = 2
# How long to wait after EAGAIN with nothing in flight.
_RETRY_S: Final = 0.001


@cache
def _halves(n: int) -> memoryview:
    """0, 1, 2, ..., n times 256 of them, of 16 bits."""
    both = bytearray(n << 9)
    both[0::2] = bytes(range(256)) * n
    both[1::2] = b"".join(bytes([i]) * 256 for i in range(n))
    return memoryview(both).cast("H")


def _low_halves(n: int) -> memoryview:
    """0, 1, 2, ..., at least n of them, of 16 bits."""
    return _halves(2 if n <= _STRETCH else _WHOLE >> 8 if n <= _WHOLE else 256)


class Bulk:
    """One job: what is to be done, and how far it is."""

    __slots__ = (
        "failures",
        "fd",
        "fileno",
        "finished",
        "next",
        "opcode",
        "pieces",
        "rw_flags",
        "signals",
        "total",
    )

    def __init__(
        self,
        opcode: int,
        fd: int | HasFileno,
        pieces: Pieces,
        *,
        rw_flags: int = 0,
        signals: bool = True,
    ) -> None:
        """signals: False where all completes when it is submitted, and no lane is to tell of it.

        Raises TypeError and ValueError for what is no descriptor.
        """
        self.opcode = opcode
        self.fd = fd
        self.fileno = fileno_of(fd)
        self.pieces = pieces
        self.total = len(pieces.offsets)
        self.rw_flags = rw_flags
        self.signals = signals
        #: The first operation that was not started, and how many have ended.
        self.next = 0
        self.finished = 0
        #: What the kernel said of each operation that was not whole: bytes, or -errno.
        self.failures: dict[int, int] = {}

    @property
    def in_flight(self) -> int:
        """How many operations are started and have not ended."""
        return self.next - self.finished

    def check(self) -> None:
        """Raises BulkError when an operation was not whole."""
        if self.failures:
            results = {i: (max(-res, 0), max(res, 0)) for i, res in self.failures.items()}
            raise BulkError(results, self.total, self.pieces.nbytes)


class BulkLane:
    """A kernel context for one job after another."""

    __slots__ = (
        "__weakref__",
        "_addressed",
        "_arguments",
        "_asked",
        "_at",
        "_buffer",
        "_busy",
        "_bytes",
        "_capacity",
        "_events",
        "_expected",
        "_expects",
        "_finalizer",
        "_getevents",
        "_halves",
        "_high",
        "_image",
        "_indexed",
        "_job",
        "_kernel",
        "_length",
        "_min_nr",
        "_nr",
        "_origin",
        "_part",
        "_pointers",
        "_pointers_at",
        "_portion",
        "_quarters",
        "_raw",
        "_ring",
        "_ring_words",
        "_slab",
        "_stop",
        "_straightforward",
        "_stretch",
        "_use_ring",
        "_waits",
        "_words",
        "eventfd",
        "io_submit_calls",
        "signals",
        "window",
    )

    def __init__(
        self,
        window: int,
        *,
        portion: int | None = None,
        signals: bool = False,
        force_syscalls: bool = False,
        busy: BusyPoll | None = None,
    ) -> None:
        """window: operations in flight. signals: whether those of a job can set `eventfd`.

        portion: how many of them `run` submits at a time while others are in flight. Less than the
        window, and the device has the first of them sooner; the window, and it does with as few
        system calls as leave the device half of its work; left out, with more. busy: by which `run`
        looks at the ring before it sleeps, and goes on with each operation as soon as it has
        completed.

        Raises:
            OSError: io_setup's, with advice.
        """
        self.window = window
        self.signals = signals
        self._kernel = kernel = Kernel()
        kernel.quiet = True  # its owner, a context or a driver, closes it
        self._finalizer = weakref.finalize(self, kernel.finalize)
        kernel.open(window)
        self.eventfd = kernel.eventfd
        self._ring = ring = CompletionRing(kernel.ctx_id)
        self._use_ring = ring.usable and not force_syscalls
        self._ring_words = memoryview(b"")
        if self._use_ring:
            self._ring_words = ring.events
        self._portion = window if portion is None else min(portion, window)
        self._busy = busy if self._use_ring else None
        self._part = 1
        if self._portion == window and self._busy is None:
            self._part = max(window // (_PART if portion is None else _PART_SPARING), 1)
        # Not less than what may be submitted at once.
        self._stretch = max(_STRETCH, 1 << (window - 1).bit_length())
        self._length = self._capacity = 0
        # The events of a stretch, if its operations are whole and in order; and which indexes they
        # have, None while the rest of them is not known.
        self._expected = bytearray()
        # Whether the last stretch whose windows were tried went so, of the same descriptor.
        self._straightforward = False
        self._expects: object = None
        self._grow(1)
        # Which constant fields the slab has, in how many iocbs; and which indexes.
        self._image: tuple[object, int] = None, 0
        self._indexed = 0, 0
        self._high = 0
        # What the addresses in it were made of.
        self._addressed: object = None
        self._raw = syscalls.raw_syscall()
        numbers = syscalls.numbers()
        self._nr = ctypes.c_long(0)
        self._asked = 0  # what it has
        self._at = ctypes.c_void_p(0)
        self._arguments = (
            syscalls.fixed(ctypes.c_long, numbers.io_submit),
            syscalls.fixed(ctypes.c_ulong, kernel.ctx_id),
            self._nr,
            self._at,
        )
        # Events that io_getevents brought.
        self._buffer = (ctypes.c_char * (_EVENT_SIZE * window))()
        self._events = memoryview(self._buffer).cast("B").cast("I")
        self._min_nr = ctypes.c_long(0)
        self._waits = 0  # what it has
        self._getevents = (
            syscalls.fixed(ctypes.c_long, numbers.io_getevents),
            syscalls.fixed(ctypes.c_ulong, kernel.ctx_id),
            self._min_nr,
            syscalls.fixed(ctypes.c_long, window),
            ctypes.byref(self._buffer),
            syscalls.fixed(ctypes.c_void_p, 0),
        )
        self._job: Bulk | None = None
        # Behind the last operation of the job that it holds, and where the first of the job would
        # have its pointer.
        self._stop = self._origin = 0
        self.io_submit_calls = 0

    def _grow(self, n: int) -> None:
        """Make a slab for at least n iocbs, more than there were: `begin` writes all of them."""
        self._capacity = n = 1 << (n - 1).bit_length()
        self._slab = (ctypes.c_char * (_IOCB.size * n))()
        self._bytes = memoryview(self._slab).cast("B")
        self._words = self._bytes.cast("q")
        self._halves = self._bytes.cast("I")
        self._quarters = self._bytes.cast("H")
        base = ctypes.addressof(self._slab)
        self._pointers = array("Q", range(base, base + _IOCB.size * n, _IOCB.size))
        self._pointers_at = self._pointers.buffer_info()[0]

    # -- a whole job ------------------------------------------------------------------------------

    def run(self, job: Bulk) -> None:
        """Do a job, blocking. Whatever is raised, the kernel has nothing of it any more.

        After an exception from outside the lane is closed.
        """
        try:
            self.begin(job)
            self._rounds(job)
            self._job = self._kernel.keeps = None
        except BaseException:
            self.close()
            raise

    def _rounds(self, job: Bulk) -> None:
        portion, window = self._portion, self.window
        most = portion
        straight = self._use_ring and job.pieces.nbytes is not None
        if straight and self._straightforward:
            straight = self._straight(job)
        while job.finished < job.total:
            started = self.submit(most)
            collected = self.collect()
            in_flight = job.next - job.finished
            if in_flight:
                most = portion
                if not collected and (not started or in_flight == window or job.next == job.total):
                    if self._busy is None:
                        self._wait(min(self._part, in_flight))
                    else:
                        self._look_and_wait(job, self._busy)
            elif not (started or collected):
                time.sleep(_RETRY_S)  # EAGAIN: the kernel is short of what nobody gives back
            elif most < window:
                most += most  # they complete at once: no device waits for more
            elif straight and started:
                straight = self._straight(job)
                if not straight:
                    most = portion

    def _straight(self, job: Bulk) -> bool:
        """Do windows of the stretch for as long as they complete at once, whole and in order.

        Whether it is worth another try; what was not so is left to `submit` and `collect`. To be
        called with nothing in flight.
        """
        first = begun = job.next
        if first == job.total:
            return True
        if first >= self._stop:
            self._fill(job, first)
        window, stop, origin = self.window, self._stop, self._origin
        if stop - first < window:
            return True
        at, raw, arguments, take = self._at, self._raw, self._arguments, self._ring.take_expected
        expected = self._expect(job)
        place = _EVENT_SIZE * (first + (origin - self._pointers_at) // 8)
        if self._asked != window:
            self._nr.value = self._asked = window
        self._straightforward = False
        while stop - first >= window:
            at.value = origin + 8 * first
            self.io_submit_calls += 1
            accepted = raw(*arguments)
            if accepted <= 0:
                return first > begun  # nothing was started, and `submit` will learn why
            job.next = first + accepted
            if not take(expected, place, window):
                return False
            first += window
            place += _EVENT_SIZE * window
            job.finished = first
        self._straightforward = True
        return True

    def _expect(self, job: Bulk) -> bytearray:
        """The events of the stretch in order, if all of its operations are whole."""
        known = self._indexed, self._high
        if known != self._expects:
            n = known[0][1]
            if self._expects is None or len(self._expected) < _EVENT_SIZE * n:
                self._expected = bytearray(_EVENT.pack(0, 0, job.pieces.nbytes or 0, 0) * n)
                words = memoryview(self._expected).cast("q")
                words[1::4] = memoryview(self._pointers)[:n].cast("B").cast("q")
            else:
                words = memoryview(self._expected).cast("q")
            self._expects = None
            words[0 : 4 * n : 4] = self._words[0 : 8 * n : 8]
            self._expects = known
        return self._expected

    def _look_and_wait(self, job: Bulk, busy: BusyPoll) -> None:
        """Wait for one of those in flight, at the ring for as long as the rule says.

        What is found has its successors submitted before its events are read: the device may have
        nothing else. Those are counted as in flight until `collect`, beside what the kernel has.
        """
        ring, finished, portion = self._ring, job.finished, self._portion
        busy.wait(
            lambda: not ring.empty or job.finished != finished,
            None,
            lambda _: self._wait(1),
            lambda: self.submit(portion, ring.peek()),
        )

    # -- its steps --------------------------------------------------------------------------------

    def begin(self, job: Bulk) -> None:
        """Take a job; there must be none. Starts nothing."""
        assert self._job is None
        # The kernel's last resort has to keep what the kernel may have.
        self._job = self._kernel.keeps = job
        self._stop = 0
        length = job.pieces.nbytes or 0
        signals = self.signals and job.signals
        constant = job.rw_flags, job.opcode, job.fileno, length, signals
        wanted = job.total
        if wanted > (_WHOLE if length else self._stretch):
            wanted = self._stretch
        self._length = wanted
        if wanted > self._capacity:
            self._grow(wanted)
        known, n = self._image
        if known == constant and n >= wanted and not self._high:
            return
        image = _IOCB.pack(
            length,
            0,
            job.rw_flags,
            job.opcode,
            0,
            job.fileno,
            0,
            length,
            0,
            0,
            syscalls.IOCB_FLAG_RESFD if signals else 0,
            self.eventfd if signals else 0,
        )
        self._bytes[: _IOCB.size * wanted] = image * wanted
        self._image = constant, wanted
        self._indexed, self._high, self._addressed = (0, 0), 0, None
        self._expects, self._straightforward = None, False

    def submit(self, most: int | None = None, completed: int = 0) -> int:
        """Start as many operations as there is room for, at most `most`; how many were.

        completed: of those in flight, how many have an event that is not collected yet.

        By one io_submit, so that it may be fewer: a stretch ends, or the kernel took no more. Fewer
        than a part of the window are not worth a system call while others are in flight. Can block:
        in io_submit.
        """
        job = self._job
        assert job is not None
        first = job.next
        n = self.window - first + job.finished + completed
        left = job.total - first
        if n >= left:
            n = left
        elif n < self._part:
            return 0
        if most is not None and n > most:
            n = most
        if n <= 0:
            return 0
        if first >= self._stop:
            self._fill(job, first)
        if first + n > self._stop:
            n = self._stop - first
        if n != self._asked:
            self._nr.value = self._asked = n
        self._at.value = self._origin + 8 * first
        self.io_submit_calls += 1
        accepted = self._raw(*self._arguments)
        if accepted > 0:
            job.next = first + accepted
            return accepted
        failure = ctypes.get_errno()
        if failure in (errno.EAGAIN, errno.EINTR):
            return 0
        # The first is refused, alone; the others get their turn.
        job.failures[first] = -failure
        job.next = first + 1
        job.finished += 1
        return 1

    def _fill(self, job: Bulk, first: int) -> None:
        """Write the next stretch of the job."""
        pieces, words = job.pieces, self._words
        n = min(self._length, job.total - first)
        stop = 8 * n
        words[_OFFSET:stop:8] = pieces.offsets[first : first + n]
        lengths = None
        # Often one buffer is used again and again.
        same = pieces.address, pieces.nbytes, first, n
        if same != self._addressed or pieces.nbytes is None:
            self._addressed = None
            addresses, lengths = pieces.stretch(first, n)
            words[_BUF:stop:8] = addresses
            self._addressed = same
        low, high = first & 0xFFFF, first >> 16
        start, known = self._indexed
        if start != low or known < n:
            self._quarters[_LOW : 4 * stop : 32] = _low_halves(low + n)[low : low + n]
            self._indexed = low, n
        if high != self._high:
            self._quarters[_HIGH : 4 * stop : 32] = memoryview(array("H", [high]) * n)
            self._high = high
        if lengths is not None:
            words[_NBYTES:stop:8] = lengths
            self._halves[_LENGTH : 2 * stop : 16] = lengths.cast("B").cast("I")[::2]
        self._origin = self._pointers_at - 8 * first
        self._stop = first + n

    def collect(self) -> int:
        """Look at what has completed; how many operations that ended. Does not enter the kernel.

        Except where the ring cannot be read: there it is one system call.
        """
        job = self._job
        assert job is not None
        if not self._use_ring:
            return self._wait(0) if job.in_flight else 0
        ring, words = self._ring, self._ring_words
        ended = 0
        while (run := ring.next_events()) is not None:
            start, n, more = run
            start *= 8
            stop = start + 8 * n
            if words[start + _LENGTH : stop : 8] != words[start + _RES : stop : 8]:
                self._look_closely(job, words[start:stop])
            ring.commit_run()
            job.finished += n
            ended += n
            if not more:  # behind the end of the ring
                break
        return ended

    def _look_closely(self, job: Bulk, events: memoryview) -> None:
        """Remember those that were not whole. No errno has a half of res that is a length."""
        words = events.cast("B").cast("q")
        for data, res in zip(words[0::4].tolist(), words[2::4].tolist(), strict=True):
            if data & 0xFFFF_FFFF != res:
                job.failures[data >> 32] = res

    def _wait(self, min_nr: int) -> int:
        """io_getevents: wait for so many, and look at them; how many there were."""
        job = self._job
        assert job is not None
        if min_nr != self._waits:
            self._min_nr.value = self._waits = min_nr
        n = self._raw(*self._getevents)
        if n < 0:
            failure = ctypes.get_errno()
            if failure != errno.EINTR:
                raise syscalls.kernel_error(failure, "io_getevents")
            return 0
        if n:
            words, stop = self._events, 8 * n
            if words[_LENGTH:stop:8] != words[_RES:stop:8]:
                self._look_closely(job, words[:stop])
            job.finished += n
        return n

    def end(self) -> None:
        """Let go of the job; nothing of it may be in flight."""
        assert self._job is not None
        assert not self._job.in_flight
        self._job = self._kernel.keeps = None

    def reset(self) -> None:
        """Make `eventfd` unreadable until the next completion."""
        try:
            os.eventfd_read(self.eventfd)
        except BlockingIOError:
            pass

    def nudge(self) -> None:
        """Make `eventfd` readable, so that whoever waits looks again."""
        os.eventfd_write(self.eventfd, 1)

    def close(self) -> None:
        """Wait for the kernel, and give everything back. Idempotent. Can block: 30 ms and more."""
        self._use_ring = False
        self._ring_words = memoryview(b"")
        self._ring.close()
        self._kernel.destroy()
        self._kernel.close_eventfd()
        self._finalizer.detach()
        self._job = self._kernel.keeps = None

    @property
    def outstanding(self) -> int:
        """How many operations are in flight whose completion sets `eventfd`."""
        job = self._job
        return job.in_flight if job is not None and self.signals and job.signals else 0

    @property
    def visible(self) -> bool:
        """Whether `empty` can be told without entering the kernel.

        With the GIL any thread may ask at any time, also beside `close`; without it nobody may.
        """
        return _GIL and self._use_ring

    @property
    def empty(self) -> bool:
        """Whether the ring is; True also where that cannot be told."""
        try:
            return not self.visible or self._ring.empty
        except ClosedError:  # just now, by another thread
            return True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

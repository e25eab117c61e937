"""L2: many operations of one size on one file, whole columns at a time.

A lane is a kernel context of its own, with nothing in it but the operations of one job: so an event
needs no table to be understood, and a run of events is compared with what all of them should be in
one step. The iocbs lie in one slab, whose constant fields are written once a job; of each batch,
three columns are written: offsets, addresses, and addresses once more, as the tokens by which an
event that is not as it should be is told.

Laws:

- Every operation runs to its end; none is started twice. A job ends when all have ended.
- At most `window` are in flight, and as long as there are more, about that many.
- Memory that the kernel has is kept: the lane owns its job until nothing is in flight; whatever is
  raised in between, io_destroy waits for the kernel before the memory is let go.
- On the path where all is well there is neither an object nor a line of Python per operation.

A lane belongs to one thread at a time.
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
from itertools import chain, starmap
from operator import index

from . import syscalls
from .errors import BulkError
from .kernel import Kernel
from .memory import contiguous, pin_destination, pin_source
from .request import fileno_of
from .ring import CompletionRing
from .syscalls import Opcode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .protocols import HasFileno

    Offsets = Sequence[int] | ReadableBuffer

__all__ = ["Bulk", "BulkLane", "check_sizes", "column", "evenly"]

_ONCE: Final = ((),)  # the arguments of one call without any, for starmap
_IOCB: Final = struct.Struct("=QIiHhIQQqQII")
assert _IOCB.size == ctypes.sizeof(syscalls.iocb)
_EVENT_SIZE: Final = 32
# How many addresses are made at a time.
_STRETCH: Final = 1024
# A batch is at least this part of the window, and so is what is waited for: the device never runs
# dry, and a system call is made for several operations.
_PART: Final = 8
# How long to wait after EAGAIN with nothing in flight.
_RETRY_S: Final = 0.001


@cache
def _ramp(n: int) -> tuple[int, int]:
    """0, 1, 2, ... and 1, 1, 1, ... as n 64-bit words of one int: columns by arithmetic in C."""
    return sum(i << 64 * i for i in range(n)), sum(1 << 64 * i for i in range(n))


def column(offsets: Offsets) -> memoryview:
    """Any sequence of ints as a column of 64-bit words; int64 buffers without a copy.

    Raises:
        TypeError, ValueError: not ints, or not within 0..2**63-1.
    """
    words: memoryview | None = None
    given: Any = offsets
    if not isinstance(offsets, (list, tuple, range)):
        try:
            view = memoryview(given)
        except TypeError:
            pass
        else:
            if view.format not in ("q", "l") or view.itemsize != 8 or view.ndim != 1:
                raise TypeError(
                    f"a buffer of offsets must be of one dimension and int64, not of format "
                    f"{view.format!r} and {view.ndim} dimensions"
                )
            words = contiguous(view).cast("B").cast("q") if view.nbytes else memoryview(array("q"))
    if words is None:
        try:
            words = memoryview(array("q", given))
        except OverflowError:
            raise ValueError("an offset is beyond 2**63-1, or far below 0") from None
    # The highest byte of each, looked at without making an int of it.
    if words.nbytes and words.cast("B")[7::8].tobytes().translate(None, _NOT_NEGATIVE):
        raise ValueError("an offset is negative")
    return words


_NOT_NEGATIVE: Final = bytes(range(128))


def evenly(data: ReadableBuffer, n: int) -> int:
    """How many bytes of data there are for each of n operations, without rest."""
    size = contiguous(data).nbytes
    if not n:
        if size:
            raise ValueError(f"{size} bytes of data, and no offsets for them")
        return 1
    if size % n:
        raise ValueError(f"{size} bytes of data cannot be divided among {n} offsets evenly")
    return size // n


def check_sizes(offsets: memoryview, nbytes: int, memory: ReadableBuffer) -> None:
    """Refuse, by ValueError, what does not fit together."""
    if not 1 <= nbytes <= syscalls.MAX_RW_COUNT:
        raise ValueError(f"nbytes must be within 1..{syscalls.MAX_RW_COUNT}, not {nbytes}")
    n, size = len(offsets), contiguous(memory).nbytes
    if size != n * nbytes:
        raise ValueError(
            f"{n} operations of {nbytes} bytes need {n * nbytes} bytes of memory, not {size}"
        )


class Bulk:
    """One job: the i-th operation is at offsets[i], with the i-th nbytes bytes of the memory."""

    __slots__ = (
        "_anchor",
        "address",
        "failures",
        "fd",
        "fileno",
        "finished",
        "nbytes",
        "next",
        "offsets",
        "opcode",
        "rw_flags",
        "total",
    )

    def __init__(
        self,
        opcode: Opcode,
        fd: int | HasFileno,
        offsets: Offsets,
        nbytes: int,
        memory: ReadableBuffer | WriteableBuffer,
        *,
        rw_flags: int = 0,
    ) -> None:
        """Raises TypeError and ValueError for what could not be right on any file."""
        self.opcode = opcode
        self.fd = fd
        self.fileno = fileno_of(fd)
        self.offsets = column(offsets)
        self.total = len(self.offsets)
        self.nbytes = nbytes = index(nbytes)
        check_sizes(self.offsets, nbytes, memory)
        pin = pin_destination if opcode is Opcode.PREAD else pin_source
        self.address, _, self._anchor = pin(memory)
        self.rw_flags = rw_flags
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
            raise BulkError(results, self.total, self.nbytes)


class BulkLane:
    """A kernel context for one job after another."""

    __slots__ = (
        "__weakref__",
        "_arguments",
        "_buffer",
        "_bytes",
        "_events",
        "_expected",
        "_finalizer",
        "_getevents",
        "_job",
        "_kernel",
        "_min_nr",
        "_nr",
        "_outcome",
        "_raw",
        "_ring",
        "_slab",
        "_stretch",
        "_stretch_start",
        "_use_ring",
        "_words",
        "eventfd",
        "io_submit_calls",
        "signals",
        "window",
    )

    def __init__(self, window: int, *, signals: bool = False, force_syscalls: bool = False) -> None:
        """window: operations in flight. signals: whether each makes `eventfd` readable.

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
        self._ring = CompletionRing(kernel.ctx_id)
        self._use_ring = self._ring.usable and not force_syscalls
        self._slab = (ctypes.c_char * (_IOCB.size * window))()
        self._bytes = memoryview(self._slab).cast("B")
        self._words = self._bytes.cast("q")
        base = ctypes.addressof(self._slab)
        pointers = (ctypes.c_uint64 * window)(*(base + _IOCB.size * i for i in range(window)))
        self._raw = syscalls.raw_syscall()
        numbers = syscalls.numbers()
        self._nr = ctypes.c_long(0)
        self._arguments = (
            (
                ctypes.c_long(numbers.io_submit),
                ctypes.c_ulong(kernel.ctx_id),
                self._nr,
                pointers,
            ),
        )
        # Events that io_getevents brought.
        self._buffer = (ctypes.c_char * (_EVENT_SIZE * window))()
        self._events = memoryview(self._buffer).cast("B").cast("q")
        self._min_nr = ctypes.c_long(0)
        self._getevents = (
            (
                ctypes.c_long(numbers.io_getevents),
                ctypes.c_ulong(kernel.ctx_id),
                self._min_nr,
                ctypes.c_long(window),
                self._buffer,
                ctypes.c_void_p(0),
            ),
        )
        self._outcome: list[int] = []
        self._job: Bulk | None = None
        self._expected = memoryview(array("q"))
        self._stretch = memoryview(array("q"))
        self._stretch_start = 0
        self.io_submit_calls = 0

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
        while job.finished < job.total:
            self.submit()
            if not self.collect() and job.finished < job.total:
                if job.in_flight:
                    self._wait(max(min(self.window // _PART, job.in_flight), 1))
                else:
                    time.sleep(_RETRY_S)  # EAGAIN: the kernel is short of what nobody gives back

    # -- its steps --------------------------------------------------------------------------------

    def begin(self, job: Bulk) -> None:
        """Take a job; there must be none. Starts nothing."""
        assert self._job is None
        # The kernel's last resort has to keep what the kernel may have.
        self._job = self._kernel.keeps = job
        image = _IOCB.pack(
            0,
            0,
            job.rw_flags,
            job.opcode,
            0,
            job.fileno,
            0,
            job.nbytes,
            0,
            0,
            syscalls.IOCB_FLAG_RESFD if self.signals else 0,
            self.eventfd if self.signals else 0,
        )
        n = min(self.window, job.total)
        self._bytes[: _IOCB.size * n] = image * n
        # An event's res and res2, of operations that are whole.
        self._expected = memoryview(array("q", [job.nbytes]) * self.window)
        self._stretch, self._stretch_start = self._stretch[:0], 0

    def submit(self, most: int | None = None) -> int:
        """Start as many operations as there is room for, at most `most`; how many were.

        Fewer than a part of the window are not worth a system call while others are in flight. Can
        block: in io_submit.
        """
        job = self._job
        assert job is not None
        room = self.window - job.in_flight
        left = job.total - job.next
        n = min(room, left)
        if most is not None:
            n = min(n, most)
        if n <= 0 or (room < self.window // _PART and room < left):
            return 0
        first = job.next
        self._fill(job, first, n)
        self._nr.value = n
        outcome = self._outcome
        outcome.clear()
        self.io_submit_calls += 1
        outcome.extend(chain(starmap(self._raw, self._arguments), starmap(ctypes.get_errno, _ONCE)))
        accepted, failure = outcome
        if accepted > 0:
            job.next = first + accepted
            return accepted
        if accepted < 0 and failure not in (errno.EAGAIN, errno.EINTR):
            # The first is refused, alone; the others get their turn.
            job.failures[first] = -failure
            job.next = first + 1
            job.finished += 1
            return 1
        return 0

    def _fill(self, job: Bulk, first: int, n: int) -> None:
        words = self._words
        stop = 8 * n
        words[5:stop:8] = job.offsets[first : first + n]
        at = first - self._stretch_start
        if at + n > len(self._stretch):
            self._stretch_start = first
            at = 0
            # Few lengths, because what is made of each is kept; beyond the last one none is used.
            length = min(1 << (job.total - first - 1).bit_length(), _STRETCH)
            ramp, ones = _ramp(length)
            column = ramp * job.nbytes + (job.address + first * job.nbytes) * ones
            column &= (1 << 64 * length) - 1
            self._stretch = memoryview(column.to_bytes(8 * length, "little")).cast("q")
        addresses = self._stretch[at : at + n]
        words[3:stop:8] = addresses
        words[0:stop:8] = addresses

    def collect(self) -> int:
        """Look at what has completed; how many operations that ended. Does not enter the kernel.

        Except where the ring cannot be read: there it is one system call.
        """
        job = self._job
        assert job is not None
        before = job.finished
        if not self._use_ring:
            if job.in_flight:
                self._wait(0)
            return job.finished - before
        ring = self._ring
        n = ring.peek()
        while n:
            self._look(job, *ring.raw(n))
            n = ring.advance_and_peek(n)
        return job.finished - before

    def _look(self, job: Bulk, events: memoryview, start: int, n: int) -> None:
        stop = start + 4 * n
        if events[start + 2 : stop : 4] != self._expected[:n]:
            self._look_closely(job, events, start, n)
        job.finished += n

    def _look_closely(self, job: Bulk, events: memoryview, start: int, n: int) -> None:
        for i in range(start, start + 4 * n, 4):
            res = events[i + 2]
            if res != job.nbytes:
                job.failures[(events[i] - job.address) // job.nbytes] = res

    def _wait(self, min_nr: int) -> None:
        """io_getevents: wait for so many, and look at them."""
        job = self._job
        assert job is not None
        self._min_nr.value = min_nr
        outcome = self._outcome
        outcome.clear()
        outcome.extend(chain(starmap(self._raw, self._getevents), starmap(ctypes.get_errno, _ONCE)))
        n, failure = outcome
        if n < 0:
            if failure != errno.EINTR:
                raise syscalls.kernel_error(failure, "io_getevents")
            return
        if n:
            self._look(job, self._events, 0, n)

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

    def close(self) -> None:
        """Wait for the kernel, and give everything back. Idempotent. Can block: 30 ms and more."""
        self._use_ring = False
        self._ring.close()
        self._kernel.destroy()
        self._kernel.close_eventfd()
        self._finalizer.detach()
        self._job = self._kernel.keeps = None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

"""L2: a context: what a program submits to and reaps from, complete without an event loop.

Its way in, and its life from io_setup to io_destroy; the way out is in `reaping`.

Laws:

- Every request that `submit` took is given back exactly once, whatever is raised in between.
- Memory that the kernel holds is kept: the table of requests in flight owns request, buffer and
  file, and outlives the context until io_destroy has returned, which waits for the kernel.
- In a forked child nothing of the parent is touched.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from _thread import RLock
from functools import partial
from operator import index

from . import syscalls
from .errors import ClosedError, ForkedError
from .kernel import Kernel, Submitter
from .queue import PlugSection, QueueFullError, SubmissionQueue
from .reaping import Reaping
from .slab import IocbSlab
from .syscalls import Opcode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Any, Final, Self, overload

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .bulk import BulkLane
    from .pieces import Buffers, Numbers
    from .polling import PollingRule
    from .protocols import HasFileno
    from .request import Completion, Request
    from .statistics import Statistics

__all__ = ["IOContext"]

# Requests in one io_submit; their iocbs take 64 KiB. More per call gains nothing.
_MAX_OFFER: Final = 1024
_MAX_NR_EVENTS: Final = (1 << 32) - 1


class IOContext(Reaping):
    """Asynchronous I/O on descriptors: submit requests, reap completions.

    Usable from several threads. Close it, best by `with`. Do not use it from signal handlers or
    finalizers.
    """

    def __init__(
        self,
        nr_events: int = 128,
        *,
        max_batch: int = 32,
        max_pending: int = 16384,
        force_syscalls: bool = False,
        polling: PollingRule | None = None,
    ) -> None:
        """Make a context that has at most nr_events requests in flight.

        nr_events is charged to the system-wide limit `/proc/sys/fs/aio-max-nr`. max_batch: pending
        requests that are submitted although plugged, and how many operations of a bulk call are
        submitted at a time while others are in flight: an eighth of nr_events or less keeps a
        device busiest, nr_events takes the least processor time. max_pending: requests that wait
        behind the ones in flight before `submit` waits too. force_syscalls: reap by io_getevents
        even where the ring can be read. polling: a rule of `rawaio.polling`, of this context's own,
        by which `reap` looks at the ring before it sleeps; of no effect where it reaps by
        io_getevents, and on a build without the GIL.

        Raises:
            OSError: io_setup's errno, with advice as notes: EAGAIN over aio-max-nr; ENOSYS no
                AIO in this kernel; EPERM denied by seccomp; EINVAL nr_events far too large;
                ENOMEM. EMFILE, ENFILE: no descriptor left.
            UnsupportedError: not a 64-bit Linux process on x86_64 or aarch64.
            ValueError: a number below 1.

        Source: io_setup(2), eventfd(2); Linux 2.6.22.
        """
        nr_events, max_batch, max_pending = map(index, (nr_events, max_batch, max_pending))
        for name, limit in (
            ("nr_events", nr_events),
            ("max_batch", max_batch),
            ("max_pending", max_pending),
        ):
            if limit < 1:
                raise ValueError(f"{name} must be 1 at least, not {limit}")
        if nr_events > _MAX_NR_EVENTS:
            raise ValueError(f"nr_events is a 32-bit number, not {nr_events}")
        syscalls.numbers()
        kernel = Kernel()
        self._finalizer = weakref.finalize(self, kernel.finalize)
        kernel.open(nr_events)
        slab = IocbSlab(min(nr_events, _MAX_OFFER), kernel.eventfd)
        kernel.queue = queue = SubmissionQueue(
            Submitter(kernel.ctx_id, slab).submit,
            nr_events=nr_events,
            max_batch=max_batch,
            max_pending=max_pending,
            max_offer=slab.capacity,
            continuation=kernel.nudge,
        )
        super().__init__(kernel, queue, force_syscalls=force_syscalls, polling=polling)
        self._closing = RLock()
        #: Kernel contexts for `pread_many` and `pwrite_many`, that no thread uses just now.
        self._lanes: list[BulkLane] = []
        self._bulk_operations = 0
        self._bulk_calls = 0
        _live[id(self)] = weakref.ref(self, partial(_forget, id(self)))

    # -- in -------------------------------------------------------------------------------------

    def submit(self, *requests: Request) -> int:
        """Take all the requests and start them, as many as there is room for; return how many.

        What has no room, or is held back by `plugged`, is pending and started later. What the
        kernel refuses comes back as a Completion. Can block: in io_submit (buffered reads,
        extending writes), and while max_pending requests wait; then completions are collected
        for the next reap.

        Raises:
            BusyError: a request is under way already, or there twice; none was taken.
            TypeError: not a Request; none was taken.
            ClosedError, ForkedError: none was taken.
        """
        while True:
            try:
                return self._queue.push(requests)
            except QueueFullError:
                self._make_room(len(requests))

    def plugged(self) -> PlugSection:
        """A `with` block whose requests are submitted together at its end, or max_batch at a time.

        Sections nest; the outermost counts. It holds for all threads. A reap that waits submits
        what is pending all the same.
        """
        self._check()
        return self._queue.section()

    def _make_room(self, n: int) -> None:
        queue = self._queue
        self._check()
        queue.flush()
        self._fetch(self._done, None)
        queue.flush()
        if self._waiters and self._done:
            self._kernel.nudge()
        if queue.in_queue and queue.in_queue + n > queue.max_pending:
            self._wait(None, collecting=True)

    def cancel(self, request: Request) -> bool:
        """Whether the request was cancelled: it then completes once, with res == -ECANCELED.

        Pending requests and polls can be. False: the kernel cannot cancel it, and it completes
        as if nothing had been said; or it is not under way in this context.

        Raises:
            ClosedError, ForkedError.

        Source: io_cancel(2).
        """
        self._check()
        queue = self._queue
        if queue.withdraw(request, -errno.ECANCELED):
            self._kernel.nudge()
            queue.kick()
            return True
        if any(c[0] is request and c[1] == -errno.ECANCELED for c in _snapshot(self._done)):
            return True
        if request.opcode is not Opcode.POLL:
            return False
        with queue.lock:
            token = next((t for t, r in queue.in_flight_table.items() if r is request), None)
            if token is None:
                return False
            if token in self._cancelled:
                return True
            # Marked before, and taken back, so that no exception leaves a cancelled poll unmarked.
            self._cancelled.add(token)
            try:
                syscalls.io_cancel(self._kernel.ctx_id, request.own_iocb()[1], 0)
            except OSError:
                self._cancelled.discard(token)
                return False
        return True

    # -- many at a time -------------------------------------------------------------------------

    if TYPE_CHECKING:

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: int,
            out: None = None,
            *,
            lengths: Numbers | None = None,
        ) -> bytearray: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: None = None,
            out: None = None,
            *,
            lengths: Numbers,
        ) -> bytearray: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: int,
            out: WriteableBuffer | Buffers,
            *,
            lengths: Numbers | None = None,
        ) -> int: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: None = None,
            *,
            out: WriteableBuffer | Buffers,
            lengths: Numbers,
        ) -> int: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: None = None,
            *,
            out: Buffers,
            lengths: Numbers | None = None,
        ) -> int: ...

    def pread_many(
        self,
        fd: int | HasFileno,
        offsets: Numbers,
        nbytes: int | None = None,
        out: WriteableBuffer | Buffers | None = None,
        *,
        lengths: Numbers | None = None,
    ) -> int | bytearray:
        """Read at each of the offsets; how many bytes in all.

        offsets: any sequence of int, or a buffer of int64 (`array("q")`, NumPy). out is one of:

        - one writable, contiguous buffer, with nbytes: the i-th nbytes bytes of it are for the
          i-th offset; or with lengths, given as offsets are: the pieces are packed, one after
          another;
        - a list or a tuple of such buffers, one for each offset. Each is filled. nbytes and lengths
          are not needed, and have to agree;
        - left out: with nbytes or lengths, a new bytearray, which is returned.

        A length may be 0, nbytes may not. The memory may not be resized before this returns. The
        operations have places in the kernel of their own, as many as nr_events, and none of them is
        seen by `reap`. Can block: until all have ended.

        Raises:
            BulkError: some were short or failed; all ran to their end, and the data of the others
                are valid.
            OSError: io_setup's, with advice; at the first call of each thread at a time.
            TypeError, ValueError: arguments that could not be right on any file, or do not agree;
                then nothing is started.
            ClosedError, ForkedError.
        """
        result: int | bytearray = self._many(
            Opcode.PREAD, fd, offsets, out, nbytes, lengths=lengths
        )
        return result

    def pwrite_many(
        self,
        fd: int | HasFileno,
        offsets: Numbers,
        data: ReadableBuffer | Sequence[ReadableBuffer],
        nbytes: int | None = None,
        *,
        lengths: Numbers | None = None,
    ) -> int:
        """Write at each of the offsets; how many bytes in all.

        data: one contiguous buffer, with nbytes or lengths, or a list or a tuple of buffers, as out
        of `pread_many`. With neither, one buffer is divided among the offsets, without rest. The
        order is not that of the offsets. Otherwise as `pread_many`.
        """
        written: int = self._many(Opcode.PWRITE, fd, offsets, data, nbytes, lengths=lengths)
        return written

    def _many(
        self,
        opcode: Opcode,
        fd: int | HasFileno,
        offsets: Numbers,
        memory: Any,  # noqa: ANN401 - checked where it is pinned
        nbytes: int | None,
        *,
        lengths: Numbers | None,
    ) -> Any:  # noqa: ANN401 - bytes or their number
        self._check()
        from .bulk import Bulk, BulkLane  # noqa: PLC0415 - only for who uses it
        from .pieces import Pieces  # noqa: PLC0415

        pieces = Pieces(offsets, memory, nbytes, lengths, reading=opcode is Opcode.PREAD)
        job = Bulk(opcode, fd, pieces)
        if job.total:
            try:
                lane = self._lanes.pop()
            except IndexError:
                lane = BulkLane(
                    min(self._queue.nr_events, _MAX_OFFER),
                    portion=self._queue.max_batch,
                    force_syscalls=not self._use_ring,
                )
            calls = lane.io_submit_calls
            lane.run(job)
            with self._queue.lock:
                self._bulk_operations += job.total
                self._bulk_calls += lane.io_submit_calls - calls
            self._lanes.append(lane)
            if self._closed:
                self._close_lanes()
            job.check()
        return pieces.total if pieces.made is None else pieces.made

    def _close_lanes(self) -> None:
        while self._lanes:
            self._lanes.pop().close()

    def statistics(self) -> Statistics:
        """A snapshot of the counters. Does not enter the kernel.

        Raises:
            ForkedError.
        """
        from .statistics import Statistics  # noqa: PLC0415 - dataclasses take 10 ms to import

        if isinstance(self._refusal, ForkedError):
            self._check()
        queue = self._queue
        with queue.lock:
            in_queue, in_flight, submitted = queue.in_queue, queue.in_flight, queue.submitted
            bulk, bulk_calls = self._bulk_operations, self._bulk_calls
        return Statistics(
            nr_events=queue.nr_events,
            in_queue=in_queue,
            in_flight=in_flight,
            submitted=submitted + bulk,
            completed=submitted + bulk - in_queue - in_flight,
            io_submit_calls=queue.io_submit_calls + bulk_calls,
            eagain=queue.eagain,
            ring_reaps=self._ring_reaps,
            syscall_reaps=self._syscall_reaps,
            waits=self._waits,
            mechanism="ring" if self._use_ring else "io_getevents",
        )

    @property
    def why_not_ring(self) -> str | None:
        """Why completions are not read from the ring; None when they are."""
        if self._use_ring:
            return None
        return self._ring.why_not or "force_syscalls"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    # -- end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for all requests, run their callbacks, drop the completions, destroy the context.

        Polls are cancelled. Idempotent; after an exception it can be called again. In a forked
        child it does nothing. Can block: until the kernel is done, and then about 30 ms.
        """
        if self._kernel.pid != os.getpid():
            return
        with self._closing:
            if not self._finalizer.alive:  # closed, or the program is about to end
                return
            reason = ClosedError("the context is closed")
            self._queue.refuse(reason)
            if not self._closed:
                self._cancel_polls()
                self._reap(sys.maxsize, None, None)
            self._refusal = reason
            with self._queue.lock:
                self._closed = self._kernel.closing = True
                self._direct = False
                self._kernel.close_sources()
            self._close_lanes()
            self._kernel.destroy()
            if self._waiters:
                self._kernel.nudge()  # the last of them closes the eventfd
            else:
                with self._queue.lock:
                    self._kernel.close_eventfd()
            self._queue.dead = True
            self._finalizer.detach()
            _live.pop(id(self), None)

    def _cancel_polls(self) -> None:
        queue = self._queue
        with queue.turn:  # no poll is on its way to the kernel, where it cannot be cancelled
            with queue.lock:
                requests = [*queue.pending, *queue.in_flight_table.values()]
            for request in requests:
                if request.opcode is Opcode.POLL:
                    self.cancel(request)

    def __enter__(self) -> Self:
        self._check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._refusal is not None:
            return f"<rawaio.IOContext, {self._refusal}>"
        return (
            f"<rawaio.IOContext nr_events {self._queue.nr_events}, in_queue "
            f"{self._queue.in_queue}, in_flight {self._queue.in_flight}>"
        )


def _snapshot(completions: deque[Completion]) -> list[Completion]:
    """What is in a deque that other threads add to and take from, without a lock."""
    while True:
        try:
            return list(completions)
        except RuntimeError:
            continue  # changed meanwhile, which takes a build without the GIL


# -- fork ---------------------------------------------------------------------------------------

_live: Final[dict[int, weakref.ref[IOContext]]] = {}


def _forget(key: int, reference: object) -> None:
    if _live.get(key) is reference:  # and not that of a new context in the same place
        del _live[key]


def _after_fork_in_child() -> None:
    reason = ForkedError("the context belongs to the parent process")
    for reference in list(_live.values()):
        context = reference()
        if context is not None:
            context._refusal = reason
            context._forked = context._queue.dead = True
            context._queue.refuse(reason)
    _live.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)

"""L2: a context: what a program submits to and reaps from, complete without an event loop.

Its way in, and its life from io_setup to io_destroy; the way out is in `reaping`, and calls for
many operations, which go another way, are in `bulkcalls`.

Laws:

- Every request that `submit` took is given back exactly once, whatever is raised in between.
- Memory that the kernel holds is kept: the queue owns the requests in flight, and with them buffer
  and file, and outlives the context until io_destroy has returned, which waits for the kernel.
- In a forked child nothing of the parent is touched.
"""

from __future__ import annotations

import errno
import os
import sys
from _thread import RLock
from _weakref import ref  # all of `weakref` takes a millisecond to import

from . import syscalls
from ._light import index, partial
from .bulkcalls import BulkCalls
from .errors import ClosedError, ForkedError
from .kernel import Kernel, Submitter
from .queue import PlugSection, QueueFullError, SubmissionQueue
from .reaping import Reaping
from .slab import IocbSlab
from .syscalls import IOCB_CMD_POLL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from types import TracebackType
    from typing import Final, Self

    from .polling import PollingRule
    from .request import Completion, Request
    from .statistics import Statistics

__all__ = ["IOContext"]

# Requests in one io_submit; their iocbs take 64 KiB. More per call gains nothing.
_MAX_OFFER: Final = 1024
_MAX_NR_EVENTS: Final = (1 << 32) - 1


class IOContext(Reaping, BulkCalls):
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
        device busiest; nr_events or more takes the least processor time, with half of them in
        flight at least. max_pending: requests that wait behind the ones in flight before `submit`
        waits too. force_syscalls: reap by io_getevents even where the ring can be read. polling: a
        rule of `rawaio.polling`, of this context's own, by which `reap` and bulk calls look at the
        ring before they sleep; of no effect where completions are had by io_getevents, and on a
        build without the GIL.

        Raises:
            OSError: io_setup's errno, with advice as notes: EAGAIN over aio-max-nr; ENOSYS no
                AIO in this kernel; EPERM denied by seccomp; EINVAL nr_events far too large;
                ENOMEM. EMFILE, ENFILE: no descriptor left.
            UnsupportedError: not a 64-bit Linux process on x86_64 or aarch64.
            ValueError: a number below 1.

        Source: io_setup(2), eventfd(2); Linux 2.6.22.
        """
        from weakref import finalize  # noqa: PLC0415 - only for who has a context

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
        self._finalizer = finalize(self, kernel.finalize)
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
        Reaping.__init__(self, kernel, queue, slab, force_syscalls=force_syscalls, polling=polling)
        BulkCalls.__init__(self)
        self._closing = RLock()
        _live[id(self)] = ref(self, partial(_forget, id(self)))

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
        try:
            queue.flush()
            self._fetch(self._done, None)
            queue.flush()
            if self._waiters and self._done:
                self._kernel.nudge()
            if queue.in_queue and queue.in_queue + n > queue.max_pending:
                self._wait(None, collecting=True)
        except BaseException as error:
            self._recover(error)
            if self._waiters:
                self._kernel.nudge()  # what it was woken for, others have to look for
            raise

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
        if request._opcode != IOCB_CMD_POLL:
            return False
        with queue.lock:
            token = next((t for t, r in list(queue.in_flight_table.items()) if r is request), None)
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
                if request._opcode == IOCB_CMD_POLL:
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

_live: Final[dict[int, ref[IOContext]]] = {}


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

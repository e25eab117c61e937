"""L2: a context: its ring and its queue, complete without an event loop.

Laws:

- Every request that `submit` took is given back exactly once, by one `reap`, whatever is raised in
  between; its callback has run by then, with the context unlocked.
- Memory that the kernel holds is kept: the table of requests in flight owns request, buffer and
  file, and outlives the context until io_destroy has returned, which waits for the kernel.
- Nothing waits with the lock held. A wait is for the eventfd, which any completion signals, and
  which is signalled for waiters when something else is to be looked at (`_nudge`).
- A count of zero in the eventfd never makes a reap skip the ring, and a stale count only makes it
  look once more.
- In a forked child nothing of the parent is touched.

Where a completion is: in the ring, then in `_done` (or, when no callback is to be run, directly in
the list that reap returns), and after its callback in that list. A reap that an exception cuts
short puts its list into `_ready`, for the next one.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import time
import weakref
from _thread import RLock, get_ident
from collections import deque
from functools import partial
from itertools import repeat, starmap
from operator import index

from . import syscalls
from .errors import BusyError, ClosedError, ForkedError, RawAIOError
from .kernel import Kernel, Submitter
from .lifecycle import complete, complete_one, reopen
from .queue import _GIL, MAX_PASSES, PlugSection, QueueFullError, SubmissionQueue
from .request import Completion, Request
from .ring import CompletionRing, Ordering, SyscallEvents
from .slab import IocbSlab
from .syscalls import Opcode
from .unraisable import report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any, Final, Self, overload

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .bulk import BulkLane
    from .busypoll import BusyPoll
    from .pieces import Buffers, Numbers
    from .polling import PollingRule
    from .protocols import CompletionSource, HasFileno
    from .statistics import Statistics

__all__ = ["IOContext"]

# Requests in one io_submit; their iocbs take 64 KiB. More per call gains nothing.
_MAX_OFFER: Final = 1024
_MAX_NR_EVENTS: Final = (1 << 32) - 1
# How deep reaps may nest through callbacks, and how many rounds of completions that submit again
# one reap goes through: QEMU's bound on the same recursion.
_MAX_DEPTH: Final = MAX_PASSES
# poll(2) takes an int; a longer wait is made of several.
_LONGEST_WAIT_MS: Final = 3_600_000


_ONCE: Final = ((),)  # the arguments of one call without any, for starmap


class IOContext:
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
        self._refusal: RawAIOError | None = None
        self._kernel = kernel = Kernel()
        self._finalizer = weakref.finalize(self, kernel.finalize)
        kernel.open(nr_events)
        slab = IocbSlab(min(nr_events, _MAX_OFFER), kernel.eventfd)
        self._queue = kernel.queue = queue = SubmissionQueue(
            Submitter(kernel.ctx_id, slab).submit,
            nr_events=nr_events,
            max_batch=max_batch,
            max_pending=max_pending,
            max_offer=slab.capacity,
            continuation=kernel.nudge,
        )
        self._by_syscall = SyscallEvents(kernel.ctx_id)
        self._ring = CompletionRing(kernel.ctx_id, counted=True)
        kernel.sources = self._ring, self._by_syscall
        self._use_ring = self._ring.usable and not force_syscalls
        self._counted = self._use_ring and self._ring.ordering is Ordering.COUNTED
        if self._counted:
            kernel.ring = self._ring
        # Whether an empty ring can be told without the lock: with the GIL nobody unmaps it between
        # the look at the view and the loads, which no call separates.
        self._direct = _GIL and self._use_ring and not self._counted
        self._busy: BusyPoll | None = None
        if polling is not None and self._direct:
            from .busypoll import BusyPoll  # noqa: PLC0415 - only for who asks for it

            self._busy = BusyPoll(polling)
        # Completed, and no callback has been run.
        self._done = queue.rejected
        # Completed, callbacks run, and then the reap that had them was cut short.
        self._ready: deque[Completion] = deque()
        # Tokens of polls that io_cancel was said to have cancelled.
        self._cancelled: set[int] = set()
        self._fetching = False
        # How many reaps of a thread are inside one another, by way of callbacks.
        self._depth: dict[int, int] = {}
        self._waiters: set[object] = set()
        self._pollers: list[select.poll] = []
        self._closing = RLock()
        self._closed = False
        self._forked = False
        #: Kernel contexts for `pread_many` and `pwrite_many`, that no thread uses just now.
        self._lanes: list[BulkLane] = []
        self._bulk_operations = 0
        self._bulk_calls = 0
        self._ring_reaps = 0
        self._syscall_reaps = 0
        self._waits = 0
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

    # -- out ------------------------------------------------------------------------------------

    def reap(
        self, min_nr: int = 0, max_nr: int | None = None, timeout: float | None = None
    ) -> list[Completion]:
        """Completions, in the order in which the kernel completed them, each exactly once.

        min_nr: how many to wait for; with fewer outstanding, it waits for those. max_nr: how many
        to take at most. timeout: seconds to wait at most, None for ever; when it is over, what is
        there is returned. Does not enter the kernel when there are completions in the ring, or
        min_nr is 0 and nothing is pending. Can block: as said, in callbacks, and in io_submit when
        something is pending.

        Callbacks of what is returned have run. An Exception in one goes to sys.unraisablehook.
        KeyboardInterrupt, SystemExit and the like propagate, and the next reap returns the rest.
        In a callback reap may be called again, up to 8 deep; then `reap()` returns nothing, and the
        outer ones go on with what there is.

        Raises:
            ValueError: min_nr or timeout negative, max_nr below 1 or below min_nr.
            BusyError: min_nr above 0 in a callback that is 8 reaps deep.
            ClosedError, ForkedError.
            OSError: io_getevents failed, which it does not.
        """
        if self._refusal is not None:
            self._check()
        if min_nr < 0:
            raise ValueError(f"min_nr must not be negative, got {min_nr}")
        if max_nr is not None and (max_nr < 1 or max_nr < min_nr):
            raise ValueError(f"max_nr must be 1 and min_nr at least, got {max_nr}")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must not be negative, got {timeout}")
        if self._depth and self._too_deep(waits=min_nr > 0):
            return []
        return self._reap(min_nr, max_nr, timeout)

    def process_completions(self) -> list[Completion]:
        """What an event loop calls when `fileno` is readable: reset it, then `reap()`.

        Also submits what is pending, unless plugged. Does not wait.

        Raises: as `reap`.
        """
        self._check()
        if self._depth and self._too_deep(waits=False):
            return []
        try:
            self._kernel.reset()
        except BaseException as error:
            self._recover(error)
            self._kernel.nudge()  # what it was reset for has not been looked at
            raise
        return self._reap(0, None, None)

    def collect(self, target: deque[Completion], *, reset: bool = True) -> None:
        """Move what has completed to the end of target, in order; callbacks are not run.

        For event loops that know by `user_data` whom to tell. Also submits what is pending, unless
        plugged. Whatever is raised, completions are in target or come with the next call. reset:
        reset the eventfd first, one system call; without it, what is there is only looked for.

        Raises:
            ClosedError, ForkedError.
        """
        if self._refusal is not None:
            self._check()
        queue = self._queue
        try:
            if reset:
                self._kernel.reset()
            if self._done or self._ready:
                with queue.lock:
                    for earlier in (self._ready, self._done):
                        target.extend(starmap(earlier.popleft, repeat((), len(earlier))))
            self._fetch(target, None)
            if complete(target) < len(target):  # a request with a callback, which is not run
                for completion in target:
                    complete_one(completion[0])
            if queue.pending:
                queue.kick()
        except BaseException as error:
            self._recover(error)
            self._kernel.nudge()
            raise

    @property
    def empty(self) -> bool:
        """Whether the ring is; True also where that cannot be told without entering the kernel."""
        return not self._direct or self._ring.empty

    @property
    def outstanding(self) -> int:
        """How many requests are pending or in flight."""
        return self._queue.outstanding

    @property
    def retry_in(self) -> float | None:
        """Seconds after which an event loop should call `process_completions` without an event.

        None: no need, an event will come. A number only after EAGAIN with nothing in flight.
        """
        self._check()
        return self._queue.retry_in

    def fileno(self) -> int:
        """The eventfd: readable when something has completed. Reset by `process_completions`."""
        self._check()
        return self._kernel.eventfd

    def drain(self, timeout: float | None = None) -> list[Completion]:
        """Submit and wait for everything that is pending or in flight, and reap it.

        Also what is plugged. timeout as for `reap`; when it is over, what is there is returned, and
        `statistics` tells what is left.

        Raises: as `reap`.
        """
        self._check()
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must not be negative, got {timeout}")
        if self._depth:
            self._too_deep(waits=True)
        return self._reap(sys.maxsize, None, timeout)

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

    # -- inside ---------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._refusal is not None:
            raise type(self._refusal)(*self._refusal.args)

    def _too_deep(self, *, waits: bool) -> bool:
        """Whether this thread is in a callback of a callback of ...; then waiting is refused."""
        if self._depth.get(get_ident(), 0) < _MAX_DEPTH:
            return False
        if waits:
            raise BusyError(f"cannot wait in a callback that is {_MAX_DEPTH} reaps deep")
        return True

    def _reap(self, min_nr: int, max_nr: int | None, timeout: float | None) -> list[Completion]:
        queue, done = self._queue, self._done
        reaped: list[Completion] = []
        # How many of them have been marked, and have had their callbacks; -1 is all.
        finished = [0]
        try:
            if not (done or self._ready or self._depth or self._counted):
                self._fetch(reaped, max_nr)
                finished[0] = n = complete(reaped)
                if n < len(reaped):
                    # The rest waits its turn where callbacks that reap find it.
                    done.extendleft(starmap(reaped.pop, repeat((), len(reaped) - n)))
                elif (
                    n >= min_nr
                    and n != max_nr
                    and not (queue.pending or done or self._waiters or self._closed)
                ):
                    return reaped
            self._go_round(reaped, finished, min_nr, max_nr, timeout)
            return reaped
        except BaseException as error:
            self._recover(error)
            if finished[0] >= 0:
                reopen(reaped, finished[0])
                done.extendleft(starmap(reaped.pop, repeat((), len(reaped) - finished[0])))
            self._ready.extendleft(starmap(reaped.pop, repeat((), len(reaped))))
            if self._ready or done or self._waiters:
                self._kernel.nudge()
            raise

    def _go_round(
        self,
        reaped: list[Completion],
        finished: list[int],
        min_nr: int,
        max_nr: int | None,
        timeout: float | None,
    ) -> None:
        # A function of its own: CPython does not look for the handler of a try around a loop when
        # an exception from outside strikes at the jump back.
        queue = self._queue
        done = self._done
        deadline = None if timeout is None else time.monotonic() + timeout
        rounds = 0
        before = queue.moved
        while True:
            moved = queue.moved
            finished[0] = -1
            self._gather(reaped, max_nr)
            if queue.pending:
                if len(reaped) < min_nr:
                    queue.flush()  # also what is plugged: nobody else may ever unplug it
                else:
                    queue.kick()
            if len(reaped) == max_nr:
                self._kernel.nudge()  # there may be more, and the eventfd be reset
                break
            if len(reaped) >= min_nr:
                if queue.moved == moved and not done:
                    break
                # What was submitted meanwhile, by callbacks too, may have completed at once.
                rounds += 1
                if rounds < MAX_PASSES:
                    continue
                self._kernel.nudge()
                break
            if self._closed or not (done or queue.in_flight_table or queue.outstanding):
                break
            if queue.moved != moved:
                continue
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self._wait(left)
        # Others may wait for a completion, for the last one, or for room in pending.
        if self._waiters and (done or queue.moved != before or not queue.outstanding):
            self._kernel.nudge()

    def _gather(self, reaped: list[Completion], max_nr: int | None) -> None:
        """Add to reaped what is completed, one by one, and run the callbacks."""
        finished = len(reaped)
        started: list[Completion | None] = [None]
        resumed = False
        depth, me = -1, 0
        done = self._done
        try:
            if self._ready:
                with self._queue.lock:
                    n = len(self._ready)
                    if max_nr is not None:
                        n = min(n, max_nr - finished)
                    resumed = True
                    reaped.extend(starmap(self._ready.popleft, repeat((), n)))
                finished = len(reaped)
                resumed = False
            self._fetch(done, None)
            me = get_ident()
            depth = self._depth.get(me, 0)
            # No more than there are now: callbacks may have others refused, and so on for ever.
            for _ in range(len(done)):
                if len(reaped) == max_nr:
                    break
                try:
                    reaped.extend(starmap(done.popleft, _ONCE))
                except IndexError:  # a reap inside a callback, or in another thread, took it
                    break
                completion = reaped[-1]
                request = completion[0]
                complete_one(request)
                callback = request.callback
                if callback is not None:
                    self._depth[me] = depth + 1
                    if self._waiters and done:
                        self._kernel.nudge()  # the callback may take its time
                    _call(callback, completion, started)
                    self._set_depth(me, depth)
                    if self._forked:
                        self._check()
                finished = len(reaped)
        except BaseException as error:
            self._recover(error)
            if depth >= 0:
                self._set_depth(me, depth)
            if resumed or (reaped and started[0] is reaped[-1]):
                finished = len(reaped)
            reopen(reaped, finished)
            done.extendleft(starmap(reaped.pop, repeat((), len(reaped) - finished)))
            raise

    def _set_depth(self, thread: int, depth: int) -> None:
        if depth:
            self._depth[thread] = depth
        else:
            self._depth.pop(thread, None)

    def _fetch(self, target: list[Completion] | deque[Completion], max_nr: int | None) -> None:
        """Move what has completed from the kernel to target, as long as that is below max_nr."""
        queue = self._queue
        with queue.lock:
            if self._closed or self._fetching:
                return
            if self._done and target is not self._done:
                return  # another thread has just put there what completed earlier
            self._fetching = True
            try:
                if not self._use_ring:
                    self._move(self._by_syscall, target, max_nr)
                elif not self._counted:
                    self._move(self._ring, target, max_nr)
                else:
                    if self._by_syscall.buffered:
                        self._move(self._by_syscall, target, max_nr)
                    self._kernel.reset()
                    self._move(self._ring, target, max_nr)
                    if self._ring.hidden:  # somebody else has read the eventfd
                        self._move(self._by_syscall, target, max_nr)
            finally:
                self._fetching = False

    def _move(
        self,
        source: CompletionSource,
        target: list[Completion] | deque[Completion],
        max_nr: int | None,
    ) -> None:
        take, table, append = self._queue.take, self._queue.in_flight_table, target.append
        most = None
        while True:
            if max_nr is not None:
                most = max_nr - len(target)
                if most <= 0:
                    return
            run = source.next_run(most)
            if run is None:
                return
            data, res, res2, more = run
            n = len(data)
            if self._cancelled:
                self._fetch_one_by_one(target, data, res, res2)
            elif n == 1 and (request := table.get(data[0])) is not None:
                completion = Completion((request, res[0], res2[0]))
                # One line and one step, as nothing can strike before append has been called.
                del table[data[0]]; append(completion)  # noqa: E702 # fmt: skip
            else:
                try:
                    target.extend(map(Completion, zip(map(take, data), res, res2)))  # noqa: B905
                except KeyError:
                    self._fetch_one_by_one(target, data, res, res2)
            if source is self._ring:
                self._ring_reaps += n
            else:
                self._syscall_reaps += n
                if self._counted:
                    self._ring.credit(-n)
            source.commit_run()
            if not more:
                return

    def _fetch_one_by_one(
        self,
        target: list[Completion] | deque[Completion],
        data: list[int],
        res: list[int],
        res2: list[int],
    ) -> None:
        """For events of which some are cancelled, read for the second time, or nobody's."""
        queue = self._queue
        for token, r, r2 in zip(data, res, res2, strict=True):
            if token in queue.in_flight_table:
                # A cancelled poll completes with a mask of 0, or of what came in between.
                event = ((-errno.ECANCELED,), (0,)) if token in self._cancelled else ((r,), (r2,))
                target.extend(map(Completion, zip(map(queue.take, (token,)), *event, strict=True)))
                self._cancelled.discard(token)
            elif not queue.issued(token):
                report(RawAIOError(f"an event with unknown token {token}, res {r}"), self)

    def _wait(self, timeout: float | None, *, collecting: bool = False) -> None:
        """Sleep until something completes or is to be looked at, or the queue is to be kicked.

        collecting: what has completed already is no reason to look.
        """
        queue = self._queue
        waiter = object()
        try:
            self._waiters.add(waiter)
            # Whoever changes one of these looks for waiters afterwards.
            ready = self._closed or ((self._done or self._ready) and not collecting)
            if not ready and self._has_to_sleep():
                retry = queue.retry_in
                if retry is not None and (timeout is None or timeout > retry):
                    timeout = retry
                if self._busy is None:
                    self._sleep(timeout)
                else:
                    self._busy.wait(self._something_to_do, timeout, self._sleep)
            self._leave(waiter)
        except BaseException:
            self._leave(waiter)
            raise

    def _has_to_sleep(self) -> bool:
        queue = self._queue
        with queue.lock:
            outstanding = bool(queue.in_queue or queue.in_flight)
            self._waits += outstanding
        return outstanding

    def _something_to_do(self) -> bool:
        return bool(not self.empty or self._done or self._ready or self._closed)

    def _leave(self, waiter: object) -> None:
        self._waiters.discard(waiter)
        if self._closed and not self._waiters:
            with self._queue.lock:
                self._kernel.close_eventfd()

    def _sleep(self, timeout: float | None) -> None:
        try:
            poller = self._pollers.pop()
        except IndexError:
            poller = select.poll()
            poller.register(self._kernel.eventfd, select.POLLIN)
        wait_ms = _LONGEST_WAIT_MS
        if timeout is not None:
            wait_ms = -int(-min(timeout * 1000, _LONGEST_WAIT_MS) // 1)  # rounded up
        if poller.poll(wait_ms):
            self._kernel.reset()
        self._pollers.append(poller)

    def _recover(self, error: BaseException) -> None:
        # Only an exception from outside can leave the lock held: one that strikes between the end
        # of a with-block and its release.
        if not isinstance(error, Exception):
            self._fetching = False
            while self._queue.lock._is_owned():
                self._queue.lock.release()


def _snapshot(completions: deque[Completion]) -> list[Completion]:
    """What is in a deque that other threads add to and take from, without a lock."""
    while True:
        try:
            return list(completions)
        except RuntimeError:
            continue  # changed meanwhile, which takes a build without the GIL


def _call(
    callback: Callable[[Completion], object],
    completion: Completion,
    started: list[Completion | None],
) -> None:
    """Run a callback, and report what it raises. started[0] is the completion once it has begun."""
    try:
        # One line and one step: nothing can strike between the store and the callback's beginning.
        started[0] = completion; callback(completion)  # noqa: E702 # fmt: skip
    except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
        report(error, callback)


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

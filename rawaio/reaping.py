"""L2: the way out of a context: completions are found, marked, called back, waited for.

Laws:

- Every completion is given back exactly once, by one `reap`, whatever is raised in between; its
  callback has run by then, with the context unlocked.
- Nothing waits with the lock held. A wait is for the eventfd, which any completion signals, and
  which is signalled for waiters when something else is to be looked at (`Kernel.nudge`).
- A count of zero in the eventfd never makes a reap skip the ring, and a stale count only makes it
  look once more.

Where a completion is: in the ring, then in `_done` (or, when no callback is to be run, directly in
the list that reap returns), and after its callback in that list. A reap that an exception cuts
short puts its list into `_ready`, for the next one.
"""

from __future__ import annotations

import errno
import sys
import time
from _thread import get_ident
from itertools import repeat, starmap

from ._light import deque
from .errors import BusyError, ClosedError, RawAIOError
from .lifecycle import complete, complete_one, reopen
from .queue import _GIL, MAX_PASSES, NOTHING, SubmissionQueue
from .request import SERIES, Completion
from .ring import CompletionRing, Ordering, SyscallEvents
from .unraisable import report

TYPE_CHECKING = False
if TYPE_CHECKING:
    import select
    from collections.abc import Callable, Sequence
    from typing import Final

    from .busypoll import BusyPoll
    from .kernel import Kernel
    from .polling import PollingRule
    from .protocols import CompletionSource
    from .request import Request
    from .slab import IocbSlab

__all__ = ["Reaping"]

# How deep reaps may nest through callbacks, and how many rounds of completions that submit again
# one reap goes through: QEMU's bound on the same recursion.
_MAX_DEPTH: Final = MAX_PASSES
# poll(2) takes an int; a longer wait is made of several.
_LONGEST_WAIT_MS: Final = 3_600_000

# In how many pieces, at most, a batch that completes in order is taken without the table.
_PIECES: Final = 8
_ONCE: Final = ((),)  # the arguments of one call without any, for starmap


class Reaping:
    """The part of a context that takes completions from the kernel, and gives them to a program."""

    def __init__(
        self,
        kernel: Kernel,
        queue: SubmissionQueue,
        slab: IocbSlab,
        *,
        force_syscalls: bool,
        polling: PollingRule | None,
    ) -> None:
        """kernel: an open one; it closes what completions are read from. slab: the queue's."""
        # Why nothing can be done any more: closed, or the parent's.
        self._refusal: RawAIOError | None = None
        self._kernel = kernel
        self._queue = queue
        self._slab = slab
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
        # The batch that was last taken as a whole: its first token, its events byte for byte, and
        # their res and res2. The next one may have ended in the same way: see `_move_whole`.
        self._expected: tuple[int, bytes, list[int], list[int]] = 0, b"", [], []
        # Whether the last reap had more to do than to take what was there.
        self._slow = False
        # How many reaps of a thread are inside one another, by way of callbacks.
        self._depth: dict[int, int] = {}
        self._waiters: set[object] = set()
        self._pollers: list[select.poll] = []
        self._closed = False
        self._forked = False
        self._ring_reaps = 0
        self._syscall_reaps = 0
        self._waits = 0

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
            if self._waiters and not (queue.pending or queue.in_flight):
                self._kernel.nudge()  # nothing would end their wait
        except BaseException as error:
            self._recover(error)
            self._kernel.nudge()
            raise

    @property
    def visible(self) -> bool:
        """Whether `empty` can be told without entering the kernel."""
        return self._direct

    @property
    def empty(self) -> bool:
        """Whether the ring is; True also where that cannot be told without entering the kernel."""
        try:
            return not self._direct or self._ring.empty
        except ClosedError:  # just now, by another thread
            return True

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
        done = self._done
        reaped: list[Completion] = []
        # How many of them have been marked, and have had their callbacks; -1 is all.
        finished = [0]
        try:
            if not (done or self._ready or self._depth or self._counted):
                # Who had to wait the last time will most often have to again.
                hopeless = min_nr and self._slow and self._direct and self.empty
                if not hopeless and self._take(reaped, finished, min_nr, max_nr):
                    self._slow = False
                    return reaped
                self._slow = True
                if min_nr and timeout is None and not reaped and self._only_waits():
                    self._wait(None)
                    if not (done or self._ready or self._depth) and self._take(
                        reaped, finished, min_nr, max_nr
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
            self._kernel.nudge()  # whoever is about to wait, and is no waiter yet, has to look
            raise

    def _take(
        self,
        reaped: list[Completion],
        finished: list[int],
        min_nr: int,
        max_nr: int | None,
    ) -> bool:
        """Move what has completed to reaped, which is empty; whether nothing else is to be done."""
        queue, done = self._queue, self._done
        known = self._fetch(reaped, max_nr)
        finished[0] = n = complete(reaped, known)
        if n < len(reaped):
            # The rest waits its turn where callbacks that reap find it.
            done.extendleft(starmap(reaped.pop, repeat((), len(reaped) - n)))
            return False
        return (
            n >= min_nr
            and n != max_nr
            and not (queue.pending or done or self._waiters or self._closed)
        )

    def _only_waits(self) -> bool:
        """Whether something is to complete, and there is nothing to do before it does."""
        queue = self._queue
        return bool(queue.table or queue.whole[1]) and not (
            queue.pending or self._done or self._ready or self._waiters
        )

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
            if self._closed or not (done or queue.in_flight or queue.outstanding):
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

    def _fetch(
        self, target: list[Completion] | deque[Completion], max_nr: int | None
    ) -> Sequence[Request] | None:
        """Move what has completed from the kernel to target, as long as that is below max_nr.

        Returns the requests of it when they are at hand.
        """
        with self._queue.lock:
            if self._closed or self._fetching:
                return None
            if self._done and target is not self._done:
                return None  # another thread has just put there what completed earlier
            self._fetching = True
            try:
                if not self._use_ring:
                    self._move(self._by_syscall, target, max_nr)
                elif not self._counted:
                    if self._queue.whole[1] and isinstance(target, list):
                        requests = self._move_whole(target, max_nr)
                        if requests:
                            return requests
                    return self._move(self._ring, target, max_nr)
                else:
                    if self._by_syscall.buffered:
                        self._move(self._by_syscall, target, max_nr)
                    self._kernel.reset()
                    self._move(self._ring, target, max_nr)
                    if self._ring.hidden:  # somebody else has read the eventfd
                        self._move(self._by_syscall, target, max_nr)
            finally:
                self._fetching = False
        return None

    def _move_whole(
        self, target: list[Completion], max_nr: int | None
    ) -> tuple[Request, ...] | None:
        """`_move` of a batch that ended as the last one did; None, and nothing is moved, if not."""
        queue, ring = self._queue, self._ring
        first, requests = batch = queue.whole
        known_first, events, res, res2 = self._expected
        n = len(requests)
        if (
            # The same tokens; or what is still in the ring of an earlier batch would be this one.
            first != known_first
            or (max_nr is not None and n > max_nr)
            or not ring.take_expected(events, 0, n, commit=False)
        ):
            return None
        # The last one may have been larger.
        completions = [*map(Completion, zip(requests, res, res2))]  # noqa: B905
        if queue.whole is not batch:  # a finalizer has unplugged, and what it flushed was refused
            return None
        # One line and one step, as nothing can strike in an assignment.
        target += completions; queue.whole = NOTHING  # noqa: E702 # fmt: skip
        self._ring_reaps += n
        ring.commit_run()
        queue.reusable = first
        return requests

    def _move(
        self,
        source: CompletionSource,
        target: list[Completion] | deque[Completion],
        max_nr: int | None,
    ) -> Sequence[Request] | None:
        queue = self._queue
        table, append = queue.table, target.append
        known: tuple[Request, ...] | None = ()
        reusable = 0
        most = None
        while True:
            if max_nr is not None:
                most = max_nr - len(target)
                if most <= 0:
                    return known
            run = source.next_run(most)
            if run is None:
                return known
            data, res, res2, more = run
            n = len(data)
            first, whole = batch = queue.whole
            if self._cancelled:
                known = None
                self._fetch_one_by_one(target, data, res, res2)
            elif n == 1 and (request := table.get(data[0])) is not None:
                known = None
                completion = Completion((request, res[0], res2[0]))
                # One line and one step, as nothing can strike before append has been called.
                del table[data[0]]; append(completion)  # noqa: E702 # fmt: skip
            elif (
                # In pieces that are worth the copy of the rest.
                1 < n <= len(whole) <= _PIECES * n
                and isinstance(target, list)
                and data == self._slab.tokens(first, n)
            ):
                taken, rest = whole[:n], (first + n, whole[n:])
                completions = [*map(Completion, zip(taken, res, res2))]  # noqa: B905
                if queue.whole is batch:
                    # One line and one step, as nothing can strike in an assignment.
                    target += completions; queue.whole = rest  # noqa: E702 # fmt: skip
                    if known is not None:
                        known = known + taken if known else taken
                    if n == len(whole) and not first % SERIES and source is self._ring:
                        # The next batch will most often have the same tokens and results.
                        self._expected = first, self._ring.given_events(), res, res2
                        reusable = first
                else:  # a finalizer has unplugged in between, and what it flushed was refused
                    known = None
                    self._fetch_one_by_one(target, data, res, res2)
            else:
                known = None
                take = queue.in_flight_table.pop
                tokens = data.tolist() if isinstance(data, memoryview) else data
                try:
                    target.extend(map(Completion, zip(map(take, tokens), res, res2)))  # noqa: B905
                except KeyError:
                    self._fetch_one_by_one(target, data, res, res2)
            if source is self._ring:
                self._ring_reaps += n
            else:
                self._syscall_reaps += n
                if self._counted:
                    self._ring.credit(-n)
            source.commit_run()
            if reusable:
                queue.reusable, reusable = reusable, 0
            if not more:
                return known

    def _fetch_one_by_one(
        self,
        target: list[Completion] | deque[Completion],
        data: Sequence[int],
        res: list[int],
        res2: list[int],
    ) -> None:
        """For events of which some are cancelled, read for the second time, or nobody's."""
        queue = self._queue
        # A hook that is told of a stranger may close the context, and with it what data is of.
        for token, r, r2 in zip(list(data), res, res2, strict=True):
            if token in queue.in_flight_table:
                # A cancelled poll completes with a mask of 0, or of what came in between.
                event = ((-errno.ECANCELED,), (0,)) if token in self._cancelled else ((r,), (r2,))
                take = queue.in_flight_table.pop
                target.extend(map(Completion, zip(map(take, (token,)), *event, strict=True)))
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
                if queue.pending:
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
            poller = _poller(self._kernel.eventfd)
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


def _poller(fd: int) -> select.poll:
    import select  # noqa: PLC0415 - only for who sleeps

    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return poller


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

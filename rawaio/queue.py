"""L2: the submission queue. Sans-I/O: what talks to the kernel is a function given to it.

Laws:

- Every request is in exactly one of: pending, in flight, completed. It is in flight from the moment
  it is offered to the kernel; what the kernel does not accept returns to the head of pending.
- `in_flight <= nr_events`, always.
- First in, first offered. A request that the kernel refuses fails alone, with its own errno, and
  the queue goes on with the next one in the same flush.
- Whenever something is pending and nothing is plugged, something brings it forward: the flush that
  is under way, a completion (whoever reaps calls `kick`), the timer (`retry_in`) when nothing is in
  flight, or `continuation`.
- Nothing recurses: a flush inside a flush, or beside one in another thread, is taken over by the
  one under way, at most `MAX_PASSES` times, and then by `continuation`.
- An exception from outside, at any bytecode, loses and doubles nothing: what the kernel said is
  recorded before the exception can strike, and `_settle`, which may be repeated, follows the
  record.

The words are QEMU's: pending, in_queue, in_flight, blocked, plugged.
"""

from __future__ import annotations

import errno
import sys
from _thread import RLock  # all of `threading` takes a millisecond to import
from itertools import repeat, starmap

from ._light import deque, length_hint, neg
from ._uninterrupted import uninterrupted
from .errors import BusyError, RawAIOError
from .lifecycle import admit, looked_at, offer, restore, take_back
from .request import COMPLETED, IN_FLIGHT, PENDING, SERIES, Completion, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any, Final, Protocol, Self

    from .protocols import OwnedLock

__all__ = ["MAX_PASSES", "NOTHING", "PlugSection", "QueueFullError", "SubmissionQueue"]

# Whether threads take turns between bytecodes, and only behind calls and jumps back. Asked of the
# build: a free-threaded one may have a GIL while some module is imported, and none afterwards.
_GIL: Final[bool] = "t" not in sys.abiflags
# How often one flush starts again for requests that were pushed while it was under way. QEMU's
# bound on the same chain of submissions that complete at once.
MAX_PASSES: Final = 8
# The first and the longest wait before EAGAIN with nothing in flight is tried again. What is short
# then, slots lent to other CPUs or kernel memory, comes back within a scheduler tick or not soon.
_RETRY_FIRST_S: Final = 0.001
_RETRY_LONGEST_S: Final = 0.064
#: No batch, as `SubmissionQueue.whole`.
NOTHING: Final[tuple[int, tuple[Request, ...]]] = 0, ()


if TYPE_CHECKING:

    class Submit(Protocol):
        """Offers a batch to the kernel."""

        def __call__(self, first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
            """io_submit the batch, the i-th request with first_token + i as its aio_data.

            first_token: a multiple of `SERIES`. Puts io_submit's return value and errno into
            outcome, in the same uninterrupted step as the call. Raises only when nothing was
            submitted.
            """
            ...


class _Anonymous:
    """The key of a plug that was given none."""

    __slots__ = ()


class QueueFullError(BusyError):
    """There is no room in pending; something has to complete first."""


class SubmissionQueue:
    """Requests on their way to the kernel, and those that it has.

    Usable from several threads, and from inside its own submit function. `lock` guards pending for
    an instant at a time and may be held by the caller; it is never held across io_submit.
    """

    __slots__ = (
        "_continuation",
        "_due",
        "_first",
        "_next_token",
        "_offered",
        "_outcome",
        "_overdue",
        "_plugs",
        "_refusal",
        "_refused_some",
        "_retry_s",
        "_stalled",
        "_submit",
        "blocked",
        "dead",
        "eagain",
        "io_submit_calls",
        "lock",
        "max_batch",
        "max_offer",
        "max_pending",
        "moved",
        "nr_events",
        "pending",
        "rejected",
        "reusable",
        "submitted",
        "table",
        "turn",
        "whole",
    )

    def __init__(
        self,
        submit: Submit,
        *,
        nr_events: int,
        max_batch: int = 32,
        max_pending: int = 16384,
        max_offer: int = 1024,
        rejected: deque[Completion] | None = None,
        continuation: Callable[[], object] | None = None,
    ) -> None:
        """submit: see `Submit`, above. The limits are numbers of requests, from 1 on.

        nr_events: in flight. max_batch: pending while plugged, before they are submitted all the
        same. max_pending: pending. max_offer: in one io_submit. rejected: where completions go
        that the kernel made no event for. continuation: called at the end of a flush in which
        requests were refused, or the bound on passes was reached, and after the first EAGAIN with
        nothing in flight; it must see to a later look at rejected and `retry_in`, and `kick`.
        """
        for name, limit in (
            ("nr_events", nr_events),
            ("max_batch", max_batch),
            ("max_pending", max_pending),
            ("max_offer", max_offer),
        ):
            if limit < 1:
                raise ValueError(f"{name} must be 1 at least, not {limit}")
        if max_offer > SERIES:
            raise ValueError(f"max_offer must be {SERIES} at most, not {max_offer}")
        self._submit = submit
        self._continuation = continuation
        self.nr_events = nr_events
        self.max_batch = max_batch
        self.max_pending = max_pending
        self.max_offer = max_offer
        self.lock = _owned_lock()
        #: Held by the thread that flushes, across io_submit; a flush never waits for it.
        self.turn = _owned_lock()
        self._due = False
        # Whether the bound on passes was reached, and there was nobody to tell.
        self._overdue = False
        self._refused_some = False
        # Whether nothing is in flight any more that would end a wait, since the last io_submit.
        self._stalled = False
        #: Whether the kernel is out of reach for good: nothing is offered any more.
        self.dead = False
        #: Taken and not yet offered, in order. To be changed by the queue alone.
        self.pending: deque[Request] = deque()
        #: What is in flight, by token, but for what is in `whole`.
        self.table: dict[int, Request] = {}
        #: The token of its first request, and a batch that found nothing in flight: it will most
        #: often complete as it is, in one piece or several, and costs less to take in that way.
        self.whole: tuple[int, tuple[Request, ...]] = NOTHING
        self.rejected: deque[Completion] = deque() if rejected is None else rejected
        self._next_token = SERIES
        #: The first token of a batch whose events are all committed, so that nobody will hear of it
        #: again; the next one that is submitted when it is pushed has the same, and what it costs
        #: to write others is saved. 0: none.
        self.reusable = 0
        # The batch that is being offered, the token of its first request, and what the kernel said.
        self._offered: list[Request] = []
        self._first = 0
        self._outcome: list[int] = []
        self._refusal: RawAIOError | None = None
        self._retry_s = 0.0
        # One key for each plug that is not undone. Keys and not a number, so that undoing the same
        # one again, after an exception from outside, changes nothing.
        self._plugs: dict[object, bool] = {}
        self.blocked = False
        self.submitted = 0
        #: How many requests have left pending by way of io_submit, accepted or refused.
        self.moved = 0
        self.io_submit_calls = 0
        self.eagain = 0

    # -- what it holds --------------------------------------------------------------------------

    @property
    def in_queue(self) -> int:
        """How many requests are pending."""
        return len(self.pending)

    @property
    def in_flight(self) -> int:
        """How many requests the kernel has, or is being offered."""
        # In this order: what is moved to the table in between is counted twice, and never missed.
        return len(self.whole[1]) + len(self.table)

    @property
    def in_flight_table(self) -> dict[int, Request]:
        """What the kernel has, or is being offered, by token. To be asked for with the lock."""
        first, requests = self.whole
        table = self.table
        if requests:
            tokens = range(first, first + len(requests))
            # What is in both is counted twice, so `uninterrupted`.
            uninterrupted(
                (table.update, zip(tokens, requests, strict=True)),
                (setattr, self, "whole", NOTHING),
            )
        return table

    @property
    def outstanding(self) -> int:
        """Pending and in flight together, at one instant."""
        with self.lock:
            return len(self.pending) + self.in_flight

    @property
    def plugged(self) -> int:
        """How many plugs are not undone."""
        return len(self._plugs)

    @property
    def retry_in(self) -> float | None:
        """Seconds after which `kick` should be called although nothing completes; None: no need."""
        if self.pending and not self._plugs:
            if self._overdue:
                return 0.0
            if self.blocked and not self.in_flight:
                return self._retry_s
        return None

    def issued(self, token: int) -> bool:
        """Whether some request had this token; an event with another one is nobody's."""
        return SERIES <= token < self._next_token and token % SERIES < self.max_offer

    # -- in -------------------------------------------------------------------------------------

    def push(self, requests: Sequence[Request]) -> int:
        """Take all the requests, or raise and take none; submit unless plugged or blocked.

        Can block: in io_submit.

        Raises:
            BusyError: one is under way already, or there twice.
            QueueFullError: max_pending would be exceeded (never when nothing is pending).
            TypeError: not a Request.
            ClosedError, ForkedError: the queue takes no more.
        """
        pending = self.pending
        n = len(requests)
        if n and not (pending or self._plugs or self._offered) and self._refusal is None:
            one = requests[0] if n == 1 and _GIL else None
            if type(one) is Request and one._state is COMPLETED:
                if self._push_one(one):
                    return 1
            elif self._push_through(requests, n):
                return n
        elif n == 1 and _GIL and len(pending) < self.max_pending:
            request = requests[0]
            # From the second condition on no call and no loop until the append: no other thread and
            # no signal handler runs in between, so the lock would only cost time.
            if type(request) is Request and request._state is COMPLETED and self._refusal is None:
                submitted = self.submitted
                try:
                    request._state = PENDING
                    self.submitted = submitted + 1
                    pending.append(request)
                except BaseException:
                    with self.lock:
                        if request._state is PENDING and request not in pending:
                            request._state = COMPLETED
                            self.submitted = submitted
                    raise
                if not self.blocked and (not self._plugs or len(pending) >= self.max_batch):
                    self.flush()
                return 1
        if self._refusal is not None:
            raise self._refused()  # without the lock, which in a forked child nobody may let go of
        try:
            with self.lock:
                self._take(requests, n)
        except BaseException as error:
            self._recover(error)
            raise
        if not self.blocked and (not self._plugs or len(pending) >= self.max_batch):
            self.flush()
        return n

    def _push_one(self, request: Request) -> bool:
        """`push` of one request when nothing is pending, without the lock. Whether it was possible.

        Only with the GIL.
        """
        turn = self.turn
        if turn._is_owned():
            return False
        offered, in_flight = self._offered, self.table
        submitted, first, taken = -1, 0, False
        try:
            if not turn.acquire(False):
                return False
            # Behind this call there is none, and no loop, until the append: no other thread and no
            # signal handler runs in between, so the lock would only cost time.
            room = self.nr_events - len(self.whole[1]) - len(in_flight)
            if (
                room < 1
                or request._state is not COMPLETED
                or self.pending
                or self._plugs
                or self._refusal is not None
                or self.dead
            ):
                self._decline()
                return False
            submitted = self.submitted
            self._due = False
            self._first = first = self._next_token
            self._next_token = first + SERIES
            request._state = IN_FLIGHT
            self.submitted = submitted + 1
            in_flight[first] = request
            offered.append(request)  # from here on it is taken, and `_settle` knows of it
            taken = True
            self._ask(first, 1)
            turn.release()
        except BaseException as error:
            self._recover(error)
            if turn._is_owned():
                if taken or offered:
                    self._settle()
                    self.blocked = bool(self.pending)
                elif submitted >= 0:
                    in_flight.pop(first, None)
                    request._state = COMPLETED
                    self.submitted = submitted
                turn.release()
            raise
        if self._due or self._refused_some:
            self._flush(MAX_PASSES - 1)
        return True

    def _push_through(self, requests: Sequence[Request], n: int) -> bool:
        """`push` when nothing is pending: offer the requests at once. Whether it was possible."""
        turn = self.turn
        if n > self.max_offer or turn._is_owned():
            return False
        before: dict[Request | None, int] = {}
        looking, feed = iter(requests), iter(requests)
        offered = self._offered
        first, counted = 0, False
        try:
            if not turn.acquire(False):
                return False
            with self.lock:
                if not (
                    n > self.nr_events - len(self.table) - len(self.whole[1])
                    or self.pending
                    or self._plugs
                    or self._refusal is not None
                    or self.dead
                ):
                    admit(looking, before, IN_FLIGHT)
                    self._due = False
                    first = self.reusable
                    if first:
                        self.reusable = 0
                    else:
                        first = self._next_token
                        self._next_token = first + SERIES
                    self._first = first
                    # One line, as in `_take`.
                    self.submitted, counted = self.submitted + n, True
                    offered.extend(feed)  # from here on they are taken, and `_settle` knows of them
                    self._hand_over(first, n)
            if not counted:
                self._decline()
                return False
            if 0 < self._ask(first, n) < n:
                self._due = True
            turn.release()
        except BaseException as error:
            self._recover(error)
            if turn._is_owned():
                if not length_hint(feed):
                    self._settle()
                    self.blocked = bool(self.pending)
                else:
                    if counted:
                        self.submitted -= n
                    restore(looked_at(requests, looking, before), before, IN_FLIGHT)
                self._decline()
            raise
        if self._due or self._refused_some:
            self._flush(MAX_PASSES - 1)
        return True

    def _decline(self) -> None:
        """Give back a turn in which nothing was offered, and to whom it was denied meanwhile.

        Without the lock: that one's requests are submitted.
        """
        self.turn.release()
        if self._due:
            self.flush()

    def _take(self, requests: Sequence[Request], n: int) -> None:
        if self._refusal is not None:
            raise self._refused()
        pending = self.pending
        if pending and len(pending) + n > self.max_pending:
            raise QueueFullError(
                f"{len(pending)} requests are pending, and at most {self.max_pending} may be"
            )
        before: dict[Request | None, int] = {}
        looking, feed = iter(requests), iter(requests)
        counted = False
        try:
            admit(looking, before)
            # One line, read and written with no call in between: another thread may push without
            # the lock, and may be let go at any call.
            self.submitted, counted = self.submitted + n, True
            pending.extend(feed)
        except BaseException:
            if length_hint(feed):  # not taken
                if counted:
                    self.submitted -= n
                restore(looked_at(requests, looking, before), before)
            raise

    def plug(self, key: object = None) -> None:
        """Hold requests back until the matching `unplug`, or until max_batch are pending.

        key: makes it a plug of its own, which only `unplug` with the same key undoes.
        """
        self._plugs[_Anonymous() if key is None else key] = True

    def unplug(self, key: object = None) -> None:
        """Undo one `plug`; the outermost submits what is pending. Can block: in io_submit.

        With a key that is not plugged it does nothing.

        Raises:
            BusyError: nothing is plugged; nothing has changed.
        """
        # Popping is what counts: of two threads, one has it.
        keys = [key] if key is not None else [k for k in list(self._plugs) if type(k) is _Anonymous]
        if any(self._plugs.pop(k, False) for k in keys):
            self.kick()
        elif key is None:
            raise BusyError("unplug without plug")

    def collected(self, key: object) -> None:
        """`unplug` by a finalizer, which may strike anywhere: also who has the lock."""
        if not self.lock._is_owned():
            self.unplug(key)
        elif self._plugs.pop(key, False) and self.pending:
            # Not submitted here, where it would be with the lock held.
            self._overdue = True
            if self._continuation is not None:
                self._continuation()

    def section(self) -> PlugSection:
        """`plug` and `unplug` as a context manager."""
        return PlugSection(self)

    def refuse(self, reason: RawAIOError) -> None:
        """Take no more requests: push raises an error like reason from now on."""
        self._refusal = reason

    # -- on -------------------------------------------------------------------------------------

    def kick(self) -> None:
        """Submit what is pending unless plugged, blocked or not: something has changed.

        Can block: in io_submit.
        """
        # What is being offered may come back.
        if (self.pending or self._offered) and not self._plugs:
            self.flush()

    def flush(self) -> None:
        """Offer what is pending to the kernel, until nothing is or it takes no more.

        Also when plugged. Can block: in io_submit. Returns at once when a flush is under way,
        which then goes on with what is pending now.
        """
        self._flush(MAX_PASSES)

    def _flush(self, passes: int) -> None:
        if self.dead:
            return
        self._due = True
        turn = self.turn
        if turn._is_owned():
            return
        for _ in range(passes):
            try:
                if not turn.acquire(False):
                    return  # that thread looks at _due after it has let go
                self._pass()
                turn.release()
            except BaseException as error:
                self._recover(error)
                if turn._is_owned():
                    self._settle()
                    self.blocked = bool(self.pending)
                    turn.release()
                raise
            if self._refused_some:
                self._refused_some = False
                if self._continuation is not None:
                    self._continuation()
            if not self._due:
                return
        if self._continuation is not None:
            self._continuation()
        else:
            self._overdue = True

    def _pass(self) -> None:
        # A function of its own: CPython 3.13 does not look for the handler of a try around a loop
        # when an exception from outside strikes at the jump back.
        self._due = self._overdue = False
        self.blocked = False
        # What is pushed meanwhile is for the next pass.
        left = len(self.pending)
        while left > 0:
            gone = self._offer(left)
            if gone == 0:
                break
            left -= gone

    def _offer(self, limit: int) -> int:
        """Offer one batch of at most limit. How many are gone from pending; 0: it is no use."""
        offered = self._offered
        with self.lock:
            pending = self.pending
            room = self.nr_events - self.in_flight
            n = min(len(pending), limit, room, self.max_offer)
            if n <= 0:
                self.blocked = bool(pending)
                return 0
            self._first = first = self._next_token
            self._next_token = first + SERIES
            if n == 1:
                offered.append(pending[0])
                pending.popleft()  # when this is cut off, `_settle` finds the request in both
            else:
                offered.extend(starmap(pending.popleft, repeat((), n)))
            offer(offered)
            self._hand_over(first, n)
        return self._ask(first, n)

    def _hand_over(self, first: int, n: int) -> None:
        """What is offered counts as in flight from now on."""
        if n > 1 and not self.table and not self.whole[1]:
            self.whole = first, tuple(self._offered)
        else:
            tokens = range(first, first + n)
            self.table.update(zip(tokens, self._offered))  # noqa: B905 - equal lengths

    def _ask(self, first: int, n: int) -> int:
        """Submit the n requests in _offered. How many are gone from there for good."""
        offered, outcome = self._offered, self._outcome
        self.io_submit_calls += 1
        self._submit(first, offered, outcome)
        if outcome[0] == n:
            self._retry_s = 0.0
            offered.clear()
            outcome.clear()
            self.moved += n
            return n
        gone = self._settle()
        self.moved += gone
        if self._stalled:
            self._stalled = False
            if self._continuation is not None:
                self._continuation()  # who sleeps has not been told of `retry_in`
        return gone

    def _settle(self) -> int:
        """Do what the kernel's answer to the last offer says. How many are gone from pending.

        Repeated after an exception from outside, it goes on where it was; repeated after that, it
        changes nothing.
        """
        offered, outcome = self._offered, self._outcome
        accepted = max(outcome[0], 0) if outcome else 0
        gone = accepted
        if accepted < len(offered):
            with self.lock:
                if self.pending and self.pending[0] is offered[-1]:
                    offered.pop()
                table = self.in_flight_table
                for token in range(self._first + accepted, self._first + len(offered)):
                    table.pop(token, None)
                take_back(offered[accepted:])
                if outcome and accepted == 0:
                    gone = self._refused_first(offered, outcome)
                self.pending.extendleft(starmap(offered.pop, repeat((), len(offered) - accepted)))
        if accepted:
            self._retry_s = 0.0
        offered.clear()
        outcome.clear()
        return gone

    def _refused_first(self, offered: list[Request], outcome: list[int]) -> int:
        if len(outcome) < 2:  # an exception struck behind the step below
            return 0
        if outcome[0] == 0 or outcome[1] == errno.EAGAIN:
            self.eagain += 1
            self.blocked = True
            if not self.in_flight:
                self._stalled = not self._retry_s
                self._retry_s = min(max(2 * self._retry_s, _RETRY_FIRST_S), _RETRY_LONGEST_S)
            return 0
        self._refused_some = True
        # The request and the errno leave their lists in the one step that makes the completion.
        self.rejected.extend(
            map(
                Completion,
                zip(
                    starmap(offered.pop, ((0,),)),
                    map(neg, starmap(outcome.pop, ((),))),
                    (0,),
                    strict=False,
                ),
            )
        )
        return 1

    # -- out ------------------------------------------------------------------------------------

    def withdraw(self, request: Request, res: int) -> bool:
        """Complete a pending request with res; False, and nothing changes, if it is not pending."""
        with self.lock:
            pending = self.pending
            try:
                place = pending.index(request)
            except ValueError:
                return False
            completion = Completion((request, res, 0))
            uninterrupted(
                (pending.rotate, -place),
                (pending.popleft,),
                (pending.rotate, place),
                (self.rejected.append, completion),
            )
            if not pending:
                self.blocked = False
            return True

    def _refused(self) -> RawAIOError:
        assert self._refusal is not None
        return type(self._refusal)(*self._refusal.args)

    def _recover(self, error: BaseException) -> None:
        # Only an exception from outside can leave the lock held: one that strikes between the end
        # of a with-block and its release.
        if not isinstance(error, Exception):
            while self.lock._is_owned():
                self.lock.release()

    def _check(self) -> None:
        """Assert the invariants; for tests, with nothing under way in other threads."""
        with self.lock:
            in_flight = list(self.in_flight_table.values())
            everything = [*self.pending, *in_flight]
            assert len(in_flight) <= self.nr_events
            assert len(set(map(id, everything))) == len(everything)
            assert not self._offered
            assert not self._outcome
            assert all(r._state is PENDING for r in self.pending)
            assert all(r._state is IN_FLIGHT for r in in_flight)
            assert all(map(self.issued, self.in_flight_table))
            series = {token // SERIES for token in self.in_flight_table}
            assert not self.reusable or self.reusable // SERIES not in series
            assert not self.reusable % SERIES
            if self.pending and not self._plugs:
                assert self.blocked or self._overdue
                assert in_flight or self.retry_in is not None


def _owned_lock() -> OwnedLock:
    lock: Any = RLock()
    return lock  # type: ignore[no-any-return]


class PlugSection:
    """A `with` block in which requests are collected; submitted at the outermost exit.

    Sections nest; enter each once. One whose exit an exception from outside kept from running ends
    when it is collected.
    """

    __slots__ = ("_key", "_queue")

    def __init__(self, queue: SubmissionQueue) -> None:
        self._queue = queue
        self._key = object()  # the last, and so __del__ can tell that all is there

    def __enter__(self) -> Self:
        self._queue.plug(self._key)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._queue.unplug(self._key)

    def __del__(self) -> None:
        key = getattr(self, "_key", None)
        if key is not None:
            self._queue.collected(key)

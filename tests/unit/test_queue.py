"""The submission queue, on a simulated kernel: each law and each docstring."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest

from rawaio.errors import BusyError, ClosedError, ForkedError, RawAIOError
from rawaio.lifecycle import complete_one
from rawaio.queue import _GIL, MAX_PASSES, PlugSection, QueueFullError, SubmissionQueue
from rawaio.request import SERIES, Completion, Request, State
from rawaio.testing import SimulatedKernel
from tests.queue_support import Driver, InThread, interleave
from tests.support import ROOT

if TYPE_CHECKING:
    from rawaio.protocols import OwnedLock
    from rawaio.queue import Submit


def fsyncs(n: int) -> list[Request]:
    return [Request.fsync(0, user_data=i) for i in range(n)]


def completed(n: int) -> list[Request]:
    """Requests that have been through a queue and may be pushed again."""
    requests = fsyncs(n)
    for request in requests:
        complete_one(request)
    return requests


def make(nr_events: int = 4, **limits: Any) -> tuple[SubmissionQueue, SimulatedKernel, Driver]:
    kernel = SimulatedKernel(nr_events)
    driver = Driver(kernel, **limits)
    return driver.queue, kernel, driver


def offers(kernel: SimulatedKernel) -> list[tuple[int, list[Request], int]]:
    """The number of its series of tokens, the requests and the answer of each io_submit."""
    assert not any(c.first_token % SERIES for c in kernel.calls)
    return [(c.first_token // SERIES, list(c.batch), c.returned) for c in kernel.calls]


def finish(driver: Driver, request: Request | None = None) -> Completion:
    """Complete one request in the kernel and reap it, with all that is said about that."""
    done = driver.kernel.complete(request)
    [completion] = driver.reap()
    assert completion.request is done
    driver.queue._check()
    return completion


def always(answer: int, code: int = 0) -> Submit:
    """A kernel that gives the same answer to every io_submit."""

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        outcome.extend((answer, code))

    return submit


# -- making one --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nr_events", "max_batch", "max_pending", "max_offer"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_below_one_are_refused(name: str, value: int) -> None:
    limits: dict[str, Any] = {"nr_events": 1, name: value}
    with pytest.raises(ValueError, match=f"{name} must be 1 at least, not {value}"):
        SubmissionQueue(always(0), **limits)


@pytest.mark.parametrize("name", ["nr_events", "max_batch", "max_pending", "max_offer"])
def test_a_limit_of_one_is_allowed(name: str) -> None:
    limits: dict[str, Any] = {"nr_events": 7, name: 1}
    assert getattr(SubmissionQueue(always(0), **limits), name) == 1


def test_what_is_offered_at_once_has_one_series_of_tokens() -> None:
    assert SubmissionQueue(always(0), nr_events=1, max_offer=SERIES).max_offer == SERIES
    with pytest.raises(ValueError, match=f"max_offer must be {SERIES} at most, not {SERIES + 1}"):
        SubmissionQueue(always(0), nr_events=1, max_offer=SERIES + 1)


def test_refused_between_the_look_and_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """`push` looks first, for a forked child; and again when it has the lock."""
    queue = SubmissionQueue(always(0), nr_events=7)
    queue.plug()
    take = queue._take

    def refused_first(requests: Sequence[Request], n: int) -> None:
        queue.refuse(ClosedError("too late"))
        take(requests, n)

    monkeypatch.setattr(SubmissionQueue, "_take", staticmethod(refused_first))
    requests = [Request.fsync(0), Request.fsync(0)]
    with pytest.raises(ClosedError, match="too late"):
        queue.push(requests)
    assert queue.outstanding == queue.submitted == 0
    assert {request.state for request in requests} == {State.NEW}


@pytest.mark.parametrize("n", [1, 2])
def test_refused_between_the_look_and_the_turn(n: int) -> None:
    queue = SubmissionQueue(always(0), nr_events=7)
    requests = completed(n)
    turn = queue.turn

    class Turn:
        """Another thread closes the queue while the turn is asked for."""

        def __getattr__(self, name: str) -> Any:
            return getattr(turn, name)

        def acquire(self, blocking: bool) -> bool:
            queue.refuse(ClosedError("too late"))
            return turn.acquire(blocking)

    queue.turn = cast("Any", Turn())
    with pytest.raises(ClosedError, match="too late"):
        queue.push(requests)
    assert not turn._is_owned()
    assert queue.outstanding == queue.submitted == 0
    assert {request.state for request in requests} == {State.COMPLETED}


def test_what_a_new_queue_says() -> None:
    queue = SubmissionQueue(always(0), nr_events=7)
    assert (queue.nr_events, queue.max_batch, queue.max_pending) == (7, 32, 16384)
    assert queue.max_offer == 1024
    assert (queue.in_queue, queue.in_flight, queue.outstanding, queue.plugged) == (0, 0, 0, 0)
    assert (queue.submitted, queue.io_submit_calls, queue.eagain, queue.moved) == (0, 0, 0, 0)
    assert queue.blocked is False
    assert queue.retry_in is None
    assert not queue.rejected
    queue._check()


def test_rejections_go_where_the_owner_wants_them() -> None:
    where: deque[Completion] = deque()
    queue = SubmissionQueue(always(-1, errno.EBADF), nr_events=1, rejected=where)
    queue.push(fsyncs(1))
    assert queue.rejected is where
    assert len(where) == 1


# -- push --------------------------------------------------------------------------------------


def test_a_pushed_request_is_offered_at_once() -> None:
    queue, kernel, _ = make()
    [request] = fsyncs(1)
    assert queue.push([request]) == 1
    assert offers(kernel) == [(1, [request], 1)]
    assert request.state is State.IN_FLIGHT
    assert queue.in_flight_table == {SERIES: request}
    assert (queue.in_queue, queue.in_flight, queue.outstanding) == (0, 1, 1)
    assert (queue.submitted, queue.io_submit_calls) == (1, 1)
    assert not queue.blocked
    queue._check()


def test_a_push_of_many_is_one_io_submit_in_their_order() -> None:
    queue, kernel, _ = make()
    requests = fsyncs(3)
    assert queue.push(requests) == 3
    assert offers(kernel) == [(1, requests, 3)]
    assert queue.in_flight_table == {SERIES + i: r for i, r in enumerate(requests)}
    assert queue.submitted == 3


def test_tokens_go_on_from_batch_to_batch() -> None:
    queue, kernel, _ = make(8)
    requests = fsyncs(5)
    queue.push(requests[:2])
    queue.push(requests[2:])
    assert offers(kernel) == [(1, requests[:2], 2), (2, requests[2:], 3)]


def test_max_offer_splits_what_is_offered() -> None:
    queue, kernel, _ = make(8, max_offer=2)
    requests = fsyncs(5)
    queue.push(requests)
    assert offers(kernel) == [(1, requests[:2], 2), (2, requests[2:4], 2), (3, requests[4:], 1)]


class IntrudedLock:
    """A lock; `intruder` runs before whoever comes next has it."""

    def __init__(self, lock: OwnedLock) -> None:
        self.lock = lock
        self.intruder: Callable[[], object] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lock, name)

    def __enter__(self) -> bool:
        intruder, self.intruder = self.intruder, None
        if intruder is not None:
            intruder()
        return self.lock.__enter__()

    def __exit__(self, *raised: object) -> None:
        self.lock.release()


def test_who_comes_second_is_submitted_without_the_lock() -> None:
    """Of two threads that push several, one has the turn, and the other is the first in pending."""
    asked: list[tuple[Request, bool]] = []

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        asked.append((batch[0], queue.lock._is_owned()))
        outcome.extend((len(batch), 0))

    queue = SubmissionQueue(submit, nr_events=8)
    lock: Any = IntrudedLock(queue.lock)
    queue.lock = lock
    mine, others = fsyncs(2), fsyncs(2)
    # The turn is taken, and the lock is not yet.
    thread = InThread(lambda: queue.push(others), threading.Event())
    lock.intruder = thread.run_until
    assert queue.push(mine) == 2
    thread.join()
    assert asked == [(others[0], False), (mine[0], False)]
    queue._check()


def test_a_section_that_is_collected_by_who_has_the_lock_leaves_its_requests_to_others() -> None:
    asked: list[bool] = []
    told: list[float | None] = []

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        asked.append(queue.lock._is_owned())
        outcome.extend((len(batch), 0))

    queue = SubmissionQueue(submit, nr_events=8, continuation=lambda: told.append(queue.retry_in))
    section = queue.section()
    section.__enter__()
    queue.push(fsyncs(3))
    with queue.lock:
        del section
        gc.collect()
    assert (asked, told, queue.plugged, queue.retry_in) == ([], [0.0], 0, 0.0)
    queue.kick()
    assert (asked, queue.retry_in) == ([False], None)
    # Of nothing nobody is told.
    section = queue.section()
    section.__enter__()
    with queue.lock:
        del section
        gc.collect()
    assert (len(told), queue.plugged) == (1, 0)
    # One that has ended changes nothing any more.
    section = queue.section()
    with section:
        pass
    queue.plug()
    queue.push(fsyncs(1))
    with queue.lock:
        del section
        gc.collect()
    assert (asked, len(told), queue.in_queue, queue.retry_in) == ([False], 1, 1, None)
    queue.unplug()
    assert asked == [False, False]
    queue._check()


def test_a_section_that_is_collected_where_nobody_is_to_be_told_is_seen_by_who_asks() -> None:
    queue = SubmissionQueue(always(1), nr_events=8)
    section = queue.section()
    section.__enter__()
    queue.push(fsyncs(1))
    with queue.lock:
        del section
        gc.collect()
    assert (queue.in_queue, queue.retry_in) == (1, 0.0)
    queue.kick()
    assert (queue.in_queue, queue.retry_in) == (0, None)
    queue._check()


def test_tokens_that_can_be_used_again_are_used_once() -> None:
    tokens: list[int] = []

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        tokens.append(first_token)
        outcome.extend((len(batch), 0))

    queue = SubmissionQueue(submit, nr_events=8)
    queue.reusable = 9 * SERIES
    queue.push(fsyncs(2))
    queue.push(fsyncs(2))
    assert tokens == [9 * SERIES, SERIES]
    assert queue.reusable == 0


def test_pushing_nothing_takes_nothing() -> None:
    queue, kernel, _ = make(1, max_pending=1)
    assert queue.push([]) == 0
    assert not kernel.calls
    queue.push(fsyncs(1))
    queue.push(fsyncs(1))
    assert queue.push(()) == 0
    queue._check()


@pytest.mark.parametrize("again", [fsyncs, completed])
def test_no_more_than_nr_events_are_in_flight(again: Callable[[int], list[Request]]) -> None:
    queue, kernel, driver = make(2)
    requests = again(3)
    for request in requests:
        assert queue.push([request]) == 1
        queue._check()
    assert list(queue.pending) == requests[2:]
    assert queue.blocked
    assert len(kernel.calls) == 2
    assert queue.retry_in is None  # a completion will come
    finish(driver)
    assert requests[2].state is State.IN_FLIGHT
    assert not queue.blocked


def test_a_push_onto_a_blocked_queue_waits_its_turn() -> None:
    queue, kernel, driver = make(1)
    requests = fsyncs(4)
    queue.push(requests[:2])
    calls = len(kernel.calls)
    queue.push(requests[2:3])
    queue.push(requests[3:])
    assert len(kernel.calls) == calls
    assert [finish(driver).request for _ in requests] == requests


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("source", [fsyncs, completed])
def test_a_push_does_not_try_a_queue_that_eagain_has_blocked(
    source: Callable[[int], list[Request]], n: int
) -> None:
    queue, kernel, _ = make(8)
    kernel.answers.append(-errno.EAGAIN)
    queue.push(fsyncs(1))
    queue.push(source(n))
    assert len(kernel.calls) == 1
    assert queue.in_queue == 1 + n
    queue.kick()
    assert queue.in_flight == 1 + n


def test_a_completed_request_is_pushed_again_under_a_new_token() -> None:
    queue, _, driver = make()
    [request] = fsyncs(1)
    for times in range(1, 4):
        assert queue.push([request]) == 1
        assert queue.in_flight_table == {times * SERIES: request}
        assert queue.submitted == times
        finish(driver)
        assert request.state is State.COMPLETED


def test_completed_requests_are_collected_while_plugged() -> None:
    queue, kernel, _ = make(8, max_batch=3)
    queue.plug()
    for i, request in enumerate(completed(3)):
        assert not kernel.calls
        assert queue.in_queue == i
        queue.push([request])
    assert [len(c.batch) for c in kernel.calls] == [3]


@pytest.mark.parametrize("under_way", ["pending", "in flight"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_request_under_way_is_refused_and_nothing_changes(under_way: str, place: int) -> None:
    queue, kernel, _ = make(1)
    busy = fsyncs(2)
    queue.push(busy)
    others: list[Request] = [*fsyncs(1), *completed(1)]
    states = [r.state for r in others]
    requests = list(others)
    requests.insert(place, busy[under_way == "pending"])
    calls = len(kernel.calls)
    with pytest.raises(BusyError, match="under way already, or there twice"):
        queue.push(requests)
    assert [r.state for r in others] == states
    assert [r.state for r in busy] == [State.IN_FLIGHT, State.PENDING]
    assert list(queue.pending) == busy[1:]
    assert queue.submitted == 2
    assert len(kernel.calls) == calls
    queue._check()


@pytest.mark.parametrize("source", [fsyncs, completed])
def test_the_same_request_twice_is_refused(source: Callable[[int], list[Request]]) -> None:
    queue, kernel, _ = make()
    a, b = source(2)
    state = a.state
    with pytest.raises(BusyError):
        queue.push([a, b, a])
    assert (a.state, b.state) == (state, state)
    assert (queue.in_queue, queue.submitted) == (0, 0)
    assert not kernel.calls
    assert queue.push([a, b]) == 2


@pytest.mark.parametrize("stranger", [None, 1, "request", object()])
def test_what_is_no_request_is_a_type_error(stranger: object) -> None:
    queue, kernel, _ = make()
    [request] = fsyncs(1)
    for requests in ([stranger], [request, stranger], [stranger, request]):
        with pytest.raises(TypeError, match="a Request is needed"):
            queue.push(cast("list[Request]", requests))
    assert request.state is State.NEW
    assert (queue.in_queue, queue.submitted) == (0, 0)
    assert not kernel.calls


def test_a_request_of_a_subclass_is_taken() -> None:
    class Own(Request):
        __slots__ = ()

    queue, _, driver = make()
    request = Own.fsync(0)
    for _ in range(2):
        queue.push([request])
        assert finish(driver).request is request


def test_a_released_request_is_pinned_again_and_released_when_refused() -> None:
    queue, _, _ = make()
    buffer = bytearray(8)
    request = Request.pread(0, buffer, 0)
    queue.push([request])
    with pytest.raises(BufferError):
        buffer.append(0)
    queue.in_flight_table.pop(SERIES)
    complete_one(request)
    with pytest.raises(BusyError):
        queue.push([request, request])
    buffer.append(0)
    assert request.state is State.COMPLETED


# -- bounded pending ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", [fsyncs, completed])
@pytest.mark.parametrize("n", [1, 2])
def test_pending_is_bounded(source: Callable[[int], list[Request]], n: int) -> None:
    queue, kernel, driver = make(1, max_pending=2)
    queue.push(fsyncs(1))
    for _ in range(2):
        queue.push(completed(1))
    requests = source(n)
    states = [r.state for r in requests]
    before = list(queue.pending)
    calls = len(kernel.calls)
    with pytest.raises(QueueFullError, match="2 requests are pending, and at most 2 may be"):
        queue.push(requests)
    assert [r.state for r in requests] == states
    assert list(queue.pending) == before
    assert queue.submitted == 3
    assert len(kernel.calls) == calls
    queue._check()
    finish(driver)
    assert queue.push(requests[:1]) == 1
    assert queue.in_queue == 2


def test_pending_may_be_filled_to_the_last_place() -> None:
    queue, _, _ = make(1, max_pending=3)
    queue.push(fsyncs(2))
    assert queue.push(fsyncs(2)) == 2
    assert queue.in_queue == 3
    with pytest.raises(QueueFullError):
        queue.push(fsyncs(1))


def test_a_push_larger_than_max_pending_is_taken_when_nothing_is_pending() -> None:
    queue, _, driver = make(1, max_pending=2)
    requests = fsyncs(5)
    assert queue.push(requests) == 5
    assert queue.in_queue == 4
    assert [finish(driver).request for _ in requests] == requests


def test_a_full_queue_is_busy_and_rawaio_s_own_error() -> None:
    assert issubclass(QueueFullError, BusyError)
    assert issubclass(QueueFullError, RawAIOError)


# -- refusal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [fsyncs, completed])
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("kind", [ClosedError, ForkedError])
def test_a_refusing_queue_takes_nothing(
    source: Callable[[int], list[Request]], n: int, kind: type[RawAIOError]
) -> None:
    queue, kernel, _ = make()
    reason = kind("the reason")
    queue.refuse(reason)
    requests = source(n)
    states = [r.state for r in requests]
    for _ in range(2):
        with pytest.raises(kind, match="the reason") as caught:
            queue.push(requests)
        assert caught.value is not reason  # one of its own, whose traceback does not grow
    assert [r.state for r in requests] == states
    assert (queue.in_queue, queue.submitted) == (0, 0)
    assert not kernel.calls


def test_a_refusal_that_comes_before_the_lock_is_had_counts() -> None:
    queue, kernel, _ = make()
    [request] = fsyncs(1)

    class Late(Sequence[Request]):
        """Is asked for its length after the first look at the refusal."""

        def __len__(self) -> int:
            queue.refuse(ClosedError("just now"))
            return 1

        def __getitem__(self, index: Any) -> Any:
            return [request][index]

    with pytest.raises(ClosedError, match="just now"):
        queue.push(Late())
    assert request.state is State.NEW
    assert not kernel.calls


def test_a_refusing_queue_still_submits_what_it_has() -> None:
    queue, _, driver = make(1)
    requests = fsyncs(3)
    queue.push(requests)
    queue.refuse(ClosedError("closed"))
    assert [finish(driver).request for _ in requests] == requests


# -- plug --------------------------------------------------------------------------------------


def test_what_is_pushed_while_plugged_goes_together_at_the_end() -> None:
    queue, kernel, _ = make(8)
    requests = fsyncs(3)
    queue.plug()
    for request in requests:
        queue.push([request])
    assert not kernel.calls
    assert all(r.state is State.PENDING for r in requests)
    queue._check()
    queue.unplug()
    assert offers(kernel) == [(1, requests, 3)]
    assert not queue.plugged


def test_only_the_outermost_unplug_submits() -> None:
    queue, kernel, _ = make()
    for depth in range(1, 4):
        queue.plug()
        assert queue.plugged == depth
    queue.push(fsyncs(1))
    for depth in (2, 1):
        queue.unplug()
        assert queue.plugged == depth
        assert not kernel.calls
    queue.unplug()
    assert queue.plugged == 0
    assert len(kernel.calls) == 1


def test_unplug_without_plug_is_an_error_and_changes_nothing() -> None:
    queue, kernel, _ = make()
    with pytest.raises(BusyError, match="^unplug without plug$"):
        queue.unplug()
    assert queue.plugged == 0
    queue.plug("mine")
    queue.push(fsyncs(1))
    with pytest.raises(BusyError, match="^unplug without plug$"):
        queue.unplug()  # a plug with a key is only undone by its key
    assert queue.plugged == 1
    assert not kernel.calls
    queue.unplug("mine")
    assert len(kernel.calls) == 1


def test_unplug_with_nothing_pending_does_not_call_the_kernel() -> None:
    queue, kernel, _ = make()
    queue.plug()
    queue.unplug()
    assert not kernel.calls


def test_a_key_is_one_plug_however_often_it_is_given() -> None:
    queue, kernel, _ = make()
    queue.plug("a")
    queue.plug("a")
    queue.plug("b")
    assert queue.plugged == 2
    queue.push(fsyncs(1))
    queue.unplug("a")
    assert queue.plugged == 1
    queue.unplug("a")  # not plugged any more
    assert queue.plugged == 1
    assert not kernel.calls
    queue.unplug("b")
    assert len(kernel.calls) == 1


def test_a_key_that_is_not_plugged_does_nothing_at_all() -> None:
    queue, kernel, _ = make()
    kernel.answers.append(-errno.EAGAIN)
    queue.push(fsyncs(1))
    assert queue.blocked
    queue.unplug("unknown")
    assert len(kernel.calls) == 1


def test_anonymous_and_keyed_plugs_nest_in_any_order() -> None:
    queue, kernel, _ = make()
    queue.plug("key")
    queue.plug()
    queue.push(fsyncs(1))
    queue.unplug("key")
    assert queue.plugged == 1
    assert not kernel.calls
    queue.plug("key")
    queue.unplug()
    assert queue.plugged == 1
    assert not kernel.calls
    queue.unplug("key")
    assert len(kernel.calls) == 1


def test_a_full_batch_is_submitted_while_plugged() -> None:
    queue, kernel, _ = make(16, max_batch=3)
    requests = fsyncs(7)
    queue.plug()
    for request in requests:
        queue.push([request])
    assert offers(kernel) == [(1, requests[:3], 3), (2, requests[3:6], 3)]
    assert queue.plugged == 1
    queue.unplug()
    assert offers(kernel)[2:] == [(3, requests[6:], 1)]


def test_a_push_beyond_the_batch_goes_whole() -> None:
    queue, kernel, _ = make(16, max_batch=2)
    queue.plug()
    queue.push(fsyncs(1))
    assert not kernel.calls
    queue.push(fsyncs(4))
    assert [len(c.batch) for c in kernel.calls] == [5]


@pytest.mark.parametrize("source", [fsyncs, completed])
def test_a_full_batch_does_not_disturb_a_blocked_queue(
    source: Callable[[int], list[Request]],
) -> None:
    queue, kernel, _ = make(1, max_batch=1)
    queue.push(fsyncs(2))
    queue.plug()
    calls = queue.io_submit_calls
    queue.push(source(1))
    queue.push(source(2))
    assert queue.io_submit_calls == calls == len(kernel.calls)
    assert queue.in_queue == 4


def test_unplug_tries_a_blocked_queue_again() -> None:
    queue, kernel, _ = make()
    kernel.answers.append(-errno.EAGAIN)
    queue.push(fsyncs(1))
    queue.plug()
    assert queue.retry_in is None  # the unplug will see to it
    queue.unplug()
    assert queue.in_flight == 1


def test_a_completion_while_plugged_submits_nothing() -> None:
    queue, kernel, driver = make(1)
    queue.push(fsyncs(2))
    queue.plug()
    finish(driver)
    assert (queue.in_queue, queue.in_flight) == (1, 0)
    assert queue.retry_in is None
    queue.unplug()
    assert queue.in_flight == 1
    assert len(kernel.calls) == 2


def test_sections_nest_and_the_outermost_submits() -> None:
    queue, kernel, _ = make()
    section = queue.section()
    assert isinstance(section, PlugSection)
    assert queue.plugged == 0
    with section as entered:
        assert entered is section
        with queue.section():
            assert queue.plugged == 2
            queue.push(fsyncs(1))
        assert queue.plugged == 1
        assert not kernel.calls
    assert queue.plugged == 0
    assert len(kernel.calls) == 1


def test_a_section_that_is_left_by_an_exception_submits() -> None:
    queue, kernel, _ = make()
    section = queue.section()
    error = KeyError()
    section.__enter__()
    queue.push(fsyncs(1))
    section.__exit__(KeyError, error, None)
    assert queue.plugged == 0
    assert len(kernel.calls) == 1


def test_sections_may_end_in_any_order() -> None:
    queue, kernel, _ = make()
    first, second = queue.section(), queue.section()
    first.__enter__()
    second.__enter__()
    queue.push(fsyncs(1))
    first.__exit__(None, None, None)
    first.__exit__(None, None, None)  # again: nothing
    assert queue.plugged == 1
    assert not kernel.calls
    second.__exit__(None, None, None)
    assert len(kernel.calls) == 1


def test_a_section_whose_exit_never_ran_ends_when_it_is_collected() -> None:
    queue, kernel, _ = make()
    section = queue.section()
    section.__enter__()
    queue.push(fsyncs(1))
    assert (queue.plugged, len(kernel.calls)) == (1, 0)
    del section
    gc.collect()
    assert (queue.plugged, len(kernel.calls)) == (0, 1)


def test_a_section_that_was_never_made_is_collected_quietly() -> None:
    section = PlugSection.__new__(PlugSection)  # as when its __init__ was interrupted
    del section
    gc.collect()


def test_a_section_that_was_never_entered_or_has_ended_is_collected_quietly() -> None:
    queue, kernel, _ = make()
    with queue.section():
        pass
    section = queue.section()
    queue.plug()
    queue.push(fsyncs(1))
    del section
    gc.collect()
    assert queue.plugged == 1
    assert not kernel.calls


# -- kick and flush ----------------------------------------------------------------------------


def test_kick_with_nothing_pending_does_nothing() -> None:
    queue, kernel, _ = make()
    queue.kick()
    queue.flush()
    assert not kernel.calls
    assert queue.io_submit_calls == 0


def test_kick_respects_the_plug_and_flush_does_not() -> None:
    queue, kernel, _ = make()
    queue.plug()
    queue.push(fsyncs(1))
    queue.kick()
    assert not kernel.calls
    queue.flush()
    assert len(kernel.calls) == 1
    assert queue.plugged == 1


def test_kick_tries_a_blocked_queue() -> None:
    queue, kernel, _ = make()
    kernel.answers.append(-errno.EAGAIN)
    queue.push(fsyncs(1))
    assert queue.blocked
    queue.kick()
    assert (queue.blocked, queue.in_flight) == (False, 1)


def test_with_no_free_slot_the_kernel_is_not_called() -> None:
    queue, kernel, _ = make(1)
    queue.push(fsyncs(2))
    calls = len(kernel.calls)
    queue.kick()
    queue.flush()
    assert queue.blocked
    assert len(kernel.calls) == calls == queue.io_submit_calls


# -- partial submission ------------------------------------------------------------------------


def test_the_rest_of_a_partial_submission_is_offered_next() -> None:
    queue, kernel, _ = make(8)
    requests = fsyncs(5)
    kernel.answers.extend([2, 1])
    queue.push(requests)
    assert offers(kernel) == [(1, requests, 2), (2, requests[2:], 1), (3, requests[3:], 2)]
    tokens = [SERIES, SERIES + 1, 2 * SERIES, 3 * SERIES, 3 * SERIES + 1]
    assert queue.in_flight_table == dict(zip(tokens, requests, strict=True))
    queue._check()


def test_moved_counts_what_the_kernel_took_or_refused() -> None:
    queue, kernel, driver = make(4)
    kernel.answers.extend([2, -errno.EBADF, -errno.EAGAIN])
    queue.push(fsyncs(6))
    assert queue.moved == 3
    queue.kick()  # now two, and then there is no room
    assert (queue.moved, queue.in_queue) == (5, 1)
    queue.kick()
    assert queue.moved == 5
    assert len(driver.reap()) == 1  # the refused one
    finish(driver)
    assert queue.moved == 6


@pytest.mark.parametrize("stale", [errno.EBADF, errno.EAGAIN, 1, 2, 3])
@pytest.mark.parametrize("answer", [0, 1, 3])
def test_errno_means_nothing_unless_io_submit_fails(answer: int, stale: int) -> None:
    queue = SubmissionQueue(always(0), nr_events=3)
    answers = [(answer, stale), (0, stale)]

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        outcome.extend(answers.pop(0))

    queue._submit = submit
    queue.push(fsyncs(3))
    assert queue.in_flight == answer
    assert queue.in_queue == 3 - answer
    assert not queue.rejected
    assert queue.eagain == (answer < 3)
    queue._check()


@pytest.mark.parametrize("code", [1, 2, 3])
def test_an_errno_is_not_taken_for_a_count(code: int) -> None:
    queue = SubmissionQueue(always(-1, code), nr_events=3)
    requests = fsyncs(3)
    queue.push(requests)
    assert list(queue.rejected) == [(r, -code, 0) for r in requests]
    assert queue.in_flight == 0


def test_what_was_not_accepted_returns_to_the_head_of_pending() -> None:
    queue, kernel, driver = make(8)
    requests = fsyncs(5)
    kernel.answers.extend([2, -errno.EAGAIN])
    queue.push(requests[:4])
    queue.push(requests[4:])
    assert list(queue.pending) == requests[2:]
    assert [r.state for r in requests] == [State.IN_FLIGHT] * 2 + [State.PENDING] * 3
    assert queue.blocked
    assert queue.retry_in is None
    finish(driver, requests[1])
    assert not queue.pending


def test_slots_stranded_in_the_kernel_are_waited_for() -> None:
    queue, kernel, driver = make(8)
    kernel.slots = 3
    requests = fsyncs(5)
    queue.push(requests)
    assert (queue.in_flight, queue.in_queue, queue.eagain) == (3, 2, 1)
    assert [finish(driver).request.state for _ in requests] == [State.COMPLETED] * 5
    assert queue.outstanding == 0


# -- EAGAIN ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [-errno.EAGAIN, 0])
def test_eagain_with_something_in_flight_waits_for_a_completion(answer: int) -> None:
    queue, kernel, driver = make()
    first, second = fsyncs(2)
    queue.push([first])
    kernel.answers.append(answer)
    queue.push([second])
    assert queue.blocked
    assert queue.eagain == 1
    assert queue.retry_in is None
    assert list(queue.pending) == [second]
    assert len(kernel.calls) == 2
    finish(driver, first)
    assert second.state is State.IN_FLIGHT
    assert (queue.blocked, queue.in_queue) == (False, 0)


@pytest.mark.parametrize("answer", [-errno.EAGAIN, 0])
def test_eagain_with_nothing_in_flight_asks_for_a_timer_that_backs_off(answer: int) -> None:
    queue, kernel, _ = make()
    kernel.answers.extend([answer] * 9)
    queue.push(fsyncs(2))
    waits: list[float | None] = [queue.retry_in]
    for calls in range(2, 10):
        queue._check()
        assert queue.blocked
        queue.kick()
        assert len(kernel.calls) == calls  # one try each time
        waits.append(queue.retry_in)
    assert waits == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.064, 0.064]
    assert queue.eagain == 9
    queue.kick()
    assert queue.in_flight == 2
    assert queue.retry_in is None


@pytest.mark.parametrize("accepted", [1, 2])
def test_acceptance_resets_the_back_off(accepted: int) -> None:
    queue, kernel, driver = make()
    kernel.answers.extend([-errno.EAGAIN] * 3)
    queue.push(fsyncs(2))
    queue.kick()
    queue.kick()
    assert queue.retry_in == 0.004
    kernel.answers.extend([accepted, -errno.EAGAIN])
    queue.kick()
    assert queue.in_flight == accepted
    kernel.answers.clear()
    kernel.answers.append(-errno.EAGAIN)
    while queue.in_flight:
        finish(driver)
    if not queue.pending:
        queue.push(fsyncs(1))
    assert queue.retry_in == 0.001


def test_eagain_with_something_in_flight_does_not_lengthen_the_wait() -> None:
    queue, kernel, driver = make()
    queue.push(fsyncs(1))
    kernel.answers.extend([-errno.EAGAIN] * 4)
    queue.push(fsyncs(1))
    queue.kick()
    queue.kick()
    finish(driver)
    assert queue.eagain == 4
    assert queue.retry_in == 0.001


def test_no_timer_is_asked_for_without_need() -> None:
    queue, kernel, driver = make()
    [request] = fsyncs(1)
    kernel.answers.append(-errno.EAGAIN)
    queue.push([request])
    waits = [queue.retry_in]
    queue.plug()
    waits.append(queue.retry_in)
    queue.unplug("other")
    waits.append(queue.retry_in)
    kernel.answers.append(-errno.EAGAIN)
    queue.unplug()
    waits.append(queue.retry_in)
    driver.withdraw(request, 0)
    waits.append(queue.retry_in)
    assert waits == [0.001, None, None, 0.002, None]


def test_what_is_left_over_when_all_has_completed_may_be_tried_at_once() -> None:
    # Whoever took the completions and did not kick is reminded.
    queue, kernel, driver = make(1)
    queue.push(fsyncs(2))
    kernel.complete()
    driver.fetch()
    assert queue.blocked
    assert queue.retry_in == 0.0


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_refused_request_fails_alone(place: int) -> None:
    queue, kernel, driver = make(8)
    requests = fsyncs(3)
    kernel.plan(requests[place], refuse=errno.EBADF)
    queue.push(requests)
    [completion] = queue.rejected
    assert completion == (requests[place], -errno.EBADF, 0)
    assert isinstance(completion, Completion)
    others = [r for r in requests if r is not requests[place]]
    assert list(queue.in_flight_table.values()) == others
    assert not queue.pending
    assert not queue.blocked
    assert queue.eagain == 0
    queue._check()
    assert driver.reap() == [completion]
    assert requests[place].state is State.COMPLETED
    assert queue.push([requests[place]]) == 1


def test_each_refused_request_has_its_own_errno() -> None:
    queue, kernel, _ = make(8)
    requests = fsyncs(6)
    codes = [errno.EBADF, 0, errno.EINVAL, errno.EOPNOTSUPP, 0, errno.EFAULT]
    for request, code in zip(requests, codes, strict=True):
        kernel.plan(request, refuse=code)
    queue.push(requests)
    refused = [(r, -code, 0) for r, code in zip(requests, codes, strict=True) if code]
    assert list(queue.rejected) == refused
    assert list(queue.in_flight_table.values()) == [requests[1], requests[4]]
    assert [c.first_token for c in kernel.calls] == sorted({c.first_token for c in kernel.calls})


def test_all_may_be_refused() -> None:
    queue = SubmissionQueue(always(-1, errno.EINVAL), nr_events=2)
    requests = fsyncs(5)
    queue.push(requests)
    assert list(queue.rejected) == [(r, -errno.EINVAL, 0) for r in requests]
    assert queue.outstanding == 0
    assert queue.io_submit_calls == 5
    assert not queue.blocked


@pytest.mark.parametrize("n", [1, 2])
def test_the_first_eagain_with_nothing_in_flight_tells_the_continuation(n: int) -> None:
    """Whoever sleeps till one of them completes does not know of the timer."""
    queue, kernel, driver = make(8)
    kernel.answers.extend([-errno.EAGAIN, -errno.EAGAIN, n])
    queue.push(fsyncs(n))
    assert driver.continuations == 1
    queue.kick()  # and again, of which everybody knows
    queue.kick()
    assert queue.in_flight == n
    kernel.answers.append(-errno.EAGAIN)
    queue.push(fsyncs(1))  # what is in flight will end the wait
    assert queue.blocked
    assert driver.continuations == 1


def test_a_flush_with_refusals_tells_the_continuation_once() -> None:
    queue, kernel, driver = make(8)
    kernel.answers.extend([1, -errno.EAGAIN, 1])
    queue.push(fsyncs(2))
    queue.kick()
    assert driver.continuations == 0
    seen: list[tuple[int, int, bool]] = []
    queue._continuation = lambda: seen.append(
        (len(queue.rejected), queue.in_queue, queue.turn._is_owned())
    )
    requests = fsyncs(4)
    for request in requests[:3]:
        kernel.plan(request, refuse=errno.EBADF)
    queue.push(requests)
    assert seen == [(3, 0, False)]
    queue.push(fsyncs(1))
    assert len(seen) == 1


def test_refusals_need_no_continuation() -> None:
    queue = SubmissionQueue(always(-1, errno.EBADF), nr_events=1)
    for n in range(1, 3):
        queue.push(fsyncs(1))
        assert len(queue.rejected) == n
        assert queue.retry_in is None


def test_a_dead_queue_offers_nothing() -> None:
    queue, kernel, _ = make(1)
    assert queue.dead is False
    queue.push(fsyncs(2))
    queue.dead = True
    calls = len(kernel.calls)
    queue.in_flight_table.pop(SERIES)
    queue.kick()
    queue.flush()
    assert len(kernel.calls) == calls
    assert queue.in_queue == 1


def test_eagain_behind_a_refusal_is_retried() -> None:
    queue, kernel, _ = make()
    requests = fsyncs(2)
    kernel.answers.extend([-errno.EBADF, -errno.EAGAIN])
    queue.push(requests)
    assert list(queue.pending) == requests[1:]
    assert queue.retry_in == 0.001
    queue._check()


# -- a submit callable that raises -------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), MemoryError()])
def test_an_exception_in_submit_loses_nothing(error: BaseException) -> None:
    queue, kernel, driver = make(8)
    requests = fsyncs(3)
    kernel.answers.append(error)
    with pytest.raises(type(error)) as caught:
        queue.push(requests)
    assert caught.value is error
    assert list(queue.pending) == requests
    assert all(r.state is State.PENDING for r in requests)
    assert queue.in_flight == 0
    assert queue.submitted == 3
    assert queue.blocked
    assert queue.retry_in == 0.0
    queue._check()
    queue.kick()
    assert list(queue.in_flight_table.values()) == requests
    for request in requests:
        finish(driver, request)


def test_an_exception_in_submit_leaves_the_batches_before_it_alone() -> None:
    queue, kernel, driver = make(8, max_offer=2)
    requests = fsyncs(5)
    kernel.answers.extend([2, ValueError("mine")])
    with pytest.raises(ValueError, match="mine"):
        queue.push(requests)
    assert list(queue.in_flight_table.values()) == requests[:2]
    assert list(queue.pending) == requests[2:]
    assert queue.retry_in is None
    queue._check()
    finish(driver, requests[0])
    assert not queue.pending


def test_submit_works_from_another_thread_after_an_exception() -> None:
    queue, kernel, _ = make()
    kernel.answers.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        queue.push(fsyncs(1))
    thread = threading.Thread(target=queue.kick)
    thread.start()
    thread.join()
    assert queue.in_flight == 1


# -- exceptions from outside, at the places where they are hardest -------------------------------


class Tripping(deque[Any]):
    """A deque one of whose methods is interrupted, before or after its work."""

    methods: frozenset[str] = frozenset()
    after = False

    def _run(self, name: str, *arguments: Any) -> Any:
        strike = name in self.methods
        if strike:
            self.methods = frozenset()
            if not self.after:
                raise KeyboardInterrupt
        result = getattr(deque, name)(self, *arguments)
        if strike:
            raise KeyboardInterrupt
        return result

    def append(self, item: Any) -> None:
        self._run("append", item)

    def extend(self, items: Iterable[Any]) -> None:
        self._run("extend", items)

    def popleft(self) -> Any:
        return self._run("popleft")

    def extendleft(self, items: Iterable[Any]) -> None:
        self._run("extendleft", items)


def tripping(*methods: str, after: bool) -> Tripping:
    tripping = Tripping()
    tripping.methods, tripping.after = frozenset(methods), after
    return tripping


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("source", [fsyncs, completed])
def test_an_interrupted_push_takes_all_or_none(
    n: int, after: bool, source: Callable[[int], list[Request]]
) -> None:
    queue, _, _ = make(8)
    requests = source(n)
    states = [r.state for r in requests]
    queue.pending = tripping("append", "extend", after=after)
    queue.plug("held back")
    with pytest.raises(KeyboardInterrupt):
        queue.push(requests)
    queue._plugs.clear()
    assert not queue.lock._is_owned()
    assert list(queue.pending) == (requests if after else [])
    assert queue.retry_in in (None, 0.0)
    assert [r.state for r in requests] == ([State.PENDING] * n if after else states)
    assert queue.submitted == (n if after else 0)
    queue.kick()
    assert queue.in_flight == (n if after else 0)
    queue._check()


class TrippingList(list[Any]):
    """A list that is interrupted when something is added, before or after its work; once."""

    after = False
    struck = False

    def append(self, item: Any) -> None:
        self.extend([item])

    def extend(self, items: Iterable[Any]) -> None:
        if not self.struck and not self.after:
            self.struck = True
            raise KeyboardInterrupt
        super().extend(items)
        if not self.struck:
            self.struck = True
            raise KeyboardInterrupt


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("source", [fsyncs, completed])
def test_an_interrupted_push_at_once_takes_all_or_none(
    n: int, after: bool, source: Callable[[int], list[Request]]
) -> None:
    queue, kernel, _ = make(8)
    requests = source(n)
    states = [r.state for r in requests]
    queue._offered = offered = TrippingList()
    offered.after = after
    with pytest.raises(KeyboardInterrupt):
        queue.push(requests)
    assert not queue.lock._is_owned()
    assert not queue.turn._is_owned()
    assert not queue.in_flight_table
    assert list(queue.pending) == (requests if after else [])
    assert [r.state for r in requests] == ([State.PENDING] * n if after else states)
    assert queue.submitted == (n if after else 0)
    assert not kernel.calls
    queue._check()
    queue.kick()
    assert queue.in_flight == (n if after else 0)
    queue._check()


@pytest.mark.parametrize("n", [1, 2])
def test_who_is_denied_the_turn_by_a_push_that_is_refused_is_not_forgotten(n: int) -> None:
    """Another thread pushes while one has the turn, and then has nothing to offer."""
    queue, _, _ = make(8)
    [late] = fsyncs(1)
    turn = queue.turn

    class Turn:
        def __getattr__(self, name: str) -> Any:
            return getattr(turn, name)

        def acquire(self, blocking: bool) -> bool:
            taken = turn.acquire(blocking)
            queue.turn = turn  # once is enough
            in_thread(lambda: queue.push([late]))
            assert list(queue.pending) == [late]
            return taken

    queue.turn = cast("Any", Turn())
    requests = completed(n)
    queue.push(requests)
    assert list(queue.in_flight_table.values()) == [late, *requests]
    queue._check()


@pytest.mark.parametrize("first", [fsyncs, completed])
def test_who_is_denied_the_turn_by_a_push_that_raises_is_not_forgotten(
    first: Callable[[int], list[Request]],
) -> None:
    queue, _, _ = make(8)
    [late] = fsyncs(1)
    turn, lock = queue.turn, queue.lock

    class Lock:
        """Another thread pushes when the lock has been taken and pending was looked at."""

        def __getattr__(self, name: str) -> Any:
            return getattr(lock, name)

        def acquire(self) -> bool:
            queue.lock = lock
            in_thread(lambda: queue.push([late]))
            assert list(queue.pending) == [late]
            return lock.acquire()

        __enter__ = acquire

        def __exit__(self, *_: object) -> None:
            lock.release()

    queue.lock = cast("Any", Lock())
    with pytest.raises(BusyError):
        queue.push(first(1) * 2)
    assert late.state is State.IN_FLIGHT
    assert not turn._is_owned()
    queue._check()


def test_a_lock_left_held_by_an_interrupt_is_let_go() -> None:
    queue, _, _ = make()
    held = queue.lock

    class Sticky:
        """Interrupted between the end of what it is held for and the release."""

        def __getattr__(self, name: str) -> Any:
            return getattr(held, name)

        def __enter__(self) -> bool:
            return held.acquire()

        def release(self, *_: object) -> None:
            queue.lock = held  # once is enough
            raise KeyboardInterrupt

        __exit__ = release

    queue.lock = cast("Any", Sticky())
    [request] = fsyncs(1)
    with pytest.raises(KeyboardInterrupt):
        queue.push([request])
    assert not held._is_owned()
    assert list(queue.pending) == [request]
    queue.kick()
    with pytest.raises(BusyError):
        queue.push([request])
    assert not held._is_owned()


def test_an_exception_does_not_let_go_of_the_caller_s_lock() -> None:
    queue, kernel, _ = make()
    kernel.answers.append(ValueError("mine"))
    with queue.lock:
        with pytest.raises(ValueError, match="mine"):
            queue.push(fsyncs(1))
        with pytest.raises(TypeError):
            queue.push(cast("list[Request]", [1]))
        assert queue.lock._is_owned()


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_rejection_happens_once(after: bool) -> None:
    queue, kernel, _ = make()
    requests = fsyncs(3)
    kernel.plan(requests[0], refuse=errno.EBADF)
    queue.rejected = tripping("extend", after=after)
    with pytest.raises(KeyboardInterrupt):
        queue.push(requests)
    queue._check()
    if after:  # otherwise it was rejected when the queue put itself in order
        queue.kick()
    assert list(queue.rejected) == [(requests[0], -errno.EBADF, 0)]
    queue.kick()
    assert list(queue.in_flight_table.values()) == requests[1:]


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupted_return_to_pending_happens_once(after: bool) -> None:
    queue, kernel, _ = make()
    requests = fsyncs(3)
    kernel.answers.append(1)
    queue.pending = tripping("extendleft", after=after)
    with pytest.raises(KeyboardInterrupt):
        queue.push(requests)
    assert list(queue.in_flight_table.values()) == requests[:1]
    assert list(queue.pending) == requests[1:]
    queue._check()
    queue.kick()
    assert list(queue.in_flight_table.values()) == requests


# Several leave pending in one call of C code, which nothing from outside can cut in two.
@pytest.mark.parametrize(("n", "after"), [(1, False), (1, True), (2, False)])
def test_an_interrupted_offer_changes_nothing(n: int, after: bool) -> None:
    queue, kernel, _ = make()
    requests = fsyncs(n)
    queue.plug()
    queue.push(requests)
    queue.pending = tripping("popleft", after=after)
    queue.pending.extend(requests)
    with pytest.raises(KeyboardInterrupt):
        queue.unplug()
    assert list(queue.pending) == requests
    assert not queue.turn._is_owned()
    queue._check()
    queue.kick()
    assert offers(kernel) == [(2, requests, n)]
    queue._check()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("when", ["acquired", "released"])
def test_an_interrupt_at_either_end_of_a_turn(n: int, when: str) -> None:
    """By a push at once, and by a flush."""
    queue, _, _ = make(8)
    turn = queue.turn

    class Turn:
        """Struck when it has just been taken, or just been let go."""

        def __getattr__(self, name: str) -> Any:
            return getattr(turn, name)

        def acquire(self, blocking: bool) -> bool:
            assert turn.acquire(blocking)
            if when == "acquired":
                queue.turn = turn  # once is enough
                raise KeyboardInterrupt
            return True

        def release(self) -> None:
            turn.release()
            if when == "released":
                queue.turn = turn
                raise KeyboardInterrupt

    requests = completed(n)
    queue.turn = cast("Any", Turn())
    with pytest.raises(KeyboardInterrupt):
        queue.push(requests)
    assert not turn._is_owned()
    taken = when == "released"
    assert [r.state for r in requests] == [State.IN_FLIGHT if taken else State.COMPLETED] * n
    assert queue.in_flight == queue.submitted == (n if taken else 0)
    queue._check()
    others = completed(n)
    queue.plug()
    queue.push(others)
    queue.turn = cast("Any", Turn())
    with pytest.raises(KeyboardInterrupt):
        queue.unplug()
    assert not turn._is_owned()
    queue.kick()
    assert [r.state for r in others] == [State.IN_FLIGHT] * n
    queue._check()


@pytest.mark.parametrize("n", [1, 2])
def test_who_has_the_turn_already_pushes_for_later(n: int) -> None:
    queue, kernel, _ = make(8)
    requests = completed(n)
    with queue.turn:
        queue.push(requests)
        assert list(queue.pending) == requests
        assert not kernel.calls
    queue.kick()
    assert list(queue.in_flight_table.values()) == requests


def test_an_interrupt_behind_the_end_of_a_flush_changes_nothing() -> None:
    queue, _, _ = make()
    turn = queue.turn

    class Turn:
        """Struck when it has just been let go."""

        def __getattr__(self, name: str) -> Any:
            return getattr(turn, name)

        def release(self) -> None:
            turn.release()
            raise KeyboardInterrupt

    queue.turn = cast("Any", Turn())
    with pytest.raises(KeyboardInterrupt):
        queue.push(completed(1))
    assert queue.in_flight == 1
    with pytest.raises(KeyboardInterrupt):
        queue.push(fsyncs(1))
    queue.turn = turn
    assert queue.in_flight == 2
    assert not queue.blocked
    queue.push(fsyncs(1))
    assert queue.in_flight == 3
    queue._check()


# -- inside one another ------------------------------------------------------------------------


def test_what_is_pushed_inside_submit_follows_in_the_same_flush() -> None:
    queue, kernel, _ = make(8)
    requests = fsyncs(4)
    inner = iter(requests[1:])

    def inside() -> None:
        for request in inner:
            queue.push([request])
            assert request.state is State.PENDING
            return

    kernel.inside = inside
    queue.push(requests[:1])
    assert offers(kernel) == [(i + 1, [r], 1) for i, r in enumerate(requests)]
    queue._check()


def test_what_is_pushed_inside_submit_does_not_join_what_was_pending_before() -> None:
    queue, kernel, _ = make(8, max_offer=2)
    requests = fsyncs(4)

    def inside() -> None:
        kernel.inside = None
        queue.push(requests[3:])

    kernel.inside = inside
    queue.push(requests[:3])
    assert [list(c.batch) for c in kernel.calls] == [requests[:2], requests[2:3], requests[3:]]


def test_withdraw_inside_submit() -> None:
    queue, kernel, driver = make(8, max_offer=1)
    requests = fsyncs(4)

    def inside() -> None:
        kernel.inside = None
        assert driver.withdraw(requests[1], -errno.ECANCELED)
        assert driver.withdraw(requests[3], -errno.ECANCELED)
        assert not queue.withdraw(requests[0], -errno.ECANCELED)  # the kernel has it

    kernel.inside = inside
    queue.push(requests)
    assert [list(c.batch) for c in kernel.calls] == [requests[:1], requests[2:3]]
    assert not queue.blocked
    queue._check()


def test_plug_inside_submit_holds_for_what_comes_after() -> None:
    queue, kernel, _ = make(8)
    requests = fsyncs(3)

    def inside() -> None:
        kernel.inside = None
        with queue.section():
            queue.push(requests[1:2])
            queue.push(requests[2:])

    kernel.inside = inside
    queue.push(requests[:1])
    assert offers(kernel) == [(1, requests[:1], 1), (2, requests[1:], 2)]


def test_a_kick_while_a_request_is_offered_is_not_forgotten() -> None:
    """A slot is given back, and its completion reaped, while io_submit says EAGAIN.

    What stays in flight may be a poll that never completes, so that nothing else will kick.
    """
    queue, kernel, driver = make()
    first, poll, late = fsyncs(3)
    queue.push([first, poll])

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        if late.state is State.IN_FLIGHT and queue.io_submit_calls == 2:
            kernel.answers.append(-errno.EAGAIN)
            kernel.complete(first)
            in_thread(driver.reap)
        kernel(first_token, batch, outcome)

    queue._submit = submit
    queue.push([late])
    assert late.state is State.IN_FLIGHT


def test_the_passes_of_a_flush_are_bounded_and_then_continued() -> None:
    continued: list[int] = []

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        queue.flush()
        outcome.extend((-1, errno.EAGAIN))

    queue = SubmissionQueue(
        submit, nr_events=1, continuation=lambda: continued.append(queue.io_submit_calls)
    )
    queue.push(fsyncs(1))
    assert continued == [1, MAX_PASSES] == [1, 8]  # and the first for EAGAIN
    assert queue.blocked
    queue.flush()
    assert continued == [1, 8, 16]
    queue._check()


def test_without_a_continuation_the_timer_goes_on() -> None:
    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        queue.flush()
        outcome.extend((-1, errno.EAGAIN))

    queue = SubmissionQueue(submit, nr_events=1)
    queue.push(fsyncs(1))
    assert queue.io_submit_calls == MAX_PASSES
    assert queue.retry_in is not None
    queue._check()


def test_no_continuation_is_asked_for_without_need() -> None:
    queue, kernel, driver = make(8)
    kernel.inside = queue.flush
    queue.push(fsyncs(3))
    queue.flush()
    assert driver.continuations == 0


def test_a_chain_of_pushes_inside_submit_is_bounded() -> None:
    """A submission that completes at once, and has another one pushed, and so on for ever."""
    chain = fsyncs(100)
    continued: list[int] = []

    def submit(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        outcome.extend((len(batch), 0))
        for token in range(first_token, first_token + len(batch)):
            complete_one(queue.in_flight_table.pop(token))
        if chain:
            queue.push([chain.pop()])

    queue = SubmissionQueue(
        submit, nr_events=4, continuation=lambda: continued.append(queue.io_submit_calls)
    )
    queue.push([chain.pop()])
    assert continued
    assert queue.io_submit_calls <= MAX_PASSES
    assert not queue.blocked  # the kernel has never said no


# -- threads -----------------------------------------------------------------------------------


def in_thread(action: Callable[[], object]) -> None:
    """Run it in another thread, to its end."""
    thread = InThread(action, threading.Event())
    thread.run_until()
    thread.join()


@pytest.mark.parametrize("source", [fsyncs, completed])
def test_a_push_beside_a_flush_is_taken_over(source: Callable[[int], list[Request]]) -> None:
    queue, kernel, _ = make(8)
    mine, theirs = fsyncs(1), source(2)

    def inside() -> None:
        kernel.inside = None
        for request in theirs:
            in_thread(partial(queue.push, [request]))
        assert len(kernel.calls) == 1
        assert list(queue.pending) == theirs
        assert not queue.blocked

    kernel.inside = inside
    queue.push(mine)
    assert offers(kernel) == [(1, mine, 1), (2, theirs, 2)]


def test_a_completion_beside_a_flush_that_finds_no_room_is_not_forgotten() -> None:
    queue, kernel, driver = make(2)
    requests = fsyncs(4)
    reaped: list[Completion] = []

    def inside() -> None:
        # Both slots are taken; one is free again before the flush looks.
        kernel.inside = None
        kernel.complete(requests[0])
        in_thread(lambda: reaped.extend(driver.reap()))

    queue.push(requests[:1])
    kernel.inside = inside
    queue.push(requests[1:])
    assert [c.request for c in reaped] == requests[:1]
    assert requests[2].state is State.IN_FLIGHT
    queue._check()


def test_one_thread_is_inside_submit_and_the_others_pass_by() -> None:
    queue, kernel, driver = make(4)
    requests = fsyncs(12)
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        kernel.inside = None
        inside.set()
        go_on.wait()

    kernel.inside = hold
    first = threading.Thread(target=queue.push, args=([requests[0]],))
    first.start()
    inside.wait()
    barrier = threading.Barrier(11)

    def push(request: Request) -> None:
        barrier.wait()
        queue.push([request])

    others = [threading.Thread(target=push, args=(r,)) for r in requests[1:]]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert queue.in_queue == 11
    assert len(kernel.calls) == 1
    go_on.set()
    first.join()
    assert (queue.in_flight, queue.in_queue) == (4, 8)
    done = {finish(driver).request for _ in requests}
    assert done == set(requests)


def test_a_push_that_comes_when_a_flush_has_looked_for_the_last_time() -> None:
    queue, _, _ = make(8)
    [late] = fsyncs(1)
    turn = queue.turn

    class Turn:
        """Lets another thread push when the pass is over, just before the turn ends."""

        def __getattr__(self, name: str) -> Any:
            return getattr(turn, name)

        def release(self) -> None:
            if late.state is State.NEW:
                in_thread(lambda: queue.push([late]))
                assert list(queue.pending) == [late]
            turn.release()

    queue.turn = cast("Any", Turn())
    queue.push(fsyncs(1))
    assert late.state is State.IN_FLIGHT


@pytest.mark.parametrize("continued", [True, False])
def test_a_push_after_the_last_pass_is_brought_forward(continued: bool) -> None:
    queue, _, driver = make(64)
    if not continued:
        queue._continuation = None
    turn = queue.turn

    class Turn:
        """Another thread pushes after each pass, just before the turn ends."""

        def __getattr__(self, name: str) -> Any:
            return getattr(turn, name)

        def release(self) -> None:
            in_thread(lambda: queue.push(fsyncs(1)))
            turn.release()

    queue.turn = cast("Any", Turn())
    queue.push(fsyncs(1))
    queue.turn = turn
    assert (queue.in_flight, queue.in_queue) == (MAX_PASSES, 1)
    assert driver.continuations == continued
    assert continued or queue.retry_in == 0.0


@pytest.mark.parametrize("source", [fsyncs, completed])
@pytest.mark.parametrize("n", [1, 2])
def test_another_thread_s_turn_is_not_waited_for(
    source: Callable[[int], list[Request]], n: int
) -> None:
    queue, kernel, _ = make()
    with queue.turn:
        in_thread(partial(queue.push, source(n)))
        in_thread(queue.flush)
    assert not kernel.calls
    queue.kick()
    assert queue.in_flight == n


class Beside:
    """Two calls on one queue, one of them at any place where threads can switch in the other."""

    ACTIONS = ("push", "push again", "push two", "plug and unplug", "section", "reap", "withdraw")

    def __init__(self, first: str, second: str, *, plugged: bool) -> None:
        self.names = first, second
        self.plugged = plugged

    def make(self) -> tuple[SubmissionQueue, Callable[[], object], Callable[[], object]]:
        self.queue, self.kernel, self.driver = make(2)
        self.pushed = fsyncs(3)
        self.completions: list[Completion] = []
        self.queue.push(self.pushed)
        if self.plugged:
            self.queue.plug()
        first, second = (self.action(name, place) for place, name in enumerate(self.names))
        return self.queue, first, second

    def action(self, name: str, place: int) -> Callable[[], object]:
        queue = self.queue
        if name.startswith("push"):
            requests = completed(1) if name == "push again" else fsyncs(1 + (name == "push two"))
            self.pushed += requests
            return lambda: queue.push(requests)
        if name == "reap":
            if place == 0 or self.names[0] != "reap":
                self.kernel.complete()
            return self.reap
        if name == "withdraw":
            return lambda: queue.withdraw(self.pushed[2], -errno.ECANCELED)
        if name == "section":
            return self.section
        queue.plug()
        return queue.unplug

    def section(self) -> None:
        with self.queue.section():
            pass

    def reap(self) -> None:
        with self.queue.lock:
            self.driver.fetch()
        self.queue.kick()

    def check(self) -> None:
        queue = self.queue
        assert queue.plugged == self.plugged
        if self.plugged:
            queue.unplug()
        if self.driver.continuations:
            queue.kick()
        queue._check()
        assert queue.submitted == len(self.pushed)
        found = [*queue.pending, *queue.in_flight_table.values()]
        found += [c.request for c in queue.rejected]
        assert sorted(map(id, found)) == sorted(map(id, self.pushed))
        for completion in queue.rejected:
            self.kernel.withdrawn(completion.request)
        while queue.outstanding:
            self.kernel.complete()
            self.driver.reap()
            queue._check()


@pytest.mark.parametrize("second", Beside.ACTIONS)
@pytest.mark.parametrize("first", Beside.ACTIONS)
@pytest.mark.parametrize("plugged", [False, True])
def test_two_threads_on_one_queue(
    first: str, second: str, plugged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the GIL, one request is pushed without the lock, between places where it may be let go.
    # The places here are lines, as without the GIL.
    monkeypatch.setattr("rawaio.queue._GIL", False)
    beside = Beside(first, second, plugged=plugged)
    assert interleave(beside.make, beside.check) > 3


@pytest.mark.parametrize("first", ["push", "push two"])
def test_a_push_without_the_lock_beside_one_that_holds_it(first: str) -> None:
    # As it is with the GIL: the first may be stopped wherever that can be let go, which is behind
    # calls and not inside the few instructions in which the second does its work.
    beside = Beside(first, "push again", plugged=False)
    assert interleave(beside.make, beside.check) > 3


def test_outstanding_counts_at_one_instant() -> None:
    counted: list[int] = []

    def build() -> tuple[SubmissionQueue, Callable[[], object], Callable[[], object]]:
        queue, _, _ = make()
        queue.plug()
        queue.push(fsyncs(3))
        return queue, lambda: counted.append(queue.outstanding), queue.unplug

    interleave(build, lambda: None)
    assert set(counted) == {3}


def test_two_threads_that_refuse_and_push() -> None:
    taken: list[bool] = []
    request = fsyncs(1)[0]

    def build() -> tuple[SubmissionQueue, Callable[[], object], Callable[[], object]]:
        nonlocal request
        queue, _, _ = make()
        request = fsyncs(1)[0]

        def push() -> None:
            try:
                taken.append(bool(queue.push([request])))
            except ClosedError:
                taken.append(False)

        return queue, push, lambda: queue.refuse(ClosedError("closed"))

    def check() -> None:
        assert (request.state is State.IN_FLIGHT) is taken[-1]

    interleave(build, check)
    assert set(taken) == {False, True}


# -- withdraw ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(5))
def test_withdraw_takes_one_out_and_keeps_the_order_of_the_rest(place: int) -> None:
    queue, _, driver = make(1)
    queue.push(fsyncs(1))
    requests = fsyncs(5)
    queue.push(requests)
    gone = requests.pop(place)
    assert driver.withdraw(gone, -errno.ECANCELED) is True
    assert list(queue.pending) == requests
    assert list(queue.rejected) == [(gone, -errno.ECANCELED, 0)]
    assert isinstance(queue.rejected[0], Completion)
    queue._check()
    assert driver.reap()[0].request is gone
    assert gone.state is State.COMPLETED
    finish(driver)
    assert [finish(driver).request for _ in requests] == requests


def test_only_what_is_pending_can_be_withdrawn() -> None:
    queue, _, driver = make(1)
    flying, waiting, new, done = fsyncs(4)
    complete_one(done)
    queue.push([flying, waiting])
    for request in (flying, new, done):
        state = request.state
        assert queue.withdraw(request, -1) is False
        assert request.state is state
    assert (queue.in_queue, queue.in_flight) == (1, 1)
    assert not queue.rejected
    assert driver.withdraw(waiting, -1)
    assert queue.withdraw(waiting, -1) is False
    assert len(queue.rejected) == 1


def test_withdraw_works_while_plugged() -> None:
    queue, kernel, _ = make()
    queue.plug()
    a, b = fsyncs(2)
    queue.push([a, b])
    queue.withdraw(a, 5)
    queue.unplug()
    assert offers(kernel) == [(1, [b], 1)]
    assert list(queue.rejected) == [(a, 5, 0)]


def test_withdraw_of_the_last_pending_request_leaves_the_queue_open() -> None:
    """With a slot free and nothing pending, what is pushed next starts at once.

    The one still in flight may be a poll that never completes.
    """
    queue, _, driver = make(2)
    flying = fsyncs(2)
    waiting, late = fsyncs(2)
    queue.push(flying)
    queue.push([waiting])
    driver.withdraw(waiting, -errno.ECANCELED)
    assert queue.blocked is False
    assert [c.request for c in driver.reap()] == [waiting]
    finish(driver, flying[0])
    queue.push([late])
    assert late.state is State.IN_FLIGHT


# -- the rest ----------------------------------------------------------------------------------


def test_issued_tells_tokens_that_some_request_had() -> None:
    queue, kernel, _ = make(8)
    assert not queue.issued(0)
    assert not queue.issued(SERIES)
    kernel.answers.append(1)
    queue.push(fsyncs(2))  # of two series: the second one is not accepted, and offered again
    assert queue.issued(SERIES)
    assert queue.issued(2 * SERIES)
    assert not any(map(queue.issued, (-1, 0, 1, SERIES - 1, 3 * SERIES)))


def test_take_gives_each_request_once() -> None:
    queue, _, _ = make()
    [request] = fsyncs(1)
    queue.push([request])
    assert queue.in_flight_table.pop(SERIES) is request
    assert queue.in_flight == 0
    with pytest.raises(KeyError):
        queue.in_flight_table.pop(SERIES)


def corrupt_bound(queue: SubmissionQueue) -> None:
    queue.nr_events = 1


def corrupt_twice(queue: SubmissionQueue) -> None:
    queue.pending.append(queue.pending[0])


def corrupt_both(queue: SubmissionQueue) -> None:
    queue.in_flight_table[SERIES] = queue.pending[0]


def corrupt_offered(queue: SubmissionQueue) -> None:
    queue._offered.append(queue.pending[0])


def corrupt_outcome(queue: SubmissionQueue) -> None:
    queue._outcome.append(1)


def corrupt_pending_state(queue: SubmissionQueue) -> None:
    complete_one(queue.pending[0])


def corrupt_in_flight_state(queue: SubmissionQueue) -> None:
    complete_one(queue.in_flight_table[SERIES])


def corrupt_token(queue: SubmissionQueue) -> None:
    queue.in_flight_table[0] = queue.in_flight_table.pop(SERIES)


def corrupt_reusable(queue: SubmissionQueue) -> None:
    queue.reusable = SERIES


def corrupt_reusable_part(queue: SubmissionQueue) -> None:
    queue.reusable = 5 * SERIES + 1


def corrupt_blocked(queue: SubmissionQueue) -> None:
    queue.blocked = False


@pytest.mark.parametrize(
    "corrupt", [f for name, f in sorted(globals().items()) if name.startswith("corrupt_")]
)
def test_check_finds_what_is_wrong(corrupt: Callable[[SubmissionQueue], None]) -> None:
    queue, _, _ = make(2)
    queue.push(fsyncs(3))
    queue._check()
    corrupt(queue)
    with pytest.raises(AssertionError):
        queue._check()
    assert not queue.lock._is_owned()


@pytest.mark.parametrize("make_one", [fsyncs, completed])
@pytest.mark.parametrize("gil", sorted({False, _GIL}))
def test_who_refuses_and_then_has_the_turn_sees_all_that_was_taken(
    make_one: Callable[[int], list[Request]], gil: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `IOContext.close` does, which waits for all that and then forgets the queue."""
    monkeypatch.setattr("rawaio.queue._GIL", gil)
    taken: list[bool] = []
    seen: list[int] = []

    def build() -> tuple[SubmissionQueue, Callable[[], object], Callable[[], object]]:
        queue, _, _ = make()
        requests = make_one(1)

        def push() -> None:
            try:
                taken.append(bool(queue.push(requests)))
            except ClosedError:
                taken.append(False)

        def close() -> None:
            queue.refuse(ClosedError("closed"))
            with queue.turn:
                seen.append(queue.outstanding)

        return queue, push, close

    interleave(build, lambda: None)
    assert [bool(n) for n in seen] == taken[: len(seen)]
    assert set(taken) == {False, True}


@pytest.mark.parametrize("gil", ["0", "1"])
def test_a_build_that_can_do_without_the_gil_counts_as_without(gil: str) -> None:
    """Whatever there is at the moment: an import may have it turned on for as long as it takes."""
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    if gil == "0" and not free_threaded:
        pytest.skip("this build cannot do without the GIL")
    source = "import rawaio.queue; print(rawaio.queue._GIL)"
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=os.environ | {"PYTHON_GIL": gil, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{not free_threaded}\n"

"""The simulated kernel: what it does, and what it objects to."""

from __future__ import annotations

import errno
import select
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from rawaio.errors import ClosedError
from rawaio.lifecycle import offer
from rawaio.request import Request
from rawaio.testing import Call, Chances, SimulatedKernel
from tests.queue_support import Driver

if TYPE_CHECKING:
    from rawaio.protocols import CompletionSource
    from rawaio.queue import Submit


def fsyncs(n: int) -> list[Request]:
    """Requests as a queue offers them."""
    requests = [Request.fsync(0, user_data=i) for i in range(n)]
    offer(requests)
    return requests


def submit(kernel: SimulatedKernel, token: int, batch: Sequence[Request]) -> list[int]:
    outcome: list[int] = []
    kernel(token, batch, outcome)
    return outcome


def test_it_is_what_queue_and_ring_ask_for() -> None:
    kernel = SimulatedKernel(1)
    as_submit: Submit = kernel
    as_source: CompletionSource = kernel
    assert callable(as_submit)
    assert as_source.peek() == 0


@pytest.mark.parametrize(("nr_events", "nr"), [(0, None), (-1, None), (1, 1), (1, 0)])
def test_sizes_are_checked(nr_events: int, nr: int | None) -> None:
    with pytest.raises(ValueError, match="nr_events must be 1 and nr 2 at least"):
        SimulatedKernel(nr_events, nr=nr)
    assert SimulatedKernel(1, nr=2).nr == 2


# -- submission --------------------------------------------------------------------------------


def test_a_batch_is_accepted_and_waits_to_be_completed() -> None:
    kernel = SimulatedKernel(4)
    a, b = batch = fsyncs(2)
    assert submit(kernel, 1, batch) == [2, 0]
    assert kernel.calls == [Call(1, (a, b), 2, 0)]
    assert kernel.running == [a, b]
    assert kernel.unreaped == 2
    assert kernel.peek() == 0
    assert kernel.complete(b) is b
    assert kernel.complete(a, res=-5) is a
    assert kernel.peek() == 2
    assert kernel.columns(2) == ([2, 1], [0, -5], [0, 0])
    assert [(e[0], *e[2:]) for e in kernel.decode(2)] == [(2, 0, 0), (1, -5, 0)]
    assert len({e[1] for e in kernel.decode(2)}) == 2
    assert kernel.unreaped == 2
    assert kernel.advance_and_peek(1) == 1
    assert kernel.unreaped == 1
    kernel.commit(1)
    assert kernel.peek() == 0


@pytest.mark.parametrize(
    ("answers", "expected", "accepted"),
    [
        ([2], [2, 0], 2),
        ([9], [3, 0], 3),
        ([0], [0, 0], 0),
        ([-errno.EAGAIN], [-1, errno.EAGAIN], 0),
        ([-errno.EBADF], [-1, errno.EBADF], 0),
    ],
)
def test_answers_are_given_in_turn(answers: list[int], expected: list[int], accepted: int) -> None:
    kernel = SimulatedKernel(4)
    kernel.answers.extend(answers)
    batch = fsyncs(3)
    assert submit(kernel, 1, batch) == expected
    assert kernel.running == batch[:accepted]
    assert not kernel.answers


def test_an_exception_among_the_answers_is_raised_and_nothing_taken() -> None:
    kernel = SimulatedKernel(4)
    kernel.answers.append(KeyError("mine"))
    batch = fsyncs(2)
    outcome: list[int] = []
    with pytest.raises(KeyError, match="mine"):
        kernel(1, batch, outcome)
    assert outcome == []
    assert not kernel.running
    assert not kernel.calls
    assert submit(kernel, 3, batch) == [2, 0]


def test_slots_limit_what_is_accepted_and_come_back_by_commit() -> None:
    kernel = SimulatedKernel(4)
    kernel.slots = 2
    batch = fsyncs(3)
    assert submit(kernel, 1, batch) == [2, 0]
    assert submit(kernel, 4, batch[2:]) == [-1, errno.EAGAIN]
    kernel.complete(batch[0])
    assert submit(kernel, 5, batch[2:]) == [-1, errno.EAGAIN]
    kernel.commit(kernel.peek())
    assert submit(kernel, 6, batch[2:]) == [1, 0]
    kernel.slots = 99  # the ring has room for one less than it has events
    small = SimulatedKernel(4, nr=3)
    small.slots = 99
    assert submit(small, 1, fsyncs(4)) == [2, 0]


def test_only_the_first_of_a_batch_is_refused() -> None:
    kernel = SimulatedKernel(4)
    a, b, c = fsyncs(3)
    kernel.plan(b, refuse=errno.EBADF)
    assert submit(kernel, 1, [a, b, c]) == [1, 0]
    assert submit(kernel, 4, [b, c]) == [-1, errno.EBADF]
    assert submit(kernel, 6, [c]) == [1, 0]
    assert submit(kernel, 7, [b]) == [1, 0]  # the plan was for once


def test_without_a_slot_nothing_else_is_looked_at() -> None:
    kernel = SimulatedKernel(4)
    kernel.slots = 0
    [request] = fsyncs(1)
    kernel.plan(request, refuse=errno.EBADF)
    assert submit(kernel, 1, [request]) == [-1, errno.EAGAIN]
    kernel.slots = 1
    assert submit(kernel, 2, [request]) == [-1, errno.EBADF]


def test_a_plan_says_what_the_event_holds_and_when() -> None:
    kernel = SimulatedKernel(4)
    a, b = fsyncs(2)
    kernel.plan(a, res=-errno.EIO, res2=7, at_once=True)
    submit(kernel, 1, [a, b])
    assert kernel.running == [b]
    assert kernel.peek() == 1
    assert kernel.columns(1) == ([1], [-errno.EIO], [7])


def test_full_success_is_the_bytes_asked_for_or_the_events() -> None:
    kernel = SimulatedKernel(4)
    requests = [
        Request.pread(0, bytearray(5), 0),
        Request.poll(0, select.POLLIN),
        Request.fsync(0),
    ]
    offer(requests)
    kernel.plan(requests[0])
    submit(kernel, 1, requests)
    for request in requests:
        kernel.complete(request)
    _, res, _ = kernel.columns(kernel.peek())
    assert res[0] == 5
    assert requests[1].poll_result(res[1]) & select.POLLIN
    assert res[2] == 0


def test_inside_is_called_when_something_was_accepted() -> None:
    kernel = SimulatedKernel(4)
    seen: list[int] = []
    kernel.inside = lambda: seen.append(kernel.unreaped)
    batch = fsyncs(1)
    kernel.answers.extend([0, -errno.EAGAIN])
    submit(kernel, 1, batch)
    submit(kernel, 2, batch)
    assert seen == []
    submit(kernel, 3, batch)
    assert seen == [1]


# -- completion --------------------------------------------------------------------------------


def test_only_what_is_running_can_complete() -> None:
    kernel = SimulatedKernel(4)
    [request] = fsyncs(1)
    with pytest.raises(ValueError, match="no request is running"):
        kernel.complete()
    with pytest.raises(ValueError, match="not running"):
        kernel.complete(request)
    submit(kernel, 1, [request])
    kernel.complete()
    with pytest.raises(ValueError, match="not running"):
        kernel.complete(request)


def test_a_run_ends_where_the_ring_wraps() -> None:
    kernel = SimulatedKernel(4, nr=5)
    token = 1
    order: list[int] = []
    runs: list[int] = []
    for _ in range(5):
        batch = fsyncs(3)
        submit(kernel, token, batch)
        token += 3
        for request in batch:
            kernel.complete(request)
        while n := kernel.peek():
            runs.append(n)
            order += kernel.columns(n)[0]
            kernel.commit(n)
    assert order == list(range(1, 16))
    assert runs == [3, 2, 1, 3, 1, 2, 3]


def test_the_next_run_is_what_peek_and_columns_give() -> None:
    kernel = SimulatedKernel(4, nr=5)
    got: list[tuple[list[int], bool]] = []
    token = 1
    for most in (None, None, 1):
        batch = fsyncs(3)
        submit(kernel, token, batch)
        token += 3
        for request in batch:
            kernel.complete(request)
        while (run := kernel.next_run(most)) is not None:
            data, res, res2, more = run
            assert res == res2 == [0] * len(data)
            got.append((data, more))
            kernel.commit_run()
        kernel.commit_run()  # of nothing
    assert got == [
        ([1, 2, 3], False),
        ([4, 5], True),
        ([6], False),
        ([7], True),
        ([8], True),
        ([9], False),
    ]


@pytest.mark.parametrize("n", [-1, 2])
def test_what_is_not_within_the_run_is_refused(n: int) -> None:
    kernel = SimulatedKernel(4)
    batch = fsyncs(2)
    submit(kernel, 1, batch)
    kernel.complete(batch[0])
    assert kernel.peek() == 1
    kernel.complete(batch[1])  # there, but peek has not seen it
    calls: list[Callable[[int], object]] = [kernel.columns, kernel.decode, kernel.commit]
    for call in calls:
        with pytest.raises(ValueError, match=f"{n} events of a run of 1"):
            call(n)
    kernel.commit(1)
    with pytest.raises(ValueError, match="1 events of a run of 0"):
        kernel.commit(1)
    assert kernel.peek() == 1


def test_a_closed_ring_is_not_read() -> None:
    kernel = SimulatedKernel(4)
    submit(kernel, 1, fsyncs(1))
    kernel.complete()
    kernel.peek()
    kernel.close()
    kernel.close()
    with pytest.raises(ClosedError):
        kernel.peek()
    with pytest.raises(ValueError, match="of a run of 0"):
        kernel.commit(1)


# -- objections --------------------------------------------------------------------------------


def test_it_objects_to_an_empty_batch() -> None:
    with pytest.raises(AssertionError, match="an empty batch"):
        submit(SimulatedKernel(4), 1, [])


@pytest.mark.parametrize("token", [0, 1, 2])
def test_it_objects_to_a_token_seen_before(token: int) -> None:
    kernel = SimulatedKernel(4)
    submit(kernel, 1, fsyncs(2))
    with pytest.raises(AssertionError, match=f"token {token} is not above all before"):
        submit(kernel, token, fsyncs(1))
    submit(kernel, 3, fsyncs(1))


def test_it_objects_to_a_request_that_it_has() -> None:
    kernel = SimulatedKernel(4)
    a, b = fsyncs(2)
    submit(kernel, 1, [a])
    with pytest.raises(AssertionError, match="it has this request already"):
        submit(kernel, 2, [b, a])
    with pytest.raises(AssertionError, match="it has this request already"):
        submit(kernel, 4, [b, b])
    kernel.complete(a)
    with pytest.raises(AssertionError, match="it has this request already"):
        submit(kernel, 6, [a])  # not reaped


def test_it_objects_to_a_request_in_another_state() -> None:
    with pytest.raises(AssertionError, match="not IN_FLIGHT"):
        submit(SimulatedKernel(4), 1, [Request.fsync(0)])


def test_it_objects_to_more_than_nr_events() -> None:
    kernel = SimulatedKernel(2)
    with pytest.raises(AssertionError, match="3 requests more than the 0 it has are more than 2"):
        submit(kernel, 1, fsyncs(3))
    submit(kernel, 4, fsyncs(2))
    kernel.complete()
    with pytest.raises(AssertionError, match="1 requests more than the 2 it has are more than 2"):
        submit(kernel, 6, fsyncs(1))


@pytest.mark.parametrize("answer", [1, 0, -errno.EAGAIN, KeyboardInterrupt()])
def test_it_objects_to_another_order_than_before(answer: int | BaseException) -> None:
    def start() -> tuple[SimulatedKernel, list[Request]]:
        kernel = SimulatedKernel(8)
        batch = fsyncs(4)
        kernel.answers.append(answer)
        try:
            submit(kernel, 1, batch)
        except KeyboardInterrupt:
            pass
        return kernel, batch[1:] if answer == 1 else batch

    kernel, rest = start()
    with pytest.raises(AssertionError, match="has to be offered again first"):
        submit(kernel, 5, fsyncs(1))
    kernel, rest = start()
    with pytest.raises(AssertionError, match="has to be offered again first"):
        submit(kernel, 5, rest[1:])
    kernel, rest = start()
    submit(kernel, 5, rest[:1])
    with pytest.raises(AssertionError, match="has to be offered again first"):
        submit(kernel, 6, [rest[2], rest[1]])
    kernel, rest = start()
    kernel.withdrawn(rest[0])
    kernel.withdrawn(rest[0])  # again: not among them
    assert submit(kernel, 5, [*rest[1:], *fsyncs(1)]) == [len(rest), 0]


def test_it_objects_to_a_call_inside_a_call() -> None:
    kernel = SimulatedKernel(4)
    objections: list[str] = []

    def inside() -> None:
        try:
            submit(kernel, 2, fsyncs(1))
        except AssertionError as error:
            objections.append(str(error))

    kernel.inside = inside
    submit(kernel, 1, fsyncs(1))
    assert objections == ["io_submit is called while another call is under way"]
    kernel.inside = None
    submit(kernel, 2, fsyncs(1))


# -- chance ------------------------------------------------------------------------------------


def play(seed: int, chances: Chances) -> tuple[list[tuple[int, int, int]], list[tuple[Any, int]]]:
    """A history: every call, and every completion."""
    kernel = SimulatedKernel(4, seed=seed, chances=chances)
    driver = Driver(kernel)
    seen: list[tuple[Any, int]] = []
    pushed = 0
    for turn in range(300):
        if turn < 100:
            pushed += driver.queue.push([Request.pread(0, bytearray(8), 0, user_data=turn)])
        if kernel.running:
            kernel.complete()
        seen += [(c.request.user_data, c.res) for c in driver.reap()]
    assert len(seen) == pushed == 100
    return [(c.first_token, len(c.batch), c.returned) for c in kernel.calls], seen


EVERYTHING = Chances(eagain=0.2, partial=0.3, refuse=0.1, fail=0.1, short=0.2, at_once=0.3)


def test_the_same_seed_gives_the_same_history() -> None:
    assert play(5, EVERYTHING) == play(5, EVERYTHING)
    assert play(5, EVERYTHING) != play(6, EVERYTHING)


def test_without_chances_everything_succeeds() -> None:
    calls, seen = play(0, Chances())
    assert all(n == returned for _, n, returned in calls)
    assert {res for _, res in seen} == {8}


def results(chances: Chances) -> set[int]:
    return {res for _, res in play(1, chances)[1]}


def test_each_chance_has_its_effect() -> None:
    assert results(Chances(refuse=0.5)) > {8, -errno.EBADF, -errno.EINVAL, -errno.EOPNOTSUPP} - {8}
    assert results(Chances(fail=0.5)) == {8, -errno.EIO, -errno.ENOSPC, -errno.EINVAL}
    assert results(Chances(short=0.5)) == set(range(9))
    assert -1 in {returned for _, _, returned in play(1, Chances(eagain=0.5))[0]}
    kernel = SimulatedKernel(64, seed=3, chances=Chances(partial=1))
    assert 0 < submit(kernel, 1, fsyncs(64))[0] < 64
    kernel = SimulatedKernel(64, chances=Chances(at_once=1))
    assert submit(kernel, 1, fsyncs(64)) == [64, 0]
    assert kernel.peek() == 64
    assert not kernel.running


def test_what_has_no_bytes_is_never_short() -> None:
    kernel = SimulatedKernel(64, chances=Chances(short=1, at_once=1))
    submit(kernel, 1, fsyncs(64))
    assert set(kernel.columns(kernel.peek())[1]) == {0}

"""IOContext: what submit takes, what reap gives, and how long it waits."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

import rawaio
from rawaio import Request
from rawaio.ring import CompletionRing, Ordering
from rawaio.statistics import Statistics
from rawaio.syscalls import fixed
from tests.context_support import (
    LIMIT_S,
    Pipe,
    new_context,
    readable,
    requests,
    results,
    sleeper,
)

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]


def _write(fd: int, user_data: object = None) -> Request:
    return Request.pwrite(fd, b"x", 0, user_data=user_data)


# -- submit ----------------------------------------------------------------------------------------


def test_the_kind_of_context_is_what_the_tests_think(kind: str, ctx: rawaio.IOContext) -> None:
    ring = CompletionRing(ctx._kernel.ctx_id, counted=True)  # as this machine has it
    usable = ring.usable
    by_ring = kind != "io_getevents" and usable
    assert ctx.statistics().mechanism == ("ring" if by_ring else "io_getevents")
    assert (ctx.why_not_ring is None) is by_ring
    counted = kind == "counted" or (kind == "ring" and ring.ordering is Ordering.COUNTED)
    assert ctx._counted is (counted and usable)
    if kind == "io_getevents" and usable:
        assert ctx.why_not_ring == "force_syscalls"


def test_the_rings_own_reason_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rawaio.ring._mapping", lambda _: (0, b""))
    with rawaio.IOContext() as ctx:
        assert ctx.statistics().mechanism == "io_getevents"
        assert (ctx.why_not_ring or "").startswith("nothing readable is mapped")


def test_each_is_given_back_once_and_in_order(ctx: rawaio.IOContext, null: int) -> None:
    submitted = [_write(null, i) for i in range(5)]
    assert ctx.submit(*submitted) == 5
    reaped = ctx.reap(min_nr=5, timeout=LIMIT_S)
    assert requests(reaped) == submitted
    assert [c.request.user_data for c in reaped] == [0, 1, 2, 3, 4]
    assert [c.result() for c in reaped] == [1] * 5
    assert {c.res2 for c in reaped} == {0}
    assert ctx.reap() == ctx.drain() == []


def test_completion_order_is_the_kernels(ctx: rawaio.IOContext, pipes: _Pipes) -> None:
    three = pipes(3)
    polls = [pipe.poll() for pipe in three]
    ctx.submit(*polls)
    assert ctx.reap() == []
    for i in (2, 0, 1):
        three[i].fire()
    assert requests(ctx.reap(min_nr=3, timeout=LIMIT_S)) == [polls[2], polls[0], polls[1]]


def test_nothing_submitted_is_nothing_done(ctx: rawaio.IOContext) -> None:
    assert ctx.submit() == 0
    assert ctx.reap() == ctx.reap(min_nr=3) == []
    assert ctx.statistics().io_submit_calls == ctx.statistics().waits == 0


def test_a_bad_descriptor_fails_alone(ctx: rawaio.IOContext, null: int) -> None:
    submitted = [_write(1 << 20 if i in (0, 3, 4, 6) else null) for i in range(7)]
    assert ctx.submit(*submitted) == 7
    reaped = ctx.reap(min_nr=7, timeout=LIMIT_S)
    failed = [c for c in reaped if c.res < 0]
    assert requests(failed) == [submitted[i] for i in (0, 3, 4, 6)]
    assert set(results(failed)) == {-errno.EBADF}
    assert requests([c for c in reaped if c.res == 1]) == [submitted[i] for i in (1, 2, 5)]
    with pytest.raises(OSError, match="pwrite") as caught:
        failed[0].result()
    assert caught.value.errno == errno.EBADF


def test_more_than_nr_events_wait_their_turn(make: _Make, null: int) -> None:
    ctx = make(nr_events=3)
    submitted = [_write(null) for _ in range(100)]
    assert ctx.submit(*submitted) == 100
    assert ctx.statistics().in_flight == 3
    assert ctx.statistics().in_queue == 97
    reaped = ctx.reap(min_nr=100, timeout=LIMIT_S)
    assert requests(reaped) == submitted


def test_each_reap_makes_room_and_uses_it(make: _Make, null: int) -> None:
    ctx = make(nr_events=2)
    submitted = [_write(null) for _ in range(7)]
    ctx.submit(*submitted)
    reaped = []
    for _ in range(7):
        reaped += ctx.reap(min_nr=1, max_nr=1)
        ctx._queue._check()
    assert requests(reaped) == submitted


def test_a_submit_waits_for_room_in_pending(make: _Make, null: int) -> None:
    ctx = make(nr_events=2, max_pending=3)
    submitted = [_write(null) for _ in range(50)]
    for request in submitted:
        ctx.submit(request)
        assert ctx.statistics().in_queue <= 3
    assert requests(ctx.drain()) == submitted


def test_more_than_max_pending_at_once_are_taken_when_nothing_is_pending(
    make: _Make, null: int
) -> None:
    ctx = make(nr_events=2, max_pending=3)
    first = [_write(null) for _ in range(20)]
    second = [_write(null) for _ in range(20)]
    assert ctx.submit(*first) == ctx.submit(*second) == 20
    assert requests(ctx.drain()) == first + second


def test_a_submit_that_waits_for_room_sleeps_until_something_completes(
    make: _Make, pipes: _Pipes
) -> None:
    ctx = make(nr_events=1, max_pending=1)
    three = pipes(3)
    polls = [pipe.poll() for pipe in three]
    ctx.submit(polls[0])
    ctx.submit(polls[1])
    sleeper(ctx, three[0].fire)
    ctx.submit(polls[2])
    assert ctx.statistics().waits == 1
    for pipe in three[1:]:
        pipe.fire()
    assert requests(ctx.drain()) == polls


def test_a_submit_that_waits_for_room_sleeps_although_something_has_completed(
    monkeypatch: pytest.MonkeyPatch, make: _Make, pipes: _Pipes
) -> None:
    """What it has collected is for the next reap, and no reason to look again and again."""
    ctx = make(nr_events=1, max_pending=1)
    four = pipes(4)
    polls = [pipe.poll() for pipe in four]
    ctx.submit(polls[0])
    ctx.submit(polls[1])
    unfired = iter(four)
    sleeper(ctx, lambda: next(unfired).fire())
    ctx.submit(polls[2])
    make_room, looks = ctx._make_room, iter(range(10))

    def counted(n: int) -> None:
        assert next(looks, None) is not None, "it does not sleep"
        make_room(n)

    monkeypatch.setattr(ctx, "_make_room", counted)
    ctx.submit(polls[3])
    assert ctx.statistics().waits == 2
    for pipe in unfired:
        pipe.fire()
    assert requests(ctx.drain()) == polls


def test_a_submit_to_a_full_section_does_not_wait_for_what_is_done_at_once(
    make: _Make, null: int
) -> None:
    ctx = make(nr_events=1, max_pending=2)
    some, more = [_write(null), _write(null)], [_write(null), _write(null)]
    with ctx.plugged():
        ctx.submit(*some)
        ctx.submit(*more)
        assert ctx.statistics().waits == 0
    assert requests(ctx.drain()) == some + more


@pytest.mark.parametrize(("nr_events", "n"), [(1, 1), (2, 2), (2, 5)])
def test_a_submit_does_not_wait_when_there_is_just_enough_room(
    make: _Make, pipes: _Pipes, nr_events: int, n: int
) -> None:
    """Or nothing is pending, and then any number is taken."""
    ctx = make(nr_events=nr_events, max_pending=2)
    some, more = pipes(nr_events + 2), pipes(n)
    for pipe in some:
        ctx.submit(pipe.poll())
    for pipe in some[:nr_events]:
        pipe.fire()
    asleep = sleeper(ctx, some[nr_events].fire)
    assert ctx.submit(*[pipe.poll() for pipe in more]) == n
    assert not asleep.is_set()


@pytest.mark.parametrize("bad", ["under way", "twice", "not a request"])
def test_submit_takes_all_or_none(ctx: rawaio.IOContext, null: int, pipe: Pipe, bad: str) -> None:
    poll = pipe.poll()
    ctx.submit(poll)
    fresh, used = _write(null), _write(null)
    ctx.submit(used)
    ctx.reap(min_nr=1)
    before = ctx.statistics()
    third: object = {"under way": poll, "twice": fresh, "not a request": object()}[bad]
    with pytest.raises(TypeError if bad == "not a request" else rawaio.BusyError):
        ctx.submit(fresh, used, third)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert ctx.statistics() == before
    assert fresh.state is rawaio.State.NEW
    assert used.state is rawaio.State.COMPLETED
    assert ctx.submit(fresh, used) == 2
    pipe.fire()
    assert len(ctx.drain()) == 3


def test_a_request_under_way_in_another_context_is_refused(make: _Make, pipe: Pipe) -> None:
    ctx, other = make(), make()
    poll = pipe.poll()
    ctx.submit(poll)
    with pytest.raises(rawaio.BusyError):
        other.submit(poll)
    assert other.statistics().submitted == 0
    pipe.fire()
    assert requests(ctx.reap(min_nr=1)) == [poll]
    other.submit(poll)
    assert requests(other.reap(min_nr=1)) == [poll]


def test_a_closed_context_takes_nothing(ctx: rawaio.IOContext, null: int) -> None:
    ctx.close()
    request = _write(null)
    with pytest.raises(rawaio.ClosedError):
        ctx.submit(request)
    assert request.state is rawaio.State.NEW


# -- plugged ---------------------------------------------------------------------------------------


def test_one_io_submit_at_the_outermost_exit(ctx: rawaio.IOContext, null: int) -> None:
    with ctx.plugged():
        ctx.submit(_write(null))
        with ctx.plugged():
            ctx.submit(_write(null), _write(null))
        ctx.submit(_write(null))
        assert ctx.statistics().io_submit_calls == 0
        assert ctx.statistics().in_queue == 4
        assert ctx.reap() == ctx.process_completions() == []
    assert ctx.statistics().io_submit_calls == 1
    assert len(ctx.reap(min_nr=4)) == 4


def test_max_batch_are_submitted_although_plugged(make: _Make, null: int) -> None:
    ctx = make(max_batch=4)
    with ctx.plugged():
        for n in range(1, 11):
            ctx.submit(_write(null))
            assert ctx.statistics().io_submit_calls == n // 4
    assert ctx.statistics().io_submit_calls == 3
    assert len(ctx.drain()) == 10


def test_a_plugged_section_submits_after_an_exception_too(ctx: rawaio.IOContext, null: int) -> None:
    with suppress(ZeroDivisionError), ctx.plugged():
        ctx.submit(_write(null))
        assert 1 / 0
    assert len(ctx.reap(min_nr=1)) == 1


def test_a_wait_submits_what_is_plugged(ctx: rawaio.IOContext, null: int) -> None:
    with ctx.plugged():
        ctx.submit(_write(null))
        assert len(ctx.reap(min_nr=1)) == 1
        ctx.submit(_write(null), _write(null))
        assert len(ctx.drain()) == 2


# -- statistics ------------------------------------------------------------------------------------


def test_statistics_are_a_frozen_snapshot(ctx: rawaio.IOContext, kind: str, null: int) -> None:
    ctx.submit(_write(null), _write(1 << 20), _write(null))
    with ctx.plugged():
        ctx.submit(_write(null))
        before = ctx.statistics()
        assert before == Statistics(
            nr_events=128,
            in_queue=1,
            in_flight=2,
            submitted=4,
            completed=1,
            io_submit_calls=3,  # the first, the bad one, the one after it
            eagain=0,
            ring_reaps=0,
            syscall_reaps=0,
            waits=0,
            mechanism=ctx.statistics().mechanism,
        )
    ctx.drain()
    after = ctx.statistics()
    assert (after.submitted, after.completed) == (4, 4)
    assert before.completed == 1
    reaps = (after.ring_reaps, after.syscall_reaps)
    assert reaps == ((3, 0) if after.mechanism == "ring" else (0, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.waits = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    ctx.close()
    assert ctx.statistics() == after


def test_a_wait_is_counted(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    ctx.submit(pipe.poll())
    sleeper(ctx, pipe.fire)
    assert len(ctx.reap(min_nr=1)) == 1
    assert ctx.statistics().waits == 1


def test_repr(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    ctx.submit(pipe.poll())
    with ctx.plugged():
        ctx.submit(_write(1 << 20), _write(1 << 20))
        assert repr(ctx) == "<rawaio.IOContext nr_events 128, in_queue 2, in_flight 1>"
    ctx.close()
    assert repr(ctx) == "<rawaio.IOContext, the context is closed>"


# -- reap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_nr": -1},
        {"max_nr": 0},
        {"max_nr": -1},
        {"min_nr": 3, "max_nr": 2},
        {"timeout": -0.001},
        {"timeout": -math.inf},
        {"timeout": math.nan},
    ],
    ids=str,
)
def test_numbers_that_mean_nothing_are_refused(
    ctx: rawaio.IOContext, null: int, arguments: dict[str, float]
) -> None:
    ctx.submit(_write(null))
    with pytest.raises(ValueError, match=next(reversed(arguments))):
        ctx.reap(**arguments)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    if "timeout" in arguments:
        with pytest.raises(ValueError, match="timeout"):
            ctx.drain(arguments["timeout"])
    assert len(ctx.reap(min_nr=1)) == 1


@pytest.mark.parametrize("name", ["nr_events", "max_batch", "max_pending"])
@pytest.mark.parametrize("value", [0, -1])
def test_limits_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 1 at least, not {value}"):
        new_context("ring", **{name: value})


def test_limits_are_whole_numbers() -> None:
    with pytest.raises(TypeError):
        rawaio.IOContext(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("nr_events", [(1 << 32) + 1, (1 << 64) + 1])
def test_nr_events_is_never_cut_to_what_the_kernel_can_read(nr_events: int) -> None:
    """io_setup takes an unsigned int: of 2**32 + 1 it would see 1."""
    with pytest.raises((OSError, ValueError), match="Invalid argument|nr_events"):
        rawaio.IOContext(nr_events)


def test_max_nr_leaves_the_rest_for_the_next(ctx: rawaio.IOContext, null: int) -> None:
    submitted = [_write(null) for _ in range(7)]
    ctx.submit(*submitted)
    reaped = [ctx.reap(min_nr=2, max_nr=3), ctx.reap(max_nr=3), ctx.reap(max_nr=3)]
    assert [len(some) for some in reaped] == [3, 3, 1]
    assert requests([c for some in reaped for c in some]) == submitted
    assert ctx.reap(max_nr=3) == []


def test_max_nr_over_the_wrap_of_the_ring(make: _Make, null: int) -> None:
    ctx = make(nr_events=100)
    submitted = [_write(null) for _ in range(100)]
    for max_nr in (7, 64, 99, 100):
        for _ in range(5):
            ctx.submit(*submitted)
            reaped: list[rawaio.Completion] = []
            while len(reaped) < 100:
                some = ctx.reap(min_nr=1, max_nr=max_nr)
                assert 1 <= len(some) <= max_nr
                reaped += some
            assert requests(reaped) == submitted


def test_min_nr_above_what_is_outstanding_waits_for_that(
    ctx: rawaio.IOContext, null: int, pipe: Pipe
) -> None:
    poll = pipe.poll()
    ctx.submit(_write(null), poll)
    sleeper(ctx, pipe.fire)
    reaped = ctx.reap(min_nr=1000)
    assert requests(reaped)[1:] == [poll]
    assert ctx.statistics().waits == 1


def test_a_wait_for_several_goes_on_after_the_first(ctx: rawaio.IOContext, pipes: _Pipes) -> None:
    four = pipes(4)
    polls = [pipe.poll() for pipe in four]
    ctx.submit(*polls)
    left = iter(four)
    sleeper(ctx, lambda: next(left).fire())
    assert requests(ctx.reap(min_nr=3, timeout=LIMIT_S)) == polls[:3]
    assert ctx.statistics().waits == 3
    four[3].fire()
    assert requests(ctx.drain()) == polls[3:]


def test_when_the_time_is_over_what_is_there_is_returned(
    ctx: rawaio.IOContext, null: int, pipe: Pipe
) -> None:
    write, poll = _write(null), pipe.poll()
    ctx.submit(write, poll)
    assert requests(ctx.reap(min_nr=2, timeout=0.002)) == [write]
    assert ctx.reap(min_nr=1, timeout=0) == []
    assert ctx.drain(timeout=0.001) == []
    assert ctx.statistics().in_flight == 1
    pipe.fire()
    assert requests(ctx.reap(min_nr=2, timeout=0)) == [poll]


def test_timeout_zero_never_sleeps(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    ctx.submit(pipe.poll())
    assert ctx.reap(min_nr=1, timeout=0) == ctx.drain(timeout=0) == []
    assert ctx.statistics().waits == 0
    pipe.fire()
    assert len(ctx.reap(min_nr=1, timeout=0)) == 1


def test_a_wait_lasts_as_long_as_the_timeout(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    ctx.submit(pipe.poll())
    begin = time.monotonic()
    assert ctx.reap(min_nr=1, timeout=0.02) == []
    assert time.monotonic() - begin >= 0.02  # never less; how much more is the machine's affair
    pipe.fire()


def test_a_wait_goes_on_for_what_is_left_of_the_timeout(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, pipe: Pipe
) -> None:
    ctx.submit(pipe.poll())
    now, slept = [100.0], list[float | None]()

    def sleep(timeout: float | None) -> None:
        slept.append(timeout)
        now[0] += 0.75

    with monkeypatch.context() as patch:
        patch.setattr("rawaio.reaping.time.monotonic", lambda: now[0])
        patch.setattr(ctx, "_sleep", sleep)
        assert ctx.reap(min_nr=1, timeout=2) == []
        assert slept == [2, 1.25, 0.5]
        assert ctx.drain(timeout=0.5) == []
        assert slept[3:] == [0.5]


@pytest.mark.parametrize("timeout", [1e18, math.inf, LIMIT_S])
def test_a_very_long_timeout(ctx: rawaio.IOContext, pipe: Pipe, timeout: float) -> None:
    ctx.submit(pipe.poll())
    sleeper(ctx, pipe.fire)
    assert len(ctx.reap(min_nr=1, timeout=timeout)) == 1


def test_a_wait_longer_than_poll_can_take_is_made_of_several(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, pipe: Pipe
) -> None:
    monkeypatch.setattr("rawaio.reaping._LONGEST_WAIT_MS", 1)
    ctx.submit(pipe.poll())
    left = iter([None, None])

    def third() -> None:
        if next(left, pipe) is pipe:
            pipe.fire()

    sleeper(ctx, third)
    assert len(ctx.reap(min_nr=1)) == 1
    assert ctx.statistics().waits >= 3


def test_a_signal_whose_handler_returns_does_not_end_a_wait(
    ctx: rawaio.IOContext, pipe: Pipe
) -> None:
    handled: list[int] = []

    def handle(number: int, frame: object) -> None:
        handled.append(number)
        if len(handled) == 3:
            pipe.fire()
            signal.setitimer(signal.ITIMER_REAL, 0)

    # Again and again: a signal between the interpreter's last look and the system call is handled
    # when that has returned, and interrupts nothing.
    every_5_ms = partial(signal.setitimer, signal.ITIMER_REAL, 0.005, 0.005)
    before = signal.signal(signal.SIGALRM, handle)
    try:
        ctx.submit(pipe.poll())
        sleeper(ctx, every_5_ms)
        assert len(ctx.reap(min_nr=1, timeout=LIMIT_S)) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert set(handled) == {signal.SIGALRM}
    assert len(handled) >= 3
    assert ctx.statistics().waits == 1


def test_an_io_getevents_that_fails_is_no_secret(make: _Make, null: int) -> None:
    ctx = make()
    ctx.submit(_write(null))
    by_syscall = ctx._by_syscall
    real = by_syscall._calls
    wrong = (*real[0][:2], fixed(ctypes.c_ulong, 0), *real[0][3:])
    use_ring, ctx._use_ring = ctx._use_ring, False
    by_syscall._calls = (wrong, real[1])
    with pytest.raises(OSError, match="io_getevents") as caught:
        ctx.reap(min_nr=1)
    assert caught.value.errno == errno.EINVAL
    by_syscall._calls = real
    ctx._use_ring = use_ring
    assert len(ctx.reap(min_nr=1)) == 1


# -- as a context manager --------------------------------------------------------------------------


def test_with_closes(kind: str) -> None:
    with new_context(kind) as ctx:
        assert [ctx.closed] == [False]
        fd = ctx.fileno()
    assert ctx.closed
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(rawaio.ClosedError), ctx:
        raise AssertionError("entered")


def test_closed_is_said_by_all_but_close_and_statistics(ctx: rawaio.IOContext, null: int) -> None:
    request = _write(null)
    ctx.close()
    ctx.close()
    assert ctx.statistics().in_flight == 0
    calls: list[Callable[[], object]] = [
        lambda: ctx.submit(request),
        ctx.submit,
        ctx.reap,
        lambda: ctx.reap(min_nr=1, timeout=0),
        ctx.process_completions,
        ctx.drain,
        ctx.fileno,
        ctx.plugged,
        lambda: ctx.cancel(request),
        lambda: ctx.retry_in,
        ctx.__enter__,
    ]
    raised: list[rawaio.ClosedError] = []
    for call in calls:
        with pytest.raises(rawaio.ClosedError, match="closed") as caught:
            call()
        raised.append(caught.value)
    assert len(set(map(id, raised))) == len(raised)  # a traceback belongs to one raise


def test_close_waits_cancels_polls_and_runs_callbacks(
    make: _Make, null: int, pipes: _Pipes
) -> None:
    ctx = make(nr_events=2)
    seen: list[rawaio.Completion] = []
    requests_ = [pipe.poll(seen.append) for pipe in pipes(2)]
    requests_ += [Request.pwrite(null, b"x", 0, callback=seen.append) for _ in range(3)]
    with ctx.plugged():
        ctx.submit(*requests_)
        ctx.close()
    assert sorted(map(id, requests(seen))) == sorted(map(id, requests_))
    canceled = [c.request for c in seen if c.res == -errno.ECANCELED]
    assert set(canceled) == set(requests_[:2])
    assert {r.state for r in requests_} == {rawaio.State.COMPLETED}
    statistics = ctx.statistics()
    assert statistics.submitted == statistics.completed == 5


def test_an_event_loop_needs_only_the_descriptor(make: _Make, null: int, pipes: _Pipes) -> None:
    """select, process_completions, retry_in; more than nr_events, and polls that come late."""
    ctx = make(nr_events=4)
    some = pipes(3)
    late = iter(some)
    submitted = [pipe.poll() for pipe in some] + [_write(null) for _ in range(20)]
    ctx.submit(*submitted)
    reaped: list[rawaio.Completion] = []
    while len(reaped) < len(submitted):
        for pipe in late:
            pipe.fire()
            break
        assert select.select([ctx], [], [], LIMIT_S)[0]
        reaped += ctx.process_completions()
    assert set(requests(reaped)) == set(submitted)
    assert not readable(ctx)
    assert threading.active_count() >= 1


def test_a_submit_that_is_struck_while_it_waits_wakes_the_others(
    make: Callable[..., rawaio.IOContext], pipes: Callable[[int], list[Pipe]], null: int
) -> None:
    """It may have been woken for what nobody else looks at."""
    ctx = make(nr_events=1, max_pending=1)
    [pipe] = pipes(1)
    ctx.submit(pipe.poll())
    ctx.submit(Request.pwrite(null, b"x", 0))

    def struck(timeout: float | None, *, collecting: bool = False) -> None:
        ctx._kernel.reset()
        raise KeyboardInterrupt

    ctx._waiters.add(other := object())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctx, "_wait", struck)
        with pytest.raises(KeyboardInterrupt):
            ctx.submit(Request.pwrite(null, b"x", 0))
    assert readable(ctx)
    ctx._waiters.discard(other)
    pipe.fire()
    assert len(ctx.drain(timeout=LIMIT_S)) == 2

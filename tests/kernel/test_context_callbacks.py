"""IOContext: what callbacks may do, and what becomes of what they raise."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest

import rawaio
from rawaio import Completion, Request, reaping
from tests.context_support import (
    LIMIT_S,
    Pipe,
    Threads,
    readable,
    requests,
    results,
    sleeper,
    unraisable,
    wait_readable,
)

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]
_DEPTH = 8  # how deep reaps may nest


def _write(fd: int, callback: Callable[[Completion], object] | None = None) -> Request:
    return Request.pwrite(fd, b"x", 0, callback=callback)


# -- when ------------------------------------------------------------------------------------------


def test_callbacks_have_run_in_order_before_reap_returns(ctx: rawaio.IOContext, null: int) -> None:
    seen: list[Completion] = []
    submitted = [_write(null, seen.append if i % 3 else None) for i in range(10)]
    ctx.submit(*submitted)
    assert seen == []
    reaped = ctx.reap(min_nr=10)
    assert requests(reaped) == submitted
    assert seen == [c for c in reaped if c.request.callback]
    assert all(a is b for a, b in zip(seen, (c for c in reaped if c.request.callback), strict=True))


@pytest.mark.parametrize("how", ["process_completions", "drain", "close"])
def test_whoever_reaps_runs_them(ctx: rawaio.IOContext, null: int, how: str) -> None:
    seen: list[Completion] = []
    ctx.submit(_write(null, seen.append))
    getattr(ctx, how)()
    assert results(seen) == [1]


def test_callbacks_of_what_the_kernel_refused_and_of_what_was_cancelled(
    ctx: rawaio.IOContext, null: int, pipe: Pipe
) -> None:
    seen: list[Completion] = []
    bad, poll, waiting = _write(1 << 20, seen.append), pipe.poll(seen.append), _write(null)
    waiting.callback = seen.append
    ctx.submit(bad, poll)
    with ctx.plugged():
        ctx.submit(waiting)
        assert ctx.cancel(waiting)
        assert ctx.cancel(poll)
        assert seen == []
    reaped = ctx.drain()
    assert reaped == seen
    assert {c.request for c in reaped} == {bad, poll, waiting}


def test_a_callback_left_out_of_max_nr_is_not_run_yet(ctx: rawaio.IOContext, null: int) -> None:
    seen: list[Completion] = []
    submitted = [_write(null, seen.append) for _ in range(4)]
    ctx.submit(*submitted)
    for n in (1, 2, 3, 4):
        assert requests(ctx.reap(min_nr=1, max_nr=1)) == submitted[n - 1 : n]
        assert requests(seen) == submitted[:n]


def test_the_request_is_completed_and_what_is_behind_it_is_not(
    ctx: rawaio.IOContext, null: int
) -> None:
    states: list[list[rawaio.State]] = []
    submitted = [_write(null, lambda _: states.append([r.state for r in submitted]))]
    submitted += [_write(null), _write(null, submitted[0].callback)]
    ctx.submit(*submitted)
    ctx.reap(min_nr=3)
    done, in_flight = rawaio.State.COMPLETED, rawaio.State.IN_FLIGHT
    assert states == [[done, in_flight, in_flight], [done, done, done]]


# -- what they may do ------------------------------------------------------------------------------


def test_other_threads_use_the_context_meanwhile(
    ctx: rawaio.IOContext, null: int, threads: Threads
) -> None:
    seen: list[Completion] = []

    def callback(completion: Completion) -> None:
        other = Threads()
        other.start(lambda: seen.extend(use()))
        other.join()

    def use() -> list[Completion]:
        ctx.submit(_write(null))
        ctx.statistics()
        with ctx.plugged():
            pass
        return ctx.reap(min_nr=1, timeout=LIMIT_S)

    first = _write(null, callback)
    ctx.submit(first)
    assert requests(ctx.reap(min_nr=1)) == [first]
    assert results(seen) == [1]


def test_a_callback_submits(ctx: rawaio.IOContext, null: int) -> None:
    left = [3]

    def again(completion: Completion) -> None:
        if left[0]:
            left[0] -= 1
            ctx.submit(completion.request)

    request = _write(null, again)
    ctx.submit(request)
    assert requests(ctx.reap(min_nr=4)) == [request] * 4
    ctx._queue._check()


def test_what_a_callback_submits_and_is_there_at_once_comes_with_the_same_reap(
    ctx: rawaio.IOContext, null: int
) -> None:
    second = _write(null)
    first = _write(null, lambda _: ctx.submit(second))
    ctx.submit(first)
    assert requests(ctx.reap()) == [first, second]


def test_a_callback_waits_for_what_was_fetched_with_it(ctx: rawaio.IOContext, null: int) -> None:
    inner: list[Completion] = []
    first = _write(null, lambda _: inner.extend(ctx.reap(min_nr=1, timeout=LIMIT_S)))
    second, third = _write(null), _write(null)
    ctx.submit(first, second, third)
    outer = ctx.reap(min_nr=3)
    assert requests(inner) == [second, third]
    assert requests(outer) == [first]


def test_a_callback_takes_one_and_leaves_the_rest(ctx: rawaio.IOContext, null: int) -> None:
    inner: list[Completion] = []
    first = _write(null, lambda _: inner.extend(ctx.reap(min_nr=1, max_nr=1)))
    second, third = _write(null), _write(null)
    ctx.submit(first, second, third)
    assert requests(ctx.reap(min_nr=2)) == [first, third]
    assert requests(inner) == [second]


def test_a_callback_waits_for_what_it_submits(ctx: rawaio.IOContext, pipe: Pipe, null: int) -> None:
    inner: list[Completion] = []

    def callback(_: Completion) -> None:
        ctx.submit(pipe.poll())
        sleeper(ctx, pipe.fire)
        inner.extend(ctx.reap(min_nr=1, timeout=LIMIT_S))

    first = _write(null, callback)
    ctx.submit(first)
    assert requests(ctx.reap(min_nr=1)) == [first]
    assert len(inner) == 1


def test_callbacks_of_a_nested_reap_run_in_it(ctx: rawaio.IOContext, null: int) -> None:
    order: list[str] = []

    def outer(_: Completion) -> None:
        order.append("outer begins")
        ctx.reap(min_nr=1)
        order.append("outer ends")

    ctx.submit(_write(null, outer), _write(null, lambda _: order.append("inner")))
    ctx.reap(min_nr=1)
    assert order == ["outer begins", "inner", "outer ends"]


def test_a_callback_plugs(ctx: rawaio.IOContext, null: int) -> None:
    calls: list[int] = []

    def callback(completion: Completion) -> None:
        with ctx.plugged():
            for _ in range(3):
                ctx.submit(_write(null))
            calls.append(ctx.statistics().io_submit_calls)
        calls.append(ctx.statistics().io_submit_calls)

    ctx.submit(_write(null, callback))
    assert len(ctx.reap(min_nr=4)) == 4
    assert calls == [1, 2]


def test_a_callback_cancels(ctx: rawaio.IOContext, null: int, pipe: Pipe) -> None:
    poll = pipe.poll()
    ctx.submit(poll, _write(null, lambda _: ctx.cancel(poll)))
    assert requests(ctx.reap(min_nr=2))[1:] == [poll]


def test_a_callback_closes(ctx: rawaio.IOContext, null: int, pipe: Pipe) -> None:
    seen: list[Completion] = []
    first = _write(null, lambda _: ctx.close())
    second, poll = _write(null, seen.append), pipe.poll(seen.append)
    ctx.submit(first, second, poll)
    assert requests(ctx.reap(min_nr=3)) == [first]
    assert ctx.closed
    assert requests(seen) == [second, poll]
    with pytest.raises(rawaio.ClosedError):
        ctx.reap()


def test_a_callback_may_close_when_close_runs_it(ctx: rawaio.IOContext, null: int) -> None:
    seen: list[Completion] = []
    ctx.submit(_write(null, lambda _: ctx.close()), _write(null, seen.append))
    ctx.close()
    assert ctx.closed
    assert results(seen) == [1]


def test_a_callback_cannot_submit_when_close_runs_it(ctx: rawaio.IOContext, null: int) -> None:
    request = _write(null)
    ctx.submit(_write(null, lambda _: ctx.submit(request)))
    with unraisable() as raised:
        ctx.close()
    assert [type(error) for error, _ in raised] == [rawaio.ClosedError]
    assert request.state is rawaio.State.NEW


# -- what they raise -------------------------------------------------------------------------------


def test_an_exception_goes_to_the_hook_and_costs_nobody_anything(
    ctx: rawaio.IOContext, null: int
) -> None:
    seen: list[Completion] = []
    error = ZeroDivisionError("mine")

    def fail(completion: Completion) -> None:
        raise error

    submitted = [_write(null, callback) for callback in (seen.append, fail, None, seen.append)]
    ctx.submit(*submitted)
    with unraisable() as raised:
        assert requests(ctx.reap(min_nr=4)) == submitted
    assert requests(seen) == [submitted[0], submitted[3]]
    assert len(raised) == 1
    assert raised[0][0] is error
    assert repr(fail) in raised[0][1]
    ctx._queue._check()


@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_to_end_the_program_propagates_and_nothing_is_lost(
    ctx: rawaio.IOContext, null: int, kind_of_error: type[BaseException]
) -> None:
    seen: list[Completion] = []

    def end(completion: Completion) -> None:
        seen.append(completion)
        raise kind_of_error

    submitted = [_write(null, callback) for callback in (seen.append, None, end, seen.append, end)]
    ctx.submit(*submitted)
    with pytest.raises(kind_of_error):
        ctx.reap(min_nr=5)
    assert requests(seen) == [submitted[0], submitted[2]]
    with pytest.raises(kind_of_error):
        ctx.reap(min_nr=5)
    assert requests(seen) == [submitted[i] for i in (0, 2, 3, 4)]
    assert requests(ctx.reap(min_nr=5)) == submitted
    assert len(seen) == 4
    assert not ctx._depth
    ctx._queue._check()


def test_the_rest_comes_in_order_and_max_nr_counts_it(ctx: rawaio.IOContext, null: int) -> None:
    def end(_: Completion) -> None:
        raise SystemExit

    submitted = [_write(null) for _ in range(6)]
    submitted[3].callback = end
    ctx.submit(*submitted)
    with pytest.raises(SystemExit):
        ctx.reap(min_nr=6)
    reaped = [ctx.reap(min_nr=1, max_nr=2) for _ in range(3)]
    assert [requests(some) for some in reaped] == [submitted[:2], submitted[2:4], submitted[4:]]


def test_the_end_of_the_program_passes_through_nested_reaps(
    ctx: rawaio.IOContext, null: int
) -> None:
    inner: list[Completion] = []

    def end(_: Completion) -> None:
        raise SystemExit

    first = _write(null, lambda _: inner.extend(ctx.reap(min_nr=3)))
    second, third, fourth = _write(null), _write(null, end), _write(null)
    ctx.submit(first, second, third, fourth)
    with pytest.raises(SystemExit):
        ctx.reap(min_nr=4)
    assert inner == []
    rest = ctx.drain()
    assert len(rest) == 4
    assert set(requests(rest)) == {first, second, third, fourth}
    assert not ctx._depth


def test_what_a_nested_reap_leaves_counts_for_the_outer_ones_max_nr(
    ctx: rawaio.IOContext, null: int
) -> None:
    def end(_: Completion) -> None:
        raise SystemExit

    def catch(_: Completion) -> None:
        with pytest.raises(SystemExit):
            ctx.reap()

    submitted = [_write(null, catch), _write(null), _write(null, end), _write(null)]
    ctx.submit(*submitted)
    some = ctx.reap(min_nr=2, max_nr=2)
    assert len(some) == 2
    assert {*requests(some), *requests(ctx.drain())} == set(submitted)


def test_what_is_left_is_there_for_a_loop_to_see(ctx: rawaio.IOContext, null: int) -> None:
    def end(_: Completion) -> None:
        raise SystemExit

    submitted = [_write(null, end), _write(null), _write(null)]
    ctx.submit(*submitted)
    with pytest.raises(SystemExit):
        ctx.process_completions()
    wait_readable(ctx)
    assert requests(ctx.process_completions()) == submitted


def test_what_is_left_wakes_those_that_wait(
    ctx: rawaio.IOContext, null: int, pipes: _Pipes, threads: Threads
) -> None:
    """Another thread sleeps, and nothing else will complete."""
    one, silent = pipes(2)
    seen: list[Completion] = []
    asleep = sleeper(ctx)

    def end(_: Completion) -> None:
        threads.start(lambda: seen.extend(ctx.reap(min_nr=2)))
        asleep.wait(LIMIT_S)
        raise SystemExit

    submitted = [one.poll(end), _write(null), silent.poll()]
    ctx.submit(*submitted)
    one.fire()
    with pytest.raises(SystemExit):
        ctx.process_completions()
    threads.join()
    assert len(seen) == 2
    silent.fire()
    assert {*requests(seen), *requests(ctx.drain())} == set(submitted)


def test_close_goes_on_after_an_exception(make: _Make, null: int, pipe: Pipe) -> None:
    ctx = make()
    seen: list[Completion] = []

    def end(_: Completion) -> None:
        raise KeyboardInterrupt

    ctx.submit(_write(null, end), _write(null, seen.append), pipe.poll(seen.append))
    with pytest.raises(KeyboardInterrupt):
        ctx.close()
    assert [ctx.closed] == [False]
    with pytest.raises(rawaio.ClosedError):
        ctx.submit(_write(null))
    ctx.close()
    assert ctx.closed
    assert len(seen) == 2


# -- recursion -------------------------------------------------------------------------------------


class Chain:
    """A request whose callback submits it again, and then calls something, n times in all."""

    def __init__(self, ctx: rawaio.IOContext, null: int, n: int) -> None:
        self.ctx = ctx
        self.left = n
        self.depth = self.deepest = 0
        self.seen: list[Completion] = []
        self.request = _write(null, self.step)
        self.then: Callable[[], list[Completion]] = ctx.reap

    def step(self, completion: Completion) -> None:
        self.depth += 1
        self.deepest = max(self.depth, self.deepest)
        self.left -= 1
        try:
            if self.left:
                self.ctx.submit(completion.request)
                self.seen += self.then()
        finally:
            self.depth -= 1

    def run(self) -> None:
        self.ctx.submit(self.request)
        while self.left:
            self.seen += self.ctx.reap(min_nr=1, timeout=LIMIT_S)
        self.seen += self.ctx.drain()


@pytest.mark.parametrize("then", ["nothing", "reap", "process_completions"])
def test_a_chain_neither_overflows_the_stack_nor_loses_one(
    ctx: rawaio.IOContext, null: int, then: str
) -> None:
    chain = Chain(ctx, null, 10_000)
    chain.then = getattr(ctx, then, list[Completion])
    with unraisable() as raised:
        chain.run()
    assert raised == []
    assert len(chain.seen) == 10_000
    assert chain.deepest == (1 if then == "nothing" else _DEPTH)
    assert not ctx._depth


@pytest.mark.parametrize("how", ["reap", "drain"])
def test_a_wait_too_deep_is_refused(ctx: rawaio.IOContext, null: int, how: str) -> None:
    chain = Chain(ctx, null, 20)
    chain.then = ctx.drain if how == "drain" else lambda: ctx.reap(min_nr=1)
    with unraisable() as raised:
        chain.run()
    assert len(chain.seen) == 20
    assert chain.deepest == _DEPTH
    assert raised
    assert {type(error) for error, _ in raised} == {rawaio.BusyError}
    assert all("8 reaps deep" in str(error) for error, _ in raised)


def test_the_depth_is_each_threads_own(ctx: rawaio.IOContext, null: int, threads: Threads) -> None:
    """A thread may wait although another one is as deep as it may be."""
    deep, go_on = threading.Event(), threading.Event()
    chain = Chain(ctx, null, _DEPTH)

    def then() -> list[Completion]:
        if chain.depth == _DEPTH - 1:
            deep.set()
            assert go_on.wait(LIMIT_S)
        return ctx.reap()

    chain.then = then
    threads.start(chain.run)
    assert deep.wait(LIMIT_S)
    other = Chain(ctx, null, 2)
    other.then = lambda: ctx.reap(min_nr=1, timeout=LIMIT_S)
    other.run()
    go_on.set()
    threads.join()
    assert len(chain.seen) + len(other.seen) == _DEPTH + 2


def test_a_callback_that_submits_for_ever_does_not_keep_a_reap(
    ctx: rawaio.IOContext, null: int
) -> None:
    again = [True]

    def callback(completion: Completion) -> None:
        if again[0]:
            ctx.submit(completion.request)

    request = _write(null, callback)
    ctx.submit(request)
    for look in (ctx.reap, ctx.process_completions, lambda: ctx.reap(min_nr=2)):
        reaped = look()
        assert 2 <= len(reaped) <= 100
        assert readable(ctx)  # so that a loop goes on
    assert len(ctx.reap(max_nr=3)) == 3
    again[0] = False
    assert requests(ctx.drain()) == [request]


def test_a_callback_of_a_bad_request_that_submits_for_ever(ctx: rawaio.IOContext) -> None:
    """Nothing of it ever gets as far as the kernel's ring."""
    left = [1000]  # long enough to tell

    def callback(completion: Completion) -> None:
        left[0] -= 1
        if left[0] > 0:
            ctx.submit(completion.request)

    ctx.submit(_write(1 << 20, callback))
    for look in (ctx.reap, ctx.process_completions):
        assert 1 <= len(look()) <= 100
        assert readable(ctx)
    left[0] = 1
    assert len(ctx.drain()) == 1


@pytest.mark.parametrize("callbacks", [False, True])
def test_what_an_interrupted_reap_keeps_for_the_next_one_is_still_under_way(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, null: int, callbacks: bool
) -> None:
    """It could be submitted again else, and its old completion be taken for the new one."""
    submitted = [_write(null), _write(null)]
    if callbacks:
        submitted[0].callback = submitted[1].callback = lambda _: None
    ctx.submit(*submitted)

    def interrupted(mark: Callable[..., object], *arguments: object) -> object:
        result = mark(*arguments)
        if submitted[0].state is rawaio.State.COMPLETED:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        for name in ("complete", "complete_one"):
            mark = getattr(reaping, name)
            patch.setattr(reaping, name, partial(interrupted, mark))
        with pytest.raises(KeyboardInterrupt):
            ctx.reap(min_nr=2)
    assert [request.state for request in submitted] == [rawaio.State.IN_FLIGHT] * 2
    with pytest.raises(rawaio.BusyError):
        ctx.submit(submitted[0])
    assert requests(ctx.reap(min_nr=2)) == submitted
    assert ctx.submit(*submitted) == 2
    assert requests(ctx.drain()) == submitted


# -- finalizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["collected", "unplug"])
@pytest.mark.parametrize("n", [2, 3])
def test_a_section_is_collected_while_a_batch_is_taken(
    ctx: rawaio.IOContext, null: int, monkeypatch: pytest.MonkeyPatch, n: int, how: str
) -> None:
    """In the same thread. What a program's own finalizer flushes moves the batch, when refused."""
    batch, refused = [_write(null) for _ in range(n)], Request.pwrite(1 << 20, b"x", 0)
    ctx.submit(*batch)
    ctx._queue.plug("collected")
    ctx.submit(refused)
    made: list[Completion] = []

    def make(values: tuple[Request, int, int]) -> Completion:
        getattr(ctx._queue, how)("collected")
        made.append(Completion(values))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(reaping, "Completion", make)
        reaped = ctx.reap(min_nr=n)
    assert made
    reaped += ctx.drain(timeout=LIMIT_S)
    assert sorted(map(id, requests(reaped))) == sorted(map(id, [*batch, refused]))
    assert (ctx.statistics().in_queue, ctx.statistics().in_flight) == (0, 0)
    ctx._queue._check()
    ctx.submit(*batch)
    assert requests(ctx.reap(min_nr=n)) == batch


def test_a_hook_that_hears_of_a_stranger_may_close_the_context(
    make: _Make, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the events is not read from the ring, which is gone then."""
    ctx = make()
    ctx.submit(_write(null), _write(null))
    told: list[object] = []

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        told.append(unraisable.exc_value)
        ctx.close()

    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", hook)
        patch.setattr(ctx._queue, "_next_token", 0)  # nobody has ever had these tokens
        ctx._queue.in_flight_table.clear()
        with suppress(rawaio.ClosedError):
            ctx.reap()
    assert told
    assert ctx.closed

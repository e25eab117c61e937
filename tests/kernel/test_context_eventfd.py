"""IOContext: its eventfd, and events that nobody asked for, or that are read twice."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import sys
from collections.abc import Callable

import pytest

import rawaio
from rawaio import Completion, RawAIOError, Request, syscalls
from rawaio.request import SERIES
from tests.context_support import (
    LIMIT_S,
    Pipe,
    Threads,
    new_context,
    readable,
    requests,
    results,
    sleeper,
    unraisable,
    wait_readable,
)

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]


def _write(fd: int) -> Request:
    return Request.pwrite(fd, b"x", 0)


# -- what it is ------------------------------------------------------------------------------------


def test_it_is_close_on_exec_and_non_blocking(ctx: rawaio.IOContext) -> None:
    fd = ctx.fileno()
    assert not os.get_inheritable(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    assert "eventfd" in os.readlink(f"/proc/self/fd/{fd}")
    assert ctx.fileno() == fd


def test_each_completion_counts(ctx: rawaio.IOContext, null: int) -> None:
    assert not readable(ctx)
    ctx.submit(_write(null), _write(null), _write(null))
    assert readable(ctx)
    assert os.eventfd_read(ctx.fileno()) == 3
    assert not readable(ctx)
    assert len(ctx.reap(min_nr=3)) == 3


def test_process_completions_resets_it(ctx: rawaio.IOContext, null: int) -> None:
    ctx.submit(_write(null))
    wait_readable(ctx)
    assert len(ctx.process_completions()) == 1
    assert not readable(ctx)
    assert ctx.process_completions() == []


@pytest.mark.parametrize("way", ["select", "poll", "epoll"])
def test_a_loop_is_woken(ctx: rawaio.IOContext, pipe: Pipe, threads: Threads, way: str) -> None:
    poll = pipe.poll()
    ctx.submit(poll)
    threads.start(pipe.fire)
    if way == "select":
        assert select.select([ctx], [], [], LIMIT_S)[0] == [ctx]
    elif way == "poll":
        poller = select.poll()
        poller.register(ctx, select.POLLIN)
        assert poller.poll(LIMIT_S * 1000) == [(ctx.fileno(), select.POLLIN)]
    else:
        with select.epoll() as epoll:
            epoll.register(ctx, select.EPOLLIN)
            assert epoll.poll(LIMIT_S) == [(ctx.fileno(), select.EPOLLIN)]
    assert requests(ctx.process_completions()) == [poll]


def test_a_stale_count_only_makes_a_reap_look_once_more(
    ctx: rawaio.IOContext, null: int, pipe: Pipe
) -> None:
    ctx.submit(_write(null))
    ctx.reap(min_nr=1)
    assert ctx.process_completions() == []
    os.eventfd_write(ctx.fileno(), 7)
    ctx.submit(pipe.poll())
    sleeper(ctx, lambda: None if readable(ctx) else pipe.fire())
    assert len(ctx.reap(min_nr=1)) == 1
    assert ctx.statistics().waits <= 2


@pytest.mark.parametrize("look", ["reap", "wait", "process_completions", "drain", "close"])
def test_a_count_that_somebody_else_took_hides_nothing(
    ctx: rawaio.IOContext, null: int, look: str
) -> None:
    seen: list[Completion] = []
    for _ in range(3):
        submitted = [_write(null) for _ in range(3)]
        for request in submitted:
            request.callback = seen.append
        ctx.submit(*submitted)
        assert os.eventfd_read(ctx.fileno()) == 3
        seen.clear()
        if look == "close":
            ctx.close()
            assert requests(seen) == submitted
            break
        reaped = ctx.reap(min_nr=3) if look == "wait" else getattr(ctx, look)()
        assert requests(reaped) == requests(seen) == submitted


def test_who_waits_does_not_sleep_when_somebody_else_took_a_part_of_the_count(
    ctx: rawaio.IOContext, null: int
) -> None:
    submitted = [_write(null) for _ in range(5)]
    ctx.submit(*submitted[:2])
    assert os.eventfd_read(ctx.fileno()) == 2
    ctx.submit(*submitted[2:])
    assert requests(ctx.reap(min_nr=5, timeout=0.01)) == submitted
    assert ctx.statistics().waits == 0


def test_a_part_of_the_count_that_somebody_else_took_hides_nothing(
    ctx: rawaio.IOContext, null: int
) -> None:
    """Also not later, when what is counted again is less than what is there."""
    for taken in range(4):
        submitted = [_write(null) for _ in range(5)]
        ctx.submit(*submitted[:taken])
        if taken:
            os.eventfd_read(ctx.fileno())
        ctx.submit(*submitted[taken:])
        assert requests(ctx.process_completions()) == submitted


def test_a_count_that_somebody_else_took_is_never_made_up_for(null: int) -> None:
    """What is counted later may be what is known already, and vouches for nothing new."""
    with new_context("counted") as ctx:
        if not ctx._counted:
            pytest.skip(f"the ring cannot be read: {ctx.why_not_ring}")
        ctx.submit(_write(null))
        assert os.eventfd_read(ctx.fileno()) == 1
        assert results(ctx.process_completions()) == [1]
        for _ in range(2):
            ctx.submit(_write(null))
            assert results(ctx.process_completions()) == [1]
        assert (ctx.statistics().ring_reaps, ctx.statistics().syscall_reaps) == (0, 3)


def test_what_io_getevents_has_brought_comes_before_what_is_in_the_ring(
    monkeypatch: pytest.MonkeyPatch, null: int
) -> None:
    """Although an exception from outside kept it from being taken over."""
    with new_context("counted") as ctx:
        if not ctx._counted:
            pytest.skip(f"the ring cannot be read: {ctx.why_not_ring}")
        brought, later = [_write(null) for _ in range(3)], _write(null)
        ctx.submit(*brought)
        assert os.eventfd_read(ctx.fileno()) == 3

        def interrupted(self: object, n: int) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(type(ctx._by_syscall), "_span", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ctx.reap()
        ctx.submit(later)
        assert requests(ctx.reap(min_nr=4, timeout=LIMIT_S)) == [*brought, later]


def test_a_nudge_vouches_for_no_event(pipe: Pipe, null: int) -> None:
    """Where the ring is believed as far as the eventfd has counted."""
    with new_context("counted") as ctx:
        if not ctx._counted:
            pytest.skip(f"the ring cannot be read: {ctx.why_not_ring}")
        poll = pipe.poll()
        with ctx.plugged():
            ctx.submit(poll)
            ctx.cancel(poll)  # nudges
        assert results(ctx.process_completions()) == [-errno.ECANCELED]
        ctx.submit(_write(null))
        assert os.eventfd_read(ctx.fileno()) == 1
        assert results(ctx.process_completions()) == [1]
        assert (ctx.statistics().ring_reaps, ctx.statistics().syscall_reaps) == (0, 1)
        ctx.submit(_write(null))
        assert results(ctx.process_completions()) == [1]


def test_the_count_may_be_as_high_as_it_goes(ctx: rawaio.IOContext, null: int, pipe: Pipe) -> None:
    os.eventfd_write(ctx.fileno(), 2**64 - 2)
    poll = pipe.poll()
    with ctx.plugged():
        ctx.submit(poll)
        assert ctx.cancel(poll)
    assert results(ctx.process_completions()) == [-errno.ECANCELED]
    assert not readable(ctx)


# -- completions that the kernel does not signal -----------------------------------------------


@pytest.mark.parametrize("outlet", ["submit", "plugged"])
def test_what_the_kernel_refuses_makes_it_readable(ctx: rawaio.IOContext, outlet: str) -> None:
    request = _write(1 << 20)
    if outlet == "submit":
        ctx.submit(request)
    else:
        with ctx.plugged():
            ctx.submit(request)
    assert readable(ctx)
    assert results(ctx.process_completions()) == [-errno.EBADF]


def test_what_is_refused_when_there_is_room_at_last(make: _Make, pipe: Pipe) -> None:
    """Submitted by process_completions, which gives it or says that there is more."""
    ctx = make(nr_events=1)
    poll, bad = pipe.poll(), _write(1 << 20)
    ctx.submit(poll, bad)
    pipe.fire()
    wait_readable(ctx)
    reaped = ctx.process_completions()
    if len(reaped) < 2:
        wait_readable(ctx)
        reaped += ctx.process_completions()
    assert requests(reaped) == [poll, bad]


def test_what_the_kernel_refuses_wakes_who_waits(
    ctx: rawaio.IOContext, pipe: Pipe, threads: Threads
) -> None:
    ctx.submit(pipe.poll())
    asleep = sleeper(ctx)
    seen: list[Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=1)))
    assert asleep.wait(LIMIT_S)
    ctx.submit(_write(1 << 20))
    try:
        threads.join()
    finally:
        pipe.fire()
    assert results(seen) == [-errno.EBADF]


def test_a_cancelled_pending_request_makes_it_readable(ctx: rawaio.IOContext, null: int) -> None:
    request = _write(null)
    with ctx.plugged():
        ctx.submit(request)
        assert not readable(ctx)
        assert ctx.cancel(request)
        assert readable(ctx)
        assert results(ctx.process_completions()) == [-errno.ECANCELED]
        assert not readable(ctx)


def test_what_max_nr_leaves_makes_it_readable(ctx: rawaio.IOContext, pipes: _Pipes) -> None:
    """A reap that slept has reset it, and there is more."""
    two = pipes(2)
    polls = [pipe.poll() for pipe in two]
    ctx.submit(*polls)

    def fire() -> None:
        for pipe in two:
            pipe.fire()

    sleeper(ctx, fire)
    assert requests(ctx.reap(min_nr=1, max_nr=1)) == polls[:1]
    assert ctx.statistics().waits == 1
    assert readable(ctx)
    assert requests(ctx.process_completions()) == polls[1:]


def test_what_max_nr_leaves_of_what_came_between_look_and_wait(
    ctx: rawaio.IOContext, pipes: _Pipes
) -> None:
    two = pipes(2)
    polls = [pipe.poll() for pipe in two]
    ctx.submit(*polls)
    wait = ctx._wait

    def come(timeout: float | None, *, collecting: bool = False) -> None:
        for pipe in two:
            pipe.fire()
        wait(timeout, collecting=collecting)

    ctx._wait = come  # type: ignore[method-assign]
    assert requests(ctx.reap(min_nr=1, max_nr=1)) == polls[:1]
    assert readable(ctx)
    assert requests(ctx.process_completions()) == polls[1:]


def test_what_another_thread_collects_between_look_and_wait(
    ctx: rawaio.IOContext, pipes: _Pipes
) -> None:
    """It has found no waiter to tell of it, and the eventfd says nothing any more."""
    pipe, silent = pipes(2)
    poll = pipe.poll()
    ctx.submit(poll, silent.poll())
    wait = ctx._wait

    def come(timeout: float | None, *, collecting: bool = False) -> None:
        pipe.fire()
        wait_readable(ctx)
        ctx._fetch(ctx._done, None)  # as a submit that needs room does
        ctx._kernel.reset()
        wait(timeout, collecting=collecting)

    ctx._wait = come  # type: ignore[method-assign]
    assert requests(ctx.reap(min_nr=1, timeout=LIMIT_S)) == [poll]
    assert ctx.statistics().waits == 0


def test_a_timeout_ends_the_wait_for_what_does_not_come(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    poll = pipe.poll()
    ctx.submit(poll)
    for _ in range(3):
        assert ctx.reap(min_nr=1, timeout=0.001) == []
    pipe.fire()
    assert requests(ctx.reap(min_nr=1)) == [poll]


def test_what_is_reaped_may_be_under_way_again_before_the_reap_is_over(
    ctx: rawaio.IOContext, pipe: Pipe
) -> None:
    """Another thread may know that it has completed; it is not marked a second time."""
    readable, writable = os.pipe()
    os.write(writable, b"x")
    first, second = rawaio.Request.poll(readable, select.POLLIN), pipe.poll()
    sleep = ctx._sleep

    def asleep(timeout: float | None) -> None:
        ctx._sleep = sleep  # type: ignore[method-assign]
        os.read(readable, 1)
        ctx.submit(first)
        pipe.fire()
        sleep(timeout)

    try:
        ctx.submit(first, second)
        ctx._sleep = asleep  # type: ignore[method-assign]
        assert requests(ctx.reap(min_nr=2)) == [first, second]
        assert first.state is rawaio.State.IN_FLIGHT
        os.write(writable, b"x")
        assert requests(ctx.reap(min_nr=1)) == [first]
    finally:
        ctx.drain()
        os.close(readable)
        os.close(writable)


def test_nobody_waits_for_what_another_has_taken_between_look_and_wait(
    ctx: rawaio.IOContext, pipe: Pipe
) -> None:
    """It was the last, and so nothing would end the wait."""
    poll = pipe.poll()
    ctx.submit(poll)
    wait = ctx._wait
    taken: list[Completion] = []

    def come(timeout: float | None, *, collecting: bool = False) -> None:
        pipe.fire()
        wait_readable(ctx)
        taken.extend(ctx.process_completions())
        wait(timeout, collecting=collecting)

    ctx._wait = come  # type: ignore[method-assign]
    assert ctx.reap(min_nr=1, timeout=LIMIT_S) == []
    assert requests(taken) == [poll]
    assert ctx.statistics().waits == 0


# -- events that nobody asked for ------------------------------------------------------------------


class Stranger:
    """Submits to a context's kernel context by the raw call, with a token of its own."""

    def __init__(self, ctx: rawaio.IOContext, fd: int) -> None:
        self.ctx = ctx
        self.byte = ctypes.c_char(b"x")
        self.iocb = syscalls.iocb()
        self.iocb.aio_lio_opcode = syscalls.Opcode.PWRITE
        self.iocb.aio_fildes = fd
        self.iocb.aio_buf = ctypes.addressof(self.byte)
        self.iocb.aio_nbytes = 1
        self.iocb.aio_flags = syscalls.IOCB_FLAG_RESFD
        self.iocb.aio_resfd = ctx.fileno()

    def submit(self, token: int) -> None:
        self.iocb.aio_data = token
        pointer = ctypes.c_void_p(ctypes.addressof(self.iocb))
        assert syscalls.io_submit(self.ctx._kernel.ctx_id, 1, ctypes.addressof(pointer)) == 1


@pytest.mark.parametrize("token", [0, 1 << 40, (1 << 64) - 1, (1 << 63)])
def test_an_unknown_token_is_reported_and_costs_nobody_anything(
    ctx: rawaio.IOContext, null: int, token: int
) -> None:
    before, after = [_write(null) for _ in range(3)], [_write(null) for _ in range(3)]
    ctx.submit(*before)
    Stranger(ctx, null).submit(token)
    ctx.submit(*after)
    with unraisable() as raised:
        assert requests(ctx.reap(min_nr=6)) == before + after
    signed = token - ((token >> 63) << 64)
    assert [(type(error), str(error)) for error, _ in raised] == [
        (RawAIOError, f"an event with unknown token {signed}, res 1")
    ]
    assert "<rawaio.IOContext" in raised[0][1]
    assert (ctx.statistics().submitted, ctx.statistics().completed) == (6, 6)
    ctx._queue._check()


def test_only_strangers(ctx: rawaio.IOContext, null: int) -> None:
    stranger = Stranger(ctx, null)
    for token in range(1000, 1005):
        stranger.submit(token)
    with unraisable() as raised:
        assert ctx.process_completions() == []
        assert len(raised) == 5
        assert ctx.process_completions() == []
        assert len(raised) == 5


def test_a_stranger_with_an_old_token_is_not_given_back_again(
    ctx: rawaio.IOContext, null: int
) -> None:
    first, second = _write(null), _write(null)
    ctx.submit(first)
    assert requests(ctx.reap(min_nr=1)) == [first]
    Stranger(ctx, null).submit(SERIES)
    ctx.submit(second)
    with unraisable() as raised:
        assert requests(ctx.reap(min_nr=1)) == [second]
    assert raised == []


def test_max_nr_is_kept_although_some_are_strangers(ctx: rawaio.IOContext, null: int) -> None:
    stranger = Stranger(ctx, null)
    submitted = [_write(null) for _ in range(6)]
    for request in submitted:
        stranger.submit(5000)
        ctx.submit(request)
    reaped: list[Completion] = []
    with unraisable() as raised:
        while len(reaped) < 6:
            some = ctx.reap(min_nr=1, max_nr=2)
            assert 1 <= len(some) <= 2
            reaped += some
    assert requests(reaped) == submitted
    assert len(raised) == 6


def test_a_hook_that_looks_at_the_context(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, null: int
) -> None:
    """It is called in the middle of a reap."""
    seen: list[object] = []

    def hook(what: sys.UnraisableHookArgs) -> None:
        seen.append(ctx.reap())
        seen.append(ctx.statistics().submitted)

    monkeypatch.setattr(sys, "unraisablehook", hook)
    submitted = [_write(null), _write(null)]
    ctx.submit(submitted[0])
    Stranger(ctx, null).submit(5000)
    ctx.submit(submitted[1])
    reaped = ctx.reap(min_nr=2)
    inner = seen[0]
    assert isinstance(inner, list)
    assert requests([*inner, *reaped]) == submitted
    assert seen[1] == 2


@pytest.mark.parametrize("cancels", [False, True])
def test_events_that_are_read_twice(
    monkeypatch: pytest.MonkeyPatch,
    ctx: rawaio.IOContext,
    null: int,
    pipe: Pipe,
    cancels: bool,
) -> None:
    """What is interrupted between taking over a batch and giving it back to the kernel."""
    submitted = [_write(null), pipe.poll(), _write(null)]
    ctx.submit(*submitted)
    if cancels:
        assert ctx.cancel(submitted[1])
    else:
        pipe.fire()
    count = 0
    while count < 3:  # until all are there; the kernel's poll may take a while
        wait_readable(ctx)
        count += os.eventfd_read(ctx.fileno())
    os.eventfd_write(ctx.fileno(), count)
    source = type(ctx._ring if ctx._use_ring else ctx._by_syscall)
    real = source.commit_run
    left = [1]

    def commit_run(self: object) -> None:
        if left[0]:
            left[0] -= 1
            raise KeyboardInterrupt
        real(self)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(source, "commit_run", commit_run)
    with pytest.raises(KeyboardInterrupt):
        ctx.reap()
    assert ctx.statistics().in_flight == 0
    later = _write(null)
    ctx.submit(later)
    reaped = ctx.reap(min_nr=4)
    assert sorted(map(id, requests(reaped))) == sorted(map(id, [*submitted, later]))
    assert reaped[-1].request is later
    polled = next(c for c in reaped if c.request is submitted[1])
    if cancels:
        assert polled.res == -errno.ECANCELED
    else:
        assert polled.result() == select.POLLIN
    assert ctx._cancelled == set()
    ctx._queue._check()

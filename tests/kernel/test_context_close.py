"""IOContext closed while other threads use it. The limits only end what hangs."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest

import rawaio
from rawaio import Completion, Request
from tests.context_support import (
    LIMIT_S,
    Pipe,
    Threads,
    new_context,
    requests,
    results,
    sleeper,
    together,
    wait_readable,
)

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]
_NR_THREADS = 4


def _write(fd: int) -> Request:
    return Request.pwrite(fd, b"x", 0)


@pytest.mark.parametrize("min_nr", [1, 2, 1000])
def test_close_while_others_wait(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads, min_nr: int
) -> None:
    polls = [pipe.poll() for pipe in pipes(2)]
    called: list[Completion] = []
    for poll in polls:
        poll.callback = called.append
    ctx.submit(*polls)
    asleep = sleeper(ctx)
    reaped: list[Completion] = []

    def wait() -> None:
        try:
            reaped.extend(ctx.reap(min_nr=min_nr))
        except rawaio.ClosedError:
            pass

    for _ in range(3):
        threads.start(wait)
    assert asleep.wait(LIMIT_S)
    fd = ctx.fileno()
    ctx.close()
    threads.join()
    assert Counter(requests(called)) == Counter(polls)
    assert set(results(called)) == {-errno.ECANCELED}
    assert len(reaped) <= 2
    assert not ctx._waiters
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


class Gates:
    """Other threads are held up just before they sleep in ctx, and let go one by one."""

    def __init__(self, ctx: rawaio.IOContext) -> None:
        self.held: list[threading.Event] = []
        self.arrived = threading.Semaphore(0)
        self.owner = threading.current_thread()
        sleeper(ctx, self._hold)

    def _hold(self) -> None:
        if threading.current_thread() is self.owner:
            return
        gate = threading.Event()
        self.held.append(gate)
        self.arrived.release()
        gate.wait(LIMIT_S)

    def wait_for(self, n: int) -> None:
        for _ in range(n):
            assert self.arrived.acquire(timeout=LIMIT_S)


@pytest.mark.parametrize("waits", ["reap", "submit", "one of each"])
def test_all_who_are_about_to_sleep_are_woken_by_close(
    make: _Make, pipes: _Pipes, threads: Threads, waits: str
) -> None:
    """Also the last one, when those before it have seen the eventfd and gone."""
    ctx = make(nr_events=1, max_pending=1)
    fd = ctx.fileno()
    polls = [pipe.poll() for pipe in pipes(5)]
    ctx.submit(polls[0])
    ctx.submit(polls[1])
    gates = Gates(ctx)

    def reap() -> None:
        with suppress(rawaio.ClosedError):
            ctx.reap(min_nr=1)

    def submit(poll: Request) -> None:
        with suppress(rawaio.ClosedError):
            ctx.submit(poll)

    sleepers: list[threading.Thread] = []
    for i in range(3):
        if waits == "reap" or (waits == "one of each" and i == 1):
            sleepers.append(threads.start(reap))
        else:
            sleepers.append(threads.start(submit, polls[2 + i]))
        gates.wait_for(1)
    drain = ctx._reap

    def drained(min_nr: int, max_nr: int | None, timeout: float | None) -> list[Completion]:
        reaped = drain(min_nr, max_nr, timeout)
        ctx._kernel.reset()  # as somebody does who was woken by this, and is gone
        return reaped

    ctx._reap = drained  # type: ignore[method-assign]
    ctx.close()
    for gate, thread in zip(gates.held, sleepers, strict=True):
        # Not closed yet, or the number may be that of a file that nobody writes to.
        assert "eventfd" in os.readlink(f"/proc/self/fd/{fd}")
        gate.set()
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert not ctx._waiters
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_who_waits_when_it_is_closed_returns_what_it_has(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads
) -> None:
    first, second = pipes(2)
    polls = [first.poll(), second.poll()]
    ctx.submit(*polls)
    first.fire()
    wait_readable(ctx)
    gates = Gates(ctx)
    seen: list[Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=2)))
    gates.wait_for(1)
    ctx.close()
    gates.held[0].set()
    threads.join()
    assert requests(seen) == polls[:1]


def test_close_from_several_threads(ctx: rawaio.IOContext, null: int, threads: Threads) -> None:
    called: list[Completion] = []
    for _ in range(3):
        request = _write(null)
        request.callback = called.append
        ctx.submit(request)
    together(threads, *[ctx.close] * _NR_THREADS)
    assert ctx.closed
    assert len(called) == 3


def test_close_while_others_submit_and_reap(kind: str, null: int, threads: Threads) -> None:
    for _ in range(5):
        ctx = new_context(kind, nr_events=4)
        called: list[Completion] = []
        taken: list[Request] = []
        begun = threading.Barrier(3, timeout=LIMIT_S)

        def work(
            ctx: rawaio.IOContext = ctx,
            called: list[Completion] = called,
            taken: list[Request] = taken,
            begun: threading.Barrier = begun,
        ) -> None:
            begun.wait()
            try:
                while True:
                    request = _write(null)
                    request.callback = called.append
                    ctx.submit(request)
                    taken.append(request)
                    ctx.reap(min_nr=1)
            except rawaio.ClosedError:
                pass

        threads.start(work)
        threads.start(work)
        begun.wait()
        ctx.close()
        threads.join()
        assert Counter(requests(called)) == Counter(taken)


def test_close_while_others_look(kind: str, null: int, threads: Threads) -> None:
    """Whoever looks into the ring at that moment finds it there, or is told."""
    for _ in range(20):
        ctx = new_context(kind, nr_events=4)
        begun = threading.Barrier(3, timeout=LIMIT_S)

        def look(ctx: rawaio.IOContext = ctx, begun: threading.Barrier = begun) -> None:
            begun.wait()
            try:
                while True:
                    ctx.reap()
            except rawaio.ClosedError:
                pass

        threads.start(look)
        threads.start(look)
        begun.wait()
        ctx.close()
        threads.join()


def test_nothing_looks_at_the_ring_any_more_when_it_is_unmapped(ctx: rawaio.IOContext) -> None:
    kernel = type(ctx._kernel)
    destroy = kernel.destroy
    destroyed: list[int] = []

    def observed(self: Any) -> None:
        for source in (ctx._ring, ctx._by_syscall):
            with pytest.raises(rawaio.ClosedError):
                source.peek()
        destroyed.append(ctx._kernel.ctx_id)
        destroy(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "destroy", observed)
        ctx.close()
    assert len(destroyed) == 1


def test_close_cancels_a_poll_that_is_on_its_way_to_the_kernel(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads
) -> None:
    """Behind a read that blocks in io_submit; there it cannot be cancelled yet."""
    feed, silent = pipes(2)
    inside, closing = threading.Event(), threading.Event()
    submit, cancel_polls = ctx._queue._submit, ctx._cancel_polls

    def observed(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        inside.set()
        submit(first_token, batch, outcome)

    def begun() -> None:
        closing.set()
        cancel_polls()

    ctx._queue._submit = observed
    ctx._cancel_polls = begun  # type: ignore[method-assign]
    seen: list[Completion] = []
    read = Request.pread(feed.readable, bytearray(1), 0)
    threads.start(ctx.submit, read, silent.poll(seen.append))
    assert inside.wait(LIMIT_S)
    threads.start(ctx.close)
    assert closing.wait(LIMIT_S)
    feed.fire()
    threads.join()
    assert results(seen) == [-errno.ECANCELED]


class SlowWords:
    """The ring's header, as seen by a thread that is held up inside its first access."""

    def __init__(self, ctx: rawaio.IOContext, words: Any) -> None:
        self.ctx, self.words = ctx, words
        self.inside, self.destroyed = threading.Event(), threading.Event()
        self.too_late = False

    def __getitem__(self, i: int) -> Any:
        if not self.inside.is_set():
            self.inside.set()
            self.destroyed.wait(0.2)  # whoever destroys it may have to wait for this access
            self.too_late = self.destroyed.is_set()
        return 0 if self.too_late else self.words[i]

    def __setitem__(self, i: int, value: int) -> None:
        self.words[i] = value


@pytest.mark.skipif(
    getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="with a GIL no thread is held up between fetching the view and reading from it",
)
def test_the_ring_is_not_unmapped_under_a_thread_that_looks_into_it(
    ctx: rawaio.IOContext, threads: Threads
) -> None:
    if ctx.statistics().mechanism != "ring":
        pytest.skip("the ring is not looked into")
    words = SlowWords(ctx, ctx._ring._words)
    ctx._ring._words = words  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    kernel = type(ctx._kernel)
    destroy = kernel.destroy

    def observed(self: Any) -> None:
        destroy(self)
        words.destroyed.set()

    def look() -> None:
        with suppress(rawaio.ClosedError):
            ctx.reap()

    threads.start(look)
    assert words.inside.wait(LIMIT_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "destroy", observed)
        ctx.close()
    threads.join()
    assert not words.too_late


def test_the_eventfd_is_closed_once(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, threads: Threads
) -> None:
    """By close, or by the last that waits, and not by both: its number may be another's then."""
    fd = ctx.fileno()
    closes: list[int] = []
    real = os.close

    def close(number: int) -> None:
        if number == fd:
            closes.append(number)
            if len(closes) == 1:
                # A thread that was about to wait, and now sees that it is too late.
                threads.start(ctx._wait, None)
                threads._threads[-1].join(0.2)  # it may be made to wait until fd is closed
        real(number)

    monkeypatch.setattr(os, "close", close)
    ctx.close()
    threads.join()
    assert closes == [fd]


def test_a_close_behind_the_check_of_fileno(
    ctx: rawaio.IOContext, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ctx._check

    def check_and_be_held_up() -> None:
        check()
        threads.start(ctx.close)
        threads.join()

    monkeypatch.setattr(ctx, "_check", check_and_be_held_up)
    with pytest.raises(rawaio.ClosedError):
        ctx.fileno()

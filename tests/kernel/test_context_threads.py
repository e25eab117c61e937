"""IOContext used from several threads. The limits only end what hangs; nothing is timed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

import rawaio
from rawaio import Completion, Request
from rawaio.queue import SubmissionQueue
from tests.context_support import (
    LIMIT_S,
    Pipe,
    Threads,
    requests,
    results,
    sleeper,
    together,
)
from tests.queue_support import interleave

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]
_NR_THREADS = 4


def _write(fd: int) -> Request:
    return Request.pwrite(fd, b"x", 0)


def _everything_is_given_back(
    ctx: rawaio.IOContext, submitted: list[Request], reaped: list[Completion]
) -> None:
    assert Counter(requests(reaped)) == Counter(submitted)
    statistics = ctx.statistics()
    assert statistics.submitted == statistics.completed == len(submitted)
    assert (statistics.in_queue, statistics.in_flight) == (0, 0)
    assert not ctx._waiters
    assert not ctx._depth
    ctx._queue._check()


# -- hammering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nr_events", [2, 128])
def test_each_submits_and_reaps(make: _Make, null: int, threads: Threads, nr_events: int) -> None:
    ctx = make(nr_events=nr_events)
    submitted: list[Request] = []
    reaped: list[Completion] = []

    def work() -> None:
        for i in range(60):
            mine = [_write(null) for _ in range(1 + i % 5)]
            ctx.submit(*mine)
            submitted.extend(mine)
            reaped.extend(ctx.reap(min_nr=i % 3))

    together(threads, *[work] * _NR_THREADS)
    reaped += ctx.drain()
    _everything_is_given_back(ctx, submitted, reaped)


def test_each_takes_one_at_a_time(make: _Make, null: int, threads: Threads) -> None:
    ctx = make(nr_events=8)
    submitted: list[Request] = []
    reaped: list[Completion] = []

    def work() -> None:
        mine = [_write(null) for _ in range(100)]
        submitted.extend(mine)
        for request in mine:
            ctx.submit(request)
            reaped.extend(ctx.reap(min_nr=1, max_nr=1))

    together(threads, *[work] * _NR_THREADS)
    reaped += ctx.drain()
    _everything_is_given_back(ctx, submitted, reaped)


def test_polls_callbacks_plugs_and_cancels(
    make: _Make, null: int, pipes: _Pipes, threads: Threads
) -> None:
    """Everything at once; what each thread has submitted is called back exactly once."""
    ctx = make(nr_events=16, max_batch=4)
    submitted: list[Request] = []
    called: list[Completion] = []
    reaped: list[Completion] = []

    def work(pipe: Pipe) -> None:
        for i in range(30):
            poll, write = pipe.poll(called.append), _write(null)
            write.callback = called.append
            submitted.extend((poll, write, bad := _write(1 << 20)))
            with ctx.plugged():
                ctx.submit(poll)
                ctx.submit(write, bad)
            if i % 2:
                ctx.cancel(poll)
            pipe.fire()
            reaped.extend(ctx.reap(min_nr=2))
            while poll.state is not rawaio.State.COMPLETED:
                reaped.extend(ctx.reap(min_nr=1))
            pipe.quench()

    together(threads, *[lambda pipe=pipe: work(pipe) for pipe in pipes(_NR_THREADS)])
    reaped += ctx.drain()
    _everything_is_given_back(ctx, submitted, reaped)
    assert Counter(requests(called)) == Counter(r for r in submitted if r.callback)


def test_callbacks_that_submit_and_reap(make: _Make, null: int, threads: Threads) -> None:
    ctx = make(nr_events=8)
    lock = threading.Lock()
    left = [400]
    seen: list[Completion] = []
    nr_called = [0]

    def callback(completion: Completion) -> None:
        with lock:
            nr_called[0] += 1
            left[0] -= 1
            again = left[0] > 0
        if again:
            ctx.submit(completion.request)
        seen.extend(ctx.reap())

    def work() -> None:
        request = _write(null)
        request.callback = callback
        ctx.submit(request)
        while left[0] > 0:
            seen.extend(ctx.reap(min_nr=1))

    together(threads, *[work] * _NR_THREADS)
    seen.extend(ctx.drain())
    assert len(seen) == nr_called[0] == ctx.statistics().submitted
    assert not ctx._depth
    ctx._queue._check()


def test_one_loop_and_many_that_submit(make: _Make, null: int, threads: Threads) -> None:
    ctx = make(nr_events=4, max_pending=8)
    n = 150
    submitted = [[_write(null) for _ in range(n)] for _ in range(_NR_THREADS)]
    reaped: list[Completion] = []

    def submit(mine: list[Request]) -> None:
        for request in mine:
            ctx.submit(request)

    def loop() -> None:
        while len(reaped) < n * _NR_THREADS:
            reaped.extend(ctx.reap(min_nr=1, timeout=0.05))

    together(threads, loop, *[lambda mine=mine: submit(mine) for mine in submitted])
    _everything_is_given_back(ctx, [r for mine in submitted for r in mine], reaped)
    for mine in submitted:  # first in, first out, for each thread
        own = set(mine)
        assert [r for r in requests(reaped) if r in own] == mine


# -- waiting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_nr", [1, 3, 1000])
def test_those_that_wait_end_when_others_take_what_they_wait_for(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads, min_nr: int
) -> None:
    some = pipes(6)
    polls = [pipe.poll() for pipe in some]
    ctx.submit(*polls)
    reaped: list[Completion] = []

    def fire() -> None:
        for pipe in some:
            pipe.fire()

    def wait() -> None:
        reaped.extend(ctx.reap(min_nr=min_nr))

    def loop() -> None:
        while ctx.statistics().in_flight:
            reaped.extend(ctx.process_completions())

    together(threads, wait, wait, wait, fire, loop)
    reaped += ctx.drain()
    _everything_is_given_back(ctx, polls, reaped)


def test_each_that_waits_for_one_gets_one(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads
) -> None:
    """All sleep when the first completes; whoever is woken leaves the rest to the others."""
    for _ in range(20):
        some = pipes(_NR_THREADS)
        polls = [pipe.poll() for pipe in some]
        ctx.submit(*polls)
        reaped: list[Completion] = []
        for _ in polls:
            threads.start(lambda to=reaped: to.extend(ctx.reap(min_nr=1, max_nr=1)))
        for pipe in some:
            pipe.fire()
        threads.join()
        assert set(requests(reaped)) == set(polls)
        assert len(reaped) == len(polls)


def test_what_max_nr_leaves_wakes_who_is_about_to_sleep(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads
) -> None:
    """The one that slept has reset the eventfd; the other one has looked before."""
    *two, silent = pipes(3)
    polls = [pipe.poll() for pipe in (*two, silent)]
    ctx.submit(*polls)
    go_on = threading.Event()
    asleep = sleeper(ctx, lambda: go_on.wait(LIMIT_S))
    seen: list[Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=1)))
    assert asleep.wait(LIMIT_S)
    del ctx._sleep  # the class's own from now on
    for pipe in two:
        pipe.fire()
    ctx._kernel.reset()
    taken = ctx.reap(min_nr=1, max_nr=1)
    go_on.set()
    try:
        threads.join()
    finally:
        silent.fire()
    assert requests(taken) == polls[:1]
    assert requests(seen) == polls[1:2]


def test_those_that_wait_work_on_while_a_callback_blocks(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads
) -> None:
    """Completions that were fetched together are not one thread's own."""
    one, two, silent = pipes(3)
    go_on, done = threading.Event(), threading.Event()
    seen: list[Completion] = []

    def block(_: Completion) -> None:
        go_on.set()
        assert done.wait(LIMIT_S), "nobody runs the other callback"

    polls = [one.poll(block), two.poll(lambda _: done.set()), silent.poll()]
    ctx.submit(*polls)
    asleep = sleeper(ctx, lambda: go_on.wait(LIMIT_S))
    threads.start(lambda: seen.extend(ctx.reap(min_nr=1)))
    assert asleep.wait(LIMIT_S)
    one.fire()
    two.fire()
    reaped = ctx.process_completions()
    silent.fire()
    threads.join()
    assert {*requests(reaped), *requests(seen), *requests(ctx.drain())} == set(polls)


@pytest.mark.parametrize("look", ["process_completions", "reap"])
def test_an_interrupted_look_leaves_what_it_was_woken_for_to_the_others(
    monkeypatch: pytest.MonkeyPatch,
    ctx: rawaio.IOContext,
    pipes: _Pipes,
    threads: Threads,
    look: str,
) -> None:
    """KeyboardInterrupt in the thread that has reset the eventfd, before it has looked."""
    one, silent = pipes(2)
    polls = [one.poll(), silent.poll()]
    ctx.submit(*polls)
    go_on, fired = threading.Event(), threading.Event()

    def fire() -> None:
        one.fire()
        fired.set()

    def wait() -> None:
        if threading.current_thread() is threading.main_thread():
            fire()
        else:
            go_on.wait(LIMIT_S)

    asleep = sleeper(ctx, wait)
    seen: list[Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=1)))
    assert asleep.wait(LIMIT_S)
    kernel = type(ctx._kernel)
    reset = kernel.reset

    def interrupted(self: object) -> None:
        reset(self)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        if fired.is_set():
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "reset", interrupted)
    if look == "process_completions":
        fire()
    with pytest.raises(KeyboardInterrupt):
        getattr(ctx, look)(*[1] if look == "reap" else [])
    go_on.set()
    try:
        threads.join()
    finally:
        silent.fire()
    assert requests(seen) == polls[:1]


def test_a_submit_that_waits_for_room_ends_when_another_thread_makes_some(
    make: _Make, pipes: _Pipes, threads: Threads
) -> None:
    """Also when what was pending is silent in the kernel now."""
    ctx = make(nr_events=2, max_pending=1)
    four = pipes(4)
    polls = [pipe.poll() for pipe in four]
    ctx.submit(polls[0])
    ctx.submit(polls[1])
    ctx.submit(polls[2])
    go_on = threading.Event()
    asleep = sleeper(ctx, lambda: go_on.wait(LIMIT_S))
    threads.start(ctx.submit, polls[3])
    assert asleep.wait(LIMIT_S)
    four[0].fire()
    reaped: list[Completion] = []
    while not reaped:
        reaped += ctx.process_completions()
    assert ctx.statistics().in_queue == 0  # there is room
    go_on.set()
    try:
        threads.join()
    finally:
        for pipe in four[1:]:
            pipe.fire()
    reaped += ctx.drain()
    assert requests(reaped) == polls


def test_who_waits_gets_what_a_submit_collects_to_make_room(
    make: _Make, pipes: _Pipes, threads: Threads
) -> None:
    ctx = make(nr_events=2, max_pending=1)
    first, *silent = pipes(4)
    polls = [pipe.poll() for pipe in (first, *silent)]
    for poll in polls[:3]:
        ctx.submit(poll)
    go_on = threading.Event()
    asleep = sleeper(ctx, lambda: go_on.wait(LIMIT_S))
    seen: list[Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=1)))
    assert asleep.wait(LIMIT_S)
    first.fire()
    ctx._kernel.reset()
    ctx.submit(polls[3])
    go_on.set()
    try:
        threads.join()
    finally:
        for pipe in silent:
            pipe.fire()
    assert requests(seen) == polls[:1]


# -- blocked in io_submit --------------------------------------------------------------------------


class Blocked:
    """A thread inside io_submit: the read of an empty pipe blocks there until it is fed."""

    def __init__(self, ctx: rawaio.IOContext, pipe: Pipe, threads: Threads) -> None:
        self.pipe = pipe
        self.inside = threading.Event()
        self.outside = threading.Event()
        self.buffer = bytearray(1)
        self.request = Request.pread(pipe.readable, self.buffer, 0)
        self.others: list[Request] = []
        real = ctx._queue._submit
        request = self.request

        def observed(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
            if request in batch:
                self.inside.set()
                ctx._queue._submit = real
            real(first_token, batch, outcome)

        ctx._queue._submit = observed
        threads.start(self._run, ctx)
        assert self.inside.wait(LIMIT_S)

    def _run(self, ctx: rawaio.IOContext) -> None:
        ctx.submit(self.request)
        self.outside.set()

    def release(self) -> None:
        assert not self.outside.is_set()
        self.pipe.fire()
        assert self.outside.wait(LIMIT_S)


def test_others_push_and_reap_while_one_is_blocked_in_io_submit(
    ctx: rawaio.IOContext, null: int, pipes: _Pipes, threads: Threads
) -> None:
    feed, early = pipes(2)
    poll = early.poll()
    ctx.submit(poll)
    blocked = Blocked(ctx, feed, threads)
    early.fire()
    assert requests(ctx.reap(min_nr=1, timeout=LIMIT_S)) == [poll]
    writes = [_write(null) for _ in range(10)]
    assert ctx.submit(*writes[:5]) == 5
    for write in writes[5:]:
        ctx.submit(write)
    assert ctx.cancel(writes[7]) is True
    assert requests(ctx.reap(min_nr=1)) == [writes[7]]
    assert ctx.statistics().in_queue == 9
    assert ctx.reap() == ctx.process_completions() == []
    assert ctx.reap(min_nr=1, timeout=0) == []
    with ctx.plugged():
        pass
    assert ctx.cancel(blocked.request) is False
    blocked.release()
    threads.join()
    rest = [write for write in writes if write is not writes[7]]
    assert requests(ctx.reap(min_nr=10, timeout=LIMIT_S)) == [blocked.request, *rest]
    assert blocked.buffer == b"x"
    ctx._queue._check()


def test_who_waits_for_what_is_behind_the_blocked_one_gets_it(
    ctx: rawaio.IOContext, null: int, pipe: Pipe, threads: Threads
) -> None:
    blocked = Blocked(ctx, pipe, threads)
    write = _write(null)
    ctx.submit(write)
    asleep = sleeper(ctx)
    seen: list[Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=2)))
    assert asleep.wait(LIMIT_S)
    blocked.release()
    threads.join()
    assert requests(seen) == [blocked.request, write]


def test_close_waits_for_the_blocked_one(
    ctx: rawaio.IOContext, null: int, pipe: Pipe, threads: Threads
) -> None:
    blocked = Blocked(ctx, pipe, threads)
    seen: list[Completion] = []
    write = _write(null)
    write.callback = seen.append
    ctx.submit(write)
    threads.start(ctx.close)
    blocked.release()
    threads.join()
    assert ctx.closed
    assert requests(seen) == [write]
    assert blocked.buffer == b"x"


def test_several_blocked_one_after_the_other(
    ctx: rawaio.IOContext, pipes: _Pipes, threads: Threads
) -> None:
    """The turn of the first lasts until all that is pending is in the kernel."""
    feeds = pipes(3)
    buffers = [bytearray(1) for _ in feeds]
    reads = [Request.pread(p.readable, b, 0) for p, b in zip(feeds, buffers, strict=True)]
    threads.start(ctx.submit, *reads)
    seen: list[Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=0)))
    for feed in feeds:
        feed.fire()
    threads.join()
    seen += ctx.drain()
    assert sorted(results(seen)) == [1, 1, 1]
    assert buffers == [b"x"] * 3


# -- one request, two threads ----------------------------------------------------------------------


@pytest.mark.parametrize("together", [1, 3])
def test_of_two_that_submit_the_same_one_wins(
    ctx: rawaio.IOContext, null: int, threads: Threads, together: int
) -> None:
    mine = [_write(null) for _ in range(together)]
    for _ in range(50):
        won: list[int] = []
        barrier = threading.Barrier(2, timeout=LIMIT_S)

        def submit(won: list[int] = won, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                won.append(ctx.submit(*mine))
            except rawaio.BusyError:
                won.append(0)

        threads.start(submit)
        threads.start(submit)
        threads.join()
        assert sorted(won) == [0, together]
        assert requests(ctx.drain()) == mine
    assert ctx.statistics().submitted == 50 * together


def test_of_two_that_go_to_sleep_both_are_counted(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    ctx.submit(pipe.poll())
    before = [0]

    def build() -> tuple[SubmissionQueue, Callable[[], object], Callable[[], object]]:
        before[0] = ctx.statistics().waits
        return ctx._queue, ctx._has_to_sleep, ctx._has_to_sleep

    def check() -> None:
        assert ctx.statistics().waits == before[0] + 2

    assert interleave(build, check) > 1

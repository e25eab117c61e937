"""IOContext: what can be cancelled, and what becomes of it and of the rest."""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rawaio
from rawaio import Request
from tests.context_support import LIMIT_S, Pipe, Threads, readable, requests, results, sleeper

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]


def _write(fd: int) -> Request:
    return Request.pwrite(fd, b"x", 0)


def _canceled(reaped: list[rawaio.Completion]) -> list[Request]:
    assert set(results(reaped)) <= {-errno.ECANCELED}
    return requests(reaped)


@pytest.mark.parametrize("place", range(5))
def test_a_pending_request_completes_once_with_ecanceled(
    make: _Make, null: int, pipe: Pipe, place: int
) -> None:
    ctx = make()
    submitted = [pipe.poll(), *(_write(null) for _ in range(4))]
    with ctx.plugged():
        ctx.submit(*submitted)
        assert ctx.cancel(submitted[place])
        assert ctx.statistics().in_queue == 4
        assert ctx.statistics().completed == 1
        assert _canceled(ctx.reap()) == [submitted[place]]
        assert submitted[place].state is rawaio.State.COMPLETED
    pipe.fire()
    rest = [request for request in submitted if request is not submitted[place]]
    assert set(requests(ctx.drain())) == set(rest)
    ctx._queue._check()


def test_a_pending_request_behind_a_full_kernel(make: _Make, null: int, pipe: Pipe) -> None:
    ctx = make(nr_events=1)
    poll, first, second = pipe.poll(), _write(null), _write(null)
    ctx.submit(poll, first, second)
    assert ctx.cancel(first)
    assert readable(ctx)
    assert _canceled(ctx.reap(min_nr=1)) == [first]
    pipe.fire()
    assert requests(ctx.reap(min_nr=2)) == [poll, second]
    assert ctx.submit(first) == 1
    assert results(ctx.drain()) == [1]


def test_a_poll_in_flight_completes_once_with_ecanceled(
    ctx: rawaio.IOContext, pipes: _Pipes
) -> None:
    polls = [pipe.poll() for pipe in pipes(3)]
    ctx.submit(*polls)
    assert ctx.cancel(polls[1])
    assert _canceled(ctx.reap(min_nr=1)) == [polls[1]]
    assert ctx.reap() == []
    assert ctx.statistics().in_flight == 2
    assert ctx.cancel(polls[2])
    assert ctx.cancel(polls[0])
    assert _canceled(ctx.reap(min_nr=2)) == [polls[2], polls[0]]
    assert ctx._cancelled == set()


def test_a_cancelled_poll_is_used_again(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    poll = pipe.poll()
    for _ in range(3):
        ctx.submit(poll)
        assert ctx.cancel(poll)
        assert _canceled(ctx.reap(min_nr=1)) == [poll]
    ctx.submit(poll)
    pipe.fire()
    assert ctx.reap(min_nr=1)[0].result() == select.POLLIN


@pytest.mark.parametrize("rest", [False, True])
def test_among_others_only_the_cancelled_is_cancelled(
    ctx: rawaio.IOContext, null: int, pipes: _Pipes, rest: bool
) -> None:
    one, two = pipes(2)
    first, second = one.poll(), two.poll()
    submitted = [_write(null), first, second, _write(null)]
    ctx.submit(*submitted)
    assert ctx.cancel(first)
    if rest:
        two.fire()
    reaped = ctx.reap(min_nr=4 if rest else 3)
    expected = {submitted[0]: 1, first: -errno.ECANCELED, submitted[3]: 1}
    if rest:
        expected[second] = select.POLLIN
    found = {c.request: c.res if c.res < 0 else c.result() for c in reaped}
    assert found == expected


def test_what_comes_after_the_cancel_does_not_undo_it(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    poll = pipe.poll()
    ctx.submit(poll)
    assert ctx.cancel(poll)
    pipe.fire()
    assert _canceled(ctx.reap(min_nr=1)) == [poll]


def test_a_poll_that_has_fired_completes_normally(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    poll = pipe.poll()
    ctx.submit(poll)
    pipe.fire()
    select.select([ctx], [], [], LIMIT_S)
    assert ctx.cancel(poll) is False
    assert ctx._cancelled == set()
    assert ctx.reap(min_nr=1)[0].result() == select.POLLIN
    assert ctx.cancel(poll) is False


def test_a_read_completes_normally(ctx: rawaio.IOContext, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data" * 1024)
    buffer = bytearray(4096)
    with path.open("rb") as file:
        request = Request.pread(file, buffer, 0)
        ctx.submit(request)
        assert ctx.cancel(request) is False
        assert results(ctx.reap(min_nr=1)) == [4096]
    assert buffer == b"data" * 1024


def test_a_completion_that_nobody_has_reaped_is_not_cancelled(
    ctx: rawaio.IOContext, null: int
) -> None:
    request = _write(null)
    ctx.submit(request)
    assert ctx.cancel(request) is False
    assert results(ctx.reap(min_nr=1)) == [1]


def test_what_is_not_under_way_here(make: _Make, null: int, pipe: Pipe) -> None:
    ctx, other = make(), make()
    poll, write = pipe.poll(), _write(null)
    assert ctx.cancel(poll) is ctx.cancel(write) is False
    ctx.submit(poll)
    with ctx.plugged():
        ctx.submit(write)
        assert other.cancel(poll) is other.cancel(write) is False
    assert len(ctx.reap(min_nr=1)) == 1
    assert ctx.cancel(write) is False
    assert ctx.cancel(poll) is True
    assert _canceled(ctx.drain()) == [poll]


@pytest.mark.parametrize("where", ["pending", "in flight"])
def test_twice(ctx: rawaio.IOContext, pipe: Pipe, where: str) -> None:
    """The second says the same as the first, and there is one completion."""
    poll = pipe.poll()
    with ctx.plugged():
        ctx.submit(poll)
        if where == "in flight":
            ctx._queue.flush()
        assert ctx.cancel(poll) is True
        assert ctx.cancel(poll) is True
        assert _canceled(ctx.reap(min_nr=1)) == [poll]
        assert ctx.cancel(poll) is False
    assert ctx.drain() == []


class Changing(deque[rawaio.Completion]):
    """A deque that other threads change while it is looked through, the first few times."""

    changes = 3

    def __iter__(self) -> Iterator[rawaio.Completion]:
        for completion in super().__iter__():
            if self.changes:
                self.changes -= 1
                self.rotate()
            yield completion


def test_completions_come_and_go_while_it_looks(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    """As they do without the GIL, from which list(deque) is safe."""
    poll, write = pipe.poll(), _write(pipe.writable)
    with ctx.plugged():
        ctx.submit(poll, write)
        assert ctx.cancel(write)
        assert ctx.cancel(poll)
        done, changing = ctx._done, Changing(ctx._done)
        ctx._done = changing
        assert ctx.cancel(poll) is True
        assert changing.changes == 0
        ctx._done = done
    assert _canceled(ctx.drain()) == [write, poll]


def test_a_cancel_makes_way_for_what_is_pending(make: _Make, null: int, pipe: Pipe) -> None:
    ctx = make(nr_events=1)
    poll, write = pipe.poll(), _write(null)
    ctx.submit(poll, write)
    assert ctx.cancel(poll)
    assert requests(ctx.reap(min_nr=2)) == [poll, write]


def test_who_waits_is_woken(ctx: rawaio.IOContext, pipe: Pipe, threads: Threads) -> None:
    poll = pipe.poll()
    ctx.submit(poll)
    asleep = sleeper(ctx)
    seen: list[rawaio.Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=1)))
    assert asleep.wait(LIMIT_S)
    assert ctx.cancel(poll)
    threads.join()
    assert _canceled(seen) == [poll]


def test_who_waits_is_woken_by_a_pending_one(
    make: _Make, null: int, pipe: Pipe, threads: Threads
) -> None:
    ctx = make(nr_events=1)
    poll, write = pipe.poll(), _write(null)
    ctx.submit(poll, write)
    asleep = sleeper(ctx)
    seen: list[rawaio.Completion] = []
    threads.start(lambda: seen.extend(ctx.reap(min_nr=1)))
    assert asleep.wait(LIMIT_S)
    assert ctx.cancel(write)
    threads.join()
    assert _canceled(seen) == [write]


def test_close_does_not_wait_for_silent_polls(make: _Make, null: int, pipes: _Pipes) -> None:
    ctx = make(nr_events=2)
    seen: list[rawaio.Completion] = []
    polls = [pipe.poll(seen.append) for pipe in pipes(5)]
    ctx.submit(*polls)
    assert ctx.statistics().in_queue == 3
    ctx.close()
    assert set(_canceled(seen)) == set(polls)
    assert len(seen) == 5


def test_a_poll_of_a_closed_descriptor_is_cancelled_all_the_same(ctx: rawaio.IOContext) -> None:
    pipe = Pipe()
    poll = pipe.poll()
    ctx.submit(poll)
    os.close(pipe.readable)
    assert ctx.cancel(poll)
    assert _canceled(ctx.drain()) == [poll]
    os.close(pipe.writable)

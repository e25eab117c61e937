"""Batches whose requests complete in any order, in pieces, beside each other, where the ring ends.

They are polls of pipes: what is made ready completes at once, and alone. (An eventfd that is
polled with another eventfd to be signalled completes later, by a thread of the kernel.)
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rawaio import Completion, IOContext, Request, aligned_buffer

N = 12


class World:
    """A context, and polls that complete when they are told to."""

    def __init__(self, *, force_syscalls: bool) -> None:
        self.ctx = IOContext(nr_events=N, force_syscalls=force_syscalls)
        self.pipes = [os.pipe2(os.O_NONBLOCK) for _ in range(N)]
        self.polls = [Request.poll(readable, select.POLLIN) for readable, _ in self.pipes]

    def complete(self, poll: Request) -> None:
        os.write(self.pipes[self.polls.index(poll)][1], b"x")

    def forget(self, poll: Request) -> None:
        assert os.read(self.pipes[self.polls.index(poll)][0], 9) == b"x"

    def reset(self) -> None:
        """Whatever came before, nothing is under way and nothing is ready."""
        for _, writable in self.pipes:
            os.write(writable, b"x")
        self.ctx.drain()
        for readable, _ in self.pipes:
            os.read(readable, 9)

    def close(self) -> None:
        self.ctx.close()
        for fd in chain(*self.pipes):
            os.close(fd)


@pytest.fixture(scope="module", params=[False, True], ids=["ring", "io_getevents"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(force_syscalls=request.param)
    yield world
    world.close()


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, N)),
        # In the order of submission most often: that is the way that is worth a short cut.
        st.tuples(st.just("complete"), st.one_of(st.just(0), st.integers(0, N))),
        st.tuples(st.just("reap"), st.one_of(st.none(), st.integers(1, N))),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=200)
@given(STEPS)
def test_each_comes_back_once_and_in_the_order_of_completion(
    world: World, steps: list[tuple[str, int | None]]
) -> None:
    ctx = world.ctx
    idle, waiting = list(world.polls), list[Request]()
    done = list[Request]()
    world.reset()

    def reap(most: int | None) -> None:
        completions = ctx.reap(max_nr=most)
        for completion in completions:
            assert completion.result() == select.POLLIN
            world.forget(completion.request)
        requests = [completion.request for completion in completions]
        assert requests == done[: len(done) if most is None else most]
        del done[: len(requests)]
        idle.extend(requests)

    for what, n in steps:
        if what == "submit" and n is not None:
            batch = idle[:n]
            del idle[:n]
            assert ctx.submit(*batch) == len(batch)
            waiting.extend(batch)
        elif what == "complete" and n is not None and waiting:
            poll = waiting.pop(n % len(waiting))
            world.complete(poll)
            done.append(poll)
        elif what == "reap":
            reap(n)
    for poll in waiting:
        world.complete(poll)
    done.extend(waiting)
    waiting.clear()
    reap(None)
    assert len(idle) == N
    ctx._queue._check()


class Repeated:
    """A context, and requests that complete at once, whose results change when they are told to."""

    def __init__(self, *, force_syscalls: bool) -> None:
        self.ctx = IOContext(nr_events=N, force_syscalls=force_syscalls)
        self.fd = os.memfd_create("ten")
        os.write(self.fd, b"0123456789")
        self.reads = [Request.pread(self.fd, aligned_buffer(4), 0) for _ in range(N)]

    def close(self) -> None:
        self.ctx.close()
        os.close(self.fd)


@pytest.fixture(scope="module", params=[False, True], ids=["ring", "io_getevents"])
def repeated(request: pytest.FixtureRequest) -> Iterator[Repeated]:
    repeated = Repeated(force_syscalls=request.param)
    yield repeated
    repeated.close()


TURNS = st.lists(
    st.tuples(
        # Which requests, most often the same; the offset of which of them is changed, and to what;
        # how many are reaped, and how many at most.
        st.one_of(
            st.just((0, 4)), st.just((0, 1)), st.tuples(st.integers(0, N - 1), st.integers(1, N))
        ),
        st.one_of(st.none(), st.tuples(st.integers(0, N - 1), st.integers(0, 11))),
        st.integers(0, N),
        st.one_of(st.none(), st.integers(N, 2 * N), st.integers(1, N)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=200)
@given(TURNS)
def test_batches_that_come_again_end_as_each_read_does(
    repeated: Repeated,
    turns: list[tuple[tuple[int, int], tuple[int, int] | None, int, int | None]],
) -> None:
    ctx = repeated.ctx
    ctx.drain()
    under_way = list[Request]()

    def take(completions: list[Completion]) -> None:
        for completion in completions:
            request = under_way.pop(0)
            assert completion.request is request
            assert completion.result() == min(4, max(10 - request.offset, 0))

    for (first, n), change, at_least, most in turns:
        batch = [r for r in repeated.reads[first : first + n] if r not in under_way]
        if change is not None and repeated.reads[change[0]] not in under_way:
            repeated.reads[change[0]].offset = change[1]
        assert ctx.submit(*batch) == len(batch)
        under_way.extend(batch)
        take(ctx.reap(min_nr=at_least if most is None else min(at_least, most), max_nr=most))
    take(ctx.drain())
    assert under_way == []
    ctx._queue._check()

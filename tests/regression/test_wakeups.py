"""Whoever waits for the eventfd is told of everything that has completed."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from rawaio import Completion, IOContext, Request

BAD_FD = (1 << 31) - 1


@pytest.fixture(params=[False, True], ids=["ring", "io_getevents"])
def context(request: pytest.FixtureRequest) -> Iterator[IOContext]:
    try:
        context = IOContext(8, force_syscalls=request.param)
    except OSError as error:
        pytest.skip(f"no context: {error}")
    with context:
        yield context


def readable(context: IOContext) -> bool:
    poller = select.poll()
    poller.register(context.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def test_a_request_that_io_submit_refuses_is_announced(context: IOContext) -> None:
    """It has completed, but the kernel makes no event for it, and so does not signal."""
    context.submit(Request.pwrite(BAD_FD, b"x", 0))
    assert readable(context)
    assert len(context.process_completions()) == 1
    assert not readable(context)


def test_a_refusal_at_the_end_of_a_section_is_announced(context: IOContext) -> None:
    with context.plugged():
        context.submit(Request.pwrite(BAD_FD, b"x", 0))
        assert not readable(context)
    assert readable(context)


def test_a_waiter_is_told_of_what_another_reap_leaves_in_the_ring(context: IOContext) -> None:
    """A reap that has made the eventfd unreadable and takes only one of two completions.

    They come when it has looked and is about to wait. The thread that sleeps already, for the
    second one, has seen the eventfd go back to zero.
    """
    read_end, write_end = os.pipe()

    class Waiters(set[object]):
        """Those who wait; the completions come when one more is about to."""

        def add(self, waiter: object) -> None:
            super().add(waiter)
            os.write(write_end, b"x")

    sleeper = object()
    context._waiters = Waiters([sleeper])
    context.submit(*(Request.poll(read_end, select.POLLIN) for _ in range(2)))
    assert len(context.reap(min_nr=1, max_nr=1)) == 1
    assert readable(context)
    context._waiters.discard(sleeper)
    assert len(context.reap(min_nr=1)) == 1
    os.close(write_end)
    os.close(read_end)


def test_what_an_exception_in_a_callback_leaves_over_is_announced(context: IOContext) -> None:
    def leave(completion: Completion) -> None:
        raise SystemExit

    with open("/dev/null", "wb") as null:
        first = Request.pwrite(null, b"x", 0, callback=leave)
        second = Request.pwrite(null, b"x", 0, callback=lambda _: None)
        context.submit(first, second)
        with pytest.raises(SystemExit):
            context.process_completions()
    assert readable(context)
    assert [c.request for c in context.process_completions()] == [first, second]

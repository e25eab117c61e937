"""Whoever waits for the eventfd is told of everything that has completed."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections import deque
from collections.abc import Iterator, Sequence

import pytest

from rawaio import Completion, IOContext, Request
from tests.context_support import LIMIT_S

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


def test_a_sleeper_is_told_of_eagain_in_another_thread(context: IOContext) -> None:
    """What it waits for was being offered, and is not in flight after all: a timer brings it on."""
    queue = context._queue
    submit, sleep = queue._submit, context._sleep
    offered, refuse = threading.Event(), threading.Event()
    slept: list[float | None] = []

    def refusing(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        offered.set()
        assert refuse.wait(LIMIT_S)
        queue._submit = submit
        outcome.extend((-1, errno.EAGAIN))

    def asleep(timeout: float | None) -> None:
        if not slept:
            refuse.set()
            thread.join()
        slept.append(timeout)
        sleep(LIMIT_S if timeout is None else timeout)

    with open("/dev/null", "wb") as null:
        request = Request.pwrite(null, b"x", 0)
        queue._submit = refusing
        thread = threading.Thread(target=context.submit, args=(request,))
        thread.start()
        assert offered.wait(LIMIT_S)
        context._sleep = asleep  # type: ignore[method-assign]
        assert [c.request for c in context.reap(min_nr=1, timeout=LIMIT_S / 2)] == [request]
    assert slept
    assert context.statistics().eagain == 1


def test_a_sleeper_is_told_that_a_loop_has_collected_the_last(context: IOContext) -> None:
    read_end, write_end = os.pipe()
    sleep = context._sleep
    collected: deque[Completion] = deque()

    def asleep(timeout: float | None) -> None:
        os.write(write_end, b"x")
        assert select.select([context], [], [], LIMIT_S)[0]
        context.collect(collected)
        sleep(timeout)

    poll = Request.poll(read_end, select.POLLIN)
    context.submit(poll)
    context._sleep = asleep  # type: ignore[method-assign]
    assert context.reap(min_nr=1) == []
    assert [c.request for c in collected] == [poll]
    os.close(write_end)
    os.close(read_end)

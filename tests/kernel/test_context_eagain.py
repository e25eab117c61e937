"""IOContext where io_submit says EAGAIN although there is room: the kernel lacks something."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

import rawaio
from rawaio import Request
from tests.context_support import LIMIT_S, Pipe, results, sleeper


def _write(fd: int) -> Request:
    return Request.pwrite(fd, b"x", 0)


_FOR_EVER = 100_000  # so often that only a loop that never sleeps sees the end


def _short_of_memory(monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, times: int) -> None:
    """The kernel answers EAGAIN so many times."""
    submit = ctx._queue._submit
    left = [times]

    def refuse(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        if left[0]:
            left[0] -= 1
            outcome.extend((-1, errno.EAGAIN))
        else:
            submit(first_token, batch, outcome)

    monkeypatch.setattr(ctx._queue, "_submit", refuse)


def test_eagain_with_nothing_in_flight_is_tried_again_by_a_timer(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, null: int
) -> None:
    _short_of_memory(monkeypatch, ctx, 4)
    assert [ctx.retry_in] == [None]
    ctx.submit(_write(null), _write(null))
    delay = ctx.retry_in
    assert delay is not None
    assert 0 < delay < 1
    assert ctx.process_completions() == []
    assert ctx.statistics().eagain == 2  # one look, one try: what is short is not back at once
    assert [ctx.retry_in] == [2 * delay]
    assert len(ctx.reap(min_nr=2)) == 2
    assert ctx.retry_in is None
    assert ctx.statistics().eagain == 4
    assert ctx.statistics().waits >= 1


def test_a_wait_ends_in_time_although_the_kernel_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, null: int
) -> None:
    _short_of_memory(monkeypatch, ctx, _FOR_EVER)
    monkeypatch.setattr("rawaio.queue._RETRY_FIRST_S", 2 * LIMIT_S)
    monkeypatch.setattr("rawaio.queue._RETRY_LONGEST_S", 2 * LIMIT_S)
    ctx.submit(_write(null))
    assert ctx.reap(min_nr=1, timeout=0.001) == []
    assert ctx.drain(timeout=0.001) == []
    assert ctx.statistics().in_queue == 1
    assert ctx.statistics().eagain < 10  # and it slept
    monkeypatch.undo()
    assert len(ctx.drain()) == 1


def test_a_longer_timeout_does_not_put_the_retry_off(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, null: int
) -> None:
    _short_of_memory(monkeypatch, ctx, 4)
    ctx.submit(_write(null))
    assert len(ctx.reap(min_nr=1, timeout=1e9)) == 1
    assert ctx.statistics().eagain == 4


def test_eagain_with_something_in_flight_waits_for_that(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, null: int, pipe: Pipe
) -> None:
    """As when other processors hold the slots: there is room once something completes."""
    ctx.submit(pipe.poll())
    _short_of_memory(monkeypatch, ctx, _FOR_EVER)
    ctx.submit(_write(null))
    assert ctx.retry_in is None
    assert ctx.reap(min_nr=1, timeout=0.001) == []
    assert ctx.statistics().eagain < 10
    monkeypatch.undo()
    sleeper(ctx, pipe.fire)
    assert {c.result() for c in ctx.reap(min_nr=2)} == {1}
    assert ctx.statistics().completed == 2


def test_what_is_behind_a_cancelled_one_is_offered_at_once(
    monkeypatch: pytest.MonkeyPatch, ctx: rawaio.IOContext, null: int
) -> None:
    """It may have been that one which the kernel would not take."""
    _short_of_memory(monkeypatch, ctx, 1)
    first, second = _write(null), _write(null)
    ctx.submit(first, second)
    assert ctx.statistics().in_queue == 2
    assert ctx.cancel(first)
    assert ctx.statistics().in_queue == 0
    assert sorted(results(ctx.reap(min_nr=2))) == [-errno.ECANCELED, 1]

"""Holds on ranges: who gets them when. tests/stateful/test_rangelock.py has the rest."""

from __future__ import annotations

import pytest

from rawaio.rangelock import Hold, RangeLock


@pytest.fixture
def lock() -> RangeLock:
    return RangeLock()


def exclusive(lock: RangeLock, start: int, stop: int, calls: list[str], name: str) -> Hold:
    return lock.acquire(start, stop, exclusive=True, granted=lambda: calls.append(name))


def test_what_touches_nothing_is_granted_at_once(lock: RangeLock) -> None:
    first = lock.acquire(0, 10, exclusive=True)
    second = lock.acquire(10, 20, exclusive=True)
    assert first.granted
    assert second.granted
    assert len(lock) == 2


def test_shared_holds_overlap(lock: RangeLock) -> None:
    assert lock.acquire(0, 10).granted
    assert lock.acquire(5, 15).granted
    assert not lock.acquire(14, 16, exclusive=True).granted


def test_who_waits_is_called_once_when_it_is_free(lock: RangeLock) -> None:
    calls: list[str] = []
    first, second = lock.acquire(0, 10, exclusive=True), lock.acquire(5, 15, exclusive=True)
    third = exclusive(lock, 0, 20, calls, "third")
    lock.release(first)
    assert (second.granted, third.granted, calls) == (True, False, [])
    lock.release(second)
    assert (third.granted, calls) == (True, ["third"])
    lock.release(third)
    assert (third.granted, calls) == (False, ["third"])
    assert len(lock) == 0
    assert calls == ["third"]


def test_nobody_overtakes_who_waits(lock: RangeLock) -> None:
    first = lock.acquire(0, 10)
    waiting = lock.acquire(5, 15, exclusive=True)
    # It could share with the first, and would keep the second from its range.
    assert not lock.acquire(0, 10).granted
    assert lock.acquire(0, 5).granted
    lock.release(first)
    assert not waiting._blockers
    assert waiting.granted


def test_who_gives_up_waiting_lets_those_behind_go_on(lock: RangeLock) -> None:
    calls: list[str] = []
    first = lock.acquire(0, 10)
    waiting = exclusive(lock, 0, 10, calls, "waiting")
    behind = lock.acquire(0, 10, granted=lambda: calls.append("behind"))
    lock.release(waiting)
    assert behind.granted
    assert calls == ["behind"]
    lock.release(first)
    assert not waiting.granted
    assert calls == ["behind"]


def test_those_who_waited_are_called_in_the_order_in_which_they_came(lock: RangeLock) -> None:
    calls: list[str] = []
    first = lock.acquire(0, 100, exclusive=True)
    for i in range(5):
        exclusive(lock, 10 * i, 10 * i + 10, calls, str(i))
    lock.release(first)
    assert calls == ["0", "1", "2", "3", "4"]


def test_who_is_called_may_acquire_and_release(lock: RangeLock) -> None:
    calls: list[str] = []
    first = lock.acquire(0, 10, exclusive=True)
    holds: list[Hold] = []

    def granted() -> None:
        calls.append("second")
        assert holds[0].granted
        holds.append(exclusive(lock, 0, 10, calls, "fourth"))
        lock.release(holds[0])

    holds.append(lock.acquire(0, 10, exclusive=True, granted=granted))
    third = exclusive(lock, 0, 10, calls, "third")
    lock.release(first)
    assert calls == ["second", "third"]
    lock.release(third)
    assert calls == ["second", "third", "fourth"]
    lock._check()


def test_released_by_a_neighbour_s_call_nobody_is_called(lock: RangeLock) -> None:
    calls: list[str] = []
    first = lock.acquire(0, 10)
    other: list[Hold] = []
    lock.acquire(0, 5, exclusive=True, granted=lambda: lock.release(other[0]))
    other.append(exclusive(lock, 5, 10, calls, "other"))
    lock.release(first)
    assert calls == []
    assert len(lock) == 1


def test_releasing_again_does_nothing(lock: RangeLock) -> None:
    first = lock.acquire(0, 10, exclusive=True)
    lock.release(first)
    second = lock.acquire(0, 10, exclusive=True)
    third = lock.acquire(0, 10)
    lock.release(first)
    assert second.granted
    assert not third.granted
    lock._check()


def test_an_empty_range_is_in_nobody_s_way(lock: RangeLock) -> None:
    assert lock.acquire(5, 5, exclusive=True).granted
    assert lock.acquire(4, 7, exclusive=True).granted
    assert lock.acquire(5, 5, exclusive=True).granted


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4)])
def test_a_range_that_there_is_not_is_refused(lock: RangeLock, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"a range from {start} to {stop}"):
        lock.acquire(start, stop)
    assert len(lock) == 0


def test_a_hold_says_what_it_is(lock: RangeLock) -> None:
    first = lock.acquire(0, 10, exclusive=True)
    second = lock.acquire(5, 15)
    assert repr(first) == "<rawaio.rangelock.Hold exclusive 0..10, granted>"
    assert repr(second) == "<rawaio.rangelock.Hold shared 5..15, waiting>"
    lock.release(first)
    lock.release(second)
    assert repr(second) == "<rawaio.rangelock.Hold shared 5..15, released>"


def test_shared_holds_are_not_compared_while_nothing_is_exclusive(
    lock: RangeLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[Hold] = []
    monkeypatch.setattr(Hold, "_conflicts", lambda self, other: compared.append(other))
    for i in range(100):
        lock.acquire(0, i)
    assert compared == []

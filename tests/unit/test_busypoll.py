"""Looking before sleeping: how long, and what the rule is told."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest

from rawaio.busypoll import BusyPoll
from rawaio.polling import HandlerPolling


class Clock:
    """Time that goes on by a microsecond whenever it is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 1_000_000
        monkeypatch.setattr(time, "monotonic_ns", self)

    def __call__(self) -> int:
        self.ns += 1000
        return self.ns


class Rule:
    """Polls for as long as it is told to, and notes what it is told."""

    def __init__(self, poll_ns: int) -> None:
        self.poll_ns = poll_ns
        self.told: list[tuple[int, int]] = []

    def add(self) -> HandlerPolling:
        return HandlerPolling()

    def remove(self, handler: HandlerPolling) -> None:
        raise AssertionError(handler)

    def adjust(self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int) -> None:
        assert now_ns > 0
        self.told.append((block_ns, len(list(active))))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_what_is_there_in_time_needs_no_sleep(clock: Clock) -> None:
    rule = Rule(10_000)
    looks = iter([False, False, True])
    slept: list[float | None] = []
    busy = BusyPoll(rule)
    busy.wait(lambda: next(looks), None, slept.append)
    busy.learn()
    assert slept == []
    assert rule.told == [(3000, 1)]


def test_what_is_urgent_is_done_before_the_rule_is_told(clock: Clock) -> None:
    """It is no part of the wait, however long it takes; and behind a sleep nothing is urgent."""
    rule = Rule(10_000)
    done: list[str] = []

    def then() -> None:
        done.append("then")
        assert not busy._lessons
        clock.ns += 1_000_000

    busy = BusyPoll(rule)
    busy.wait(lambda: True, None, lambda _: None, then)
    busy.learn()
    assert done == ["then"]
    assert rule.told == [(1000, 1)]
    rule.poll_ns = 0
    busy.wait(lambda: True, None, lambda _: None, then)
    assert done == ["then"]


def test_the_rule_learns_in_order(clock: Clock) -> None:
    """Of waits of several threads, which were over before one of them was told of."""
    rule = Rule(0)
    busy = BusyPoll(rule)
    busy._lessons.extend([(5, True), (7, False)])
    busy.wait(lambda: True, None, lambda _: None)
    assert rule.told == [(5, 1), (7, 0)]
    busy.learn()
    assert len(rule.told) == 3


def test_nobody_waits_for_who_tells_the_rule(clock: Clock) -> None:
    rule = Rule(0)
    busy = BusyPoll(rule)
    with busy._lock:
        for _ in range(100):
            busy.wait(lambda: True, None, lambda _: None)
    assert rule.told == []
    busy.learn()
    assert len(rule.told) == 64


def test_what_is_late_is_slept_for(clock: Clock) -> None:
    rule = Rule(5_000)
    slept: list[float | None] = []

    def sleep(timeout: float | None) -> None:
        slept.append(timeout)
        clock.ns += 1_000_000

    busy = BusyPoll(rule)
    busy.wait(lambda: bool(slept), None, sleep)
    busy.learn()
    assert slept == [None]
    assert rule.told == [(1_006_000, 1)]


def test_nothing_is_polled_where_the_rule_says_so(clock: Clock) -> None:
    rule = Rule(0)
    done: list[object] = []

    def ready() -> bool:
        done.append("looked")
        return False

    busy = BusyPoll(rule)
    busy.wait(ready, 1.0, done.append)
    busy.learn()
    assert done == [1.0, "looked"]
    assert rule.told == [(1000, 0)]


def test_a_timeout_ends_the_looking_too(clock: Clock) -> None:
    rule = Rule(1_000_000_000)
    slept: list[float | None] = []
    busy = BusyPoll(rule)
    busy.wait(lambda: False, 0.000_01, slept.append)
    busy.learn()
    assert slept == [0]
    assert rule.told == [(11_000, 0)]

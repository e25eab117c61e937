"""The queue's way to the kernel, beside a system call that only notes what it is given."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from rawaio import Request, syscalls
from rawaio.kernel import Submitter
from rawaio.slab import IocbSlab

if TYPE_CHECKING:
    from types import FrameType

CTX = 0x7000_0000_0000


class Calls:
    """Takes all that it is offered."""

    def __init__(self) -> None:
        self.made: list[tuple[int, ...]] = []

    def __call__(self, *arguments: Any) -> int:
        self.made.append(tuple(argument.value for argument in arguments))
        nr: int = arguments[2].value
        return nr


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(syscalls, "raw_syscall", lambda: made)
    return made


def fsyncs(n: int) -> list[Request]:
    return [Request.fsync(0) for _ in range(n)]


def submitted(submitter: Submitter, n: int) -> int:
    """What it said of a batch of n."""
    outcome: list[int] = []
    submitter.submit(1, fsyncs(n), outcome)
    return outcome[0]


def test_as_many_are_submitted_as_there_are(calls: Calls) -> None:
    slab = IocbSlab(9, 3)
    submitter = Submitter(CTX, slab)
    sizes = [1, 1, 3, 9, 9, 1, 2]
    assert [submitted(submitter, n) for n in sizes] == sizes
    assert calls.made == [(syscalls.numbers().io_submit, CTX, n, slab.address) for n in sizes]


@pytest.mark.parametrize(("first", "second"), [(5, 2), (2, 5)])
def test_a_number_that_was_struck_is_not_believed(calls: Calls, first: int, second: int) -> None:
    """Whatever line an exception from outside strikes at."""
    at = 0
    while True:
        submitter = Submitter(CTX, IocbSlab(9, 3))
        submitted(submitter, first)
        ended = struck(submitter, second, at)
        for n in (first, second, first):
            assert submitted(submitter, n) == calls.made[-1][2] == n
        if ended:
            break
        at += 1
    assert at > 5


def struck(submitter: Submitter, n: int, at: int) -> bool:
    """Submit, and be struck before the at-th line; whether it has fewer."""
    left = at

    def strike(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code is not Submitter.submit.__code__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return strike

    before = sys.gettrace()
    sys.settrace(strike)
    try:
        submitted(submitter, n)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left >= 0

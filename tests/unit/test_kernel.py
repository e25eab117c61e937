"""The queue's way to the kernel, beside a system call that only notes what it is given."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from rawaio import Request, syscalls
from rawaio import kernel as kernel_module
from rawaio.kernel import Submitter
from rawaio.slab import IocbSlab
from tests.support import interrupted_at, passed

CTX = 0x7000_0000_0000


class Calls:
    """Takes all that it is offered."""

    def __init__(self) -> None:
        self.made: list[tuple[int, ...]] = []

    def __call__(self, *arguments: Any) -> int:
        self.made.append(tuple(map(passed, arguments)))
        nr: int = passed(arguments[2])
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
    """Wherever an exception from outside strikes."""
    step = 0
    interrupted = True
    while interrupted:
        submitter = Submitter(CTX, IocbSlab(9, 3))
        submitted(submitter, first)
        interrupted = interrupted_at(
            step, kernel_module.__file__, partial(submitted, submitter, second)
        )
        for n in (first, second, first):
            assert submitted(submitter, n) == calls.made[-1][2] == n
        step += 1
    assert step > 20

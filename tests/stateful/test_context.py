"""IOContext in any order of calls, on the real kernel, beside a model of what it has to hold.

Polls of pipes complete in the order in which the machine writes to the pipes; writes to /dev/null
complete inside io_submit; a descriptor that does not exist is refused by it. Every request has a
callback, and the order of completions is the order in which the callbacks run.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import sys
import time
from collections import Counter
from contextlib import ExitStack
from typing import cast

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rawaio import Completion, IOContext, Request, State
from rawaio.queue import PlugSection
from tests.context_support import KINDS, LIMIT_S, Pipe, new_context, readable

_NO_FD = 1 << 20
_NR_PIPES = 4
_RESULTS = {"write": 1, "poll": select.POLLIN, "bad": -errno.EBADF}
_ACTS = ("nothing", "nothing", "submit", "reap", "take one", "raise")
_SPECS = st.tuples(st.sampled_from(sorted(_RESULTS)), st.sampled_from(_ACTS))


class Machine(RuleBasedStateMachine):
    def __init__(self, kind: str, null: int, pipes: list[Pipe]) -> None:
        super().__init__()
        self.kind, self.null, self.pipes = kind, null, pipes
        self.fired = [False] * _NR_PIPES
        self.what: dict[Request, str] = {}
        self.acts: dict[Request, str] = {}
        self.free: dict[str, list[Request]] = {"write": [], "bad": []}  # to be used again
        self.polls = [self.new("poll", pipe.readable) for pipe in pipes]
        self.under_way: list[Request] = []  # in the order in which they were taken
        self.cancelled: set[Request] = set()
        self.in_order: list[Request] = []  # polls that have fired in the kernel
        self.called: Counter[Request] = Counter()
        self.given: Counter[Request] = Counter()
        self.sections: list[PlugSection] = []
        self.closing = False

    @initialize(nr_events=st.integers(1, 5), max_batch=st.integers(1, 4))
    def begin(self, nr_events: int, max_batch: int) -> None:
        self.ctx: IOContext = new_context(self.kind, nr_events=nr_events, max_batch=max_batch)

    def new(self, what: str, fd: int) -> Request:
        poll = what == "poll"
        request = Request.poll(fd, select.POLLIN) if poll else Request.pwrite(fd, b"x", 0)
        request.callback = self.callback
        self.what[request] = what
        return request

    def take(self, what: str, act: str) -> Request | None:
        """A request that is not under way."""
        if what == "poll":
            idle = [poll for poll in self.polls if poll not in self.under_way]
            request = idle[0] if idle else None
        elif self.free[what]:
            request = self.free[what].pop()
        else:
            request = self.new(what, self.null if what == "write" else _NO_FD)
        if request is not None:
            self.acts[request] = act
        return request

    # -- what happens ---------------------------------------------------------------------------

    def callback(self, completion: Completion) -> None:
        request, what = completion.request, self.what[completion.request]
        assert request.state is State.COMPLETED
        place = self.under_way.index(request)  # exactly once: a second time it is not there
        if request in self.cancelled:
            self.cancelled.remove(request)
            assert completion.res == -errno.ECANCELED or self.closing
        elif not self.closing:
            assert completion.request.poll_result(completion.res) == _RESULTS[what]
            if what == "write":  # first in, first out
                assert not any(
                    self.what[r] == "write" and r not in self.cancelled
                    for r in self.under_way[:place]
                )
            if request in self.in_order:
                assert self.in_order.pop(0) is request
        del self.under_way[place]
        self.called[request] += 1
        act = "nothing" if self.closing else self.acts[request]
        if what != "poll":
            self.free[what].append(request)
        if act == "submit":
            self.submit([("write", "nothing"), ("bad", "reap")])
        elif act == "reap":
            self.give(self.ctx.reap())
        elif act == "take one":
            self.give(self.ctx.reap(max_nr=1))
        elif act == "raise":
            raise ZeroDivisionError

    def give(self, completions: list[Completion]) -> None:
        self.given.update(completion.request for completion in completions)

    def tail(self) -> int:
        """How far the kernel has got in the ring, which it fills whoever reads it."""
        return ctypes.c_uint32.from_address(self.ctx._kernel.ctx_id + 12).value

    def let_the_kernel_catch_up(self, before: int) -> None:
        """A poll may complete in a worker of the kernel; what comes next is to be the same."""
        deadline = time.monotonic() + LIMIT_S
        while self.tail() == before:
            assert time.monotonic() < deadline
            os.sched_yield()

    def nr_silent(self) -> int:
        """Polls that the kernel has and that have not fired."""
        silent = set(self.polls) - set(self.in_order) - self.cancelled
        return len(silent & set(self.ctx._queue.in_flight_table.values()))

    # -- rules ----------------------------------------------------------------------------------

    @rule(specs=st.lists(_SPECS, min_size=1, max_size=5))
    def submit(self, specs: list[tuple[str, str]]) -> None:
        requests: list[Request] = []
        for what, act in specs:
            request = self.take(what, act)
            if request is not None:
                requests.append(request)
                self.under_way.append(request)
                pipe = self.polls.index(request) if what == "poll" else None
                if pipe is not None and self.fired[pipe]:
                    self.pipes[pipe].quench()
                    self.fired[pipe] = False
        assert self.ctx.submit(*requests) == len(requests)

    @rule(i=st.integers(0, _NR_PIPES - 1))
    def fire(self, i: int) -> None:
        if not self.fired[i]:
            self.fired[i] = True
            poll = self.polls[i]
            in_kernel = poll in self.ctx._queue.in_flight_table.values()
            if in_kernel and poll not in self.cancelled:
                self.in_order.append(poll)
                before = self.tail()
                self.pipes[i].fire()
                self.let_the_kernel_catch_up(before)
            else:
                self.pipes[i].fire()

    @precondition(lambda self: self.under_way)
    @rule(i=st.integers(0, 20))
    def cancel(self, i: int) -> None:
        request = self.under_way[i % len(self.under_way)]
        pending = request in self.ctx._queue.pending
        silent = (
            request in self.polls
            and request in self.ctx._queue.in_flight_table.values()
            and not self.fired[self.polls.index(request)]
        )
        before = self.tail()
        cancelled = self.ctx.cancel(request)
        if cancelled and silent and request not in self.cancelled:
            self.let_the_kernel_catch_up(before)
        if request in self.cancelled:
            return
        assert cancelled or not (pending or silent)
        if cancelled:
            self.cancelled.add(request)
            assert pending or request in self.polls

    @rule()
    def plug(self) -> None:
        self.sections.append(self.ctx.plugged())
        self.sections[-1].__enter__()

    @precondition(lambda self: self.sections)
    @rule()
    def unplug(self) -> None:
        self.sections.pop().__exit__(None, None, None)

    @rule()
    def steal(self) -> None:
        """Somebody else takes the eventfd's count."""
        if readable(self.ctx):
            os.eventfd_read(self.ctx.fileno())

    @rule(max_nr=st.integers(1, 4), wait=st.booleans())
    def reap_some(self, max_nr: int, wait: bool) -> None:
        some = self.ctx.reap(min_nr=min(wait, 1), max_nr=max_nr, timeout=0)
        assert len(some) <= max_nr
        self.give(some)

    @rule(loop=st.booleans())
    def reap(self, loop: bool) -> None:
        self.give(self.ctx.process_completions() if loop else self.ctx.reap())
        queue = self.ctx._queue
        left = Counter(self.what[r] for r in queue.in_flight_table.values())
        if not readable(self.ctx):  # then it says that it gave everything
            assert left["write"] == 0
            assert not queue.rejected
            if not self.sections:
                assert not queue.pending or left["poll"] == queue.nr_events

    @precondition(lambda self: not self.nr_silent())
    @rule()
    def wait_for_one(self) -> None:
        """There is something that completes, or nothing is outstanding."""
        if not any(r in self.polls for r in self.under_way):
            outstanding = bool(self.under_way)
            reaped = self.ctx.reap(min_nr=1)
            assert bool(reaped) is outstanding
            self.give(reaped)

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "ctx"):
            return
        queue, statistics = self.ctx._queue, self.ctx.statistics()
        queue._check()
        assert statistics.submitted == (
            statistics.in_queue + statistics.in_flight + statistics.completed
        )
        assert statistics.submitted == self.called.total() + len(self.under_way)
        assert statistics.in_flight <= statistics.nr_events
        assert self.given == self.called
        waiting = [r for r in queue.pending if r not in self.cancelled]
        assert waiting == [r for r in self.under_way if r in waiting]
        assert not self.ctx._depth
        assert not self.ctx._waiters

    def teardown(self) -> None:
        if hasattr(self, "ctx"):
            self.closing = True
            for section in self.sections:
                section.__exit__(None, None, None)
            self.ctx.close()
            assert self.under_way == []
        for pipe, fired in zip(self.pipes, self.fired, strict=True):
            if fired:
                pipe.quench()


@pytest.mark.parametrize("kind", KINDS)
def test_any_order_of_calls(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, ZeroDivisionError):
            raised.append(unraisable.exc_value)

    raised: list[BaseException | None] = []
    monkeypatch.setattr(sys, "unraisablehook", hook)
    with ExitStack() as stack:
        null = os.open("/dev/null", os.O_WRONLY)
        stack.callback(os.close, null)
        pipes = [Pipe() for _ in range(_NR_PIPES)]
        for pipe in pipes:
            stack.callback(pipe.close)

        def machine() -> Machine:
            assert not raised, raised
            return Machine(kind, null, pipes)

        run_state_machine_as_test(
            cast("type[RuleBasedStateMachine]", machine),
            settings=settings(
                max_examples=40,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
    assert not raised, raised

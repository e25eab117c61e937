"""What tests of the queue share: a driver for it, and two threads in every order."""

from __future__ import annotations

import dis
import os
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType, TracebackType
from typing import Any, cast

import rawaio
from rawaio.lifecycle import complete_one
from rawaio.queue import SubmissionQueue
from rawaio.request import Completion, Request
from rawaio.testing import SimulatedKernel

PACKAGE = os.path.join(os.path.dirname(rawaio.__file__), "")


class Driver:
    """What a context does with a queue, in its shortest form: fetch, run callbacks, kick."""

    def __init__(self, kernel: SimulatedKernel, **limits: Any) -> None:
        self.kernel = kernel
        self.continuations = 0
        self.raised: list[Exception] = []
        self.queue = SubmissionQueue(
            kernel, nr_events=kernel.nr_events, continuation=self._continue, **limits
        )

    def _continue(self) -> None:
        self.continuations += 1

    def fetch(self) -> None:
        """Move what the kernel has completed to where the queue puts what it rejects."""
        queue, kernel = self.queue, self.kernel
        n = kernel.peek()
        while n:
            data, res, res2 = kernel.columns(n)
            queue.rejected.extend(
                map(Completion, zip(map(queue.in_flight_table.pop, data), res, res2, strict=True))
            )
            n = kernel.advance_and_peek(n)

    def reap(self) -> list[Completion]:
        """Everything that has completed; callbacks have run, what they raised is in `raised`."""
        reaped: list[Completion] = []
        self.fetch()
        while self.queue.rejected:
            completion = self.queue.rejected.popleft()
            complete_one(completion.request)
            reaped.append(completion)
            if completion.request.callback is not None:
                try:
                    completion.request.callback(completion)
                except Exception as error:  # noqa: BLE001 - whatever it is, tests look at it
                    self.raised.append(error)
        self.queue.kick()
        return reaped

    def withdraw(self, request: Request, res: int) -> bool:
        """`SubmissionQueue.withdraw`, which the kernel has to be told of."""
        done = self.queue.withdraw(request, res)
        if done:
            self.kernel.withdrawn(request)
        return done


class ObservedLock:
    """A re-entrant lock that tells when a thread has to wait for it."""

    def __init__(self, on_wait: Callable[[], object]) -> None:
        self._lock = threading.RLock()
        self._on_wait = on_wait

    def acquire(self, blocking: bool = True) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        if blocking:
            self._on_wait()
            return self._lock.acquire()
        return False

    def release(self) -> None:
        self._lock.release()

    def _is_owned(self) -> bool:
        owned: Callable[[], bool] = getattr(self._lock, "_is_owned")  # noqa: B009 - not in stubs
        return owned()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        t: type[BaseException] | None,
        v: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.release()


class InThread:
    """A call in a thread of its own."""

    def __init__(self, action: Callable[[], object], moved_on: threading.Event) -> None:
        self._action = action
        self._moved_on = moved_on
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - raised again by join
            self._failures.append(error)
        finally:
            self._moved_on.set()

    def run_until(self) -> None:
        """Start it; return when it has ended, or somebody says that it has moved on."""
        self._thread.start()
        self._moved_on.wait()

    def join(self) -> None:
        """Wait for its end, and raise what it has raised."""
        self._thread.join()
        for failure in self._failures:
            raise failure


@cache
def switch_points(code: CodeType) -> frozenset[int]:
    """The offsets of the instructions that another thread's may come before.

    With a GIL they are those behind calls and the start, and those that are jumped back to. (3.11's
    PRECALL is a part of the call: it does not look whether the GIL is wanted.)
    """
    everywhere = not getattr(sys, "_is_gil_enabled", lambda: True)()
    points: set[int] = set()
    switches = False
    for instruction in dis.get_instructions(code):
        if switches or everywhere:
            points.add(instruction.offset)
        switches = instruction.opname.startswith(("RESUME", "CALL"))
        if instruction.opname.startswith("JUMP_BACKWARD"):
            points.add(instruction.argval)
    return frozenset(points)


@contextmanager
def each_instruction(look: Callable[[CodeType, int], object]) -> Generator[None]:
    """Call look with code and offset, before each instruction of rawaio's in this thread."""
    me = threading.get_ident()
    if sys.version_info >= (3, 12):
        monitoring = sys.monitoring
        tool, event = 4, monitoring.events.INSTRUCTION

        def on_instruction(code: CodeType, offset: int) -> object:
            if not code.co_filename.startswith(PACKAGE):
                return monitoring.DISABLE
            if threading.get_ident() == me:
                look(code, offset)
            return None

        monitoring.use_tool_id(tool, "switch points")
        monitoring.register_callback(tool, event, on_instruction)
        monitoring.set_events(tool, event)
        try:
            yield
        finally:
            monitoring.set_events(tool, 0)
            monitoring.register_callback(tool, event, None)
            monitoring.free_tool_id(tool)
    else:

        def on_event(frame: FrameType, event: str, argument: object) -> object:
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            if event == "opcode":
                look(frame.f_code, frame.f_lasti)
            return on_event

        tracer = sys.gettrace()
        sys.settrace(cast("Any", on_event))
        try:
            yield
        finally:
            sys.settrace(tracer)


@contextmanager
def at_switch_point(number: int, act: Callable[[], object]) -> Generator[list[int]]:
    """Call act once, at the number-th place in rawaio's code where another thread may run.

    Yields a list whose one item is how many such places were passed.
    """
    passed = [0]

    def look(code: CodeType, offset: int) -> None:
        if offset in switch_points(code):
            if passed[0] == number:
                act()
            passed[0] += 1

    with each_instruction(look):
        yield passed


def interleave(
    make: Callable[[], tuple[SubmissionQueue, Callable[[], object], Callable[[], object]]],
    check: Callable[[], object],
) -> int:
    """Run two calls on one queue, with the second at each switch point of the first in turn.

    make returns a new queue, and the two. The second runs in a thread of its own, to its end, or
    until it has to wait for a lock that the first holds. Returns how many runs that took.
    """
    number = 0
    while True:
        queue, first, second = make()
        moved_on = threading.Event()
        queue.lock, queue.turn = ObservedLock(moved_on.set), ObservedLock(moved_on.set)
        beside = InThread(second, moved_on)
        with at_switch_point(number, beside.run_until) as passed:
            first()
        if passed[0] <= number:
            return number
        beside.join()
        check()
        number += 1

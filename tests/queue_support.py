"""What several tests share."""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rawaio.queue import SubmissionQueue
from rawaio.request import Completion, Request, complete_one
from rawaio.testing import SimulatedKernel

PACKAGE_FILES = "/rawaio/"


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
                map(Completion, zip(map(queue.take, data), res, res2, strict=True))
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

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.on_wait: Callable[[], object] = lambda: None

    def acquire(self, blocking: bool = True) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        if blocking:
            self.on_wait()
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


@contextmanager
def at_switch_point(number: int, act: Callable[[], object]) -> Generator[list[int]]:
    """Call act once, at the number-th place in rawaio's code where another thread may run.

    Yields a list whose one item is how many such places were passed. With a GIL they are behind
    calls, jumps back and the starts of functions; without one, everywhere.
    """
    everywhere = not getattr(sys, "_is_gil_enabled", lambda: True)()
    passed = [0]

    def on_call(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if PACKAGE_FILES not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        code = frame.f_code.co_code
        before = "RESUME"

        def on_opcode(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            nonlocal before
            if event == "opcode":
                if everywhere or before.startswith(("RESUME", "CALL", "PRECALL", "JUMP_BACKWARD")):
                    if passed[0] == number:
                        act()
                    passed[0] += 1
                before = dis.opname[code[frame.f_lasti]]
            return on_opcode

        return on_opcode

    tracer = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield passed
    finally:
        sys.settrace(tracer)


def interleave(
    make: Callable[[], tuple[SubmissionQueue, Callable[[], object], Callable[[], object]]],
    check: Callable[[], object],
) -> int:
    """Run two calls on one queue, with the second at each switch point of the first in turn.

    make returns a new queue, and the two. The second runs in a thread of its own, to its end, or
    until it has to wait for the lock that the first holds. Returns how many runs that took.
    """
    number = 0
    while True:
        queue, first, second = make()
        lock = ObservedLock()
        queue.lock = lock
        moved_on = threading.Event()
        lock.on_wait = moved_on.set
        beside = InThread(second, moved_on)
        with at_switch_point(number, beside.run_until) as passed:
            first()
        if passed[0] <= number:
            return number
        beside.join()
        check()
        number += 1

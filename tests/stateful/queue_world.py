"""The rules that queue and kernel are run under, and a model beside them.

A `World` is one queue on one kernel, the model of what it must hold, and the actions that tests
may take in any order. What differs between kernels is a `Harness`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol, cast

import pytest

from rawaio import BusyError, IOContext
from rawaio.queue import PlugSection, QueueFullError, SubmissionQueue
from rawaio.request import Completion, Request, State
from rawaio.syscalls import Opcode
from rawaio.testing import Chances, SimulatedKernel
from tests.queue_support import Driver

NR_EVENTS = 3
MAX_BATCH = 3
MAX_PENDING = 7  # of the queue on its own; a context waits instead of raising
BAD_FD = (1 << 31) - 1
FILE_SIZE, READ_SIZE = 3, 8

# kind of request -> its result, and what the simulated kernel has to be told to give it
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "poll": (select.POLLIN, {"res": select.POLLIN}),  # completes when it is told to
    "null": (1, {"at_once": True}),
    "bad": (-errno.EBADF, {"refuse": errno.EBADF}),  # refused by io_submit
    "sealed": (-errno.EPERM, {"res": -errno.EPERM, "at_once": True}),  # fails in its event
    "short": (FILE_SIZE, {"res": FILE_SIZE, "at_once": True}),
}
# What a request's callback does.
ACTS = ("nothing", "silent", "submit", "section", "reap", "raise", "again", "submit and reap")


class Spec(NamedTuple):
    """A request to be made."""

    kind: str
    act: str
    child: Spec | None  # what its callback submits, if it does


class CallbackError(Exception):
    """What callbacks raise."""


class Files:
    """Descriptors for requests, used again and again."""

    def __init__(self) -> None:
        self.null = os.open("/dev/null", os.O_RDWR)
        self.file = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.write(self.file, bytes(FILE_SIZE))
        fcntl.fcntl(self.file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        self._pipes: list[tuple[int, int]] = []

    def pipe(self) -> tuple[int, int]:
        """An empty pipe."""
        return self._pipes.pop() if self._pipes else os.pipe2(os.O_NONBLOCK)

    def give_back(self, pipe: tuple[int, int], *, written: bool) -> None:
        """Take the pipe back, with or without a byte in it."""
        if written:
            os.read(pipe[0], 1)
        self._pipes.append(pipe)

    def close(self) -> None:
        for fd in (self.null, self.file, *(fd for pipe in self._pipes for fd in pipe)):
            os.close(fd)


class Harness(Protocol):
    """A queue and a kernel."""

    queue: SubmissionQueue
    exact: bool  # whether each request has the result of its kind

    def prepare(self, request: Request, kind: str) -> None: ...
    def submit(self, requests: Sequence[Request]) -> None: ...
    def section(self) -> PlugSection: ...
    def reap(self) -> list[Completion]: ...
    def waiting(self) -> list[Request]: ...
    def finish(self, request: Request, pipe: tuple[int, int] | None) -> None: ...
    def cancel(self, request: Request) -> bool: ...
    def calm(self) -> None: ...
    def close(self) -> None: ...


class QueueHarness:
    """The queue alone, on a simulated kernel that may do what it likes."""

    def __init__(self, seed: int, chances: Chances) -> None:
        self.kernel = SimulatedKernel(NR_EVENTS, seed=seed, chances=chances, nr=NR_EVENTS + 2)
        self.driver = Driver(self.kernel, max_batch=MAX_BATCH, max_pending=MAX_PENDING)
        self.queue = self.driver.queue
        self.exact = False

    def prepare(self, request: Request, kind: str) -> None:
        pass  # its fate is drawn

    def submit(self, requests: Sequence[Request]) -> None:
        self.queue.push(requests)

    def section(self) -> PlugSection:
        return self.queue.section()

    def reap(self) -> list[Completion]:
        return self.driver.reap()

    def waiting(self) -> list[Request]:
        return self.kernel.running

    def finish(self, request: Request, pipe: tuple[int, int] | None) -> None:
        if pipe is not None:
            os.write(pipe[1], b"x")
        self.kernel.complete(request)

    def cancel(self, request: Request) -> bool:
        return self.driver.withdraw(request, -errno.ECANCELED)

    def calm(self) -> None:
        self.kernel.answers.clear()
        self.kernel.chances = Chances()
        self.kernel.slots = max(self.kernel.slots, 1)

    def close(self) -> None:
        reveal(self.driver.raised)


class ContextHarness:
    """A context on the real kernel, by its ring or by io_getevents."""

    def __init__(self, *, force_syscalls: bool) -> None:
        self.context = IOContext(NR_EVENTS, max_batch=MAX_BATCH, force_syscalls=force_syscalls)
        self.queue = self.context._queue
        self.exact = True
        self._finished: set[Request] = set()
        self._raised: list[BaseException | None] = []
        self._stack = ExitStack()
        self._stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = lambda unraisable: self._raised.append(unraisable.exc_value)

    def prepare(self, request: Request, kind: str) -> None:
        self._finished.discard(request)

    def submit(self, requests: Sequence[Request]) -> None:
        self.context.submit(*requests)

    def section(self) -> PlugSection:
        return self.context.plugged()

    def reap(self) -> list[Completion]:
        return self.context.reap()

    def waiting(self) -> list[Request]:
        in_flight = sorted(self.queue.in_flight_table.items())
        return [r for _, r in in_flight if r.opcode is Opcode.POLL and r not in self._finished]

    def finish(self, request: Request, pipe: tuple[int, int] | None) -> None:
        assert pipe is not None
        # The eventfd tells when the event is there; usually that is before write returns.
        self.context._kernel.reset()
        os.write(pipe[1], b"x")
        poller = select.poll()
        poller.register(self.context.fileno(), select.POLLIN)
        poller.poll()
        self._finished.add(request)

    def cancel(self, request: Request) -> bool:
        return request.state is State.PENDING and self.context.cancel(request)

    def calm(self) -> None:
        pass

    def close(self) -> None:
        self._stack.close()
        self.context.close()
        reveal(self._raised)


class SimulatedContextHarness(ContextHarness):
    """A context on a simulated kernel that does as the real one."""

    def __init__(self) -> None:
        super().__init__(force_syscalls=True)
        self.kernel = SimulatedKernel(NR_EVENTS)
        cast("Any", self.context)._by_syscall = self.kernel
        self.queue._submit = self.kernel

    def prepare(self, request: Request, kind: str) -> None:
        self.kernel.plan(request, **KINDS[kind][1])

    def waiting(self) -> list[Request]:
        return self.kernel.running

    def finish(self, request: Request, pipe: tuple[int, int] | None) -> None:
        assert pipe is not None
        os.write(pipe[1], b"x")
        self.kernel.complete(request)

    def cancel(self, request: Request) -> bool:
        done = super().cancel(request)
        if done:
            self.kernel.withdrawn(request)
        return done

    def close(self) -> None:
        for request in self.kernel.running:  # some are, when a test has failed
            self.kernel.complete(request)
        super().close()


def reveal(errors: Sequence[BaseException | None]) -> None:
    """Raise what callbacks have raised without being asked to."""
    for error in errors:
        if error is not None and type(error) is not CallbackError:
            raise error


class World:
    """A harness, the model, and what may be done to both."""

    def __init__(self, harness: Harness, files: Files) -> None:
        self.harness = harness
        self.queue = harness.queue
        self.files = files
        self.pushes = 0
        #: Pushed and not yet given back -> how many pushes came before.
        self.open: dict[Request, int] = {}
        #: Its callback was called, and no reap has returned it.
        self.called: dict[int, Completion] = {}
        self.done: list[Request] = []
        self.sections: list[PlugSection] = []
        #: What a user has seen, in order.
        self.seen: list[tuple[object, ...]] = []
        self._kinds: dict[Request, Spec] = {}
        self._pipes: dict[Request, tuple[int, int]] = {}
        self._written: set[Request] = set()
        self._cancelled: set[Request] = set()
        self._again: dict[Request, int] = {}
        self._made = 0

    # -- actions ------------------------------------------------------------------------------

    def submit(self, specs: Sequence[Spec]) -> None:
        self._push([self._make(spec) for spec in specs])

    def submit_again(self, place: int) -> None:
        """Submit a completed request again."""
        if self.done:
            self._push([self.done.pop(place % len(self.done))])

    def submit_refused(self, spec: Spec) -> None:
        """What is under way, or is there twice, is refused, and its neighbours with it."""
        request = self._make(spec)
        for other in (request, *self.open):
            before = self.view()
            with pytest.raises(BusyError):
                self.harness.submit([request, other])
            assert self.view() == before
            assert request.state is State.NEW
        self._push([request])

    def enter(self) -> None:
        section = self.harness.section()
        section.__enter__()
        self.sections.append(section)

    def leave(self, place: int) -> None:
        if self.sections:
            self.sections.pop(place % len(self.sections)).__exit__(None, None, None)

    def abandon(self, place: int) -> None:
        """Let a section be collected instead of leaving it."""
        if self.sections:
            del self.sections[place % len(self.sections)]

    def finish(self, place: int) -> None:
        """Have a request completed by the kernel, any of those it has."""
        waiting = self.harness.waiting()
        if waiting:
            request = waiting[place % len(waiting)]
            if request in self._pipes:
                self._written.add(request)
            self.harness.finish(request, self._pipes.get(request))

    def reap(self) -> list[Completion]:
        reaped = self.harness.reap()
        for completion in reaped:
            request = completion.request
            if request.callback is None:
                self._completed(completion)
            else:
                assert self.called.pop(id(completion)) is completion
            self.seen.append(("returned", request.user_data))
        return reaped

    def cancel(self, place: int) -> None:
        pending = list(self.queue.pending)
        if pending:
            request = pending[place % len(pending)]
            assert self.harness.cancel(request)
            self._cancelled.add(request)

    def kick(self) -> None:
        self.queue.kick()

    def drain(self) -> None:
        """Do what the law says until all is given back; it must be enough."""
        self.harness.calm()
        while self.sections:
            self.leave(0)
        for _ in range(100 * (len(self.open) + self._made + 1)):
            self.check()
            if self.reap():
                continue
            if not self.open:
                break
            if self.harness.waiting():
                self.finish(len(self.open))
            elif self.queue.retry_in is not None:
                self.kick()
            else:
                raise AssertionError(f"stalled: {self.view()}")
        assert not self.open
        assert not self.called
        assert self.queue.outstanding == 0

    def close(self) -> None:
        self.harness.close()
        for request, pipe in self._pipes.items():
            self.files.give_back(pipe, written=request in self._written)
        self._pipes.clear()

    # -- what must hold -----------------------------------------------------------------------

    def check(self) -> None:
        queue = self.queue
        queue._check()
        assert queue.in_flight <= NR_EVENTS
        assert queue.plugged == len(self.sections)
        assert queue.submitted == self.pushes
        in_flight = [r for _, r in sorted(queue.in_flight_table.items())]
        rejected = [c.request for c in queue.rejected]
        places = [*in_flight, *queue.pending, *rejected]
        assert len(places) == len(set(places)), "a request is in two places"
        assert set(places) == set(self.open), "a request is lost, or not given back"
        order = [self.open[r] for r in (*in_flight, *queue.pending)]
        assert order == sorted(order), "not first in, first out"

    def view(self) -> tuple[object, ...]:
        """What can be seen of the queue from outside."""
        queue = self.queue
        return (
            [r.user_data for r in queue.pending],
            [r.user_data for _, r in sorted(queue.in_flight_table.items())],
            [(c.request.user_data, c.res) for c in queue.rejected],
            [(r.user_data, r.state) for r in self.open],
            (queue.plugged, queue.blocked, queue.retry_in),
            (queue.submitted, queue.io_submit_calls, queue.eagain),
        )

    # -- inside -------------------------------------------------------------------------------

    def _make(self, spec: Spec) -> Request:
        files = self.files
        callback: Callable[[Completion], object] | None = self._on_completion
        if spec.act == "silent":
            callback = None
        self._made += 1
        name = f"{spec.kind} {self._made}"
        request: Request
        if spec.kind == "poll":
            pipe = files.pipe()
            request = Request.poll(pipe[0], select.POLLIN, callback=callback, user_data=name)
            self._pipes[request] = pipe
        elif spec.kind == "short":
            buffer = bytearray(READ_SIZE)
            request = Request.pread(files.file, buffer, 0, callback=callback, user_data=name)
        else:
            fd = {"null": files.null, "bad": BAD_FD, "sealed": files.file}[spec.kind]
            request = Request.pwrite(fd, b"x", 0, callback=callback, user_data=name)
        self._kinds[request] = spec
        return request

    def _push(self, requests: list[Request]) -> None:
        for request in requests:
            self.harness.prepare(request, self._kinds[request].kind)
        before = dict(self.open)
        pushes = self.pushes
        self._note(requests)
        try:
            self.harness.submit(requests)
        except QueueFullError:
            assert len(self.queue.pending) + len(requests) > MAX_PENDING
            self.open, self.pushes = before, pushes

    def _note(self, requests: list[Request]) -> None:
        for request in requests:
            assert request not in self.open
            self.open[request] = self.pushes
            self.pushes += 1

    def _completed(self, completion: Completion) -> None:
        request = completion.request
        del self.open[request]
        self.done.append(request)
        result = completion.res if completion.res < 0 else request.poll_result(completion.res)
        if request in self._cancelled:
            self._cancelled.discard(request)
            assert result == -errno.ECANCELED
        elif self.harness.exact:
            assert result == KINDS[self._kinds[request].kind][0]
        if request in self._written:
            self._written.discard(request)
            os.read(self._pipes[request][0], 1)
        self.seen.append(("completed", request.user_data, result))

    def _on_completion(self, completion: Completion) -> None:
        assert id(completion) not in self.called
        self.called[id(completion)] = completion
        self._completed(completion)
        request = completion.request
        spec = self._kinds[request]
        act = spec.act
        if act == "raise":
            raise CallbackError
        if act == "again" and self._again.setdefault(request, 0) < 2:
            self._again[request] += 1
            if request in self.done:
                self.done.remove(request)
                self._push([request])
        if spec.child is not None:
            if act in ("submit", "submit and reap"):
                self.submit([spec.child])
            elif act == "section":
                with self.harness.section():
                    self.submit([spec.child])
                    self.submit([spec.child])
        if act in ("reap", "submit and reap"):
            self.reap()

"""L3: what stands between files and an event loop: operations wait, start, complete.

Files know no event loop. They make an `Operation` and give it to a `Driver`, which submits once per
turn of the loop and completes it when its event is reaped. What is the loop's own, how to wait, to
be called soon, to watch a descriptor, is a handful of methods that a subclass in `loops` gives.

Laws:

- Every operation that was taken finishes once: with a result, with an error, or withdrawn before it
  started. `Operation.completed` may be repeated after an exception from outside, and is written so.
- At most nr_events operations are started; the others wait, first come, first served, and hold no
  buffer of rawaio's. What would block goes to threads, at most `MAX_THREADS` at a time.
- Nothing here blocks the loop: what is submitted on it either carries RWF_NOWAIT or is bounded, by
  `_TURN_BYTES` a turn.
- Memory that was lent by the caller is the kernel's until the operation has finished; who is
  cancelled waits for that (`settle`). Then nothing here refers to it any more, in no thread: a
  `bytearray` can be resized at once. Memory of rawaio's own is left to the operation.
- Everything runs in the loop's thread, but for `Operation.perform`.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import warnings
import weakref
from abc import abstractmethod
from collections import deque
from itertools import islice, repeat, starmap
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Protocol

from ._uninterrupted import uninterrupted
from .context import IOContext
from .errors import ClosedError, ForkedError, RawAIOError
from .operation import Call, Operation, Phase, Waiter
from .queue import MAX_PASSES
from .request import Completion, Request, State
from .unraisable import report
from .workers import MAX_THREADS, Workers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .protocols import PolledRing

__all__ = ["Driver", "LanesSide", "Owned", "Plug"]

# What one turn of the loop may submit. The kernel pins the pages and builds the bios of a direct
# transfer inside io_submit, which takes 0.1 to 0.6 ms a MiB.
_TURN_BYTES: Final = 4 << 20

_PACKAGE: Final = os.path.join(os.path.dirname(__file__), "")
# How many sizes of reads scratch views are kept for.
_SIZES: Final = 256
# Answers from the page cache between two turns of the loop, in all and for one task alone. One
# takes one or two microseconds.
_TURN_CREDIT: Final = 512
_RUN_CREDIT: Final = 64


class Owned(Protocol):
    """What is closed with a driver: a context, or a lane."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        ...

    def close(self) -> None:
        """Wait for the kernel, and give everything back. Can block."""
        ...


class LanesSide(Protocol):
    """What the driver needs of `many.Lanes`."""

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        ...

    def move(self, driver: Driver, /) -> None:
        """The driver is attached to a loop."""
        ...

    def leave(self, driver: Driver, /) -> None:
        """The driver leaves its loop."""
        ...


class Driver:
    """Operations on their way through one event loop.

    For use in the loop's thread. `engine` is "aio", or "threads" where the kernel refused
    io_setup; it is found out at the first operation that needs it.
    """

    def __init__(self, *, nr_events: int = 128, max_batch: int = 32) -> None:
        self.nr_events = nr_events
        self.max_batch = max_batch
        #: What may still be answered at once before the loop has its turn; see `breathe`.
        self.credit = _RUN_CREDIT
        #: The thread that the loop was last seen in.
        self.thread = 0
        #: Whether waiters may belong to another loop.
        self.moved = False
        self.refusal: RawAIOError | None = None
        self._context: IOContext | None = None
        self._denied: OSError | None = None
        self._waiting: deque[Operation] = deque()
        # Whose the requests are that the context has. Not in the requests: the context's table,
        # which lives as long as the kernel has something, would keep a driver alive for nothing.
        self._started: dict[Request, Operation] = {}
        self._arrived: deque[Completion] = deque()
        self._soon = False
        # How many bytes may still be submitted in this turn of the loop.
        self._share = _TURN_BYTES
        self._plugs = 0
        self._heavy: deque[Operation] = deque()
        self._performing: set[Operation] = set()
        # Operation, request, result. The list is emptied here, whoever else still has it.
        self._performed: deque[list[Any]] = deque()
        self._told = False
        self._workers = Workers()
        self._breathing = 0
        self._idle: list[Waiter] = []
        self._retrying = False
        self._pid = os.getpid()
        # What is to be closed for a driver that nobody shuts down.
        self.owned: list[Owned] = []
        self._finalizer = weakref.finalize(self, _retire, self.owned, self._workers)
        #: Where many operations are done at a time; made and set by `many`.
        self.lanes: LanesSide | None = None
        #: Memory to read cached data into, the same in a list, and what such a read takes of
        #: `credit`; by its size.
        self.scratch: dict[int, tuple[memoryview, list[memoryview], int]] = {}
        self._scratch = memoryview(b"")
        #: What the files of this driver share, by device and inode.
        self.shared: weakref.WeakValueDictionary[tuple[int, int, int], Any] = (
            weakref.WeakValueDictionary()
        )
        _live.add(self)

    # -- the loop's part ------------------------------------------------------------------------

    @abstractmethod
    def waiter(self) -> Waiter:
        """Something new to sleep on."""
        raise NotImplementedError

    @abstractmethod
    def check_running(self) -> None:
        """See that this is the loop that runs, in this thread; note the thread.

        Raises:
            ClosedError, ForkedError, RuntimeError.
        """
        raise NotImplementedError

    @abstractmethod
    def _runs_here(self) -> bool:
        """Whether the loop runs in this thread now; note the thread."""
        raise NotImplementedError

    @abstractmethod
    def _call_soon(self, callback: Callable[[], object]) -> None:
        """Have it called in the loop's next turn."""
        raise NotImplementedError

    @abstractmethod
    def _call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        raise NotImplementedError

    @abstractmethod
    def _call_threadsafe(self, callback: Callable[[], object]) -> None:
        """Have it called soon; from any thread. Does nothing when the loop is gone."""
        raise NotImplementedError

    @abstractmethod
    def _watch(self, fd: int, callback: Callable[[], object], ring: PolledRing) -> None:
        """Have it called whenever fd is readable; ring: whose completions make it so."""
        raise NotImplementedError

    @abstractmethod
    def _unwatch(self, fd: int) -> None:
        raise NotImplementedError

    @abstractmethod
    def wake(self, waiter: Waiter, result: object, error: BaseException | None) -> None:
        """Give a waiter, of whatever loop, its result or its error."""
        raise NotImplementedError

    @abstractmethod
    async def guard(self) -> None:
        """See to it that the loop ends this driver when it ends, if it can."""
        raise NotImplementedError

    @abstractmethod
    def settle(self, operation: Operation) -> Awaitable[Any]:
        """Wait for an operation; when cancelled, withdraw it or wait for its end."""
        raise NotImplementedError

    @abstractmethod
    def abandon(self, operation: Operation) -> None:
        """Nobody will wait for an operation any more; it holds no memory of the caller's."""
        raise NotImplementedError

    @abstractmethod
    def pause(self) -> Awaitable[None]:
        """Let every other task run once."""
        raise NotImplementedError

    # -- the kernel's part ----------------------------------------------------------------------

    def aio(self, *, required: bool = False) -> bool:
        """Whether there is native AIO. Makes the context at the first call; that takes 0.1 ms.

        required: raise where there is none.

        Raises:
            OSError: io_setup's, with advice. ENOSYS and EPERM only when required.
            ClosedError, ForkedError.
        """
        self._check()
        if self._context is None and self._denied is None:
            try:
                context = IOContext(self.nr_events, max_batch=self.nr_events)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EPERM):
                    raise
                self._denied = error
            else:
                self._context = context
                self.owned.append(context)
                # Anew: at the end of the program the newest goes first, before the context's.
                self._finalizer.detach()
                self._finalizer = weakref.finalize(self, _retire, self.owned, self._workers)
                self._watch(context.fileno(), self._on_readable, context)
        if self._denied is not None:
            if required:
                raise self._denied
            _warn_once(self._denied)
        return self._context is not None

    @property
    def context(self) -> IOContext | None:
        """The context, once it is needed."""
        return self._context

    # -- in -------------------------------------------------------------------------------------

    def admit(self) -> None:
        """To be called before an operation is begun.

        Raises:
            ClosedError, ForkedError: it was shut down, or is the parent's.
            RuntimeError: called from another loop.
        """
        # To ask for the loop takes a system call on CPython 3.11: once a turn is often enough.
        if self.thread != get_ident() or not self._soon:
            self.check_running()
        if self.refusal is not None:
            self._check()

    @property
    def admitted(self) -> bool:
        """Whether `admit` was passed in this turn of the loop, and would be in this thread."""
        return self._soon and self.refusal is None

    def begin(self, operation: Operation) -> None:
        """Have an operation submitted in the loop's next turn, or with a full batch."""
        waiting = self._waiting
        if not self._soon:
            if not self._plugs:
                self._call_soon(self._flush)
                self._soon = True
            waiting.append(operation)
            return
        waiting.append(operation)
        if not len(waiting) % self.max_batch and not self._plugs:
            self._turn(reset=False, collect=False)

    def offload(self, operation: Operation) -> None:
        """Have an operation that may block performed in a thread."""
        try:
            self._heavy.append(operation)
            self._pump()
        except BaseException:
            self._call_soon(self._again)
            raise

    def requeue(self, operation: Operation, request: Request | None, *, offloaded: bool) -> None:
        """Have an operation go on with another request, or with the same one in a thread.

        None: with its first one. For `Operation.completed`, which is not repeated once this has
        been done. It goes before those that wait, for they have no memory yet, and it may have.
        """
        if not offloaded and not self._soon:
            self._call_soon(self._flush)
            self._soon = True
        uninterrupted(
            (setattr, operation, "request", request),
            (setattr, operation, "phase", Phase.WAITING),
            (setattr, operation, "offloaded", offloaded),
            (self._started.pop, operation.request, None),
            (self._performing.discard, operation),
            ((self._heavy if offloaded else self._waiting).appendleft, operation),
        )

    def call(
        self, function: Callable[[], object], unwanted: Callable[[Any], object] | None = None
    ) -> Call:
        """`offload` a function; await the operation's waiter.

        Raises: as `admit`.
        """
        self.admit()
        operation = Call(self, function, unwanted)
        self.offload(operation)
        return operation

    def dispose(self, function: Callable[[], object]) -> None:
        """Have a thread call a function that nobody waits for; also after `shutdown`."""
        if self._workers.stopped:
            function()
        else:
            self._heavy.append(Call(self, function))
            self._pump()

    def plugged(self) -> Plug:
        """A `with` block whose operations are submitted together at its end, at once."""
        return Plug(self)

    async def last_call(self, function: Callable[[], object]) -> None:
        """Call a function in a thread, also after `shutdown`; then it is called here."""
        if self.refusal is not None:
            function()
        else:
            await self.settle(self.call(function))

    def more_scratch(self, nbytes: int) -> tuple[memoryview, list[memoryview], int]:
        """Memory for one read of what is cached, to be copied before anything else runs."""
        if nbytes > len(self._scratch):
            self._scratch = memoryview(bytearray(nbytes))
        if len(self.scratch) >= _SIZES:
            self.scratch.clear()
        view = self._scratch[:nbytes]
        scratch = self.scratch[nbytes] = view, [view], 1 + (nbytes >> 13)
        return scratch

    async def breathe(self) -> None:
        """Let the loop have its turn, after many answers at once; then there is credit again."""
        self.check_running()
        self._breathing += 1
        try:
            await self.pause()
        finally:
            self._breathing -= 1
        # Shared among those who want it, so that a turn stays short however many they are.
        self.credit = min(max(_TURN_CREDIT // (self._breathing + 1), 1), _RUN_CREDIT)

    # -- on -------------------------------------------------------------------------------------

    def _is_stale(self) -> bool:
        """Whether this is a call that a loop still had for a driver that has left it.

        Then the loop it is in now, or will be, does everything.
        """
        return self.thread != get_ident() and not self._runs_here()

    def _flush(self) -> None:
        if self._is_stale():
            return
        try:
            self._soon = False
            self._share = _TURN_BYTES
            if not self._plugs:
                self._turn(reset=False, collect=False)
        except BaseException:
            self._soon = False
            self._call_soon(self._again)
            raise

    def _on_readable(self) -> None:
        self._turn(reset=True, collect=True)

    def _again(self) -> None:
        """The bottom half: what an exception, or the bound on passes, left behind."""
        if self._is_stale():
            return
        try:
            self._turn(reset=False, collect=True)
            self._pump()
        except BaseException:
            self._call_soon(self._again)
            raise

    def _turn(self, *, reset: bool, collect: bool) -> None:
        """Dispatch what has completed, submit what waits, and so on while that brings more."""
        context = self._context
        if context is None or context.closed:
            return
        if collect and not self._soon:
            self._share = _TURN_BYTES
        try:
            self._passes(context, reset, collect)
            retry = context.retry_in
            if retry is not None and not self._retrying:
                self._call_later(retry, self._retry)
                self._retrying = True
            if self._idle:
                self._tell_idle()
        except BaseException:
            self._call_soon(self._again)
            raise

    def _retry(self) -> None:
        if self._is_stale():
            return
        try:
            self._retrying = False
            self._turn(reset=False, collect=True)
        except BaseException:
            self._retrying = False
            self._call_soon(self._again)
            raise

    def _passes(self, context: IOContext, reset: bool, collect: bool) -> None:
        arrived = self._arrived
        for _ in range(MAX_PASSES):
            if collect:
                context.collect(arrived, reset=reset)
                reset = False
            # Also what an exception left there: its requests may be used again, once it is gone.
            if arrived:
                self._dispatch()
                if self._heavy:
                    self._pump()
            if not self._waiting or not self._submit(context):
                return
            # What completed inside io_submit is in the ring already.
            collect = True
        self._call_soon(self._again)

    def _dispatch(self) -> None:
        arrived, started = self._arrived, self._started
        while arrived:
            request, res, _ = arrived[0]
            operation = started.get(request)
            if operation is not None and operation.request is request:
                try:
                    operation.completed(res)
                except Exception as error:  # noqa: BLE001 - its task has to know
                    operation.fail(error)
            started.pop(request, None)
            arrived.popleft()

    def _submit(self, context: IOContext) -> bool:
        """Start what there is room for; whether anything was."""
        waiting = self._waiting
        room = self.nr_events - context.outstanding - len(self._arrived)
        if room <= 0:
            return False
        if self._share <= 0:
            self._flush_soon()
            return False
        batch: list[Request] = []
        taken = 0
        first = waiting[0]
        try:
            taken = self._start(batch, room)
            if batch:
                context.submit(*batch)
            deque(starmap(waiting.popleft, repeat((), taken)), maxlen=0)
        except BaseException as error:
            # Either all of the batch was taken or nothing.
            if batch and batch[0].state in (State.PENDING, State.IN_FLIGHT):
                if waiting and waiting[0] is first:
                    deque(starmap(waiting.popleft, repeat((), taken)), maxlen=0)
            elif isinstance(error, Exception):
                for operation in list(islice(waiting, taken)):
                    if operation.request is not None:
                        self._started.pop(operation.request, None)
                        operation.fail(error)
                    waiting.popleft()
                if waiting:
                    self._call_soon(self._again)
                return False
            raise
        return bool(batch)

    def _flush_soon(self) -> None:
        if not self._soon:
            self._call_soon(self._flush)
            self._soon = True

    def _start(self, batch: list[Request], room: int) -> int:
        """Start operations from the front, at most room; how many are to leave the queue."""
        taken = 0
        started = self._started
        for operation in self._waiting:
            request = None
            try:
                request = operation.start()
            except Exception as error:  # noqa: BLE001 - its task has to know
                operation.fail(error)
            taken += 1
            if request is not None:
                started[request] = operation
                batch.append(request)
                self._share -= operation.nbytes
                if len(batch) == room or self._share <= 0:
                    break
        return taken

    # -- threads --------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Have threads perform what is heavy, as many as there may be."""
        heavy, performing = self._heavy, self._performing
        while heavy and len(performing) < MAX_THREADS:
            operation = heavy[0]
            request = None
            try:
                request = operation.start()
            except Exception as error:  # noqa: BLE001 - its task has to know
                operation.fail(error)
            if operation.phase == Phase.STARTED:
                try:
                    self._workers.post(
                        (self._perform, ([operation, request],)),
                        (performing.add, operation),
                        (heavy.popleft,),
                    )
                except RuntimeError as error:  # there is no thread, and none can be started
                    heavy.popleft()
                    operation.fail(error)
            elif heavy and heavy[0] is operation:
                heavy.popleft()

    def _perform(self, work: list[Any]) -> None:
        """In a thread. work: an operation, and its request; the result is put to them.

        Once the loop has been told, this thread refers to neither but by way of work.
        """
        operation, request = work
        try:
            res = operation.perform(request)
        except BaseException as error:  # noqa: BLE001 - only MemoryError and the like come here
            res = -(getattr(error, "errno", None) or errno.EIO)
        del operation, request
        work.append(res)
        self._performed.append(work)
        if not self._told:
            self._told = True
            self._call_threadsafe(self._on_performed)

    def _on_performed(self) -> None:
        if self._is_stale():
            return
        try:
            self._told = False
            self._take_performed()
            self._pump()
            if self._idle:
                self._tell_idle()
        except BaseException:
            self._call_soon(self._on_performed)
            raise

    def _take_performed(self) -> None:
        performed, performing = self._performed, self._performing
        while performed:
            operation, request, res = performed[0]
            if operation in performing and operation.request is request:
                try:
                    operation.completed(res)
                except Exception as error:  # noqa: BLE001 - its task has to know
                    operation.fail(error)
            if operation.phase >= Phase.FINISHED:
                performing.discard(operation)
            performed.popleft().clear()

    # -- end ------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything waits or is under way."""
        if self._waiting or self._heavy or self._performing or self._arrived:
            return True
        if self.lanes is not None and self.lanes.busy:
            return True
        context = self._context
        return context is not None and not context.closed and context.outstanding > 0

    def _ended(self) -> None:
        if self._idle:
            self._tell_idle()

    def _tell_idle(self) -> None:
        if not self.busy:
            idle, self._idle = self._idle, []
            for waiter in idle:
                if not waiter.done():
                    self.wake(waiter, None, None)

    async def drained(self) -> None:
        """Wait until nothing is under way."""
        while self.busy:
            waiter = self.waiter()
            self._idle.append(waiter)
            await waiter

    async def shutdown(self) -> None:
        """Take nothing more, wait for what is under way, and give everything back.

        Idempotent. The loop is not blocked: io_destroy's 30 ms pass in a thread.
        """
        if self._pid != os.getpid():
            return
        if self.refusal is None:
            self.refusal = ClosedError("the driver of this event loop was shut down")
        await self.drained()
        if self._context is not None and not self._context.closed:
            self._unwatch(self._context.fileno())
        if self.lanes is not None:
            self.lanes.leave(self)
        closing = [Call(self, one.close) for one in self.owned if not one.closed]
        self._heavy.extend(closing)
        self._pump()
        for call in closing:
            await self.settle(call)
        self._finalizer.detach()
        self._workers.stop()

    def _check(self) -> None:
        if self.refusal is not None:
            raise type(self.refusal)(*self.refusal.args)

    def statistics(self) -> dict[str, int]:
        """How much waits and is under way."""
        return {
            "waiting": len(self._waiting),
            "in_flight": 0 if self._context is None else self._context.outstanding,
            "offloaded": len(self._heavy) + len(self._performing),
        }


class Plug:
    """See `Driver.plugged`."""

    __slots__ = ("_driver",)

    def __init__(self, driver: Driver) -> None:
        self._driver = driver

    def __enter__(self) -> None:
        self._driver._plugs += 1

    def __exit__(self, *exception: object) -> None:
        driver = self._driver
        driver._plugs -= 1
        if not driver._plugs and driver._waiting:
            driver._turn(reset=False, collect=False)


_live: Final[weakref.WeakSet[Driver]] = weakref.WeakSet()
_warned: Final[set[int]] = set()


def _warn_once(denied: OSError) -> None:
    if denied.errno not in _warned:
        _warned.add(denied.errno or 0)
        why = " ".join([str(denied), *getattr(denied, "__notes__", ())])
        level = 1
        while sys._getframe(level).f_code.co_filename.startswith(_PACKAGE):
            level += 1
        warnings.warn(
            f"no native AIO here, threads are used instead: {why}",
            RuntimeWarning,
            stacklevel=level + 1,
        )


def _retire(owned: list[Owned], workers: Workers) -> None:
    """Give back what a driver had that nobody shut down."""
    workers.stop()
    for one in owned:
        if one.closed:
            continue
        if not threading.main_thread().is_alive():
            _close(one)  # the program ends, and waits for no more threads
            continue
        try:
            threading.Thread(target=_close, args=(one,), name="rawaio close").start()
        except RuntimeError:  # no more threads
            _close(one)


def _close(one: Owned) -> None:
    try:
        one.close()
    except Exception as error:  # noqa: BLE001 - there is nobody to tell
        report(error, one)


def _after_fork_in_child() -> None:
    for driver in list(_live):
        driver.refusal = ForkedError("the driver belongs to the parent process")
        driver.thread = 0
        driver._finalizer.detach()


os.register_at_fork(after_in_child=_after_fork_in_child)

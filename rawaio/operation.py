"""L3: operations: what a task waits for, from its making to its end.

Laws:

- An operation ends once: finished, failed, or withdrawn before it was started.
- `completed` and `released` may be repeated after an exception from outside, and are written so.
"""

from __future__ import annotations

import errno
import os
from copy import copy
from typing import TYPE_CHECKING, Any, Final, Protocol

from .errors import set_written, written
from .syscalls import RWF, Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .errors import RawAIOError
    from .request import Request

__all__ = ["Call", "DriverSide", "Operation", "Phase", "Waiter", "perform"]

_NOWAIT: Final = int(RWF.NOWAIT)


class Waiter(Protocol):
    """What a task sleeps on: an `asyncio.Future`, or something that can as much."""

    def done(self) -> bool:
        """Whether it has a result or an exception, or nobody waits for it any more."""
        ...

    def set_result(self, result: Any, /) -> None:  # noqa: ANN401 - as of any future
        """Wake the task, with a result."""
        ...

    def cancel(self) -> object:
        """Nobody waits for it any more."""
        ...

    def set_exception(self, exception: Any, /) -> None:  # noqa: ANN401 - as of any future
        """Wake the task, with an exception."""
        ...

    def __await__(self) -> Generator[Any, None, Any]: ...


class DriverSide(Protocol):
    """What operations need of their driver."""

    moved: bool
    refusal: RawAIOError | None

    def admit(self) -> None:
        """Refuse, by raising, what is not to be begun."""
        ...

    def begin(self, operation: Operation, /) -> None:
        """Have it submitted in the loop's next turn."""
        ...

    def offload(self, operation: Operation, /) -> None:
        """Have it performed in a thread."""
        ...

    def requeue(self, operation: Operation, /, request: Request | None, *, offloaded: bool) -> None:
        """Have it go on with another request, or with the same one in a thread."""
        ...

    def waiter(self) -> Waiter:
        """Something new to sleep on."""
        ...

    def wake(self, waiter: Waiter, result: object, error: BaseException | None) -> None:
        """Give a waiter, of whatever loop, its result or its error."""
        ...

    def dispose(self, function: Callable[[], object]) -> None:
        """Have a thread call a function that nobody waits for."""
        ...


class Phase:
    """How far an operation is."""

    WAITING: Final = 0
    STARTED: Final = 1
    FINISHED: Final = 2
    WITHDRAWN: Final = 3


class Operation:
    """Something that a task waits for: one request, or several one after another."""

    __slots__ = ("driver", "nbytes", "phase", "request", "waiter")

    def __init__(self, driver: DriverSide, nbytes: int = 0) -> None:
        self.driver = driver
        self.waiter = driver.waiter()
        self.phase = Phase.WAITING
        self.request: Request | None = None
        self.nbytes = nbytes

    # -- for subclasses -------------------------------------------------------------------------

    def start(self) -> Request | None:
        """The request to submit next; None when there is none to submit now.

        May be called again for a request that was not taken.
        """
        raise NotImplementedError

    def completed(self, res: int) -> None:
        """`request` completed with res, bytes or -errno. May be repeated."""
        raise NotImplementedError

    def perform(self, request: Request | None) -> int:
        """Do what `start` returned, in a thread; what it returns is given to `completed`."""
        assert request is not None
        return perform(request)

    def released(self) -> None:
        """It is over, in whatever way: give back what it holds. May be repeated."""

    def cancelled(self) -> None:
        """Who waits for it was cancelled, and waits for its end: it may end early."""

    # -- its end --------------------------------------------------------------------------------

    def finish(self, result: object) -> None:
        """End it with a result. Does nothing when it is over."""
        if self.phase < Phase.FINISHED:
            if not self.waiter.done():
                if self.driver.moved:
                    self.driver.wake(self.waiter, result, None)
                else:
                    self.waiter.set_result(result)
            self.released()
            self.phase = Phase.FINISHED
            self.request = None  # the last: cut short before, it is repeated

    def fail(self, error: BaseException) -> None:
        """End it with an error. Does nothing when it is over."""
        if self.phase < Phase.FINISHED:
            if not self.waiter.done():
                if self.driver.moved:
                    self.driver.wake(self.waiter, None, error)
                else:
                    self.waiter.set_exception(error)
            self.released()
            self.phase = Phase.FINISHED
            self.request = None

    def withdraw(self) -> bool:
        """End it without a result, if it has not been started; whether that was so."""
        if self.phase == Phase.WAITING:
            self.phase = Phase.WITHDRAWN
            self.request = None
            self.released()
            return True
        return self.phase == Phase.WITHDRAWN

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it."""
        return not self.waiter.done()


def perform(request: Request) -> int:
    """Do a request by the plain system call, blocking; bytes, 0, or -errno."""
    opcode = request.opcode
    fd = request.fd if isinstance(request.fd, int) else request.fd.fileno()
    flags = request.rw_flags & ~_NOWAIT
    buffer: Any = request.buffer
    try:
        match opcode:
            case Opcode.PREAD:
                return os.preadv(fd, (buffer,), request.offset, flags)
            case Opcode.PWRITE:
                return os.pwritev(fd, (buffer,), request.offset, flags)
            case Opcode.PREADV:
                return os.preadv(fd, buffer, request.offset, flags)
            case Opcode.PWRITEV:
                return os.pwritev(fd, buffer, request.offset, flags)
            case Opcode.FSYNC:
                os.fsync(fd)
            case Opcode.FDSYNC:
                os.fdatasync(fd)
            case _:
                return -errno.EINVAL
    except OSError as error:
        return -(error.errno or errno.EIO)
    return 0


class Call(Operation):
    """A function that may block, called in a thread.

    A function that has begun is not interrupted; when nobody waits for its result any more,
    unwanted is called with it, in the thread. Function and arguments are let go before who waits
    is given the result, and an error does not hold them either.
    """

    __slots__ = ("_function", "_handed", "_outcome", "_unwanted")

    def __init__(
        self,
        driver: DriverSide,
        function: Callable[[], object],
        unwanted: Callable[[Any], object] | None = None,
    ) -> None:
        super().__init__(driver)
        self._function: Callable[[], object] = function
        self._unwanted = unwanted
        self._handed = False
        self._outcome: tuple[object, BaseException | None] | None = None

    def start(self) -> None:
        """Nothing to submit."""
        if self.wanted:
            self.phase = Phase.STARTED
        else:
            self.withdraw()

    def perform(self, request: Request | None) -> int:
        """Call the function."""
        del request
        try:
            self._outcome = self._function(), None
        except BaseException as error:  # noqa: BLE001 - it belongs to who waits
            _clear_frames(error)
            self._outcome = None, error
        return 0

    def completed(self, res: int) -> None:
        """Hand over what the function returned or raised."""
        if self._outcome is None:
            return  # it failed, and this is repeated
        # Here, where it was made. On a free-threaded build what is let go of last by another thread
        # than the one that made it lives until that one runs again, which may be asleep.
        self._function = _over
        result, error = self._outcome
        if error is not None:
            self.fail(_made_here(error))
            self._outcome = None  # whose traceback has a frame that has this call
            return
        if not self.wanted and not self._handed:
            self._dispose_of(result)
        self._handed = True  # when this is repeated, it is the task's already
        self.finish(result)

    def forgo(self) -> None:
        """Nobody takes the result, though it may have been handed over already."""
        if self.phase == Phase.FINISHED and self._outcome is not None:
            result, error = self._outcome
            if error is None:
                self._dispose_of(result)

    def _dispose_of(self, result: object) -> None:
        unwanted, self._unwanted = self._unwanted, None
        if unwanted is not None:
            self.driver.dispose(lambda: unwanted(result))


def _over() -> None:
    """In the place of a function that was called."""


def _made_here(error: BaseException) -> BaseException:
    """The same error, made by this thread; see `Call.completed`. The kernel's errors only."""
    if not isinstance(error, OSError) or type(error).__module__ != "builtins":
        return error
    mine = copy(error)
    if hasattr(error, "characters_written"):
        set_written(mine, written(error))
    mine.__cause__, mine.__context__ = error.__cause__, error.__context__
    mine.__suppress_context__ = error.__suppress_context__
    return mine.with_traceback(error.__traceback__)


def _clear_frames(error: BaseException) -> None:
    """Let go of what the functions had that ended by an error; their lines are still known.

    Not of what a function is a closure of.
    """
    traceback = error.__traceback__
    assert traceback is not None
    while (traceback := traceback.tb_next) is not None:  # the first is of who called them
        traceback.tb_frame.clear()

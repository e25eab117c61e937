"""L3: files on asyncio's event loops, uvloop's among them.

A loop has one driver, made at first use. The loop holds it, by the reader callback of its eventfd,
and by an asynchronous generator, through which the loop says that it is about to end
(`shutdown_asyncgens`, which `asyncio.run` calls); no loop is patched. A driver whose loop was
closed without that goes when it is collected: a thread then waits for the kernel and closes the
context.
"""

from __future__ import annotations

import asyncio
import weakref
from asyncio import events
from threading import get_ident
from types import AsyncGeneratorType, coroutine
from typing import TYPE_CHECKING, Any, Final

from ..driver import Driver
from ..operation import Operation, Phase, Waiter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

    from ..protocols import PolledRing

__all__ = ["AsyncioDriver", "running_driver", "shutdown"]

_drivers: Final[
    weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[AsyncioDriver]]
] = weakref.WeakKeyDictionary()


class _Over:
    """In the place of a waiter that was waited for, and has an error.

    An error has, by its traceback, the frames that it went through, and they have the operation
    and the caller's memory: an operation that had the error too would keep all that until garbage
    is collected.
    """

    __slots__ = ()

    def done(self) -> bool:
        return True

    def set_result(self, result: object, /) -> None:
        raise NotImplementedError

    set_exception = set_result

    def cancel(self) -> bool:
        return False

    def __await__(self) -> Generator[Any, None, Any]:
        raise NotImplementedError


_OVER: Final = _Over()


@coroutine
def _pause() -> Generator[None, None, None]:
    yield


class AsyncioDriver(Driver):
    """A driver on one of asyncio's loops."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        nr_events: int = 128,
        max_batch: int = 32,
    ) -> None:
        """loop: the running one, when left out. Otherwise as `Driver`."""
        super().__init__(nr_events=nr_events, max_batch=max_batch)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._attached_before = False
        self._guardian: AsyncGeneratorType[None, None] | None = None
        self._guarded: list[weakref.ref[AsyncioDriver]] = []
        self.attach(loop or asyncio.get_running_loop())

    # -- moving ---------------------------------------------------------------------------------

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Go on in this loop, with all that is waiting and under way.

        Call it in the loop's thread, or before the loop runs. Waiters of the loop before are woken
        through it.

        Raises:
            RuntimeError: still attached to a loop, or this one has a driver already.
        """
        self._check()
        if self._loop is not None:
            raise RuntimeError("the driver is attached to a loop already; detach it first")
        known = _drivers.get(loop, lambda: None)()
        if known is not None and known is not self and known.refusal is None:
            raise RuntimeError("this loop has a driver already")
        self.moved = self._attached_before
        self._attached_before = True
        self.thread = 0
        self._loop = loop
        # Methods of the loop, found once: they are called for each operation.
        self.waiter = loop.create_future  # type: ignore[method-assign]
        call_soon: Any = loop.call_soon
        self._call_soon = call_soon  # type: ignore[method-assign]
        _drivers[loop] = weakref.ref(self)
        if self._context is not None and not self._context.closed:
            self._watch(self._context.fileno(), self._on_readable, self._context)
        if self.lanes is not None:
            self.lanes.move(self)
        loop.call_soon(self._resume)

    def detach(self) -> None:
        """Leave the loop; what is waiting and under way stays, until `attach`.

        Call it in the loop's thread, or when the loop does not run.
        """
        loop = self._loop
        if loop is None:
            return
        if self._context is not None and not self._context.closed and not loop.is_closed():
            loop.remove_reader(self._context.fileno())
        if self.lanes is not None and not loop.is_closed():
            self.lanes.leave(self)
        if _drivers.get(loop, lambda: None)() is self:
            del _drivers[loop]
        guardian, self._guardian = self._guardian, None
        self._guarded.clear()  # or the guardian would end this driver
        if guardian is not None and not guardian.ag_running:
            # Here and now: the loop may never run again, and would complain of a task.
            _step(guardian.aclose())
        self._loop = None
        self.thread = 0
        del self.waiter, self._call_soon

    def _resume(self) -> None:
        if not self._runs_here():
            return  # it has left again
        self._guard()
        self._soon = self._retrying = False
        self._on_performed()
        self._again()

    # -- the loop's part ------------------------------------------------------------------------

    def pause(self) -> Awaitable[None]:
        """See `Driver`."""
        return _pause()

    def waiter(self) -> Waiter:
        """See `Driver`. Replaced by the loop's method when attached."""
        self._check()
        raise RuntimeError("the driver is not attached to a loop")

    def check_running(self) -> None:
        """See `Driver`."""
        self._check()
        if not self._runs_here():
            raise RuntimeError(
                "a file belongs to the event loop it was opened in, and that is not the one "
                "that is running here"
            )

    def _runs_here(self) -> bool:
        loop = self._loop
        if loop is None or events._get_running_loop() is not loop:
            return False
        self.thread = get_ident()
        return True

    def _call_soon(self, callback: Callable[[], object]) -> None:
        """Attached to no loop: `_resume` does everything later. Replaced when attached."""

    def _call_later(self, seconds: float, callback: Callable[[], object]) -> None:
        assert self._loop is not None
        self._loop.call_later(seconds, callback)

    def _call_threadsafe(self, callback: Callable[[], object]) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(callback)
            except RuntimeError:
                pass  # the loop is closed; nobody waits any more

    def _watch(self, fd: int, callback: Callable[[], object], ring: PolledRing) -> None:
        assert self._loop is not None
        self._loop.add_reader(fd, callback)
        watch_ring = getattr(self._loop, "watch_ring", None)  # of loops.polling
        if watch_ring is not None:
            watch_ring(ring)

    def _unwatch(self, fd: int) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(fd)

    def wake(self, waiter: Waiter, result: object, error: BaseException | None) -> None:
        """See `Driver`."""
        future: Any = waiter
        loop = future.get_loop()
        if loop is self._loop:
            _wake(future, result, error)
        else:
            try:
                loop.call_soon_threadsafe(_wake, future, result, error)
            except RuntimeError:
                pass  # that loop is closed; nobody waits any more

    async def settle(self, operation: Operation) -> Any:  # noqa: ANN401 - as of any future
        """See `Driver`."""
        try:
            return await operation.waiter
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:
            # Whoever has the error has this frame, and those of the callers, with their memory.
            operation.waiter = _OVER
            raise
        operation.cancelled()
        while not operation.withdraw() and operation.phase != Phase.FINISHED:
            # Whoever cancelled us has cancelled the waiter too.
            if operation.waiter.done():
                operation.waiter = asyncio.get_running_loop().create_future()
            try:
                await operation.waiter
            except asyncio.CancelledError as error:
                cancelled = error
            except Exception:  # noqa: BLE001 - the caller is cancelled, and never sees it
                break
        operation.waiter = _OVER
        try:
            raise cancelled
        finally:
            del cancelled

    def abandon(self, operation: Operation) -> None:
        """See `Driver`."""
        waiter = operation.waiter
        assert isinstance(waiter, asyncio.Future)
        if not waiter.cancel() and not waiter.cancelled():
            waiter.exception()  # looked at: it would be logged
        operation.withdraw()

    # -- its end --------------------------------------------------------------------------------

    async def guard(self) -> None:
        """Have the loop end this driver when it ends."""
        self._guard()

    def _guard(self) -> None:
        if self._guardian is None:
            self._guarded = [weakref.ref(self)]
            guardian = _guardian(self._guarded)
            assert isinstance(guardian, AsyncGeneratorType)
            self._guardian = guardian
            _step(self._guardian.__anext__())

    async def shutdown(self) -> None:
        """See `Driver`."""
        await super().shutdown()
        if self._loop is not None:
            self.detach()


def _wake(waiter: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if not waiter.done():
        if error is not None:
            waiter.set_exception(error)
        else:
            waiter.set_result(result)


def _step(awaitable: Awaitable[None]) -> None:
    """Await what does not wait, where nothing can be awaited."""
    try:
        awaitable.__await__().send(None)
    except StopIteration:
        pass


async def _guardian(guarded: list[weakref.ref[AsyncioDriver]]) -> AsyncGenerator[None, None]:
    """Lives as long as the loop: closed by `shutdown_asyncgens`."""
    try:
        yield
    finally:
        for reference in guarded:
            driver = reference()
            if driver is not None:
                await driver.shutdown()


def running_driver() -> AsyncioDriver:
    """The running loop's driver; made at first use.

    Raises:
        RuntimeError: no event loop is running.
    """
    loop = asyncio.get_running_loop()
    reference = _drivers.get(loop)
    driver = None if reference is None else reference()
    if driver is None or driver.refusal is not None:
        driver = AsyncioDriver(loop)
    return driver


async def shutdown() -> None:
    """Shut the running loop's driver down, if it has one."""
    reference = _drivers.get(asyncio.get_running_loop())
    driver = None if reference is None else reference()
    if driver is not None:
        await driver.shutdown()

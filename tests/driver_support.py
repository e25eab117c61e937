"""What the tests of files and drivers share: loops, turns, and completions that are held back."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import pytest

import rawaio
from rawaio.driver import Driver
from rawaio.handle import _SLOTS
from tests.context_support import LIMIT_S

_T = TypeVar("_T")


def run(main: Awaitable[_T], loop: asyncio.AbstractEventLoop | None = None) -> _T:
    """`asyncio.run`, with a limit; or in a loop of one's own, which is left open."""

    async def limited() -> _T:
        async with asyncio.timeout(LIMIT_S):
            return await main

    return asyncio.run(limited()) if loop is None else loop.run_until_complete(limited())


async def turns(n: int = 5) -> None:
    """Let the loop turn: what was to be called soon has been called then."""
    for _ in range(n):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Let the loop turn until a condition holds."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        await asyncio.sleep(0)


def wait_until(condition: Callable[[], object]) -> None:
    """The same without a loop."""
    deadline = time.monotonic() + LIMIT_S
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        tick.wait(0.001)


def skip_unless_direct(folder: Path) -> None:
    """Skip the test where there is no direct I/O."""
    probe = folder / "probe"
    probe.touch()
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no direct I/O in {folder}: {error}")
    finally:
        probe.unlink()


class Suspensions(Coroutine[Any, Any, _T]):
    """A coroutine that tells when it is suspended, by `at(n)`, n = 1, 2, ..."""

    def __init__(self, inner: Coroutine[Any, Any, _T], at: Callable[[int], object]) -> None:
        self._inner = inner
        self._at = at
        self.count = 0

    def send(self, value: Any) -> Any:
        return self._suspended(self._inner.send(value))

    def throw(self, *error: Any) -> Any:
        return self._suspended(self._inner.throw(*error))

    def close(self) -> None:
        self._inner.close()

    def _suspended(self, what: Any) -> Any:
        self.count += 1
        self._at(self.count)
        return what

    def __await__(self) -> Generator[Any, Any, _T]:
        raise NotImplementedError("for tasks")


class Gate:
    """Holds back what a driver has under way: nothing of it is known to have been done.

    `hold(threads=True)` also keeps threads from beginning what they were given.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._dispatch = driver._dispatch
        self._on_performed = driver._on_performed
        self._perform = driver._perform
        self._held = False
        self._go = threading.Event()
        self._go.set()
        patched: Any = driver
        patched._dispatch = self._gated_dispatch
        patched._on_performed = self._gated_on_performed
        patched._perform = self._gated_perform

    def close(self) -> None:
        self.release()
        for name in ("_dispatch", "_on_performed", "_perform"):
            delattr(self._driver, name)

    @property
    def arrived(self) -> bool:
        """Whether all that was begun is done, and held."""
        driver = self._driver
        assert driver.context is None or not driver.context.closed
        return (
            (driver.context is None or not driver.context.outstanding)
            and len(driver._performed) == len(driver._performing)
            and not driver._waiting
            and bool(driver._arrived or driver._performed)
        )

    def hold(self, *, threads: bool = True) -> None:
        self._held = True
        if threads:
            self._go.clear()

    def release(self) -> None:
        self._held = False
        self._go.set()
        self._dispatch()
        self._on_performed()
        driver = self._driver
        if driver.context is not None and not driver.context.closed:
            driver._again()

    def _gated_dispatch(self) -> None:
        if not self._held:
            self._dispatch()

    def _gated_on_performed(self) -> None:
        if not self._held:
            self._on_performed()

    def _gated_perform(self, work: list[Any]) -> None:
        self._go.wait()
        self._perform(work)


@contextmanager
def gated(driver: Driver) -> Generator[Gate, None, None]:
    gate = Gate(driver)
    try:
        yield gate
    finally:
        gate.close()


MOMENTS = ("at once", "under way", "twice", "too late")


class Cancelled(Generic[_T]):
    """A coroutine that is cancelled at its k-th suspension, at one of `MOMENTS`.

    At once: what it began has not been submitted yet. Under way: what it began is in flight, or
    with a thread that has not begun; twice: again while it waits for that. Too late: what it began
    is done, and the task has not been woken yet.
    """

    def __init__(self, driver: Driver, inner: Coroutine[Any, Any, _T], k: int, moment: str) -> None:
        self._driver = driver
        self._k = k
        self._moment = moment
        self._gate = Gate(driver)
        #: Whether there was a k-th suspension.
        self.reached = False
        self.task = asyncio.create_task(Suspensions(inner, self._at))

    def _at(self, n: int) -> None:
        if n == self._k:
            self.reached = True
            if self._moment == "at once":
                self.task.cancel()
            else:
                self._gate.hold(threads=self._moment != "too late")

    async def run(self, before_release: Callable[[], object] = lambda: None) -> None:
        """before_release: called while what it began is held, after it was cancelled."""
        gate = self._gate
        try:
            await until(lambda: self.reached or self.task.done())
            if self.reached and self._moment != "at once":
                await turns()
                if self._moment == "too late":
                    await until(lambda: gate.arrived or not self._driver.busy)
                    gate.release()
                    self.task.cancel()
                else:
                    for _ in range(2 if self._moment == "twice" else 1):
                        self.task.cancel()
                        await turns()
                    before_release()
                    gate.release()
            await asyncio.wait([self.task])
        finally:
            gate.close()


async def check_at_rest(file: rawaio.File) -> None:
    """Nothing is under way, held or lost, once the driver has nothing to do."""
    driver = file.driver
    await driver.drained()
    await turns()
    assert driver.statistics() == {"waiting": 0, "in_flight": 0, "offloaded": 0}
    assert not driver._performing
    assert not driver._performed
    assert not driver._arrived
    assert file.statistics().under_way == 0
    for lock in (file.lock, file._shared.appending, file._shared.unaligned):
        lock._check()
        assert len(lock) == 0
    kept = sum(nbytes * len(slots) for nbytes, slots in file._slots.items())
    assert kept + file._slots_free == _SLOTS
    every = [slot for slots in file._slots.values() for slot in slots]
    assert len(set(map(id, every))) == len(every)
    assert not driver._started

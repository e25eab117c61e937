"""A driver moved from one loop to another, with what is waiting, in flight and in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import File
from rawaio.loops.asyncio import AsyncioDriver, running_driver
from tests.context_support import LIMIT_S, Threads
from tests.driver_support import check_at_rest, gated, run, skip_unless_direct, turns, until

_BLOCK = 4096
_DATA = bytes(range(256)) * 256


@pytest.fixture
def path(tmp_path: Path) -> Path:
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(_DATA)
    return path


@pytest.fixture
def loops() -> Iterator[tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]]:
    both = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        yield both
    finally:
        for loop in both:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


def _driver(file: File) -> AsyncioDriver:
    driver = file.driver
    assert isinstance(driver, AsyncioDriver)
    return driver


async def _opened(path: Path, *, direct: bool = True) -> File:
    return await rawaio.open(path, "r+", direct=direct)


async def _closed(file: File) -> None:
    await file.close()


def test_idle(
    path: Path, loops: tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]
) -> None:
    first, second = loops
    file = run(_opened(path), first)
    driver = _driver(file)
    for loop in (second, first, second):
        driver.detach()
        driver.detach()
        driver.attach(loop)

        async def use() -> None:
            assert running_driver() is driver
            assert await file.pread(_BLOCK, 0) == _DATA[:_BLOCK]
            await file.pwrite(_DATA[:100], 0)
            await file.fsync()
            await check_at_rest(file)

        run(use(), loop)
    run(_closed(file), second)


@pytest.mark.parametrize("where", ["waiting", "in flight", "in threads", "done"])
def test_busy(
    path: Path,
    loops: tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop],
    where: str,
) -> None:
    """Tasks of the first loop are woken in it, by a driver that is in the second."""
    first, second = loops
    file = run(_opened(path, direct=where != "in threads"), first)
    file._reads_cached = False
    driver = _driver(file)
    results: list[bytes] = []
    n = 3 * driver.nr_events

    async def read(i: int) -> None:
        results.append(await file.pread(_BLOCK, i % 16 * _BLOCK))

    async def begin() -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(read(i)) for i in range(n)]
        if where == "waiting":
            await turns(1)
        elif where == "done":
            await turns(2)
            await until(lambda: gate.arrived or driver._waiting)
        else:
            await turns()
        return tasks

    async def go_on() -> None:
        gate.release()
        await driver.drained()

    async def end(tasks: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*tasks)

    with gated(driver) as gate:
        gate.hold(threads=where != "done")
        tasks = run(begin(), first)
        assert driver.busy
        assert not results
        driver.detach()
        run(turns(), first)  # what it still had to call does nothing
        driver.attach(second)
        run(turns(), first)
        run(go_on(), second)
        run(end(tasks), first)
    assert sorted(results) == sorted(_DATA[i % 16 * _BLOCK :][:_BLOCK] for i in range(n))
    run(check_at_rest(file), second)
    run(_closed(file), second)


def test_to_a_loop_in_another_thread(path: Path, threads: Threads) -> None:
    """The first loop goes on running meanwhile, and wakes the tasks that wait in it."""
    second = asyncio.new_event_loop()
    ready = threading.Event()

    def serve() -> None:
        second.call_soon(ready.set)
        second.run_forever()
        second.run_until_complete(second.shutdown_asyncgens())
        second.close()

    threads.start(serve)
    assert ready.wait(LIMIT_S)

    async def main() -> None:
        file = await _opened(path)
        driver = _driver(file)
        with gated(driver) as gate:
            gate.hold()
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(file.pread(_BLOCK, i % 16 * _BLOCK))
                for i in range(2 * driver.nr_events)
            ]
            tasks.append(asyncio.create_task(file.fsync()))
            await turns()
            driver.detach()
            attached = asyncio.wrap_future(
                asyncio.run_coroutine_threadsafe(_attached(driver, second), second)
            )
            await attached

            async def release() -> None:
                gate.release()
                await driver.drained()

            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(release(), second))
            for i, task in enumerate(tasks[:-1]):
                assert await task == _DATA[i % 16 * _BLOCK :][:_BLOCK]
            await tasks[-1]
        with pytest.raises(RuntimeError, match="belongs to the event loop"):
            await file.pread(1, 0)
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_closed(file), second))

    try:
        run(main())
    finally:
        second.call_soon_threadsafe(second.stop)
        threads.join()


async def _attached(driver: AsyncioDriver, loop: asyncio.AbstractEventLoop) -> None:
    driver.attach(loop)


def test_cancelled_after_the_move(
    path: Path, loops: tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]
) -> None:
    """A task of the first loop still waits for the memory that it lent."""
    first, second = loops
    file = run(_opened(path), first)
    driver = _driver(file)
    view = rawaio.aligned_buffer(_BLOCK)

    async def begin() -> asyncio.Task[int]:
        task = asyncio.create_task(file.preadinto(view, _BLOCK))
        await turns()
        return task

    async def cancel(task: asyncio.Task[int]) -> None:
        task.cancel()
        await turns()
        assert not task.done()

    async def end(task: asyncio.Task[int]) -> None:
        with pytest.raises(asyncio.CancelledError):
            await task

    async def go_on() -> None:
        gate.release()
        await driver.drained()

    with gated(driver) as gate:
        gate.hold()
        task = run(begin(), first)
        driver.detach()
        driver.attach(second)
        run(cancel(task), first)
        run(go_on(), second)
        run(end(task), first)
    assert view == _DATA[_BLOCK : 2 * _BLOCK]
    run(_closed(file), second)


def test_ended_with_the_loop_it_was_moved_to(path: Path) -> None:
    first = asyncio.new_event_loop()
    file = run(_opened(path), first)
    driver = _driver(file)
    driver.detach()
    first.close()

    async def use() -> None:
        driver.attach(asyncio.get_running_loop())
        await file.pread(_BLOCK, 0)
        await file.close()

    run(use())
    assert isinstance(driver.refusal, rawaio.ClosedError)
    assert driver.context is not None
    assert driver.context.closed


def test_refused(
    path: Path, loops: tuple[asyncio.AbstractEventLoop, asyncio.AbstractEventLoop]
) -> None:
    first, second = loops
    file = run(_opened(path), first)
    other = run(_opened(path), second)
    driver = _driver(file)
    with pytest.raises(RuntimeError, match="detach it first"):
        driver.attach(second)
    driver.detach()
    with pytest.raises(RuntimeError, match="has a driver already"):
        driver.attach(second)
    for call in _calls(file):
        with pytest.raises(RuntimeError, match="belongs to the event loop|not attached to a loop"):
            run(call(), first)
    driver.attach(first)
    run(_closed(file), first)
    run(_closed(other), second)

    async def shut_down() -> None:
        await driver.shutdown()

    run(shut_down(), first)
    with pytest.raises(rawaio.ClosedError):
        driver.attach(first)


def _calls(file: File) -> list[Callable[[], Any]]:
    return [
        lambda: file.pread(_BLOCK, 0),
        lambda: file.preadinto(bytearray(5), 0),
        lambda: file.pwrite(bytes(5), 0),
        lambda: file.append(b"x"),
        file.fsync,
        lambda: file.truncate(5),
        lambda: file.allocate(0, 5),
        file.close,
        lambda: anext(file.stream()),
    ]

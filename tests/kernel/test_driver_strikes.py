"""An exception out of each step of the driver, once: everything goes on, and nothing is lost."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import descriptor, syscalls
from rawaio import driver as driver_module
from rawaio.bulk import BulkLane
from rawaio.context import IOContext
from rawaio.driver import Driver
from rawaio.loops.asyncio import AsyncioDriver, _wake
from rawaio.operation import perform
from rawaio.request import Request
from rawaio.workers import Workers
from tests.context_support import unraisable
from tests.driver_support import run, skip_unless_direct, turns, until
from tests.filesystems import file_size_limit

DATA = bytes(range(256)) * 64
BLOCK = 4096


class _StruckError(BaseException):
    pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    skip_unless_direct(tmp_path)
    file = tmp_path / "file"
    file.write_bytes(DATA)
    return file


def strike(
    patch: pytest.MonkeyPatch, owner: type, name: str, *, after: bool = False
) -> Callable[[], bool]:
    """Have a method raise at its next call, before or after it has done its work."""
    method = getattr(owner, name)
    struck = False

    def struck_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal struck
        if struck:
            return method(*args, **kwargs)
        struck = True
        if after:
            method(*args, **kwargs)
        raise _StruckError

    patch.setattr(owner, name, struck_once)
    return lambda: struck


async def reads(file: rawaio.File) -> None:
    pages = await asyncio.gather(*(file.pread(512, 512 * i) for i in range(8)))
    assert b"".join(pages) == DATA[: 8 * 512]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["_turn", "_passes", "_start", "_submit", "_dispatch"])
def test_in_what_the_loop_calls(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
        async with rawaio.open(path) as file:
            struck = strike(monkeypatch, Driver, step, after=after)
            await reads(file)
            assert struck()
            await reads(file)
        assert [type(what["exception"]) for what in told] == [_StruckError]

    run(main())


def test_behind_io_submit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
        async with rawaio.open(path) as file:
            struck = strike(monkeypatch, IOContext, "submit", after=True)
            await reads(file)
            assert struck()
        assert len(told) == 1

    run(main())


def test_a_batch_that_is_refused_fails_and_the_next_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with rawaio.open(path) as file:
            with monkeypatch.context() as patch:
                patch.setattr(IOContext, "submit", _refuses)
                results = await asyncio.gather(
                    *(file.pread(512, 512 * i) for i in range(200)), return_exceptions=True
                )
            assert {type(result) for result in results} == {rawaio.BusyError}
            await reads(file)

    run(main())


def _refuses(context: IOContext, *requests: Request) -> int:
    del context
    raise rawaio.BusyError(f"{len(requests)} of them")


@pytest.mark.parametrize("step", ["_pump", "_take_performed"])
def test_in_what_is_done_for_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def main() -> None:
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
        async with rawaio.open(path, "r+") as file:
            struck = strike(monkeypatch, Driver, step)
            try:
                await file.truncate(len(DATA))
            except _StruckError:  # in the task itself
                told.append({})
            await until(struck)
            await until(lambda: not file.under_way)
            await reads(file)
        assert len(told) == 1

    run(main())


def test_where_no_thread_can_be_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with rawaio.open(path, "r+") as file:
            file.driver._workers = Workers()  # without the one that opened the file
            with monkeypatch.context() as patch:
                patch.setattr("threading.Thread.start", _no_threads)
                with pytest.raises(RuntimeError, match="can't start"):
                    await file.truncate(100)
            assert file.size == len(DATA)
            await file.truncate(100)
            assert file.size == 100

    run(main())


def test_what_is_called_in_another_thread_does_nothing(path: Path) -> None:
    """As what an old loop still had to call, while the new one runs elsewhere."""

    async def main() -> None:
        async with rawaio.open(path) as file:
            driver = file.driver
            await asyncio.sleep(0)
            read = asyncio.create_task(file.pread(512, 0))
            await asyncio.sleep(0)
            for call in (driver._flush, driver._again, driver._retry, driver._on_performed):
                await asyncio.to_thread(call)
            assert await read == DATA[:512]

    run(main())


def test_after_a_shutdown_nothing_is_begun(path: Path) -> None:
    async def main() -> None:
        file = await rawaio.open(path)
        driver = file.driver
        await rawaio.shutdown()
        with pytest.raises(rawaio.ClosedError):
            driver.admit()
        await file.close()

    run(main())


# -- the ends ------------------------------------------------------------------------------------


class _Thing:
    def __init__(self, error: Exception | None = None) -> None:
        self.closed = False
        self.error = error

    def close(self) -> None:
        self.closed = True
        if self.error is not None:
            raise self.error


def _no_threads(*args: object, **kwargs: object) -> None:
    raise RuntimeError("can't start new thread")


def test_without_threads_what_nobody_shut_down_is_closed_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("threading.Thread.start", _no_threads)
    first, second = _Thing(), _Thing(OSError(errno.EIO, "of all things"))
    closed = _Thing()
    closed.close()
    with unraisable() as seen:
        driver_module._retire([first, closed, second], Workers())
    assert (first.closed, second.closed) == (True, True)
    assert [type(error) for error, _ in seen] == [OSError]


def test_what_nobody_waits_for_is_called_at_once_when_the_threads_are_gone() -> None:
    async def main() -> None:
        driver = AsyncioDriver()
        await driver.shutdown()
        called: list[int] = []
        driver.dispose(lambda: called.append(1))
        assert called == [1]

    run(main())


def test_a_closed_loop_is_told_nothing() -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    driver = AsyncioDriver(first)
    waiter = second.create_future()
    first.close()
    second.close()
    driver._call_threadsafe(pytest.fail)
    driver.wake(waiter, 1, None)
    assert not waiter.done()
    driver.detach()
    driver._resume()  # what the loop before still had to call
    assert driver._loop is None


def test_a_waiter_is_woken_with_an_error_once() -> None:
    async def main() -> None:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        _wake(future, None, OSError(errno.EIO, "first"))
        _wake(future, None, OSError(errno.EIO, "second"))
        with pytest.raises(OSError, match="first"):
            await future

    run(main())


def test_a_request_that_no_plain_call_can_do() -> None:
    assert perform(Request.poll(0, 1)) == -errno.EINVAL


def test_reads_of_many_sizes(path: Path) -> None:
    async def main() -> None:
        async with rawaio.open(path, direct=False) as file:
            for nbytes in range(1, 600):
                assert await file.pread(nbytes, 7) == DATA[7 : 7 + nbytes]

    run(main())


def test_closed_while_a_read_waits_for_its_turn(path: Path) -> None:
    async def main() -> None:
        file = await rawaio.open(path)
        read = asyncio.create_task(file.pread(512, 0))
        await asyncio.sleep(0)
        assert file.under_way
        await file.close()
        assert await read == DATA[:512]

    run(main())


def test_the_size_without_statx(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = errno.ENOSYS

    def statx(*_: object) -> bytes:
        raise OSError(failure, "no")

    async def main() -> None:
        nonlocal failure
        async with rawaio.open(path) as file:
            monkeypatch.setattr(syscalls, "statx", statx)
            assert file.size == len(DATA)
            failure = errno.EIO
            with pytest.raises(OSError, match="no"):
                assert file.size

    run(main())


def test_the_second_descriptor_says_where_it_comes_from(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> int:
        raise OSError(errno.ENOENT, "no /proc")

    with path.open("rb") as opened, monkeypatch.context() as patch:
        patch.setattr(os, "open", refuses)
        with pytest.raises(OSError, match="no /proc") as caught:
            descriptor.buffered_twin(descriptor.Descriptor(opened.fileno(), "x", owned=False))
    assert "/proc/self/fd" in caught.value.__notes__[0]


# -- many at a time ------------------------------------------------------------------------------


def test_lanes_move_with_their_driver(path: Path) -> None:
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def use(file: rawaio.File) -> None:
        assert await file.pread_many(range(0, 8192, 512), 512) == DATA[:8192]

    async def opened() -> rawaio.File:
        file = await rawaio.open(path, direct=False)
        await use(file)
        return file

    async def end(file: rawaio.File) -> None:
        await use(file)
        await file.close()
        await rawaio.shutdown()

    try:
        file = first.run_until_complete(opened())
        driver = file.driver
        assert isinstance(driver, AsyncioDriver)
        driver.detach()
        driver.attach(second)
        second.run_until_complete(end(file))
    finally:
        first.close()
        second.close()


def test_a_lane_with_no_room_tries_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after EAGAIN with nothing in flight."""
    refusals = 3
    submit = BulkLane.submit

    def refuses(lane: BulkLane, most: int | None = None) -> int:
        nonlocal refusals
        refusals -= 1
        return 0 if refusals >= 0 else submit(lane, most)

    async def main() -> None:
        async with rawaio.open(path, direct=False) as file:
            with monkeypatch.context() as patch:
                patch.setattr(BulkLane, "submit", refuses)
                assert await file.pread_many(range(0, 8192, 512), 512) == DATA[:8192]
        assert refusals < 0

    run(main())


def test_a_lane_is_cancelled(path: Path) -> None:
    async def main() -> None:
        async with rawaio.open(path, direct=False) as file:
            for k in range(4):
                out = bytearray(16 * 100_000)
                many = asyncio.create_task(file.pread_many([0] * 100_000, 16, out))
                await turns(1 + k)
                many.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await many
                assert not file.under_way

    run(main())


def test_threads_do_many_and_what_fails_is_told(path: Path) -> None:
    async def main() -> None:
        async with rawaio.open(path, "r+", direct=False, engine="threads") as file:
            assert await file.pread_many([1] * 2000, 3) == DATA[1:4] * 2000
            with file_size_limit(len(DATA)), pytest.raises(rawaio.BulkError) as caught:
                await file.pwrite_many([0, 1 << 20], bytes(8))
            assert caught.value.errors == {1: errno.EFBIG}

    run(main())


@pytest.mark.parametrize("nbytes", [BLOCK, 777])
def test_direct_writes_that_fail_for_good(path: Path, nbytes: int) -> None:
    async def main() -> None:
        async with rawaio.open(path, "r+") as file:
            data = rawaio.aligned_buffer(2 * nbytes)
            with file_size_limit(len(DATA)), pytest.raises(rawaio.BulkError) as caught:
                await file.pwrite_many([0, 1 << 20], data)
            assert caught.value.indexes == [1]
            assert caught.value.errors[1] in (errno.EFBIG, errno.EINVAL)

    run(main())

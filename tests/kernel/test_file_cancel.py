"""Cancelled at every place where a method of a file waits, and at every moment of waiting there.

Each method is cancelled at its first suspension, at its second, and so on until it runs through;
at each of the moments that `Cancelled` knows.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import File
from rawaio.driver import Driver
from rawaio.workers import MAX_THREADS, Workers
from tests.context_support import descriptors
from tests.driver_support import (
    MOMENTS,
    Cancelled,
    Gate,
    check_at_rest,
    gated,
    run,
    skip_unless_direct,
    turns,
    until,
)
from tests.fuse_server import FuseServer
from tests.support import Interruption

_BLOCK = 4096
_SIZE = 16 * _BLOCK + 123
_OLD = bytes(range(1, 252)) * 300
_NEW = b"\xff"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(_OLD[:_SIZE])
    return path


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all, with one context: to give a context back takes longer than a test."""
    with asyncio.Runner() as runner:
        yield runner.get_loop()


def _aligned(nbytes: int) -> memoryview:
    return rawaio.aligned_buffer(nbytes)


@dataclass
class Method:
    """One way to call a method: what it does to memory, and to the file."""

    call: Callable[[File, list[memoryview]], Coroutine[Any, Any, Any]]
    buffers: Callable[[], list[memoryview]] = field(default=list[memoryview])
    # What is in the file when it has been called n times.
    after: Callable[[bytes, int], bytes] = lambda old, n: old
    # The bytes that may be changed when it was cancelled.
    touched: range = range(0)
    lent: bool = False


def _overlay(offset: int, nbytes: int) -> Callable[[bytes, int], bytes]:
    def after(old: bytes, n: int) -> bytes:
        stop = offset + nbytes
        return old[:offset].ljust(offset, b"\0") + _NEW * nbytes + old[stop:] if n else old

    return after


def _plain(*sizes: int) -> Callable[[], list[memoryview]]:
    return lambda: [memoryview(bytearray(nbytes)) for nbytes in sizes]


def _good(*sizes: int) -> Callable[[], list[memoryview]]:
    return lambda: [_aligned(nbytes) for nbytes in sizes]


def _read(nbytes: int, offset: int) -> Method:
    return Method(lambda f, _: f.pread(nbytes, offset))


def _read_into(offset: int, buffers: Callable[[], list[memoryview]]) -> Method:
    return Method(lambda f, views: f.preadv(views, offset), buffers, lent=True)


def _write(nbytes: int, offset: int, *, dsync: bool = False, aligned: bool = False) -> Method:
    def data() -> list[memoryview]:
        view = _aligned(nbytes) if aligned else memoryview(bytearray(nbytes))
        view[:] = _NEW * nbytes
        return [view]

    return Method(
        lambda f, views: f.pwrite(views[0], offset, dsync=dsync),
        data,
        _overlay(offset, nbytes),
        range(offset, offset + nbytes),
        lent=True,
    )


def _write_vector(offset: int, sizes: tuple[int, ...], *, aligned: bool) -> Method:
    def data() -> list[memoryview]:
        views = _good(*sizes)() if aligned else _plain(*sizes)()
        for view in views:
            view[:] = _NEW * len(view)
        return views

    return Method(
        lambda f, views: f.pwritev(views, offset),
        data,
        _overlay(offset, sum(sizes)),
        range(offset, offset + sum(sizes)),
        lent=True,
    )


def _append(nbytes: int) -> Method:
    def data() -> list[memoryview]:
        return [memoryview(bytearray(_NEW * nbytes))]

    return Method(
        lambda f, views: f.append(views[0]),
        data,
        lambda old, n: old + _NEW * nbytes * n,
        range(_SIZE, _SIZE + nbytes),
        lent=True,
    )


def _streamed(offset: int, length: int, chunk_size: int, depth: int) -> Method:
    async def call(file: File, views: list[memoryview]) -> list[bytes]:
        stream = file.stream(offset, length, chunk_size=chunk_size, depth=depth)
        async with aclosing(stream) as chunks:
            return [chunk async for chunk in chunks]

    return Method(call)


METHODS = {
    "pread": _read(_BLOCK, _BLOCK),
    "pread unaligned": _read(100, 4000),
    "pread at the end": _read(4 * _BLOCK, 14 * _BLOCK),
    "preadinto": _read_into(_BLOCK, _good(2 * _BLOCK)),
    "preadinto unaligned": _read_into(100, _plain(5000)),
    "preadinto in pieces": _read_into(0, _plain(_SIZE)),
    "preadv": _read_into(_BLOCK, _good(_BLOCK, _BLOCK)),
    "preadv unaligned": _read_into(5, _plain(100, 5000)),
    "preadv mixed": _read_into(_BLOCK, lambda: _good(_BLOCK)() + _plain(_BLOCK)()),
    "pwrite": _write(2 * _BLOCK, _BLOCK, aligned=True),
    "pwrite dsync": _write(2 * _BLOCK, _BLOCK, aligned=True, dsync=True),
    "pwrite unaligned": _write(5000, 4000),
    "pwrite in one block": _write(10, 4000),
    "pwrite over the end": _write(5000, 15 * _BLOCK + 5),
    "pwrite behind the end": _write(100, 20 * _BLOCK + 5),
    "pwrite extending": _write(_BLOCK, 20 * _BLOCK, aligned=True),
    "pwritev": _write_vector(_BLOCK, (_BLOCK, _BLOCK), aligned=True),
    "pwritev unaligned": _write_vector(5, (100, 5000), aligned=False),
    "append": _append(_BLOCK),
    "append unaligned": _append(77),
    "stream": _streamed(0, 8 * _BLOCK, _BLOCK, 3),
    "stream unaligned": _streamed(5, _SIZE, 5000, 2),
    "fsync": Method(lambda f, _: f.fsync()),
    "fdatasync": Method(lambda f, _: f.fdatasync()),
    "truncate": Method(
        lambda f, _: f.truncate(5000),
        after=lambda old, n: old[:5000] if n else old,
        touched=range(5000, _SIZE),
    ),
    "allocate": Method(
        lambda f, _: f.allocate(0, 20 * _BLOCK),
        after=lambda old, n: old.ljust(20 * _BLOCK, b"\0") if n else old,
        touched=range(_SIZE, 20 * _BLOCK),
    ),
}


def _fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _found(path: Path) -> bytes:
    return path.read_bytes()


async def _attempt(file: File, method: Method, k: int, moment: str) -> Cancelled[Any]:
    """Cancel a call at its k-th suspension, and see what becomes of the memory that was lent."""
    driver = file.driver
    views = method.buffers()
    attempt = Cancelled(driver, method.call(file, views), k, moment)

    def before_release() -> None:
        if method.lent and driver._performing:
            assert not attempt.task.done(), "a thread has what was lent"

    lent: list[list[bytes]] = []
    attempt.task.add_done_callback(lambda _: lent.append([bytes(view) for view in views]))
    await attempt.run(before_release)
    await driver.drained()
    assert [[bytes(view) for view in views]] == lent, "memory changed after the end"
    return attempt


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("name", METHODS)
def test_cancelled_at_every_suspension(
    path: Path, loop: asyncio.AbstractEventLoop, name: str, direct: bool, moment: str
) -> None:
    method = METHODS[name]

    async def one(k: int, expected: Any) -> bool:
        _fill(path, _OLD[:_SIZE])
        async with rawaio.open(path, "r+", direct=direct) as file:
            if not direct:
                # Nothing is answered at once, and so there is something to cancel.
                file._reads_cached = file._writes_cached = k % 2 == 0
            attempt = await _attempt(file, method, k, moment)
            await check_at_rest(file)
            if attempt.task.cancelled():
                assert attempt.reached
                _check_parts(_found(path), _OLD[:_SIZE], method)
            else:
                assert attempt.task.result() == expected
                assert _found(path) == method.after(_OLD[:_SIZE], 1)
            # It goes on as if nothing had been.
            _fill(path, _OLD[:_SIZE])
            assert await method.call(file, method.buffers()) == expected
            assert _found(path) == method.after(_OLD[:_SIZE], 1)
            await check_at_rest(file)
            fd = file.fileno()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        return attempt.reached

    async def every() -> int:
        async with rawaio.open(path, "r+", direct=direct) as file:
            expected = await method.call(file, method.buffers())
        k = 0
        while await one(k + 1, expected):
            k += 1
            assert k < 100
        return k

    reached = run(every(), loop)
    assert reached >= 1


def _check_parts(found: bytes, model: bytes, method: Method) -> None:
    """What a method that was cancelled may have left: each byte old or new."""
    whole = method.after(model, 1)
    if found in (model, whole):
        return
    assert len(found) in range(min(len(model), len(whole)), max(len(model), len(whole)) + 1)
    for i in range(max(len(found), len(model))):
        byte = found[i : i + 1]
        allowed = {model[i : i + 1], whole[i : i + 1]}
        if i >= min(len(model), len(whole)):
            allowed.add(b"\0")  # made longer, and not filled yet
            allowed.add(b"")
        assert byte in allowed, i
        if i not in method.touched and i < len(model):
            assert byte == model[i : i + 1], i


# -- open and close ------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_open_cancelled(
    path: Path, loop: asyncio.AbstractEventLoop, direct: bool, moment: str
) -> None:
    """No descriptor is left open, and none is closed by the collector, which warns."""

    async def one(driver: Driver, k: int) -> bool:
        before = descriptors()
        attempt = Cancelled(driver, rawaio.open(path, "r+", direct=direct)._opened(), k, moment)
        await attempt.run()
        if not attempt.task.cancelled():
            await attempt.task.result().close()
        reached = attempt.reached
        assert reached == attempt.task.cancelled()
        del attempt
        gc.collect()
        await driver.drained()
        await turns()
        assert descriptors() == before
        return reached

    async def every() -> None:
        async with rawaio.open(path) as other:
            k = 1
            while await one(other.driver, k):
                k += 1
            assert k > 1

    run(every(), loop)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_close_cancelled(
    path: Path, loop: asyncio.AbstractEventLoop, direct: bool, busy: bool, moment: str
) -> None:
    """Closed by the next close at the latest, and it takes nothing new from the first one on."""

    async def one(k: int) -> bool:
        file = await rawaio.open(path, "r+", direct=direct)
        fd = file.fileno()
        await file.pwrite(b"x", _SIZE - 1)  # a direct file has a buffered twin now
        file._reads_cached = False
        read = asyncio.create_task(file.pread(_BLOCK, 0)) if busy else None
        await turns(1)
        attempt = Cancelled(file.driver, file.close(), k, moment)
        await attempt.run()
        assert file.closed
        with pytest.raises(rawaio.ClosedError):
            await file.pread(1, 0)
        if read is not None:
            assert await read == _OLD[:_BLOCK]
        await file.close()
        await file.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        assert file.fileno() == -1
        assert file._twin is None or file._twin.fileno() == -1
        await file.driver.drained()
        assert file.statistics().under_way == 0
        assert not file._slots
        return attempt.reached

    async def every() -> None:
        k = 1
        while await one(k):
            k += 1
        assert k > 1

    run(every(), loop)


async def _left_behind(file: File, gate: Gate) -> asyncio.Task[bytes]:
    """A read that is held, of a file whose close was cancelled meanwhile."""
    file._reads_cached = False
    gate.hold()
    read = asyncio.create_task(file.pread(_BLOCK, 0))
    await turns()
    closing = asyncio.create_task(file.close())
    await turns()
    closing.cancel()
    await asyncio.wait([closing])
    return read


def test_a_close_behind_a_cancelled_one_waits_until_the_file_is_closed(
    path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only until a thread is about to close it."""
    closing, go, closed = threading.Event(), threading.Event(), threading.Event()
    close = os.close

    async def main() -> None:
        file = await rawaio.open(path, direct=False)
        fd = file.fileno()

        def slow(number: int) -> None:
            if number == fd:
                closing.set()
                assert go.wait(60)
            close(number)
            if number == fd:
                closed.set()

        monkeypatch.setattr(os, "close", slow)
        with gated(file.driver) as gate:
            read = await _left_behind(file, gate)
            gate.release()
        assert await read == _OLD[:_BLOCK]
        await until(closing.is_set)
        second = asyncio.create_task(file.close())
        await turns()
        waits = not second.done(), file.statistics().under_way
        go.set()
        await second
        assert waits == (True, 1)
        assert closed.is_set()
        assert file.statistics().under_way == 0

    run(main(), loop)


def test_a_file_left_behind_is_closed_by_the_next_close_after_a_strike(
    path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(*args: object) -> None:
        raise Interruption

    async def main() -> None:
        async with rawaio.open(path):  # which keeps the driver
            file = await rawaio.open(path, direct=False)
            fd = file.fileno()
            with gated(file.driver) as gate:
                read = await _left_behind(file, gate)
                (held,) = file.under_way
                with monkeypatch.context() as patch:
                    patch.setattr(file.driver, "offload", struck)
                    with pytest.raises(Interruption):
                        file.ended(held)
                assert not file.under_way
                os.fstat(fd)
                gate.release()
                assert await read == _OLD[:_BLOCK]
            await file.close()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
            assert file.statistics().under_way == 0

    run(main(), loop)


def test_a_file_left_behind_is_closed_by_what_ends_behind_the_shutdown(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When there are neither threads nor a loop's future to be had any more."""
    begun, go = threading.Event(), threading.Event()
    pwritev = os.pwritev

    def slow(fd: int, *more: Any) -> int:
        begun.set()
        assert go.wait(60)
        return pwritev(fd, *more)

    async def main() -> None:
        file = await rawaio.open(path, "r+", direct=True, engine="threads")
        fd = file.fileno()
        monkeypatch.setattr(os, "pwritev", slow)
        # One waits for the range of the other: the file counts it, and the driver does not.
        writes = [asyncio.create_task(file.pwrite(_NEW * 100, offset)) for offset in (10, 50)]
        await until(begun.is_set)
        closing = asyncio.create_task(file.close())
        await turns()
        closing.cancel()
        await asyncio.wait([closing])
        ending = asyncio.create_task(rawaio.shutdown())
        await turns()
        go.set()
        await ending
        # Whichever has the range first.
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(result) for result in results if result != 100] == [rawaio.ClosedError]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        await file.close()
        assert file.statistics().under_way == 0

    run(main())


def test_a_file_left_behind_is_closed_by_the_next_close_where_there_are_no_threads(
    path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with rawaio.open(path):  # which keeps the driver
            file = await rawaio.open(path, direct=False)
            fd = file.fileno()
            with gated(file.driver) as gate, monkeypatch.context() as patch:
                read = await _left_behind(file, gate)
                patch.setattr(Workers, "post", _no_threads)
                gate.release()
                assert await read == _OLD[:_BLOCK]
                assert file.statistics().under_way == 0
                os.fstat(fd)
            await file.close()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, what: reported.append(what))
    try:
        run(main(), loop)
        gc.collect()
    finally:
        loop.set_exception_handler(None)
    assert [str(what["exception"]) for what in reported] == ["no threads"]


def _no_threads(*args: object) -> None:
    raise RuntimeError("no threads")


def test_close_cancelled_while_all_threads_are_busy(
    path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    """A close that has not begun is taken back, and the next one closes all there is."""

    async def main() -> None:
        file = await rawaio.open(path, "r+")
        await file.pwrite(b"x", _SIZE - 1)
        twin = file._twin
        assert twin is not None
        with gated(file.driver) as gate:
            gate.hold()
            blockers = [file.driver.call(lambda: None) for _ in range(MAX_THREADS)]
            task = asyncio.create_task(file.close())
            await turns()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            gate.release()
            for blocker in blockers:
                await blocker.waiter
        await file.close()
        assert twin.fileno() == -1

    run(main(), loop)


def test_close_fails_and_closes_all(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        file = await rawaio.open(path, "r+")
        await file.pwrite(b"x", _SIZE - 1)
        assert file._twin is not None
        os.close(file._twin.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            await file.close()
        assert file.descriptor.fileno() == -1

    run(main(), loop)


# -- in flight in the kernel ---------------------------------------------------------------------


@pytest.fixture
def fuse() -> Iterator[FuseServer]:
    with FuseServer() as server:
        if not server.async_dio:
            pytest.skip("the kernel does not offer FUSE_ASYNC_DIO")
        server.write_file("file", _OLD[: 16 * _BLOCK])
        yield server


async def _opened(fuse: FuseServer) -> File:
    return await rawaio.open(fuse.path("file"), "r+", engine="aio")


async def _held(fuse: FuseServer, n: int) -> None:
    """Wait until the server holds so many requests, without blocking the loop."""
    await asyncio.to_thread(fuse.wait_held, n)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_lent_memory_is_waited_for(fuse: FuseServer, times: int) -> None:
    """However often it is cancelled, it ends when the kernel has let the memory go."""

    async def main() -> None:
        async with await _opened(fuse) as file:
            for name in ("preadinto", "preadv", "pwrite", "pwritev"):
                views = _good(_BLOCK, _BLOCK)()
                for view in views:
                    view[:] = _NEW * _BLOCK
                single = name in ("preadinto", "pwrite")
                call = getattr(file, name)(views[0] if single else views, _BLOCK)
                fuse.hold()
                task = asyncio.create_task(call)
                await _held(fuse, 1 if single else 2)
                for _ in range(times):
                    assert task.cancel()
                    await turns()
                    assert not task.done()
                assert all(view == _NEW * _BLOCK for view in views)
                fuse.unhold()
                await asyncio.wait([task])
                assert task.cancelled()
                if name == "preadinto":
                    assert views[0] == _OLD[_BLOCK : 2 * _BLOCK]
                await check_at_rest(file)
        expected = _OLD[:_BLOCK] + _NEW * 2 * _BLOCK + _OLD[3 * _BLOCK : 16 * _BLOCK]
        assert fuse.contents("file") == expected

    run(main())


def test_memory_of_ones_own_is_not_waited_for(fuse: FuseServer) -> None:
    """A read that is cancelled ends at once; its buffer comes back when the kernel is done."""

    async def main() -> None:
        file = await _opened(fuse)
        fuse.hold()
        target = bytearray(5000)
        chunks = file.stream(chunk_size=_BLOCK, depth=2)
        tasks = [
            asyncio.create_task(call)
            for call in (file.pread(_BLOCK, 0), file.preadinto(target, 3), anext(chunks))
        ]
        await _held(fuse, 1 + 2 + 2)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        driver = file.driver
        assert driver.statistics()["in_flight"] == 1 + 1 + 2
        assert file.statistics().under_way == 1 + 1 + 2
        assert not file._slots
        closing = asyncio.create_task(file.close())
        await turns()
        assert not closing.done()
        fuse.unhold()
        await closing
        assert target == bytes(5000)
        assert driver.statistics()["in_flight"] == 0

    run(main())


def test_many_that_are_cancelled_make_room(fuse: FuseServer) -> None:
    """What waits for room and is cancelled is never submitted."""

    async def main() -> None:
        async with await _opened(fuse) as file:
            nr_events = file.driver.nr_events
            fuse.hold()
            tasks = [asyncio.create_task(file.pread(_BLOCK, 0)) for _ in range(2 * nr_events)]
            await _held(fuse, nr_events)
            for task in tasks[nr_events:]:
                task.cancel()
            last = asyncio.create_task(file.pread(_BLOCK, _BLOCK))
            await turns()
            assert [task.cancelled() for task in tasks] == [False] * nr_events + [True] * nr_events
            fuse.forget()
            fuse.unhold()
            assert await last == _OLD[_BLOCK : 2 * _BLOCK]
            for task in tasks[:nr_events]:
                assert await task == _OLD[:_BLOCK]
            assert len(fuse.requests("read")) <= 1
            await check_at_rest(file)

    run(main())


def test_timeout(fuse: FuseServer) -> None:
    async def main() -> None:
        async with await _opened(fuse) as file:
            fuse.hold()
            loop = asyncio.get_running_loop()
            view = _aligned(_BLOCK)
            for call in (lambda: file.pread(_BLOCK, 0), lambda: file.pwrite(view, 0)):
                limit = asyncio.timeout(None)

                async def limited(
                    call: Callable[[], Coroutine[Any, Any, object]] = call,
                    limit: asyncio.Timeout = limit,
                ) -> None:
                    async with limit:
                        await call()

                task = asyncio.create_task(limited())
                await _held(fuse, 1)
                limit.reschedule(loop.time())
                await until(limit.expired)
                await turns()
                fuse.release()
                with pytest.raises(TimeoutError):
                    await task
            fuse.unhold()
            await check_at_rest(file)
            assert await file.pread(_BLOCK, 0) == bytes(_BLOCK)

    run(main())


def test_task_group(fuse: FuseServer) -> None:
    """One that fails ends the others, and the group ends when they have let go of memory."""

    async def main() -> None:
        async with await _opened(fuse) as file:
            fuse.hold()
            view = _aligned(_BLOCK)
            done: list[str] = []

            async def group() -> None:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(file.pread(_BLOCK, 0))
                    tasks.create_task(file.preadinto(view, _BLOCK))
                    tasks.create_task(file.pwrite(_aligned(_BLOCK), 2 * _BLOCK))
                    await _held(fuse, 3)
                    raise ZeroDivisionError

            task = asyncio.create_task(group())
            task.add_done_callback(lambda _: done.append("group"))
            await until(lambda: file.statistics().under_way >= 3)
            await _held(fuse, 3)
            await turns()
            assert not done
            fuse.unhold()
            with pytest.raises(ExceptionGroup) as caught:
                await task
            assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
            assert view == _OLD[_BLOCK : 2 * _BLOCK]
            await check_at_rest(file)

    run(main())


# -- waiting for others --------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["waiting", "granted"])
@pytest.mark.parametrize("name", ["pwrite", "pwritev", "pwrite unaligned", "truncate", "allocate"])
def test_cancelled_behind_a_hold(
    path: Path, loop: asyncio.AbstractEventLoop, name: str, moment: str
) -> None:
    """Who waits for a range and gives up lets those behind pass."""
    method = METHODS[name]

    async def main() -> None:
        async with rawaio.open(path, "r+") as file:
            hold = file.lock.acquire(0, 1 << 40, exclusive=True)
            task = asyncio.create_task(method.call(file, method.buffers()))
            await until(lambda: len(file.lock) == 2 or file._unaligned)
            await asyncio.sleep(0)
            await until(lambda: not file.driver.busy)
            await turns()
            assert len(file.lock) == 2
            behind = file.lock.acquire(0, 1 << 40, exclusive=True)
            if moment == "granted":
                file.lock.release(hold)
                task.cancel()
            else:
                task.cancel()
                await turns()
                assert task.cancelled()
                file.lock.release(hold)
            await asyncio.wait([task])
            assert task.cancelled()
            assert behind.granted
            file.lock.release(behind)
            await check_at_rest(file)
            assert _found(path) == _OLD[:_SIZE]

    run(main(), loop)

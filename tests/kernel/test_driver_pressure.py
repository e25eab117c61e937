"""More operations than there is room for, and answers of the kernel that are not the usual ones."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import File, Request, handle
from rawaio.driver import Driver
from rawaio.handle import _SLOTS
from rawaio.loops.asyncio import AsyncioDriver
from rawaio.queue import MAX_PASSES
from rawaio.request import Completion
from rawaio.transfer import BouncedRead, Patience, Slot
from rawaio.workers import MAX_THREADS
from tests.driver_support import check_at_rest, gated, run, skip_unless_direct, turns, until
from tests.support import interrupted_at

_BLOCK = 4096
_DATA = bytes(range(256)) * 256


@pytest.fixture
def path(tmp_path: Path) -> Path:
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(_DATA)
        file.flush()
        os.fsync(file.fileno())  # what is dirty makes direct reads wait, and so threads do them
    return path


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner() as runner:
        yield runner.get_loop()


class Submits:
    """What a driver gives to io_submit; `refuse` lets the next calls fail."""

    def __init__(self, file: File) -> None:
        context = file.driver.context
        assert context is not None
        queue = context._queue
        self._submit = queue._submit
        self.batches: list[int] = []
        self._refusals: list[int] = []
        queue._submit = self

    def refuse(self, *errnos: int) -> None:
        self._refusals.extend(errnos)

    def __call__(self, first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        self.batches.append(len(batch))
        if self._refusals:
            outcome.extend((-1, self._refusals.pop(0)))
        else:
            self._submit(first_token, batch, outcome)


@pytest.mark.parametrize("refused", [False, True], ids=["granted", "refused"])
def test_very_many_reads(path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """Memory for as many as are in flight, however many tasks wait; and all are answered.

    refused: what RWF_NOWAIT keeps from waiting goes to threads, and waits there without memory.
    """
    out = most = 0
    take, give = File.take_slot, File.give_slot

    def counted_take(file: File, nbytes: int) -> Any:
        nonlocal out, most
        out += 1
        most = max(most, out)
        return take(file, nbytes)

    def counted_give(file: File, slot: Any) -> None:
        nonlocal out
        out -= 1
        give(file, slot)

    monkeypatch.setattr(File, "take_slot", counted_take)
    monkeypatch.setattr(File, "give_slot", counted_give)
    n = 5_000 if refused else 100_000

    async def main() -> None:
        async with rawaio.open(path) as file:
            done = 0
            if refused:
                monkeypatch.setattr(Patience, "lost", lambda _: False)
                monkeypatch.setattr(file.driver, "_dispatch", partial(_dispatch_refused, file))

            async def read(i: int) -> None:
                nonlocal done
                offset = i % 16 * _BLOCK
                assert await file.pread(_BLOCK, offset) == _DATA[offset : offset + _BLOCK]
                done += 1

            tasks = [asyncio.create_task(read(i)) for i in range(n)]
            await asyncio.wait(tasks)
            assert done == n
            for task in tasks:
                task.result()
            assert most <= file.driver.nr_events + (MAX_THREADS if refused else 0)
            assert out == 0
            assert sum(map(len, file._slots.values())) <= most
            await check_at_rest(file)

    run(main())


def _dispatch_refused(file: File) -> None:
    """As if nothing was to be had without waiting."""
    driver = file.driver
    refused = [Completion((c.request, -errno.EAGAIN, 0)) for c in driver._arrived]
    driver._arrived.clear()
    driver._arrived.extend(refused)
    Driver._dispatch(driver)


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each buffer that files make."""
    made: list[int] = []

    def make(file: File, nbytes: int) -> Slot:
        made.append(nbytes)
        return Slot(file, nbytes)

    monkeypatch.setattr(handle, "Slot", make)
    return made


_CHUNK = 1 << 18  # more than what is kept for other reads


@pytest.fixture
def chunks(path: Path) -> list[bytes]:
    """What the file consists of."""
    data = [bytes([i]) * _CHUNK for i in range(24)]
    with path.open("wb") as file:
        file.writelines(data)
        file.flush()
        os.fsync(file.fileno())
    return data


@pytest.mark.parametrize("start", [0, 1])
def test_a_stream_has_its_buffers_while_it_lasts(
    path: Path, chunks: list[bytes], slots: list[int], start: int
) -> None:
    async def main() -> None:
        async with rawaio.open(path) as file:
            stream = file.stream(start, chunk_size=_CHUNK, depth=3)
            assert b"".join([chunk async for chunk in stream]) == b"".join(chunks)[start:]
            # The last chunk of an unaligned stream is shorter.
            assert len(slots) <= 3 + start
            assert not file._slots
            await check_at_rest(file)

    run(main())


def test_streams_have_their_buffers_one_beside_another(
    path: Path, chunks: list[bytes], slots: list[int]
) -> None:
    async def main() -> None:
        async with rawaio.open(path) as file:
            long = file.stream(chunk_size=_CHUNK, depth=2)
            assert await anext(long) == chunks[0]
            short = file.stream(0, 4 * _CHUNK, chunk_size=_CHUNK, depth=2)
            assert [chunk async for chunk in short] == chunks[:4]
            broken = file.stream(chunk_size=_CHUNK, depth=2)
            assert await anext(broken) == chunks[0]
            await broken.aclose()
            assert [chunk async for chunk in long] == chunks[1:]
            assert len(slots) <= 6
            await until(lambda: not file.statistics().under_way)
            assert not file._slots
            await check_at_rest(file)

    run(main())


def test_the_room_of_a_stream_is_taken_back(
    path: Path, chunks: list[bytes], slots: list[int]
) -> None:
    """Also when others have filled it meanwhile."""
    nbytes, n = _CHUNK // 2, 24

    async def main() -> None:
        async with rawaio.open(path) as file:
            file.reserve_slots("long", _CHUNK, 8)
            with gated(file.driver) as gate:
                gate.hold()
                tasks = [asyncio.create_task(file.pread(nbytes, i * nbytes)) for i in range(n)]
                await turns()
                gate.release()
                assert b"".join(await asyncio.gather(*tasks)) == b"".join(chunks[: n // 2])
            assert slots.count(nbytes) == len(file._slots[nbytes]) == n
            assert nbytes * n > _SLOTS
            file.reserve_slots("short", _CHUNK, 1)
            file.release_slots("long")
            assert sum(map(len, file._slots.values())) == 0
            assert file._slots_free == _SLOTS + _CHUNK
            for _ in range(2):
                file.release_slots("short")
            assert await file.pread(_CHUNK, 0) == chunks[0]
            assert not file._slots
            await check_at_rest(file)

    run(main())


def test_the_room_of_a_stream_is_taken_back_wherever_it_was_struck(path: Path) -> None:
    async def main() -> None:
        async with rawaio.open(path) as file:
            step = 0
            interrupted = True
            while interrupted:
                reserve = partial(file.reserve_slots, "stream", _CHUNK, 2)
                interrupted = interrupted_at(step, handle.__file__, reserve)
                file.release_slots("stream")
                assert file._slots_free == _SLOTS
                assert not file._reserved
                step += 1
            assert step > 10

    run(main())


def test_the_rest_waits_without_memory(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        AsyncioDriver(nr_events=4)
        async with rawaio.open(path) as file:
            with gated(file.driver) as gate:
                gate.hold()
                tasks = [asyncio.create_task(file.pread(_BLOCK, 0)) for _ in range(50)]
                await turns()
                statistics = file.driver.statistics()
                assert statistics["waiting"] == 46
                assert not file._slots
                gate.release()
                await asyncio.wait(tasks)
            assert sum(map(len, file._slots.values())) <= 4

    run(main(), loop)


@pytest.mark.parametrize(("tasks", "batches"), [(1, [1]), (10, [10]), (31, [31])])
def test_submitted_once_a_turn(
    path: Path, loop: asyncio.AbstractEventLoop, tasks: int, batches: list[int]
) -> None:
    async def main() -> None:
        async with rawaio.open(path) as file:
            submits = Submits(file)
            for _ in range(3):
                submits.batches.clear()
                await asyncio.gather(*[file.pread(_BLOCK, 0) for _ in range(tasks)])
                assert submits.batches == batches

    run(main(), loop)


def test_max_batch(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    """What is full is submitted at once, and does not wait for the turn to end."""

    async def main() -> None:
        AsyncioDriver(max_batch=8)
        async with rawaio.open(path) as file:
            submits = Submits(file)
            with gated(file.driver) as gate:
                gate.hold()
                reads = [asyncio.create_task(file.pread(_BLOCK, 0)) for _ in range(20)]
                await turns()
                assert submits.batches == [8, 8, 4]
                gate.release()
                await asyncio.wait(reads)

    run(main(), loop)


def test_plugged(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        async with rawaio.open(path) as file:
            submits = Submits(file)
            coroutines = [file.pread(_BLOCK, 0) for _ in range(100)]
            with file.plugged(), file.plugged():
                for coroutine in coroutines:
                    coroutine.send(None)
                assert submits.batches == []
            assert submits.batches == [100]
            for coroutine in coroutines:
                coroutine.close()
            await file.driver.drained()

    run(main(), loop)


def test_a_turn_has_a_limit(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    """io_submit pins pages: what one turn submits is bounded, in bytes too."""
    with path.open("r+b") as file:
        file.truncate(64 << 20)

    async def main() -> None:
        async with rawaio.open(path) as file:
            submits = Submits(file)
            reads = [asyncio.create_task(file.pread(2 << 20, 0)) for _ in range(10)]
            await asyncio.wait(reads)
            assert max(submits.batches) == 2
            assert sum(submits.batches) >= 10

    run(main(), loop)


def test_eagain(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    """With nothing in flight there is no event to come: a timer tries again."""

    async def main() -> None:
        async with rawaio.open(path) as file:
            submits = Submits(file)
            for times in range(1, 6):
                submits.refuse(*[errno.EAGAIN] * times)
                data = await asyncio.gather(*[file.pread(_BLOCK, 0) for _ in range(5)])
                assert data == [_DATA[:_BLOCK]] * 5
            context = file.driver.context
            assert context is not None
            assert context.statistics().eagain == sum(range(1, 6))
            await check_at_rest(file)

    run(main(), loop)


def test_refused_by_io_submit(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    """Each fails alone, with its errno."""

    async def main() -> None:
        async with rawaio.open(path) as file:
            submits = Submits(file)
            submits.refuse(errno.EBADF, errno.EIO)
            results = await asyncio.gather(
                *[file.pread(_BLOCK, 0) for _ in range(5)], return_exceptions=True
            )
            failed = [result.errno for result in results if isinstance(result, OSError)]
            assert failed == [errno.EBADF, errno.EIO]
            assert results[2:] == [_DATA[:_BLOCK]] * 3
            await check_at_rest(file)

    run(main(), loop)


def test_what_completes_at_once_does_not_keep_the_loop(
    path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn goes through so many passes, and lets the others have theirs."""

    async def main() -> None:
        AsyncioDriver(nr_events=1)
        async with rawaio.open(path) as file:
            driver = file.driver
            context = driver.context
            assert context is not None
            collect = context.collect

            def waiting(target: Any, *, reset: bool = True) -> None:
                """As if all completed inside io_submit."""
                while True:
                    collect(target, reset=reset)
                    if target or not context.outstanding:
                        return

            monkeypatch.setattr(context, "collect", waiting)
            submits = Submits(file)
            reads = [asyncio.create_task(file.pread(_BLOCK, 0)) for _ in range(20)]
            await turns(1)
            submits.batches.clear()
            await turns(1)
            assert len(submits.batches) <= MAX_PASSES
            await asyncio.wait(reads)
            assert [read.result() for read in reads] == [_DATA[:_BLOCK]] * 20

    run(main(), loop)


@pytest.mark.parametrize("where", ["start", "completed"])
@pytest.mark.parametrize("direct", [True, False], ids=["aio", "threads"])
def test_an_exception_inside(
    path: Path, loop: asyncio.AbstractEventLoop, where: str, direct: bool
) -> None:
    """It goes to the task that it belongs to, and costs the others nothing."""

    async def main() -> None:
        file = await rawaio.open(path, "r+", engine="auto" if direct else "threads")
        async with file:
            raised = 0

            def broken(*_: object) -> None:
                nonlocal raised
                raised += 1
                raise MemoryError

            class Broken(BouncedRead):
                __slots__ = ()

            setattr(Broken, where, broken)
            operations = [
                (Broken if i in (0, 3, 9) else BouncedRead)(file, _BLOCK, 0) for i in range(10)
            ]
            for operation in operations:
                operation.begin()
            results = await asyncio.gather(
                *[operation.waiter for operation in operations],
                return_exceptions=True,
            )
            assert raised == 3
            for i, result in enumerate(results):
                if i in (0, 3, 9):
                    assert isinstance(result, MemoryError)
                else:
                    assert result == _DATA[:_BLOCK]
            await check_at_rest(file)

    run(main(), loop)


def test_threads_have_a_limit(path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        async with rawaio.open(path, engine="threads") as file:
            with gated(file.driver) as gate:
                gate.hold()
                reads = [asyncio.create_task(file.pread(_BLOCK, 0)) for _ in range(200)]
                await turns()
                assert len(file.driver._performing) == MAX_THREADS
                assert not file._slots
                gate.release()
                await asyncio.wait(reads)
            assert sum(map(len, file._slots.values())) <= MAX_THREADS
            await check_at_rest(file)

    run(main(), loop)


def test_no_thread_can_be_started(
    path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the caller's, and nothing of his stays behind."""

    async def main() -> None:
        async with rawaio.open(path, engine="threads") as file:
            driver = file.driver
            with gated(driver) as gate:
                gate.hold()
                first = asyncio.create_task(file.pread(_BLOCK, 0))
                await until(lambda: driver._performing)
                with monkeypatch.context() as patch:
                    patch.setattr("threading.Thread.start", _no_thread)
                    second = asyncio.create_task(file.pread(_BLOCK, _BLOCK))
                    await turns()
                gate.release()
                assert await first == _DATA[:_BLOCK]
                assert await second == _DATA[_BLOCK : 2 * _BLOCK]
            await check_at_rest(file)

    run(main(), loop)


def _no_thread(_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_cached_reads_let_others_run(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    path = tmp_path / "file"
    path.write_bytes(_DATA)

    async def main() -> None:
        async with rawaio.open(path, direct=False) as file:
            if not file._reads_cached:
                pytest.skip(f"no RWF_NOWAIT in {os.fspath(tmp_path)}")
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0)

            ticking = asyncio.create_task(tick())
            for _ in range(1000):
                await file.pread(100, 0)
            ticking.cancel()
            assert file.statistics().cached == 1000
            assert ticks >= 1000 // 64

    run(main(), loop)

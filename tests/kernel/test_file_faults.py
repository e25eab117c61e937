"""Files on disks that are short, full, slow and broken."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

import rawaio
from rawaio import aligned_buffer
from tests.context_support import LIMIT_S
from tests.driver_support import until
from tests.filesystems import file_size_limit, free
from tests.fuse_server import FuseServer
from tests.loopdevice import loop_device

BLOCK = 4096
Engine = Literal["auto", "aio", "threads"]
ENGINES = pytest.mark.parametrize("engine", ["auto", "aio", "threads"])
DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
DIO = pytest.mark.parametrize("async_dio", [True, False], ids=["async_dio", "sync_dio"])


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def fuse() -> Iterator[FuseServer]:
    with FuseServer() as fuse:
        yield fuse


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rawaio.writing.PIECE", 2 * BLOCK)


def pattern(nbytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def aligned(data: bytes) -> memoryview:
    view = aligned_buffer(len(data))
    view[:] = data
    return view


def written(error: OSError) -> int:
    assert hasattr(error, "characters_written")
    nbytes: int = getattr(error, "characters_written")  # noqa: B009 - typeshed knows it not
    return nbytes


async def turns(n: int = 20) -> None:
    """Let all that is ready run."""
    for _ in range(n):
        await asyncio.sleep(0)


async def held(fuse: FuseServer, n: int) -> None:
    await asyncio.to_thread(fuse.wait_held, n)


async def within(what: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(what, LIMIT_S)


# -- short ----------------------------------------------------------------------------------------


@DIO
@DIRECT
@ENGINES
def test_short_reads_are_continued(
    runner: asyncio.Runner, async_dio: bool, direct: bool, engine: Engine
) -> None:
    data = pattern(8 * BLOCK + 100)

    async def main(fuse: FuseServer) -> None:
        async with rawaio.open(fuse.path("file"), direct=direct, engine=engine) as file:
            for short in (1000, BLOCK - 1):
                fuse.short(short, "read")
                for offset in (0, 1, BLOCK, 5 * BLOCK + 77):
                    wanted = data[offset:]
                    assert await file.pread(1 << 20, offset) == wanted
                    memory = aligned_buffer(9 * BLOCK)
                    n = await file.preadinto(memory, offset)
                    assert memory[:n] == wanted
                    views = [memory[: 2 * BLOCK], memory[2 * BLOCK :]]
                    n = await file.preadv(views, offset)
                    assert memory[:n] == wanted
            assert direct is (file.statistics().continued > 0)

    with FuseServer(async_dio=async_dio) as fuse:
        fuse.write_file("file", data)
        runner.run(within(main(fuse)))


@ENGINES
def test_many_short_reads_at_once_are_continued(
    runner: asyncio.Runner, fuse: FuseServer, engine: Engine
) -> None:
    # Continued all in one turn: more of them than are submitted in one batch.
    data = pattern(100 * BLOCK)
    fuse.write_file("file", data)
    fuse.short(3000, "read")

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), engine=engine) as file:
            fuse.hold("read")
            reads = [asyncio.ensure_future(file.pread(BLOCK, i * BLOCK)) for i in range(100)]
            await held(fuse, 100 if engine == "aio" else 16)
            fuse.unhold()
            assert b"".join(await asyncio.gather(*reads)) == data

    runner.run(within(main()))


@DIRECT
@ENGINES
@pytest.mark.parametrize("offset", [0, 100])
def test_short_writes_are_continued(
    runner: asyncio.Runner, direct: bool, engine: Engine, offset: int
) -> None:
    data = pattern(5 * BLOCK + 300)

    async def main(fuse: FuseServer) -> None:
        async with rawaio.open(fuse.path("file"), "x+", direct=direct, engine=engine) as file:
            fuse.short(1000, "write")
            assert await file.pwrite(aligned(data), offset) == len(data)
            assert fuse.contents("file") == bytes(offset) + data
            half = aligned(data[: 4 * BLOCK])
            assert await file.pwritev([half[:BLOCK], half[BLOCK:]], BLOCK) == 4 * BLOCK
            assert fuse.contents("file")[BLOCK : 5 * BLOCK] == half

    with FuseServer(async_dio=False) as fuse:
        runner.run(within(main(fuse)))


# -- out of order ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "kind"),
    # Of blocking writes FUSE has one at a time under way.
    [("auto", "read"), ("aio", "read"), ("threads", "read"), ("aio", "write")],
)
def test_completions_out_of_order(
    runner: asyncio.Runner, fuse: FuseServer, engine: Engine, kind: Literal["read", "write"]
) -> None:
    before, after = pattern(8 * BLOCK), pattern(8 * BLOCK, 2)
    fuse.write_file("file", before)

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), "r+", engine=engine) as file:
            fuse.hold(kind)
            tasks: list[asyncio.Future[Any]] = []
            for i in range(8):
                place = slice(i * BLOCK, i * BLOCK + BLOCK)
                act = (
                    file.pread(BLOCK, i * BLOCK)
                    if kind == "read"
                    else file.pwrite(aligned(after[place]), i * BLOCK)
                )
                tasks.append(asyncio.ensure_future(act))
            await held(fuse, 8)
            offsets = [request.offset // BLOCK for request in fuse.held()]
            order = [3, 7, 0, 6, 5, 1, 2, 4]
            fuse.release(order=order)
            results = await asyncio.gather(*tasks)
            assert sorted(offsets) == [*range(8)]
            if kind == "read":
                assert b"".join(results) == before
            else:
                assert results == [BLOCK] * 8

    runner.run(within(main()))
    assert fuse.contents("file") == (before if kind == "read" else after)


# -- errors ---------------------------------------------------------------------------------------


@DIO
@DIRECT
@ENGINES
@pytest.mark.parametrize(("code", "offset"), [(errno.EIO, 0), (errno.ENOSPC, 100)])
def test_a_write_that_fails_in_the_middle_says_how_much_there_is(  # noqa: PLR0917 - fixtures
    small_pieces: None,
    runner: asyncio.Runner,
    async_dio: bool,
    direct: bool,
    engine: Engine,
    code: int,
    offset: int,
) -> None:
    before, data = pattern(10 * BLOCK, 2), pattern(8 * BLOCK)

    async def main(fuse: FuseServer) -> None:
        fuse.write_file("file", before)
        fuse.fail("write", code, offset=5 * BLOCK)
        async with rawaio.open(fuse.path("file"), "r+", direct=direct, engine=engine) as file:
            for vector in (False, True):
                memory = aligned(data)
                parts = [memory[:BLOCK], memory[BLOCK:]] if vector else [memory]
                with pytest.raises(OSError) as caught:
                    await file.pwritev(parts, offset)
                assert caught.value.errno == code
                n = written(caught.value)
                contents = fuse.contents("file")
                assert contents[:offset] == before[:offset]
                assert contents[offset : offset + n] == data[:n]
                assert len(contents) == len(before)
                # In one asynchronous request nothing is known of its parts.
                if not async_dio:
                    assert n > 3 * BLOCK
                    assert contents[9 * BLOCK :] == before[9 * BLOCK :]
            assert file.statistics().under_way == 0
            fuse.heal()
            await file.pwrite(data, offset)
        assert fuse.contents("file")[offset : offset + len(data)] == data

    with FuseServer(async_dio=async_dio) as fuse:
        runner.run(within(main(fuse)))


@ENGINES
def test_an_edge_that_cannot_be_read_says_how_much_was_written(
    small_pieces: None, runner: asyncio.Runner, fuse: FuseServer, engine: Engine
) -> None:
    before, data = pattern(10 * BLOCK, 2), pattern(6 * BLOCK + 200)
    fuse.write_file("file", before)
    fuse.fail("read", errno.EIO, offset=6 * BLOCK)

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), "r+", engine=engine) as file:
            with pytest.raises(OSError) as caught:
                await file.pwrite(data, 100)
            assert caught.value.errno == errno.EIO
            assert written(caught.value) == 6 * BLOCK - 100
            contents = fuse.contents("file")
            assert contents == before[:100] + data[: 6 * BLOCK - 100] + before[6 * BLOCK :]
            with pytest.raises(OSError) as caught:
                await file.pwrite(b"x", 6 * BLOCK + 5)
            assert written(caught.value) == 0

    runner.run(within(main()))


@DIO
@DIRECT
@ENGINES
def test_a_read_that_fails_fails_alone(
    runner: asyncio.Runner, async_dio: bool, direct: bool, engine: Engine
) -> None:
    data = pattern(8 * BLOCK)

    async def main(fuse: FuseServer) -> None:
        async with rawaio.open(fuse.path("file"), direct=direct, engine=engine) as file:
            results = await asyncio.gather(
                *(file.pread(BLOCK, i * BLOCK) for i in range(8)), return_exceptions=True
            )
            for i, result in enumerate(results):
                if i == 5:
                    assert isinstance(result, OSError)
                    assert result.errno == errno.EIO
                else:
                    assert result == data[i * BLOCK : i * BLOCK + BLOCK]
            for act in (
                file.pread(8 * BLOCK, 0),
                file.preadinto(aligned_buffer(8 * BLOCK), 0),
                file.preadinto(aligned_buffer(8 * BLOCK)[1:], 0),
                file.preadv([aligned_buffer(4 * BLOCK), aligned_buffer(4 * BLOCK)], 0),
            ):
                with pytest.raises(OSError) as caught:
                    await act
                assert caught.value.errno == errno.EIO

    with FuseServer(async_dio=async_dio) as fuse:
        fuse.write_file("file", data)
        fuse.fail("read", errno.EIO, offset=5 * BLOCK)
        runner.run(within(main(fuse)))


@DIRECT
@ENGINES
@pytest.mark.parametrize("nbytes", [BLOCK, 3 * BLOCK, 3000, 2 * BLOCK + 1500])
def test_a_short_append_is_no_space_and_not_tried_again(
    runner: asyncio.Runner, direct: bool, engine: Engine, nbytes: int
) -> None:
    data = pattern(nbytes)

    async def main(fuse: FuseServer) -> None:
        async with rawaio.open(fuse.path("file"), "x+", direct=direct, engine=engine) as file:
            fuse.short(1000, "write")
            with pytest.raises(OSError) as caught:
                await file.append(data)
            assert caught.value.errno == errno.ENOSPC
            n = written(caught.value)
            assert 1000 <= n < nbytes
            assert fuse.contents("file") == data[:n]
            places = [request.offset for request in fuse.requests("write")]
            assert len(places) == len(set(places))
            assert max(places) < n
            fuse.short(None)
            # The next goes on behind what there is.
            assert await file.append(b"next") == n
            assert fuse.contents("file") == data[:n] + b"next"

    with FuseServer(async_dio=False) as fuse:
        runner.run(within(main(fuse)))


def test_an_append_longer_than_a_request_is_whole(
    runner: asyncio.Runner, ext4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rawaio.writing.MOST", 2 * BLOCK)
    monkeypatch.setattr("rawaio.transfer.MOST", 2 * BLOCK)
    data = pattern(5 * BLOCK)

    async def main() -> None:
        async with rawaio.open(ext4 / "file", "x+") as file:
            assert await file.append(aligned(data)) == 0
            assert await file.append(aligned(data)) == 5 * BLOCK

    runner.run(within(main()))
    assert (ext4 / "file").read_bytes() == data + data


@DIRECT
@ENGINES
@pytest.mark.parametrize("offset", [0, 100])
def test_a_full_device(
    runner: asyncio.Runner, small: Path, direct: bool, engine: Engine, offset: int
) -> None:
    path = small / "file"
    path.touch()
    with (small / "filler").open("xb") as filler:
        os.posix_fallocate(filler.fileno(), 0, free(small) - 40 * BLOCK)
        while free(small) > 16 * BLOCK:
            os.posix_fallocate(filler.fileno(), os.fstat(filler.fileno()).st_size, BLOCK)
    data = pattern(64 * BLOCK)

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=direct, engine=engine) as file:
            for act in (file.pwrite(data, offset), file.pwritev([data[:9], data[9:]], offset)):
                with pytest.raises(OSError) as caught:
                    await act
                assert caught.value.errno == errno.ENOSPC
                n = written(caught.value)
                assert n <= 16 * BLOCK
                assert await file.pread(n, offset) == data[:n]
            size = file.size
            with pytest.raises(OSError) as caught:
                await file.append(data)
            assert caught.value.errno == errno.ENOSPC
            n = written(caught.value)
            assert await file.pread(n, size) == data[:n]
            assert file.size >= size + n
            with pytest.raises(OSError) as caught:
                await file.allocate(0, 1 << 30)
            assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
            await file.truncate(0)
            assert await file.pwrite(data[:BLOCK], 0) == BLOCK

    runner.run(within(main()))


@DIRECT
@ENGINES
@pytest.mark.parametrize("limit", [4 * BLOCK, 4 * BLOCK + 512, 5000])
def test_the_limit_of_a_file_s_size(
    runner: asyncio.Runner, ext4: Path, direct: bool, engine: Engine, limit: int
) -> None:
    path = ext4 / "file"
    path.touch()
    data = aligned(pattern(8 * BLOCK))

    async def attempt(act: Awaitable[object]) -> OSError:
        with pytest.raises(OSError) as caught:
            await act
        return caught.value

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=direct, engine=engine) as file:
            await file.pread(1, 0)
            failures: list[OSError] = []
            with file_size_limit(limit):
                failures.append(await attempt(file.pwrite(data, 0)))
                failures.append(await attempt(file.pwrite(data[:BLOCK], 8 * BLOCK)))
                failures.append(await attempt(file.pwrite(data[:100], 8 * BLOCK + 1)))
                failures.append(await attempt(file.append(data)))
                failures.append(await attempt(file.truncate(limit + 1)))
            codes = [error.errno for error in failures]
            if direct and limit % 512:
                # The kernel cuts the write off at the limit, and then it is not aligned.
                assert codes.pop(0) in (errno.EFBIG, errno.EINVAL)
                assert codes.pop(2) in (errno.EFBIG, errno.ENOSPC, errno.EINVAL)
            else:
                # A short append is not tried again.
                assert codes.pop(3) in (errno.EFBIG, errno.ENOSPC)
            assert set(codes) == {errno.EFBIG}
            n = written(failures[0])
            assert n <= limit
            assert await file.pread(n, 0) == data[:n]
            assert [written(error) for error in failures[1:3]] == [0, 0]
            assert file.size <= limit

    runner.run(within(main()))


def test_a_cached_write_that_fails_says_that_nothing_was_written(
    runner: asyncio.Runner, xfs: Path
) -> None:
    # xfs takes buffered writes at once, without a thread.
    path = xfs / "file"
    path.write_bytes(bytes(BLOCK))

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=False) as file:
            await file.pwrite(b"x", 0)
            with file_size_limit(BLOCK), pytest.raises(OSError) as caught:
                await file.pwrite(b"x", BLOCK)
            assert caught.value.errno == errno.EFBIG
            assert written(caught.value) == 0

    runner.run(within(main()))


def test_without_the_second_descriptor_the_whole_blocks_are_written(
    runner: asyncio.Runner, ext4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def buffered_twin(descriptor: object) -> None:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr("rawaio.writing.buffered_twin", buffered_twin)
    data = pattern(3 * BLOCK + 5)

    async def main() -> None:
        async with rawaio.open(ext4 / "file", "x+") as file:
            with pytest.raises(OSError, match="too many") as caught:
                await file.pwrite(data, 0)
            assert written(caught.value) == 3 * BLOCK
            assert await file.pread(1 << 20, 0) == data[: 3 * BLOCK]

    runner.run(within(main()))


@DIRECT
@ENGINES
def test_the_end_of_a_block_device(
    runner: asyncio.Runner, tmp_path: Path, direct: bool, engine: Engine
) -> None:
    size = 4 << 20
    data = aligned(pattern(4 * BLOCK))

    async def main(node: str) -> None:
        async with rawaio.open(node, "r+", direct=direct, engine=engine) as file:
            assert file.size == size
            for offset in (size - 2 * BLOCK, size - 2 * BLOCK + 10):
                room = size - offset
                with pytest.raises(OSError) as caught:
                    await file.pwrite(data, offset)
                assert caught.value.errno == errno.ENOSPC
                n = written(caught.value)
                assert n <= room
                assert await file.pread(n, offset) == data[:n]
                assert await file.pwrite(data[:room], offset) == room
                assert await file.pread(4 * BLOCK, offset) == data[:room]
                memory = aligned_buffer(4 * BLOCK)
                assert await file.preadinto(memory, offset) == room
            for offset in (size, size + 1, size + BLOCK, 1 << 50):
                assert await file.pread(BLOCK, offset) == b""
                assert await file.preadinto(aligned_buffer(BLOCK), offset) == 0
                views = [aligned_buffer(BLOCK), aligned_buffer(BLOCK)]
                assert await file.preadv(views, offset) == 0
                with pytest.raises(OSError) as caught:
                    await file.pwrite(data, offset)
                assert caught.value.errno == errno.ENOSPC
                assert written(caught.value) == 0
            assert b"".join([c async for c in file.stream(size - 5000)]) == (
                await file.pread(5000, size - 5000)
            )
            with pytest.raises(OSError, match="block device"):
                await file.append(b"x")
            await file.fsync()

    with loop_device(tmp_path, size) as node:
        runner.run(within(main(node)))


# -- syncs ----------------------------------------------------------------------------------------


def test_where_the_kernel_has_no_asynchronous_fsync_a_thread_does_it(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: called.append("fsync"))
    monkeypatch.setattr(os, "fdatasync", lambda fd: called.append("fdatasync"))

    async def main() -> None:
        # A file without any fsync: io_submit says EINVAL.
        async with rawaio.open("/proc/version", direct=False, engine="aio") as file:
            await file.fsync()
            await file.fdatasync()

    runner.run(within(main()))
    assert called == ["fsync", "fdatasync"]


def test_what_a_thread_cannot_sync_either_is_an_error(runner: asyncio.Runner) -> None:
    async def main() -> None:
        async with rawaio.open("/proc/version", direct=False) as file:
            for act in (file.fsync, file.fdatasync):
                with pytest.raises(OSError) as caught:
                    await act()
                assert caught.value.errno == errno.EINVAL

    runner.run(within(main()))


@ENGINES
def test_an_fsync_that_fails(runner: asyncio.Runner, fuse: FuseServer, engine: Engine) -> None:
    fuse.write_file("file", b"data")
    fuse.fail("fsync", errno.EIO)
    fuse.fail("fdatasync", errno.ENOSPC)

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), "r+", engine=engine) as file:
            for act, code in ((file.fsync, errno.EIO), (file.fdatasync, errno.ENOSPC)):
                with pytest.raises(OSError) as caught:
                    await act()
                assert caught.value.errno == code

    runner.run(within(main()))


# -- streams --------------------------------------------------------------------------------------


@DIRECT
@ENGINES
def test_a_stream_gives_what_is_before_an_error(
    runner: asyncio.Runner, fuse: FuseServer, direct: bool, engine: Engine
) -> None:
    data = pattern(16 * BLOCK)
    fuse.write_file("file", data)
    fuse.fail("read", errno.EIO, offset=5 * BLOCK)

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), direct=direct, engine=engine) as file:
            stream = file.stream(chunk_size=BLOCK, depth=4)
            for i in range(5):
                assert await anext(stream) == data[i * BLOCK : i * BLOCK + BLOCK]
            with pytest.raises(OSError) as caught:
                await anext(stream)
            assert caught.value.errno == errno.EIO
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    runner.run(within(main()))


@DIRECT
@ENGINES
def test_a_stream_closed_early_leaves_nothing_behind(
    runner: asyncio.Runner, fuse: FuseServer, direct: bool, engine: Engine
) -> None:
    data = pattern(64 * BLOCK)
    fuse.write_file("file", data)

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), direct=direct, engine=engine) as file:
            async with aclosing(file.stream(chunk_size=BLOCK, depth=4)) as stream:
                assert await anext(stream) == data[:BLOCK]
                assert await anext(stream) == data[BLOCK : 2 * BLOCK]
            fuse.hold("read")
            async with aclosing(file.stream(chunk_size=BLOCK, depth=4)) as stream:
                first = asyncio.ensure_future(anext(stream))
                await held(fuse, 4)
                first.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await first
            assert file.statistics().under_way >= 4
            fuse.unhold()
        assert file.statistics().under_way == 0

    runner.run(within(main()))


@DIRECT
@ENGINES
@pytest.mark.parametrize("depth", [1, 3])
def test_a_stream_reads_no_further_ahead_than_its_depth(
    runner: asyncio.Runner, fuse: FuseServer, direct: bool, engine: Engine, depth: int
) -> None:
    data = pattern(64 * BLOCK)
    fuse.write_file("file", data)

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), direct=direct, engine=engine) as file:
            stream: AsyncGenerator[bytes, None] = file.stream(chunk_size=BLOCK, depth=depth)
            fuse.forget()
            fuse.hold("read")
            first = asyncio.ensure_future(anext(stream))
            await held(fuse, depth)
            await turns()
            assert sum(request.nbytes for request in fuse.held()) <= depth * BLOCK
            fuse.unhold()
            assert await first == data[:BLOCK]
            for i in range(1, 20):
                # The consumer is slow, and nothing is read for it meanwhile.
                await turns()
                read = sum(request.nbytes for request in fuse.requests("read"))
                assert read <= (i + depth - 1) * BLOCK
                assert await anext(stream) == data[i * BLOCK : i * BLOCK + BLOCK]
            await stream.aclose()

    runner.run(within(main()))


# -- closing, while something is under way --------------------------------------------------------


@DIRECT
@ENGINES
def test_close_waits_for_what_is_under_way(
    runner: asyncio.Runner, fuse: FuseServer, direct: bool, engine: Engine
) -> None:
    data = pattern(2 * BLOCK)
    fuse.write_file("file", data)

    async def main() -> None:
        file = await rawaio.open(fuse.path("file"), "r+", direct=direct, engine=engine)
        fd = file.fileno()
        fuse.hold()
        read = asyncio.ensure_future(file.pread(BLOCK, 0))
        write = asyncio.ensure_future(file.pwrite(aligned(data[:BLOCK]), BLOCK))
        await held(fuse, 2)
        closes = [asyncio.ensure_future(file.close()) for _ in range(3)]
        await turns()
        assert not any(close.done() for close in closes)
        assert is_open(fd)
        with pytest.raises(rawaio.ClosedError):
            await file.pread(1, 0)
        fuse.unhold()
        assert await read == data[:BLOCK]
        assert await write == BLOCK
        await closes[0]
        assert not is_open(fd)
        await asyncio.gather(*closes)
        await file.close()

    runner.run(within(main()))


@ENGINES
def test_a_second_close_waits_until_the_first_has_closed_the_file(
    runner: asyncio.Runner, ext4: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    (ext4 / "file").touch()
    begun, go = threading.Event(), threading.Event()
    real = os.close

    async def main() -> None:
        file = await rawaio.open(ext4 / "file", engine=engine)
        mine = file.fileno()

        def close(fd: int) -> None:
            if fd == mine:
                begun.set()
                assert go.wait(LIMIT_S)
            real(fd)

        monkeypatch.setattr(os, "close", close)
        try:
            first = asyncio.ensure_future(file.close())
            await until(begun.is_set)
            second = asyncio.ensure_future(file.close())
            await turns()
            assert not first.done()
            assert not second.done()
        finally:
            go.set()
        await asyncio.gather(first, second)
        assert file.statistics().under_way == 0

    runner.run(within(main()))


@ENGINES
def test_every_close_returns_when_the_file_is_closed(
    runner: asyncio.Runner, ext4: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    (ext4 / "file").touch()
    real, closed = os.close, list[int]()

    def close(fd: int) -> None:
        closed.append(fd)
        real(fd)

    async def main() -> None:
        for _ in range(20):
            file = await rawaio.open(ext4 / "file", engine=engine)
            fd = file.fileno()
            monkeypatch.setattr(os, "close", close)
            closes = [asyncio.ensure_future(file.close()) for _ in range(4)]
            for one in closes:
                one.add_done_callback(partial(ended, fd))
            await asyncio.gather(*closes)
            monkeypatch.undo()
            assert closed.count(fd) == 1
            closed.clear()

    def ended(fd: int, close: asyncio.Future[None]) -> None:
        done.append(fd in closed)

    done: list[bool] = []
    runner.run(within(main()))
    assert all(done)
    assert len(done) == 80


@ENGINES
def test_a_cancelled_close_still_closes(
    runner: asyncio.Runner, fuse: FuseServer, engine: Engine
) -> None:
    fuse.write_file("file", pattern(BLOCK))

    async def main() -> int:
        file = await rawaio.open(fuse.path("file"), engine=engine)
        fd = file.fileno()
        fuse.hold()
        read = asyncio.ensure_future(file.pread(BLOCK, 0))
        await held(fuse, 1)
        close = asyncio.ensure_future(file.close())
        await turns()
        close.cancel()
        await turns()
        fuse.unhold()
        with pytest.raises(asyncio.CancelledError):
            await close
        await read
        return fd

    fd = runner.run(within(main()))
    runner.close()  # and with it all that was left to threads
    assert not is_open(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


# -- cancelled ------------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("misplaced", [0, 1])
def test_a_cancelled_read_into_lent_memory_is_waited_for(
    runner: asyncio.Runner, fuse: FuseServer, engine: Engine, misplaced: int
) -> None:
    fuse.write_file("file", pattern(BLOCK))

    async def main() -> None:
        async with rawaio.open(fuse.path("file"), engine=engine) as file:
            memory = aligned_buffer(BLOCK + misplaced)[misplaced:]
            fuse.hold()
            own = asyncio.ensure_future(file.pread(BLOCK, 0))
            lent = asyncio.ensure_future(file.preadinto(memory, 0))
            await held(fuse, 2)
            own.cancel()
            lent.cancel()
            await turns()
            assert own.cancelled()
            if not misplaced:
                assert not lent.done()
            fuse.unhold()
            with pytest.raises(asyncio.CancelledError):
                await lent
            before = bytes(memory)
        assert memory == before

    runner.run(within(main()))


@DIRECT
@ENGINES
@pytest.mark.parametrize("step", range(0, 12, 2))
def test_a_cancelled_unaligned_write_releases_what_it_held(
    runner: asyncio.Runner, ext4: Path, direct: bool, engine: Engine, step: int
) -> None:
    path = ext4 / "file"
    before = pattern(3 * BLOCK)
    path.write_bytes(before)

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=direct, engine=engine) as file:
            acts: list[Callable[[], Awaitable[object]]] = [
                lambda: file.pwrite(b"new", 100),
                lambda: file.append(b"end"),
                lambda: file.truncate(2 * BLOCK + 5),
                lambda: file.pwrite(aligned_buffer(BLOCK), 0),
                lambda: file.pwritev([aligned_buffer(BLOCK), aligned_buffer(BLOCK)], 0),
            ]
            for act in acts:
                first = asyncio.ensure_future(act())
                second = asyncio.ensure_future(act())
                await turns(step)
                first.cancel()
                await asyncio.wait([first])
                await second
            assert file.statistics().under_way == 0
            assert len(file.lock) == 0
            assert await file.pwrite(before, 0) == len(before)

    runner.run(within(main()))

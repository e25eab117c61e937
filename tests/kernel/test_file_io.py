"""Every method of `File` on real file systems: what it gives, and what is in the file after it."""

from __future__ import annotations

import asyncio
import io
import os
import random
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

import rawaio
from rawaio import ClosedError, File, aligned_buffer, handle
from tests.context_support import LIMIT_S
from tests.filesystems import FileSystem
from tests.support import address_of

BLOCK = 4096
MAX_OFFSET = (1 << 63) - 1
Engine = Literal["auto", "aio", "threads"]
DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
ENGINES = pytest.mark.parametrize("engine", ["auto", "aio", "threads"])


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def path(ext4: Path) -> Path:
    return ext4 / "file"


def pattern(nbytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def misplaced(nbytes: int, by: int = 1) -> memoryview:
    return aligned_buffer(nbytes + by)[by:]


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until it is so."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - nothing tells when a lock is asked for
            await asyncio.sleep(0)


# -- reading ---------------------------------------------------------------------------------------


@DIRECT
@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [
        *[(0, 0), (0, 1), (0, 512), (0, BLOCK), (511, 2), (1, 4 * BLOCK), (BLOCK, 3 * BLOCK)],
        *[(12000, 345), (12000, 346), (12345, 1), (12345, 0), (12346, 5), (12288, BLOCK)],
        *[(16384, BLOCK), (1 << 40, BLOCK), (1 << 40, 1), (MAX_OFFSET - 1, 1), (MAX_OFFSET, 0)],
        *[(MAX_OFFSET - BLOCK + 1, BLOCK - 1), (0, 20000), (0, 1 << 22)],
    ],
)
def test_reads_at_and_around_the_end(
    runner: asyncio.Runner, filesystem: FileSystem, direct: bool, offset: int, nbytes: int
) -> None:
    data = pattern(12345)
    path = filesystem.path / "file"
    path.write_bytes(data)
    wanted = data[offset : offset + nbytes]

    async def main() -> None:
        async with rawaio.open(path, direct=direct) as file:
            assert await file.pread(nbytes, offset) == wanted
            whole = wanted.ljust(nbytes, b"\0")
            assert await file.pread(nbytes, offset, zero_fill=True) == whole
            for by in (0, 1, 512):
                # What is behind the end of the file has no meaning: without a copy, the kernel
                # fills the block up.
                memory = misplaced(nbytes, by)
                assert await file.preadinto(memory, offset) == len(wanted)
                assert memory[: len(wanted)] == wanted
                assert await file.preadinto(memory, offset, zero_fill=True) == nbytes
                assert memory == whole
                half = nbytes // 2
                memory[:] = b"x" * nbytes
                views = memory[:half], bytearray(), memory[half:]
                assert await file.preadv(views, offset) == len(wanted)
                assert memory[: len(wanted)] == wanted
                assert await file.preadv(views, offset, zero_fill=True) == nbytes
                assert memory == whole
            chunks = [chunk async for chunk in file.stream(offset, nbytes, chunk_size=5000)]
            assert b"".join(chunks) == wanted
            assert all(len(chunk) == 5000 for chunk in chunks[:-1])

    runner.run(main())


@DIRECT
def test_a_stream_without_a_length_goes_to_the_end(
    runner: asyncio.Runner, path: Path, direct: bool
) -> None:
    data = pattern(3 * BLOCK + 17)
    path.write_bytes(data)

    async def main() -> None:
        async with rawaio.open(path, direct=direct) as file:
            for start in (0, 1, BLOCK, len(data), len(data) + 1):
                for chunk_size, depth in ((1, 1), (700, 3), (BLOCK, 1), (1 << 20, 4)):
                    if chunk_size == 1 and start < 3 * BLOCK:
                        continue
                    stream = file.stream(start, chunk_size=chunk_size, depth=depth)
                    assert b"".join([chunk async for chunk in stream]) == data[start:]

    runner.run(main())


@DIRECT
def test_holes_read_as_zeroes(runner: asyncio.Runner, filesystem: FileSystem, direct: bool) -> None:
    path = filesystem.path / "file"
    with path.open("wb") as plain:
        plain.truncate(1 << 30)
        plain.seek((1 << 30) - 1)
        plain.write(b"x")

    async def main() -> None:
        async with rawaio.open(path, direct=direct) as file:
            assert await file.pread(10000, 12345) == bytes(10000)
            assert await file.pread(10000, (1 << 30) - 5000) == bytes(4999) + b"x"
            assert file.size == 1 << 30

    runner.run(main())


def test_a_file_that_grows_while_its_end_is_read(
    runner: asyncio.Runner, ext4_4k: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The block is asked for again from its start: from its middle the kernel would refuse.
    path = ext4_4k / "file"
    data = pattern(8192)
    path.write_bytes(data[:5000])
    size_of = handle.size_of  # type: ignore[attr-defined]

    def grown(descriptor: Any) -> int:
        path.write_bytes(data)
        size: int = size_of(descriptor)
        return size

    async def main() -> None:
        async with rawaio.open(path) as file:
            for offset in (0, BLOCK):
                path.write_bytes(data[:5000])
                memory = aligned_buffer(8192 - offset)
                with monkeypatch.context() as patch:
                    patch.setattr("rawaio.handle.size_of", grown)
                    assert await file.preadinto(memory, offset) == 8192 - offset
                assert memory == data[offset:]
            assert file.statistics().continued == 2

    runner.run(main())


# -- writing ---------------------------------------------------------------------------------------

WRITES = [
    *[(0, 1), (0, 511), (0, 512), (0, BLOCK), (1, 1), (1, BLOCK), (BLOCK - 1, 2), (512, 512)],
    *[(12345, 1), (12344, 1), (12000, 345), (12000, 346), (12288, 57), (12288, BLOCK)],
    *[(20000, 5), (3 * BLOCK, 2 * BLOCK), (5 * BLOCK + 7, 3 * BLOCK), (0, 3 * BLOCK + 1)],
]


@DIRECT
@ENGINES
@pytest.mark.parametrize("size", [0, 1, BLOCK, 12345])
def test_a_write_changes_its_bytes_and_the_size_alone(
    runner: asyncio.Runner, filesystem: FileSystem, direct: bool, engine: Engine, size: int
) -> None:
    path = filesystem.path / "file"

    async def main() -> None:
        for seed, (offset, nbytes) in enumerate(WRITES):
            model = bytearray(pattern(size))
            path.write_bytes(model)
            data = pattern(nbytes, seed)
            model.extend(bytes(max(offset + nbytes - size, 0)))
            model[offset : offset + nbytes] = data
            async with rawaio.open(path, "r+", direct=direct, engine=engine) as file:
                if seed % 3 == 0:
                    assert await file.pwrite(data, offset) == nbytes
                elif seed % 3 == 1:
                    memory = aligned_buffer(nbytes)
                    memory[:] = data
                    assert await file.pwrite(memory, offset, dsync=True) == nbytes
                else:
                    half = nbytes // 2
                    parts = data[:half], bytearray(data[half:]), b""
                    assert await file.pwritev(parts, offset) == nbytes
                assert file.size == os.stat(path).st_size == len(model), (offset, nbytes)
            assert path.read_bytes() == model, (offset, nbytes)

    runner.run(main())


@DIRECT
def test_nothing_is_written_by_empty_writes(
    runner: asyncio.Runner, path: Path, direct: bool
) -> None:
    async def main() -> None:
        async with rawaio.open(path, "x+", direct=direct) as file:
            assert await file.pwrite(b"", 0) == 0
            assert await file.pwrite(b"", 12345) == 0
            assert await file.pwritev([], 12345) == 0
            assert await file.pwritev([b"", bytearray()], MAX_OFFSET) == 0
            assert await file.append(b"") == 0
            assert await file.preadv([], 5) == 0
            assert await file.preadinto(bytearray(), 5) == 0
            assert [chunk async for chunk in file.stream()] == []
            assert file.size == 0

    runner.run(main())


@DIRECT
def test_buffers_of_all_kinds(runner: asyncio.Runner, path: Path, direct: bool) -> None:
    async def main() -> None:
        async with rawaio.open(path, "x+", direct=direct) as file:
            numbers = array("q", range(1024))
            await file.pwrite(numbers, 0)
            again = array("q", bytes(8 * 1024))
            assert await file.preadinto(again, 0) == 8192
            assert again == numbers
            square = memoryview(bytearray(64)).cast("B", (8, 8))
            assert await file.preadinto(square, 8) == 64
            assert square.tobytes() == numbers.tobytes()[8:72]
            await file.pwritev((memoryview(b"abc"), bytearray(b"de"), square), 1)
            assert await file.pread(6, 0) == numbers.tobytes()[:1] + b"abcde"
            # The caller's memory is free again.
            buffer = bytearray(10)
            await file.preadinto(buffer, 0)
            await file.pwrite(buffer, 3)
            buffer.append(1)

    runner.run(main())


@DIRECT
@pytest.mark.parametrize("segments", [1023, 1024, 1025, 3000])
@pytest.mark.parametrize("size", [1, 512])
def test_vectors_longer_than_the_kernel_takes(
    runner: asyncio.Runner, path: Path, direct: bool, segments: int, size: int
) -> None:
    data = aligned_buffer(segments * size)
    data[:] = pattern(segments * size)
    views = [data[i * size : (i + 1) * size] for i in range(segments)]

    async def main() -> None:
        async with rawaio.open(path, "x+", direct=direct) as file:
            assert await file.pwritev(views, 512) == segments * size
            memory = aligned_buffer(segments * size)
            into = [memory[i * size : (i + 1) * size] for i in range(segments)]
            assert await file.preadv(into, 512) == segments * size
            assert memory == data

    runner.run(main())
    assert path.read_bytes() == bytes(512) + data


@DIRECT
def test_truncate_and_allocate(
    runner: asyncio.Runner, filesystem: FileSystem, direct: bool
) -> None:
    path = filesystem.path / "file"
    data = pattern(10000)
    path.write_bytes(data)

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=direct) as file:
            await file.truncate(5001)
            assert await file.pread(10000, 0) == data[:5001]
            await file.truncate(9000)
            assert file.size == 9000
            assert await file.pread(10000, 0) == data[:5001] + bytes(3999)
            await file.allocate(8000, 5000)
            assert file.size == 13000
            assert await file.pread(20000, 0) == data[:5001] + bytes(7999)
            await file.allocate(0, 1)
            assert file.size == 13000
            await file.truncate(0)
            assert file.size == 0
            assert await file.pread(1, 0) == b""
            await file.fsync()
            await file.fdatasync()

    runner.run(main())


# -- without a copy --------------------------------------------------------------------------------


def test_aligned_transfers_use_the_caller_s_memory(
    runner: asyncio.Runner, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: list[int] = []
    submit = rawaio.IOContext.submit

    def spy(self: rawaio.IOContext, *requests: rawaio.Request) -> int:
        for request in requests:
            addresses.extend(request.addresses or [request.address])
        return submit(self, *requests)

    monkeypatch.setattr(rawaio.IOContext, "submit", spy)

    async def main() -> None:
        async with rawaio.open(path, "x+", engine="aio") as file:
            await file.allocate(0, 8 * BLOCK)
            memory = aligned_buffer(4 * BLOCK)
            address = address_of(memory)
            await file.pwrite(memory, 0)
            await file.preadinto(memory[BLOCK:], 0)
            await file.pwritev([memory[:BLOCK], memory[BLOCK:]], 0)
            await file.preadv([memory[:512], memory[512:]], 0)
            assert set(addresses) == {address, address + BLOCK, address + 512}
            assert len(addresses) >= 6
            assert file.statistics().unaligned_writes == 0
            del addresses[:]
            await file.pwrite(memory[1:513], 0)
            await file.preadinto(memory[1:513], 0)
            inside = range(address, address + len(memory))
            assert addresses
            assert not any(other in inside for other in addresses)
            assert file.statistics().unaligned_writes == 1

    runner.run(main())


class Odd:
    """A size that is no int: of arithmetic it has none."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __index__(self) -> int:
        return self.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        return other == self.number

    def __le__(self, other: int) -> bool:
        return self.number <= other

    def __gt__(self, other: int) -> bool:
        return self.number > other


def test_a_size_that_is_no_int_is_one_from_then_on(runner: asyncio.Runner, path: Path) -> None:
    """As NumPy's, whose arithmetic wraps: what a read takes of the turn is counted in ints."""
    path.write_bytes(pattern(1 << 17))

    async def main() -> None:
        async with rawaio.open(path, direct=False) as file:
            size: Any = Odd(1 << 15)
            for _ in range(3):
                assert await file.pread(size, 0) == pattern(1 << 15)
            assert type(file.driver.credit) is int
            assert all(type(n) is int for n in file.driver.scratch)
            zero: Any = 0.0
            with pytest.raises(TypeError):
                await file.pread(zero, 0)

    runner.run(main())


@DIRECT
def test_every_read_is_counted(runner: asyncio.Runner, path: Path, direct: bool) -> None:
    """Also one that is refused; and once, whichever way it goes."""
    path.write_bytes(pattern(10000))

    async def main() -> None:
        async with rawaio.open(path, direct=direct) as file:
            await file.pread(10, 0)
            await file.pread(10, 0)
            await file.preadinto(bytearray(10), 0)
            assert await file.pread(10, 9995) == pattern(10000)[9995:]
            assert file.statistics().reads == 4
            assert file.statistics().cached == (0 if direct else 3)
            assert await file.pread(0, 0) == b""
            for offset in (-1, MAX_OFFSET, MAX_OFFSET + 1, 1 << 70):
                with pytest.raises(ValueError, match=r"offset|beyond"):
                    await file.pread(10, offset)
            assert file.statistics().reads == 9
            assert file.statistics().cached == (0 if direct else 3)
            if not direct:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                assert await file.pread(10, 0) == pattern(10000)[:10]
                assert file.statistics().reads == 10

    runner.run(main())


# -- wrong arguments -------------------------------------------------------------------------------


@DIRECT
def test_wrong_arguments_are_refused(runner: asyncio.Runner, path: Path, direct: bool) -> None:
    path.write_bytes(pattern(10000))

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=direct) as file:
            buffer = bytearray(10)
            bad: Any
            for bad in (-1, 1 << 63, 1 << 64, -(1 << 63)):
                with pytest.raises(ValueError, match="offset"):
                    await file.pread(1, bad)
                with pytest.raises(ValueError, match="offset"):
                    await file.preadinto(buffer, bad)
                with pytest.raises(ValueError, match="offset"):
                    await file.pwrite(b"x", bad)
                with pytest.raises(ValueError, match="offset"):
                    await file.allocate(bad, 1)
                with pytest.raises(ValueError, match=r"offset|beyond|negative"):
                    file.stream(bad, 5)
                with pytest.raises(ValueError, match=r"offset|beyond|negative"):
                    file.stream(bad)
            await file.pread(4096, 0)  # what was read before is remembered by its length
            for bad in (None, "1", 1.5, 4096.0, b"1"):
                with pytest.raises(TypeError):
                    await file.pread(1, bad)
                with pytest.raises(TypeError):
                    await file.pread(bad, 0)
                with pytest.raises(TypeError):
                    await file.preadinto(buffer, bad)
                with pytest.raises(TypeError):
                    await file.pwrite(b"x", bad)
                with pytest.raises(TypeError):
                    await file.truncate(bad)
            with pytest.raises(ValueError, match="beyond"):
                await file.pread(2, MAX_OFFSET - 1)
            with pytest.raises(ValueError, match="beyond"):
                await file.pwrite(b"xy", MAX_OFFSET - 1)
            with pytest.raises(ValueError, match="negative"):
                await file.pread(-1, 0)
            with pytest.raises(ValueError, match="negative"):
                await file.truncate(-1)
            with pytest.raises(ValueError, match="at least"):
                await file.allocate(0, 0)
            for size, depth in ((0, 1), (1, 0), (-1, 1)):
                with pytest.raises(ValueError, match="at least"):
                    file.stream(chunk_size=size, depth=depth)
            with pytest.raises(TypeError, match="read-only"):
                await file.preadinto(b"abc", 0)
            with pytest.raises(TypeError, match="contiguous"):
                await file.preadinto(memoryview(buffer)[::2], 0)
            with pytest.raises(TypeError, match="contiguous"):
                await file.pwrite(memoryview(buffer)[::2], 0)
            for bad in (None, 5, "text", [1]):
                with pytest.raises(TypeError):
                    await file.pwrite(bad, 0)
                with pytest.raises(TypeError):
                    await file.append(bad)
                with pytest.raises(TypeError):
                    await file.preadinto(bad, 0)
            for bad in (b"x", buffer, memoryview(buffer), "x", 5):
                with pytest.raises(TypeError):
                    await file.preadv(bad, 0)
                with pytest.raises(TypeError):
                    await file.pwritev(bad, 0)
            assert file.statistics().under_way == 0

    runner.run(main())
    assert path.read_bytes() == pattern(10000)


@DIRECT
@pytest.mark.parametrize("mode", ["r", "w"])
def test_what_the_mode_does_not_allow_is_refused(
    runner: asyncio.Runner, path: Path, direct: bool, mode: str
) -> None:
    path.write_bytes(b"data")

    async def main() -> None:
        async with rawaio.open(path, mode, direct=direct) as file:
            for act in acts(file, reads=mode == "w"):
                with pytest.raises(io.UnsupportedOperation, match="is not for"):
                    await act
            await file.fsync()

    runner.run(main())


def acts(file: File, *, reads: bool = True, writes: bool | None = None) -> list[Any]:
    """Awaitables of all methods that read, or of all that write."""
    found: list[Any] = []
    if reads:
        found += [file.pread(1, 0), file.preadinto(bytearray(1), 0), file.preadv([bytearray(1)], 0)]
        found.append(file.pread_many([0], 1))
    if (not reads) if writes is None else writes:
        found += [file.pwrite(b"x", 0), file.pwritev([b"x"], 0), file.append(b"x")]
        found += [file.truncate(1), file.allocate(0, 1), file.pwrite_many([0], b"x")]
    return found


@DIRECT
def test_a_closed_file_is_refused(runner: asyncio.Runner, path: Path, direct: bool) -> None:
    path.write_bytes(b"data")

    async def main() -> None:
        file = await rawaio.open(path, "r+", direct=direct)
        await file.pread(1, 0)
        stream = file.stream(0, 4, chunk_size=1, depth=1)
        assert await anext(stream) == b"d"
        await file.close()
        assert file.closed
        assert file.fileno() == -1
        for act in [*acts(file, writes=True), file.fsync(), file.fdatasync(), anext(stream)]:
            with pytest.raises(ClosedError, match="closed"):
                await act
        with pytest.raises(ClosedError):
            file.stream()
        with pytest.raises(ClosedError):
            _ = file.size
        assert "closed" in repr(file)

    runner.run(main())


# -- at the same time ------------------------------------------------------------------------------


@DIRECT
@ENGINES
@pytest.mark.parametrize("size", [0, 3 * BLOCK])
def test_neighbours_in_one_block_lose_nothing(
    runner: asyncio.Runner, filesystem: FileSystem, direct: bool, engine: Engine, size: int
) -> None:
    path = filesystem.path / "file"
    before = pattern(size)
    path.write_bytes(before)
    data = pattern(300 * 11, 2)
    pieces = [(i * 11, data[i * 11 : i * 11 + 11]) for i in range(300)]
    random.Random(3).shuffle(pieces)

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=direct, engine=engine) as file:
            await asyncio.gather(*(file.pwrite(piece, 100 + at) for at, piece in pieces))

    runner.run(main())
    wanted = bytearray(before)
    wanted.extend(bytes(max(100 + len(data) - size, 0)))
    wanted[100 : 100 + len(data)] = data
    assert path.read_bytes() == wanted


def test_direct_and_buffered_neighbours_lose_nothing(
    runner: asyncio.Runner, filesystem: FileSystem
) -> None:
    path = filesystem.path / "file"
    path.write_bytes(bytes(3 * BLOCK))
    data = pattern(400 * 31, 2)

    async def main() -> None:
        async with (
            rawaio.open(path, "r+") as direct,
            rawaio.open(path, "r+", direct=False) as buffered,
        ):
            await asyncio.gather(
                *(
                    (direct, buffered)[i % 2].pwrite(data[i * 31 : i * 31 + 31], i * 31)
                    for i in range(400)
                )
            )

    runner.run(main())
    assert path.read_bytes() == data[: 400 * 31].ljust(3 * BLOCK, b"\0")


def test_buffered_writes_wait_for_direct_ones_as_far_as_the_cache_writes_back(
    runner: asyncio.Runner, ext4: Path
) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(3 * BLOCK))

    async def main() -> None:
        async with (
            rawaio.open(path, "r+") as direct,
            rawaio.open(path, "r+", direct=False) as buffered,
        ):
            # As of an aligned write that is under way.
            hold = await direct.hold(direct.lock, 0, 512, exclusive=False)
            acts = [
                buffered.pwrite(b"x", 600),
                buffered.append(b"y"),
                buffered.pwrite_many([700, 2 * BLOCK], b"zz"),
            ]
            tasks = [asyncio.ensure_future(act) for act in acts]
            await until(lambda: len(direct.lock) == 4)
            assert sum(not one.granted for one in direct.lock._holds) == 3
            direct.lock.release(hold)
            await asyncio.gather(*tasks)
            assert len(direct.lock) == 0
            await direct.close()
            assert await buffered.pwrite(b"x", 0) == 1

    runner.run(main())


def test_a_direct_file_is_open_when_what_the_cache_was_being_given_is_there(
    runner: asyncio.Runner, ext4: Path
) -> None:
    """Those writes began when there was no direct file to keep away from."""
    path = ext4 / "file"
    path.write_bytes(bytes(3 * BLOCK))

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=False) as buffered:
            hold = await buffered.hold_cached(0, 1)
            assert not hold.exclusive
            opening = asyncio.ensure_future(rawaio.open(path, "r+")._opened())
            await until(lambda: len(buffered.lock) == 2)
            reader = await rawaio.open(path)  # who does not write does not wait
            await reader.close()
            assert not opening.done()
            buffered.lock.release(hold)
            direct = await opening
            assert (await buffered.hold_cached(0, 1)).exclusive
            await direct.close()

    runner.run(main())


def test_opening_a_direct_file_can_be_cancelled_while_it_waits(
    runner: asyncio.Runner, ext4: Path
) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(3 * BLOCK))

    async def main() -> None:
        async with rawaio.open(path, "r+", direct=False) as buffered:
            hold = await buffered.hold_cached(0, 1)
            before = len(os.listdir("/proc/self/fd"))
            opening = asyncio.ensure_future(rawaio.open(path, "r+")._opened())
            await until(lambda: len(buffered.lock) == 2)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            await until(lambda: len(os.listdir("/proc/self/fd")) == before)
            buffered.lock.release(hold)
            again = await buffered.hold_cached(0, 1)
            assert not again.exclusive
            buffered.lock.release(again)

    runner.run(main())


@pytest.mark.parametrize("how", ["truncate", "allocate"])
def test_a_file_grows_when_nobody_writes_the_block_it_ends_in(
    runner: asyncio.Runner, ext4: Path, how: str
) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(100))

    async def main() -> None:
        async with rawaio.open(path, "r+") as file:
            hold = await file.hold(file.lock, 0, 512, exclusive=False)
            far = 64 << 20
            grow = file.truncate(far) if how == "truncate" else file.allocate(far, 4096)
            growing = asyncio.ensure_future(grow)
            await until(lambda: len(file.lock) == 2)
            assert file.size == 100
            file.lock.release(hold)
            await growing
            assert file.size >= far

    runner.run(main())


def test_a_file_cut_before_the_write_of_its_end_begins_has_the_right_size(
    runner: asyncio.Runner, ext4: Path
) -> None:
    path = ext4 / "file"
    data = pattern(3 * BLOCK)
    path.write_bytes(data)

    async def main() -> None:
        async with rawaio.open(path, "r+") as file:
            hold = await file.hold(file.lock, 0, MAX_OFFSET)
            write = asyncio.ensure_future(file.pwrite(b"x" * 100, 9000))
            await until(lambda: len(file.lock) == 2)  # it has found a file that goes on behind it
            os.truncate(path, 9050)
            file.lock.release(hold)
            await write
            assert file.size == 9100

    runner.run(main())
    assert path.read_bytes() == data[:9000] + b"x" * 100


@DIRECT
@ENGINES
def test_appends_never_overlap(
    runner: asyncio.Runner, filesystem: FileSystem, direct: bool, engine: Engine
) -> None:
    path = filesystem.path / "file"
    path.write_bytes(b"start")
    parts = [pattern(random.Random(i).choice((1, 7, 512, 700, BLOCK)), i) for i in range(120)]

    async def main() -> list[int]:
        async with (
            rawaio.open(path, "r+", direct=direct, engine=engine) as file,
            rawaio.open(path, "r+", direct=direct, engine=engine) as other,
        ):
            return list(
                await asyncio.gather(
                    *((file, other)[i % 2].append(part) for i, part in enumerate(parts))
                )
            )

    places = runner.run(main())
    contents = path.read_bytes()
    assert len(contents) == 5 + sum(map(len, parts))
    assert contents[:5] == b"start"
    for place, part in zip(places, parts, strict=True):
        assert contents[place : place + len(part)] == part
    ends = sorted((place, place + len(part)) for place, part in zip(places, parts, strict=True))
    assert [5, *(end for _, end in ends)] == [*(start for start, _ in ends), len(contents)]


@DIRECT
def test_streams_in_parallel_with_slow_consumers(
    runner: asyncio.Runner, path: Path, direct: bool
) -> None:
    data = pattern(64 * BLOCK + 5)
    path.write_bytes(data)

    async def consume(file: File, turns: int) -> bytes:
        got = bytearray()
        stream: AsyncIterator[bytes] = file.stream(chunk_size=3000, depth=2)
        async for chunk in stream:
            got += chunk
            for _ in range(turns):
                await asyncio.sleep(0)
        return bytes(got)

    async def main() -> None:
        async with rawaio.open(path, direct=direct) as file:
            for got in await asyncio.gather(*(consume(file, turns) for turns in range(8))):
                assert got == data

    runner.run(main())

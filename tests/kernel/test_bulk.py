"""Many operations in one call, beside the same operations one by one."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import random
import resource
import signal
import threading
import tracemalloc
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import bulk, many
from rawaio.bulk import Bulk, BulkLane
from rawaio.kernel import Kernel
from rawaio.loops.asyncio import AsyncioDriver
from rawaio.many import BulkOperation, _Section
from rawaio.pieces import Pieces
from rawaio.syscalls import RWF, Opcode, numbers
from rawaio.transfer import FileCall
from tests.fuse_server import FuseServer
from tests.support import passed

BLOCK = 4096


@pytest.fixture(params=[False, True], ids=["ring", "io_getevents"])
def ctx(request: pytest.FixtureRequest) -> Iterator[rawaio.IOContext]:
    with rawaio.IOContext(16, force_syscalls=request.param) as made:
        yield made


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(64 * BLOCK + 100)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "file"
    file.write_bytes(content)
    return file


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


def singly(fd: int, offsets: list[int], nbytes: int) -> dict[int, tuple[int, int]]:
    """What the same reads come to one by one: of those that are not whole, errno and bytes."""
    results: dict[int, tuple[int, int]] = {}
    with rawaio.IOContext(1) as ctx:
        for i, offset in enumerate(offsets):
            ctx.submit(rawaio.Request.pread(fd, bytearray(nbytes), offset))
            (completion,) = ctx.reap(1)
            if completion.res != nbytes:
                results[i] = max(-completion.res, 0), max(completion.res, 0)
    return results


@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 500, 3000])
def test_reads(ctx: rawaio.IOContext, fd: int, content: bytes, count: int) -> None:
    offsets = [random.Random(i).randrange(len(content) - 100) for i in range(count)]
    out = bytearray(100 * count)
    assert ctx.pread_many(fd, offsets, 100, out) == 100 * count
    assert out == b"".join(content[o : o + 100] for o in offsets)
    assert ctx.pread_many(fd, array("q", offsets), 100) == out


@pytest.mark.parametrize("count", [1, 16, 500])
def test_writes(ctx: rawaio.IOContext, fd: int, path: Path, count: int) -> None:
    order = list(range(count))
    random.Random(count).shuffle(order)
    data = random.Random(2).randbytes(70 * count)
    assert ctx.pwrite_many(fd, [70 * i for i in order], data) == 70 * count
    written = path.read_bytes()
    for at, i in enumerate(order):
        assert written[70 * i : 70 * (i + 1)] == data[70 * at : 70 * (at + 1)]


SHAPES = ["packed", "packed int64", "buffers", "tuple of views"]


def cut(shape: str, memory: memoryview, lengths: list[int]) -> dict[str, Any]:
    """One buffer as an argument of several lengths."""
    if shape == "packed":
        return {"out": memory, "lengths": lengths}
    if shape == "packed int64":
        return {"out": memory, "lengths": array("q", lengths)}
    stops = list(accumulate(lengths))
    views = [memory[stop - n : stop] for stop, n in zip(stops, lengths, strict=True)]
    return {"out": views if shape == "buffers" else tuple(views)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 2, 17, 600, 3000])
def test_reads_of_several_lengths(
    ctx: rawaio.IOContext, fd: int, content: bytes, shape: str, count: int
) -> None:
    chance = random.Random(count)
    offsets = [chance.randrange(len(content) - 100) for _ in range(count)]
    lengths = [chance.choice([0, 1, 33, 100]) for _ in range(count)]
    expected = b"".join(content[o : o + n] for o, n in zip(offsets, lengths, strict=True))
    out = bytearray(sum(lengths))
    given = cut(shape, memoryview(out), lengths)
    assert ctx.pread_many(fd, offsets, **given) == len(out)
    assert out == expected
    assert ctx.pread_many(fd, array("q", offsets), lengths=lengths) == expected


@pytest.mark.parametrize("form", ["packed", "bytes", "bytearrays"])
@pytest.mark.parametrize("count", [1, 17, 600])
def test_writes_of_several_lengths(
    ctx: rawaio.IOContext, fd: int, path: Path, form: str, count: int
) -> None:
    chance = random.Random(count)
    parts = [chance.randbytes(chance.randrange(71)) for _ in range(count)]
    offsets = [70 * i for i in range(count)]
    chance.shuffle(offsets)
    lengths = list(map(len, parts))
    if form == "packed":
        done = ctx.pwrite_many(fd, offsets, b"".join(parts), lengths=lengths)
    else:
        done = ctx.pwrite_many(fd, offsets, parts if form == "bytes" else [*map(bytearray, parts)])
    assert done == sum(lengths)
    written = path.read_bytes()
    for offset, part in zip(offsets, parts, strict=True):
        assert written[offset : offset + len(part)] == part


@pytest.mark.parametrize("shape", SHAPES)
def test_failures_of_several_lengths(
    ctx: rawaio.IOContext, fd: int, content: bytes, shape: str
) -> None:
    end = len(content)
    offsets = [0, end - 5, end, (1 << 63) - 4, end, 3]
    lengths = [10, 8, 7, 6, 0, 9]
    out = bytearray(sum(lengths))
    with pytest.raises(rawaio.BulkError) as caught:
        ctx.pread_many(fd, offsets, **cut(shape, memoryview(out), lengths))
    assert caught.value.counts == {1: 5, 2: 0, 3: 0}
    assert caught.value.errors == {1: 0, 2: 0, 3: singly(fd, offsets[3:4], 6)[0][0]}
    assert out[:15] == content[:10] + content[end - 5 :]
    assert out[-9:] == content[3:12]


def test_long_ones_beside_a_short_one(ctx: rawaio.IOContext, fd: int, content: bytes) -> None:
    """All bits of a length are compared, in a run where one is not whole."""
    lengths = [70_000, 1 << 17, 65_536, 3]
    out = bytearray(sum(lengths))
    with pytest.raises(rawaio.BulkError) as caught:
        ctx.pread_many(fd, [1, 2, 3, len(content) - 1], out=out, lengths=lengths)
    assert caught.value.counts == {3: 1}
    assert out[:-3] == content[1:70_001] + content[2 : 2 + (1 << 17)] + content[3:65_539]


def test_one_lane_for_jobs_of_all_shapes(fd: int, content: bytes) -> None:
    """What is in the slab from one job is not taken for the next one's."""
    chance = random.Random(0)
    same = bytearray(40 * 9)
    with rawaio.IOContext(16) as context:
        for turn in range(60):
            count = chance.choice([1, 5, 40, 600])
            offsets = [chance.randrange(len(content) - 9) for _ in range(count)]
            lengths = [9] * count if turn % 2 else [chance.randrange(10) for _ in range(count)]
            expected = b"".join(content[o : o + n] for o, n in zip(offsets, lengths, strict=True))
            shape = chance.choice(["equal", "same", *SHAPES])
            if shape == "same" and count <= 40 and turn % 2:
                # The same memory again, of another number of operations.
                out = memoryview(same)[: 9 * count]
                context.pread_many(fd, offsets, 9, out)
            elif shape in ("equal", "same") and turn % 2:
                out = memoryview(context.pread_many(fd, offsets, 9))
            else:
                out = memoryview(bytearray(sum(lengths)))
                shape = "packed" if shape in ("equal", "same") else shape
                context.pread_many(fd, offsets, **cut(shape, out, lengths))
            assert out == expected
        assert len(context._lanes) == 1


@pytest.mark.parametrize("lengths", [False, True], ids=["equal", "lengths"])
def test_a_million_take_little_memory(lengths: bool) -> None:
    """Nothing is kept for each operation that was not given."""
    count = 1_000_000
    offsets, out = array("q", [0]) * count, bytearray(count)
    given: dict[str, Any] = {"lengths": array("q", [1]) * count} if lengths else {"nbytes": 1}
    with open("/dev/zero", "rb", buffering=0) as zero, rawaio.IOContext(32) as context:
        context.pread_many(
            zero,
            offsets[:5000],
            out=out[:5000],
            **({"lengths": given["lengths"][:5000]} if lengths else given),
        )
        out[:] = b"x" * count
        tracemalloc.start()
        try:
            assert context.pread_many(zero, offsets, out=out, **given) == count
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 1 << 20
    assert not any(out)


def test_the_same_failures_as_one_by_one(ctx: rawaio.IOContext, fd: int, content: bytes) -> None:
    end = len(content)
    offsets = [0, end - 50, 100, end, end + 5000, 200, (1 << 63) - 101, end - 100]
    out = bytearray(100 * len(offsets))
    with pytest.raises(rawaio.BulkError) as caught:
        ctx.pread_many(fd, offsets, 100, out)
    error = caught.value
    expected = singly(fd, offsets, 100)
    assert {i: (error.errors[i], error.counts[i]) for i in error.indexes} == expected
    assert set(expected) == {1, 3, 4, 6}
    for i in {*range(len(offsets))} - expected.keys():
        assert out[100 * i : 100 * (i + 1)] == content[offsets[i] : offsets[i] + 100]
    assert out[100:150] == content[end - 50 :]


def test_a_descriptor_that_is_none(ctx: rawaio.IOContext, fd: int) -> None:
    ctx.pread_many(fd, [0], 10)  # what it opens is open now, and does not get the number
    spare = os.dup(fd)
    os.close(spare)
    with pytest.raises(rawaio.BulkError) as caught:
        ctx.pread_many(spare, range(0, 300, 10), 10)
    assert caught.value.errno == errno.EBADF
    assert caught.value.indexes == list(range(30))
    assert len(ctx.pread_many(fd, [0], 10)) == 10  # the context is as good as before


def test_more_than_a_limit_takes(ctx: rawaio.IOContext, fd: int, path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK, before[1]))
    try:
        with pytest.raises(rawaio.BulkError) as caught:
            ctx.pwrite_many(fd, [0, 100 * BLOCK, 10], bytes(30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errors == {1: errno.EFBIG}
    assert path.stat().st_size < 100 * BLOCK


def test_nothing_of_it_is_reaped(ctx: rawaio.IOContext, fd: int) -> None:
    reads = [rawaio.Request.pread(fd, bytearray(10), 0) for _ in range(5)]
    with ctx.plugged():
        ctx.submit(*reads)
        ctx.pread_many(fd, range(100), 10)
        assert ctx.statistics().in_queue == 5
    assert [c.request for c in ctx.reap(5)] == reads
    statistics = ctx.statistics()
    assert statistics.submitted == statistics.completed == 105


def test_wrong_arguments_start_nothing(ctx: rawaio.IOContext, fd: int) -> None:
    wrong: list[tuple[tuple[Any, ...], type[Exception]]] = [
        ((fd, [0, 1], 10, bytearray(19)), ValueError),
        ((fd, [-1], 10), ValueError),
        ((fd, [0], 0), ValueError),
        ((fd, [0], 10, bytes(10)), TypeError),
        ((fd, ["0"], 10, bytearray(10)), TypeError),
        (("fd", [0], 10), TypeError),
    ]
    for arguments, kind in wrong:
        with pytest.raises(kind):
            ctx.pread_many(*arguments)
    with pytest.raises(ValueError, match="evenly"):
        ctx.pwrite_many(fd, [0, 1], b"abc")
    assert ctx.statistics().submitted == 0


def test_closed_and_forked(fd: int) -> None:
    context = rawaio.IOContext(4)
    context.pread_many(fd, [0], 10)
    child = os.fork()
    if child == 0:
        try:
            context.pread_many(fd, [0], 10)
        except rawaio.ForkedError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    context.close()
    with pytest.raises(rawaio.ClosedError):
        context.pread_many(fd, [0], 10)


def test_a_context_gives_back_what_its_lanes_had(fd: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with rawaio.IOContext(8) as context:
        context.pread_many(fd, range(100), 10)
        (lane,) = context._lanes
    assert lane.closed
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_several_threads_at_once(ctx: rawaio.IOContext, fd: int, content: bytes) -> None:
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            offsets = [random.Random(seed + i).randrange(len(content) - 64) for i in range(400)]
            for _ in range(5):
                out = ctx.pread_many(fd, offsets, 64)
                assert out == b"".join(content[o : o + 64] for o in offsets)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=read, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class _StruckError(BaseException):
    pass


def test_an_exception_from_outside_leaves_nothing_to_the_kernel(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Struck between submit and collect: the memory can be resized, so nobody has it any more."""
    with rawaio.IOContext(4) as context:
        out = bytearray(100 * 10)

        struck: list[BulkLane] = []

        def strike(lane: BulkLane) -> int:
            struck.append(lane)
            raise _StruckError

        with monkeypatch.context() as patch:
            patch.setattr(BulkLane, "collect", strike)
            with pytest.raises(_StruckError):
                context.pread_many(fd, range(100), 10, out)
        # Whoever still has the lane, as a traceback has.
        assert struck.pop().closed
        out.extend(b"moved")
        assert context.pread_many(fd, range(100), 10, out[:1000]) == 1000


def test_a_lane_that_nobody_closed_keeps_its_job_until_the_kernel_is_done(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[object] = []
    destroy = Kernel.destroy

    def watch(kernel: Kernel) -> None:
        kept.append(kernel.keeps)
        destroy(kernel)

    monkeypatch.setattr(Kernel, "destroy", watch)
    job = Bulk(Opcode.PREAD, fd, Pieces([0], bytearray(1), 1, reading=True))
    lane = BulkLane(1)
    lane.begin(job)
    lane.submit()
    del lane
    gc.collect()
    assert kept == [job]


@pytest.mark.parametrize("forced", [False, True], ids=["ring", "io_getevents"])
def test_a_lane_looks_into_the_ring_if_it_may(fd: int, forced: bool) -> None:
    """Beyond the ring's end too, whose number of events 5 does not divide."""
    lane = BulkLane(5, force_syscalls=True) if forced else BulkLane(5)
    raw = lane._raw
    called: list[int] = []

    def watch(*arguments: Any) -> int:
        called.append(passed(arguments[0]))
        return raw(*arguments)

    lane._raw = watch
    job = Bulk(Opcode.PREAD, fd, Pieces(range(3000), None, 1, reading=True))
    lane.begin(job)
    while job.finished < job.total:
        started = lane.submit()
        # What is in the page cache is complete when it has been submitted.
        assert 0 < started == lane.collect()
    usable = lane._ring.usable
    lane.close()
    assert (numbers().io_getevents in called) == (forced or not usable)


def test_each_completion_makes_the_eventfd_readable(fd: int) -> None:
    lane = BulkLane(4, signals=True)
    job = Bulk(Opcode.PREAD, fd, Pieces(range(3), None, 1, reading=True))
    lane.begin(job)
    assert lane.submit() == lane.collect() == 3
    job.check()
    assert os.eventfd_read(lane.eventfd) == 3
    lane.nudge()
    assert os.eventfd_read(lane.eventfd) == 1
    lane.reset()  # of nothing
    lane.end()
    lane.close()


def test_a_job_that_wants_no_signals(fd: int) -> None:
    """Between two that do, on the same lane."""
    lane = BulkLane(4, signals=True)
    for signals in (True, False, True):
        job = Bulk(Opcode.PREAD, fd, Pieces(range(3), None, 1, reading=True), signals=signals)
        lane.begin(job)
        assert lane.submit() == lane.collect() == 3
        lane.end()
        job.check()
        if signals:
            assert os.eventfd_read(lane.eventfd) == 3
        else:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(lane.eventfd)
    lane.close()


def test_a_job_keeps_its_file(path: Path) -> None:
    """Nobody else may have it, and a descriptor that is closed is soon another file's."""
    with path.open("rb") as file:
        job = Bulk(Opcode.PREAD, file, Pieces([0], None, 1, reading=True))
        assert job.fd is file
        assert job.fileno == file.fileno()


def test_the_window_is_kept(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more in flight than nr_events, and never a wait while there is room for a batch."""
    seen: list[tuple[int, int]] = []
    wait = BulkLane._wait

    def watch(lane: BulkLane, min_nr: int) -> None:
        assert lane._job is not None
        seen.append((lane._job.in_flight, min_nr))
        wait(lane, min_nr)

    monkeypatch.setattr(BulkLane, "_wait", watch)
    with rawaio.IOContext(16) as context:
        context.pread_many(fd, range(0, 64 * BLOCK, 512), 512)
    assert all(0 < in_flight <= 16 and min_nr <= in_flight for in_flight, min_nr in seen)


@pytest.mark.parametrize("count", [bulk._STRETCH + 7, bulk._WHOLE + 3 * bulk._STRETCH + 7])
def test_addresses_of_every_operation_across_stretches(fd: int, count: int) -> None:
    """In batches that do not divide what is filled at a time: all, or so many of more."""
    length = count if count <= bulk._WHOLE else bulk._STRETCH
    out = bytearray(3 * count)
    pieces = Pieces(range(count), out, 3, reading=True)
    job = Bulk(Opcode.PREAD, fd, pieces)
    lane = BulkLane(24)
    lane.begin(job)
    seen: list[tuple[int, ...]] = []
    before = 0
    while job.finished < job.total:
        lane.submit(5)
        for i in range(before, job.next):
            place = i % length
            words = lane._words[8 * place : 8 * place + 8].tolist()
            assert words[1] == 0  # no flags
            seen.append((words[0] >> 32, words[0] & 0xFFFF_FFFF, *words[3:6]))
        before = job.next
        lane.collect()
    assert lane.submit() == 0
    assert seen == [(i, 3, pieces.address + 3 * i, 3, i) for i in range(count)]
    lane.end()
    lane.close()
    assert not job.failures


def test_lengths_are_filled_in_by_the_stretch(fd: int) -> None:
    """They take longer, and nothing of them is of use to the next job."""
    count = bulk._STRETCH + 1
    lane = BulkLane(8)
    for pieces, filled in (
        (Pieces(range(count), None, lengths=[1] * count, reading=True), bulk._STRETCH),
        (Pieces(range(count), None, 1, reading=True), count),
    ):
        lane.begin(job := Bulk(Opcode.PREAD, fd, pieces))
        lane.submit()
        assert lane._stop == filled
        while job.in_flight:
            lane.collect()
        lane.end()
    lane.close()


def test_a_window_of_more_than_a_stretch_is_submitted_at_once(fd: int) -> None:
    window = bulk._STRETCH + 1
    job = Bulk(Opcode.PREAD, fd, Pieces(range(bulk._WHOLE + 1), None, 1, reading=True))
    lane = BulkLane(window)
    lane.begin(job)
    assert lane.submit() == window
    assert lane.io_submit_calls == 1
    lane.close()


def test_a_descriptor_that_is_another_file_now(path: Path, content: bytes) -> None:
    """Which is read directly, and not at once as the one before was."""
    offsets = [BLOCK * (7 * i % 64) for i in range(300)]
    expected = b"".join(content[o : o + BLOCK] for o in offsets)
    direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
    fd = os.open(path, os.O_RDONLY)
    out = rawaio.aligned_buffer(BLOCK * len(offsets))
    try:
        with rawaio.IOContext(8, max_batch=8) as context:
            for source in (fd, fd, direct, fd):
                os.dup2(source, fd)
                out[:] = bytes(len(out))
                assert context.pread_many(fd, offsets, BLOCK, out) == len(out)
                assert out == expected
    finally:
        os.close(fd)
        os.close(direct)


def test_one_lane_for_jobs_of_all_sizes(fd: int, content: bytes) -> None:
    """What one job left behind is of no use to the next."""
    with rawaio.IOContext(16) as context:
        for count in (3000, 5, 1, 1025, 1024, 17, 16, 8192, 8193, 8192, 9000, 2):
            out = context.pread_many(fd, range(count), 9)
            assert out == b"".join(content[i : i + 9] for i in range(count))
        assert len(context._lanes) == 1


# -- files under asyncio ---------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize("engine", ["auto", "threads"])
@pytest.mark.parametrize("nbytes", [BLOCK, 777])
def test_files_read(path: Path, content: bytes, direct: bool, engine: Any, nbytes: int) -> None:
    async def main() -> None:
        async with rawaio.open(path, direct="prefer" if direct else False, engine=engine) as f:
            offsets = [random.Random(i).randrange(60) * BLOCK + i % 2 * 5 for i in range(300)]
            out = rawaio.aligned_buffer(300 * nbytes)
            assert await f.pread_many(offsets, nbytes, out) == 300 * nbytes
            assert out == b"".join(content[o : o + nbytes] for o in offsets)
            assert await f.pread_many(array("q", offsets), nbytes) == out
            assert await f.pread_many([], nbytes) == b""

    asyncio.run(main())


@pytest.mark.parametrize("direct", ["prefer", False], ids=["direct", "buffered"])
@pytest.mark.parametrize("engine", ["auto", "threads"])
@pytest.mark.parametrize("nbytes", [BLOCK, 777])
def test_files_write(tmp_path: Path, direct: Any, engine: Any, nbytes: int) -> None:
    async def main() -> None:
        order = list(range(300))
        random.Random(3).shuffle(order)
        data = rawaio.aligned_buffer(300 * nbytes)
        data[:] = random.Random(4).randbytes(300 * nbytes)
        async with rawaio.open(tmp_path / "new", "x", direct=direct, engine=engine) as f:
            for _ in range(2):  # a file that grows, and then one that is there
                assert await f.pwrite_many([nbytes * i for i in order], data) == 300 * nbytes
        written = (tmp_path / "new").read_bytes()
        assert len(written) == 300 * nbytes
        for at, i in enumerate(order):
            part = data[nbytes * at : nbytes * (at + 1)]
            assert written[nbytes * i : nbytes * (i + 1)] == part

    asyncio.run(main())


@pytest.mark.parametrize("direct", ["prefer", False], ids=["direct", "buffered"])
def test_files_fail_as_one_by_one(path: Path, content: bytes, direct: Any) -> None:
    async def main() -> None:
        async with rawaio.open(path, direct=direct) as f:
            end = len(content)
            offsets = [0, 64 * BLOCK, BLOCK, end, 65 * BLOCK]
            out = rawaio.aligned_buffer(5 * BLOCK)
            with pytest.raises(rawaio.BulkError) as caught:
                await f.pread_many(offsets, BLOCK, out)
            assert caught.value.counts == {1: 100, 3: 0, 4: 0}
            assert set(caught.value.errors.values()) == {0}
            assert out[:BLOCK] == content[:BLOCK]
            assert out[2 * BLOCK : 3 * BLOCK] == content[BLOCK : 2 * BLOCK]
            with pytest.raises(OSError, match="not open for|not for writing"):
                await f.pwrite_many([0], b"x")
        with pytest.raises(rawaio.ClosedError):
            await f.pread_many([0], 1)

    asyncio.run(main())


def test_files_let_others_run(path: Path) -> None:
    """Another task has its turn many times while one call is under way."""

    async def main() -> None:
        async with rawaio.open(path, direct=False) as f:
            turns = 0
            done = False

            async def other() -> None:
                nonlocal turns
                while not done:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            await f.pread_many(range(40000), 16)
            done = True
            await task
            # 128 at a time, and four times that before the loop has its turn.
            assert turns > 40000 // (128 * 4) // 2

    asyncio.run(main())


@pytest.mark.parametrize("direct", ["prefer", False], ids=["direct", "buffered"])
@pytest.mark.parametrize("shape", ["equal", *SHAPES])
def test_files_in_sections(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, direct: Any, shape: str
) -> None:
    """What fails is told by its index in the whole, and memory is counted through."""
    monkeypatch.setattr(many, "_SECTION", 8)

    async def main() -> None:
        end = 64 * BLOCK
        offsets = [BLOCK * i for i in range(21)]
        offsets[3] = offsets[11] = offsets[20] = end
        lengths = [BLOCK] * 21 if shape == "equal" else [BLOCK * (1 + i % 2) for i in range(21)]
        out = rawaio.aligned_buffer(sum(lengths))
        given: dict[str, Any] = {"nbytes": BLOCK, "out": out}
        if shape != "equal":
            given = cut(shape, out, lengths)
        async with rawaio.open(path, direct=direct) as f:
            with pytest.raises(rawaio.BulkError) as caught:
                await f.pread_many(offsets, **given)
        assert caught.value.counts == {3: 100, 11: 100, 20: 100}
        for i, stop in enumerate(accumulate(lengths)):
            found = content[offsets[i] : offsets[i] + lengths[i]]
            assert out[stop - lengths[i] :][: len(found)] == found

    asyncio.run(main())


def test_threads_get_few_calls_at_a_time(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "_CHUNK", 4)
    seen: list[int] = []
    begin = _Section._begin

    async def counted(section: _Section, ahead: deque[FileCall], indexes: list[int]) -> None:
        await begin(section, ahead, indexes)
        assert len(indexes) <= 4
        seen.append(len(ahead))

    monkeypatch.setattr(_Section, "_begin", counted)

    async def main() -> None:
        async with rawaio.open(path, direct=False, engine="aio") as f:
            f.no_nowait()
            assert await f.pread_many(range(101), 2) == b"".join(
                content[i : i + 2] for i in range(101)
            )

    asyncio.run(main())
    assert len(seen) == 26
    assert max(seen) == many._CHUNKS


def test_many_small_calls_let_others_run(path: Path) -> None:
    """Also where each is answered at once, and nothing is waited for."""

    async def main() -> None:
        async with rawaio.open(path, direct=False) as f:
            turns = 0
            done = False

            async def other() -> None:
                nonlocal turns
                while not done:
                    turns += 1
                    await asyncio.sleep(0)

            task = asyncio.create_task(other())
            await asyncio.sleep(0)
            out = bytearray(160)
            for _ in range(1000):
                await f.pread_many(range(10), 16, out)
            done = True
            await task
            assert turns > 1000 * 10 // 512

    asyncio.run(main())


@pytest.mark.parametrize("lengths", [False, True], ids=["equal", "lengths"])
def test_files_take_little_memory(path: Path, lengths: bool) -> None:
    async def main() -> None:
        count = 200_000
        offsets, out = array("q", [3]) * count, bytearray(count)
        given: dict[str, Any] = {"lengths": array("q", [1]) * count} if lengths else {"nbytes": 1}
        async with rawaio.open(path, direct=False) as f:
            await f.pread_many(offsets[:10], 1)
            tracemalloc.start()
            try:
                assert await f.pread_many(offsets, out=out, **given) == count
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
        assert peak < 4 << 20  # what a section of 16384 may take
        assert len(set(out)) == 1

    asyncio.run(main())


@pytest.mark.parametrize("nth", [1, 3])
def test_files_fail_where_a_lane_does(
    path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """What nobody expects of a lane comes to the caller, and the next call has another lane."""
    calls = 0
    submit = BulkLane.submit

    def fails(lane: BulkLane, most: int | None = None) -> int:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise RuntimeError("of all things")
        return submit(lane, most)

    async def main() -> None:
        async with rawaio.open(path, direct=False) as f:
            with monkeypatch.context() as patch:
                patch.setattr(BulkLane, "submit", fails)
                with pytest.raises(RuntimeError, match="of all things"):
                    await f.pread_many(range(1000), 16)
            assert len(await f.pread_many(range(1000), 16)) == 16000

    asyncio.run(main())


class _Refuses:
    """A lane's way to the kernel, on which io_submit fails so often with such an errno."""

    def __init__(self, lane: BulkLane, failure: int, times: int) -> None:
        self.lane = lane
        self.raw = lane._raw
        self.failure = failure
        self.left = times
        lane._raw = self

    def __call__(self, *arguments: Any) -> int:
        if self.left and passed(arguments[0]) == numbers().io_submit:
            self.left -= 1
            ctypes.set_errno(self.failure)
            return -1
        return self.raw(*arguments)


def lane_of(file: rawaio.File) -> BulkLane:
    """The one that is there, after one call."""
    lanes = file.driver.lanes
    assert isinstance(lanes, many.Lanes)
    (lane,) = lanes._lanes
    return lane


def test_files_when_the_kernel_is_short_behind_a_look(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EAGAIN when the eventfd has told of all that was in flight: it will tell of nothing more."""
    collect, reset = BulkLane.collect, BulkLane.reset
    looked: list[_Refuses] = []

    def late(lane: BulkLane) -> int:
        return collect(lane) if looked else 0  # a device that takes its time

    def reset_and_refuse(lane: BulkLane) -> None:
        if not looked:
            looked.append(_Refuses(lane, errno.EAGAIN, 1))
        reset(lane)

    async def main() -> None:
        async with rawaio.open(path, direct=False, engine="aio") as f:
            await f.pread_many([0], 1)
            monkeypatch.setattr(BulkLane, "collect", late)
            monkeypatch.setattr(BulkLane, "reset", reset_and_refuse)
            assert await f.pread_many(range(300), 1) == content[:300]
            assert not looked[0].left

    asyncio.run(main())


def test_lanes_that_another_thread_closes_meanwhile(fd: int) -> None:
    class Lanes(list[BulkLane]):
        """There seems to be one, and then it is gone."""

        def __bool__(self) -> bool:
            return True

    with rawaio.IOContext(1) as context:
        context.pread_many(fd, [0], 1)
        context._lanes = Lanes(context._lanes)


def test_files_when_the_kernel_is_short_of_memory(path: Path, content: bytes) -> None:
    """EAGAIN with nothing in flight: nobody gives anything back, and it is tried again."""

    async def main() -> None:
        async with rawaio.open(path, direct=False, engine="aio") as f:
            await f.pread_many([0], 1)
            short = _Refuses(lane_of(f), errno.EAGAIN, 3)
            assert await f.pread_many(range(300), 1) == content[:300]
            assert not short.left

    asyncio.run(main())


@pytest.mark.parametrize("failure", [errno.EBADF, errno.EOPNOTSUPP])
def test_files_that_are_refused_at_once(path: Path, content: bytes, failure: int) -> None:
    """Nothing completes, and so nothing wakes anybody; EOPNOTSUPP is for another way to do."""

    async def main() -> None:
        async with rawaio.open(path, direct=False, engine="aio") as f:
            await f.pread_many([0], 1)
            lane = lane_of(f)
            refused = _Refuses(lane, failure, 30)
            if failure == errno.EBADF:
                with pytest.raises(rawaio.BulkError) as caught:
                    await f.pread_many(range(30), 1)
                assert caught.value.errors == dict.fromkeys(range(30), errno.EBADF)
                assert await f.pread_many(range(30), 1) == content[:30]
                return
            assert await f.pread_many(range(30), 1) == content[:30]
            assert not refused.left
            calls = lane.io_submit_calls
            assert await f.pread_many(range(30), 1) == content[:30]
            assert lane.io_submit_calls == calls  # as it is known now

    asyncio.run(main())


def test_files_struck_while_they_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the task is told at once, nothing goes on with."""

    async def main() -> None:
        async with rawaio.open(path, direct=False, engine="aio") as f:
            await f.pread_many([0], 1)
            lane = lane_of(f)

            async def strike(operation: object) -> None:
                del operation
                raise _StruckError

            out = bytearray(5000)
            with monkeypatch.context() as patch:
                patch.setattr(f.driver, "settle", strike)
                with pytest.raises(_StruckError):
                    await f.pread_many(range(5000), 1, out)
                assert lane.closed
                assert not f.driver.busy
            assert await f.pread_many(range(5000), 1, out) == 5000

    asyncio.run(main())


def test_files_cancelled_start_no_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 10_000
    started: list[BulkOperation] = []
    start = many.Lanes.start

    async def main() -> None:
        begun = asyncio.Event()

        def watch(lanes: many.Lanes, job: Bulk) -> BulkOperation:
            started.append(start(lanes, job))
            begun.set()
            return started[-1]

        monkeypatch.setattr(many.Lanes, "start", watch)
        async with rawaio.open(path, direct=False, engine="aio") as f:
            task = asyncio.create_task(f.pread_many(range(count), 1))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            job = started[0].job
            assert 0 < job.finished == job.next < count
            assert not f.driver.busy

    asyncio.run(main())


@pytest.mark.parametrize("lengths", [False, True], ids=["equal", "lengths"])
def test_files_hold_what_they_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: bool
) -> None:
    """From the first byte to the last, and nothing behind it."""
    (tmp_path / "file").write_bytes(bytes(16 * BLOCK))
    start = many.Lanes.start
    seen: list[list[bool]] = []

    async def main() -> None:
        async with rawaio.open(tmp_path / "file", "r+", direct="prefer") as f:
            if not f.direct:
                pytest.skip("no direct I/O here")

            def watch(lanes: many.Lanes, job: Bulk) -> BulkOperation:
                holds = [
                    f.lock.acquire(at, at + 1, exclusive=True, granted=lambda: None)
                    for at in (BLOCK - 1, BLOCK, 7 * BLOCK, 8 * BLOCK - 1, 8 * BLOCK)
                ]
                seen.append([hold.granted for hold in holds])
                for hold in holds:
                    f.lock.release(hold)
                return start(lanes, job)

            monkeypatch.setattr(many.Lanes, "start", watch)
            data = rawaio.aligned_buffer(3 * BLOCK)
            if lengths:
                given: dict[str, Any] = {"lengths": [2 * BLOCK, BLOCK]}
                await f.pwrite_many([6 * BLOCK, BLOCK], data, **given)
            else:
                await f.pwrite_many([7 * BLOCK, BLOCK, 3 * BLOCK], data)

    asyncio.run(main())
    assert seen == [[True, False, False, False, True]]


@pytest.mark.parametrize("count", [40, 3000])
def test_files_in_the_page_cache_need_no_eventfd(path: Path, content: bytes, count: int) -> None:
    """Also where more is to be done than in one turn of the loop."""

    async def main() -> None:
        async with rawaio.open(path, direct=False, engine="aio") as f:
            out = bytearray(count * 9)
            for _ in range(2):
                assert await f.pread_many(range(count), 9, out) == len(out)
            if f.driver.lanes is None:
                pytest.skip("RWF_NOWAIT is refused here")
            (lane,) = many.lanes_of(f.driver)._lanes
            if count > 1000:  # it was nudged, and the last nudge may not be reset
                lane.reset()
            with pytest.raises(BlockingIOError):
                os.eventfd_read(lane.eventfd)
        assert out == b"".join(content[i : i + 9] for i in range(count))

    asyncio.run(main())


class Silent(Bulk):
    """Of a file whose operations were taken for complete when they are submitted."""

    def __init__(self, *arguments: Any, signals: bool, **named: Any) -> None:
        assert signals
        super().__init__(*arguments, signals=False, **named)


async def _open_held(fuse: FuseServer, data: bytes) -> rawaio.File:
    """A file for a lane, every read of which is held."""
    fuse.write_file("file", data)
    f = await rawaio.open(fuse.path("file"), engine="aio")
    f.nowait_flag = RWF.DSYNC  # FUSE does not know NOWAIT, and no read minds this one
    fuse.hold("read")
    return f


def test_files_whose_completions_nobody_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may be slow where the page cache is not: what is in flight is looked for."""
    monkeypatch.setattr(many, "Bulk", Silent)
    data = bytes(range(256)) * 16 * 64

    async def main() -> None:
        with FuseServer() as fuse:
            f = await _open_held(fuse, data)
            out = rawaio.aligned_buffer(len(data))
            task = asyncio.create_task(f.pread_many(range(0, len(data), BLOCK), BLOCK, out))
            await asyncio.sleep(0)
            await asyncio.to_thread(fuse.wait_held, 64)
            assert not task.done()
            fuse.unhold()
            assert await task == len(data)
            assert bytes(out) == data
            await f.close()

    asyncio.run(main())


def test_files_whose_completions_nobody_tells_of_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loop's look at them is nobody's business any more; the second has its own."""
    monkeypatch.setattr(many, "Bulk", Silent)
    data = bytes(range(256)) * 16 * 64
    out = rawaio.aligned_buffer(len(data))
    looks: list[bool] = []
    step = BulkOperation.step

    def look(operation: BulkOperation) -> bool:
        looks.append(True)
        return step(operation)

    monkeypatch.setattr(BulkOperation, "step", look)

    async def begin(fuse: FuseServer) -> tuple[rawaio.File, asyncio.Task[int]]:
        f = await _open_held(fuse, data)
        task = asyncio.create_task(f.pread_many(range(0, len(data), BLOCK), BLOCK, out))
        await asyncio.sleep(0)
        await asyncio.to_thread(fuse.wait_held, 64)
        return f, task

    async def timers() -> None:
        loop = asyncio.get_running_loop()
        later = loop.create_future()
        loop.call_later(2 * many._RETRY_S, later.set_result, None)
        await later

    async def go_on(fuse: FuseServer, driver: AsyncioDriver) -> None:
        fuse.unhold()
        await driver.drained()

    async def end(f: rawaio.File, task: asyncio.Task[int]) -> None:
        assert await task == len(data)
        await f.close()

    with FuseServer() as fuse, closing(asyncio.new_event_loop()) as first:
        f, task = first.run_until_complete(begin(fuse))
        driver = f.driver
        assert isinstance(driver, AsyncioDriver)
        driver.detach()
        before = len(looks)
        first.run_until_complete(timers())
        assert len(looks) == before
        with closing(asyncio.new_event_loop()) as second:
            driver.attach(second)
            second.run_until_complete(go_on(fuse, driver))
            driver.detach()
            driver.attach(first)
            first.run_until_complete(end(f, task))
            first.run_until_complete(rawaio.shutdown())
    assert bytes(out) == data


def test_files_cancelled(tmp_path: Path) -> None:
    """Cancelled with reads held back by the server: it ends when the last in flight has."""

    async def main() -> None:
        with FuseServer() as fuse:
            fuse.write_file("file", bytes(range(256)) * 16 * 256)
            async with rawaio.open(fuse.path("file"), engine="aio") as f:
                f.nowait_flag = 8  # or it is done by threads from the beginning
                f.no_nowait()
                out = rawaio.aligned_buffer(256 * BLOCK)
                task = asyncio.create_task(f.pread_many(range(0, 256 * BLOCK, BLOCK), BLOCK, out))
                fuse.hold("read")
                await asyncio.sleep(0)
                await asyncio.to_thread(fuse.wait_held, 1)
                task.cancel()
                await asyncio.sleep(0)
                assert not task.done()
                fuse.unhold()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not f.under_way
                assert await f.pread(4, 0) == bytes(range(4))

    asyncio.run(main())

"""IOContext on files: every opcode, real data, and what the kernel says of what is wrong."""

from __future__ import annotations

import errno
import mmap
import os
import random
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rawaio
from rawaio import RWF, Request, aligned_buffer
from tests.context_support import LIMIT_S, Pipe, requests, results

_Make = Callable[..., rawaio.IOContext]
_BLOCK = 4096
_BLOCKS = 64


def _random(nbytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(nbytes)


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A file of random blocks, open with O_DIRECT, for reading and writing."""
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(_random(_BLOCK * _BLOCKS))
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {path.parent}: {error}")
    try:
        try:
            os.preadv(fd, [aligned_buffer(_BLOCK)], 0)
        except OSError as error:
            pytest.skip(f"no O_DIRECT in {path.parent}: {error}")
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def blocks(direct: int) -> bytes:
    """The file's contents, as they are before the test."""
    data = _random(_BLOCK * _BLOCKS)
    buffer = aligned_buffer(len(data))
    buffer[:] = data
    assert os.pwritev(direct, [buffer], 0) == len(data)
    return data


def test_direct_reads_in_any_order(ctx: rawaio.IOContext, direct: int, blocks: bytes) -> None:
    submitted = [
        Request.pread(direct, aligned_buffer(_BLOCK), _BLOCK * i, user_data=i)
        for i in random.Random(2).sample(range(_BLOCKS), _BLOCKS)
    ]
    ctx.submit(*submitted)
    reaped = ctx.reap(min_nr=_BLOCKS, timeout=LIMIT_S)
    assert set(requests(reaped)) == set(submitted)
    for completion in reaped:
        i = completion.request.user_data
        assert isinstance(i, int)
        assert completion.result() == _BLOCK
        assert completion.request.buffer == blocks[_BLOCK * i : _BLOCK * (i + 1)]


def test_direct_writes(ctx: rawaio.IOContext, direct: int, blocks: bytes) -> None:
    new = _random(_BLOCK * _BLOCKS, seed=3)
    source = aligned_buffer(len(new))
    source[:] = new
    flags = [0, RWF.DSYNC, RWF.SYNC, 0]
    for i in range(_BLOCKS):
        at = slice(_BLOCK * i, _BLOCK * (i + 1))
        ctx.submit(Request.pwrite(direct, source[at], at.start, rw_flags=flags[i % 4]))
    assert results(ctx.drain(timeout=LIMIT_S)) == [_BLOCK] * _BLOCKS
    back = aligned_buffer(len(new))
    os.preadv(direct, [back], 0)
    assert back == new != blocks


def test_vectored(ctx: rawaio.IOContext, direct: int, blocks: bytes) -> None:
    buffers = [aligned_buffer(n * _BLOCK) for n in (1, 3, 2)]
    read = Request.preadv(direct, buffers, _BLOCK)
    ctx.submit(read)
    assert ctx.reap(min_nr=1)[0].result() == 6 * _BLOCK
    assert b"".join(buffers) == blocks[_BLOCK : 7 * _BLOCK]
    write = Request.pwritev(direct, buffers[::-1], 10 * _BLOCK, rw_flags=RWF.DSYNC)
    ctx.submit(write)
    assert ctx.reap(min_nr=1)[0].result() == 6 * _BLOCK
    back = aligned_buffer(6 * _BLOCK)
    os.preadv(direct, [back], 10 * _BLOCK)
    assert back == b"".join(buffers[::-1])


@pytest.mark.parametrize("make_sync", [Request.fsync, Request.fdsync])
def test_sync(ctx: rawaio.IOContext, tmp_path: Path, make_sync: Callable[[int], Request]) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(b"x" * 100)
        file.flush()
        ctx.submit(make_sync(file.fileno()))
        completion = ctx.reap(min_nr=1)[0]
    assert completion.res in (0, -errno.EINVAL)  # EINVAL: a kernel that cannot (before 4.18)
    if completion.res == 0:
        assert completion.result() == 0


def test_a_sync_of_what_cannot_be_synced_is_refused(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    ctx.submit(Request.fsync(pipe.writable))
    assert results(ctx.reap(min_nr=1)) == [-errno.EINVAL]


def test_poll_for_writing_and_for_the_end(ctx: rawaio.IOContext) -> None:
    pipe = Pipe()
    ctx.submit(Request.poll(pipe.writable, select.POLLOUT))
    assert ctx.reap(min_nr=1)[0].result() == select.POLLOUT
    ctx.submit(Request.poll(pipe.readable, select.POLLIN))
    os.close(pipe.writable)
    assert ctx.reap(min_nr=1)[0].result() & select.POLLHUP
    os.close(pipe.readable)


def test_bytes_are_written_from_and_any_buffer_is_read_into(
    ctx: rawaio.IOContext, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("w+b") as file, mmap.mmap(-1, 8) as area:
        ctx.submit(Request.pwrite(file, b"12345678", 0))
        assert results(ctx.reap(min_nr=1)) == [8]
        view = memoryview(bytearray(16))
        lent = bytearray(4)
        ctx.submit(
            Request.pread(file, area, 0),
            Request.pread(file, view[4:12], 0),
            Request.pread(file, lent, 4),
        )
        assert results(ctx.reap(min_nr=3)) == [8, 8, 4]
        assert area[:] == b"12345678"
        assert bytes(view) == b"\0" * 4 + b"12345678" + b"\0" * 4
        assert lent == b"5678"


def test_priority(ctx: rawaio.IOContext, direct: int, blocks: bytes) -> None:
    best_effort, idle = 2 << 13, 3 << 13
    submitted = [
        Request.pread(direct, aligned_buffer(_BLOCK), 0, priority=value)
        for value in (0, best_effort | 7, idle)
    ]
    ctx.submit(*submitted)
    assert results(ctx.reap(min_nr=3)) == [_BLOCK] * 3
    ctx.submit(Request.pread(direct, aligned_buffer(_BLOCK), 0, priority=1))
    assert results(ctx.reap(min_nr=1)) == [-errno.EINVAL]  # a level, and no class


def test_a_file_that_ends_gives_a_short_read_and_then_none(
    ctx: rawaio.IOContext, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        buffers = [bytearray(b"-" * 8) for _ in range(3)]
        pairs = zip(buffers, (4, 10, 1000), strict=True)
        ctx.submit(*[Request.pread(file, buffer, at) for buffer, at in pairs])
        assert results(ctx.reap(min_nr=3)) == [6, 0, 0]
    assert buffers == [b"456789--", b"-" * 8, b"-" * 8]


def test_a_short_direct_read_at_the_end(ctx: rawaio.IOContext, direct: int, blocks: bytes) -> None:
    buffer = aligned_buffer(4 * _BLOCK)
    ctx.submit(Request.pread(direct, buffer, _BLOCK * (_BLOCKS - 1)))
    assert results(ctx.reap(min_nr=1)) == [_BLOCK]
    assert buffer[:_BLOCK] == blocks[-_BLOCK:]
    assert not any(buffer[_BLOCK:])


def test_a_misaligned_direct_read_is_einval_in_the_completion(
    ctx: rawaio.IOContext, direct: int, blocks: bytes
) -> None:
    area = aligned_buffer(2 * _BLOCK)
    ctx.submit(
        Request.pread(direct, area[:_BLOCK], 1),
        Request.pread(direct, area[: _BLOCK - 1], 0),
        Request.pread(direct, area[1 : _BLOCK + 1], 0),
        Request.pread(direct, area[:_BLOCK], _BLOCK),
    )
    reaped = ctx.reap(min_nr=4)
    by_request = {c.request: c for c in reaped}
    outcome = [by_request[r].res for r in sorted(by_request, key=lambda r: r.offset == _BLOCK)]
    assert outcome == [-errno.EINVAL] * 3 + [_BLOCK]
    assert area[:_BLOCK] == blocks[_BLOCK : 2 * _BLOCK]
    with pytest.raises(OSError, match="pread") as caught:
        next(c for c in reaped if c.res < 0).result()
    assert caught.value.errno == errno.EINVAL


def test_a_device_that_is_full(ctx: rawaio.IOContext) -> None:
    """EINVAL: its driver has no asynchronous write, and io_submit refuses it."""
    full = os.open("/dev/full", os.O_WRONLY)
    ctx.submit(Request.pwrite(full, b"x" * 100, 0))
    assert ctx.reap(min_nr=1)[0].res in (-errno.ENOSPC, -errno.EINVAL)
    os.close(full)


def test_what_fails_after_it_was_taken_fails_in_the_completion(
    ctx: rawaio.IOContext, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("wb") as file:
        too_far, good = Request.pwrite(file, b"x", 1 << 62), Request.pwrite(file, b"x", 0)
        ctx.submit(too_far, good)
        assert ctx.statistics().io_submit_calls == 1
        bad, rest = ctx.reap(min_nr=2)
    assert (bad.request, bad.res, rest.res) == (too_far, -errno.EFBIG, 1)
    with pytest.raises(OSError, match="File too large"):
        bad.result()


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        (RWF.NOWAIT, {_BLOCK, -errno.EAGAIN, -errno.EOPNOTSUPP}),
        (RWF.HIPRI, {_BLOCK, -errno.EOPNOTSUPP}),
        (1 << 30, {-errno.EOPNOTSUPP}),
    ],
)
def test_flags_reach_the_kernel(
    ctx: rawaio.IOContext, direct: int, blocks: bytes, flags: int, allowed: set[int]
) -> None:
    ctx.submit(Request.pread(direct, aligned_buffer(_BLOCK), 0, rw_flags=flags))
    assert set(results(ctx.reap(min_nr=1))) <= allowed


def test_nowait_of_an_empty_pipe_does_not_block(ctx: rawaio.IOContext, pipe: Pipe) -> None:
    """Without the flag this read would block in io_submit."""
    buffer = bytearray(4)
    ctx.submit(Request.pread(pipe.readable, buffer, 0, rw_flags=RWF.NOWAIT))
    assert results(ctx.reap(min_nr=1)) in ([-errno.EAGAIN], [-errno.EOPNOTSUPP])


def test_a_completed_request_is_changed_and_submitted_again(
    ctx: rawaio.IOContext, direct: int, blocks: bytes
) -> None:
    request = Request.pread(direct, aligned_buffer(_BLOCK), 0)
    for i in (0, 5, 3):
        request.offset = _BLOCK * i
        if i == 3:
            request.buffer = aligned_buffer(2 * _BLOCK)
        ctx.submit(request)
        with pytest.raises(rawaio.BusyError):
            request.offset = 0
        nbytes = ctx.reap(min_nr=1)[0].result()
        assert nbytes == _BLOCK * (2 if i == 3 else 1)
        assert request.buffer == blocks[_BLOCK * i : _BLOCK * i + nbytes]


def test_a_request_goes_from_one_context_to_another(
    make: _Make, direct: int, blocks: bytes
) -> None:
    request = Request.pread(direct, aligned_buffer(_BLOCK), _BLOCK)
    for ctx in (make(), make()):
        ctx.submit(request)
        assert ctx.reap(min_nr=1)[0].result() == _BLOCK
        assert request.buffer == blocks[_BLOCK : 2 * _BLOCK]


def test_a_deep_queue(make: _Make, direct: int, blocks: bytes) -> None:
    """More than there is room for, each submitted again as it completes."""
    ctx = make(nr_events=16)
    left = iter(range(500))
    wrong: list[int] = []

    def again(completion: rawaio.Completion) -> None:
        request = completion.request
        if request.buffer != blocks[request.offset : request.offset + _BLOCK]:
            wrong.append(request.offset)
        for i in left:
            request.offset = i % _BLOCKS * _BLOCK
            ctx.submit(request)
            break

    for _ in range(32):
        ctx.submit(Request.pread(direct, aligned_buffer(_BLOCK), 0, callback=again))
    assert results(ctx.drain(timeout=LIMIT_S)) == [_BLOCK] * 532
    assert wrong == []

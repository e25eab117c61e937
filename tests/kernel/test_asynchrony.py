"""Where io_submit returns before the device has answered, and where it sleeps until then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rawaio
from rawaio import Request, aligned_buffer
from rawaio.syscalls import Opcode
from tests.context_support import LIMIT_S, Threads, results, waits_in_io_submit
from tests.filesystems import MIB, held_disk
from tests.fuse_server import FuseServer

_NBYTES = 1 << 16


class Disk:
    """A file on a device that answers when it is told to."""

    def __init__(self, root: Path, fuse: FuseServer, ctx: rawaio.IOContext) -> None:
        self.fuse = fuse
        self.ctx = ctx
        path = root / "file"
        path.write_bytes(os.urandom(MIB))
        self.buffered = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        self.buffer = aligned_buffer(_NBYTES)
        self.buffer[:] = bytes(_NBYTES)  # no page faults: btrfs reads past the cache only then

    def reset(self) -> None:
        """Leave the file as it was, nothing to be written, and nothing cached."""
        os.ftruncate(self.buffered, MIB)
        os.fsync(self.buffered)
        os.sync()
        os.posix_fadvise(self.buffered, 0, 0, os.POSIX_FADV_DONTNEED)

    def waits(self, threads: Threads, request: Request, expected: int = _NBYTES) -> bool:
        """Whether io_submit waits for the device."""
        self.fuse.hold("read" if request.opcode is Opcode.PREAD else "write")
        thread = threads.start(self.ctx.submit, request)
        self.fuse.wait_held(1)
        answer = waits_in_io_submit(thread)
        self.fuse.unhold()
        threads.join()
        assert results(self.ctx.drain(LIMIT_S)) == [expected]
        return answer

    def close(self) -> None:
        self.fuse.unhold()
        os.close(self.buffered)
        os.close(self.direct)


@pytest.fixture(params=["ext4", "xfs", "btrfs"], scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def made(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    directory = tmp_path_factory.mktemp(kind)
    with rawaio.IOContext() as ctx, held_disk(kind, directory) as (root, fuse):
        disk = Disk(root, fuse, ctx)
        try:
            yield disk
        finally:
            disk.close()


@pytest.fixture
def disk(made: Disk) -> Iterator[Disk]:
    made.reset()
    yield made
    made.fuse.unhold()


def test_a_direct_read_returns(disk: Disk, threads: Threads) -> None:
    assert not disk.waits(threads, Request.pread(disk.direct, disk.buffer, 0))


def test_a_direct_overwrite_returns(kind: str, disk: Disk, threads: Threads) -> None:
    waits = disk.waits(threads, Request.pwrite(disk.direct, disk.buffer, 0))
    if kind != "btrfs":  # it writes data with checksums through the cache
        assert not waits


def test_a_direct_write_that_extends_the_file(kind: str, disk: Disk, threads: Threads) -> None:
    waits = disk.waits(threads, Request.pwrite(disk.direct, disk.buffer, MIB))
    if kind == "ext4":
        assert waits
    if kind == "xfs":
        assert not waits


def test_a_cold_buffered_read_waits(disk: Disk, threads: Threads) -> None:
    assert disk.waits(threads, Request.pread(disk.buffered, disk.buffer, 0))


@pytest.mark.parametrize("operation", [Request.fsync, Request.fdsync])
def test_a_sync_returns(disk: Disk, threads: Threads, operation: Callable[[int], Request]) -> None:
    os.pwrite(disk.buffered, b"x", 0)
    assert not disk.waits(threads, operation(disk.buffered), expected=0)

"""What a test can make the FUSE server do, seen from io_submit."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import Request, aligned_buffer
from rawaio.syscalls import Opcode
from tests.context_support import LIMIT_S, Threads, requests, results, waits_in_io_submit
from tests.fuse_server import FuseRequest, FuseServer, Kind, Order
from tests.support import ROOT

_BLOCK = 4096
_DATA = b"".join(bytes([i + 1]) * _BLOCK for i in range(16))


@contextmanager
def opened(fuse: FuseServer, flags: int = os.O_DIRECT) -> Generator[int, None, None]:
    fuse.write_file("file", _DATA)
    fd = os.open(fuse.path("file"), os.O_RDWR | os.O_CLOEXEC | flags)
    try:
        fuse.forget()
        yield fd
    finally:
        os.close(fd)


def aligned(data: bytes) -> memoryview:
    buffer = aligned_buffer(len(data))
    buffer[:] = data
    return buffer


def buffers(n: int, nbytes: int = _BLOCK) -> list[memoryview]:
    return [aligned_buffer(nbytes) for _ in range(n)]


@pytest.fixture
def context() -> Iterator[rawaio.IOContext]:
    with rawaio.IOContext() as ctx:
        yield ctx


# Before the server: a test that fails closes the server first, which ends what is held, and then
# the context, which waits for it.
@pytest.fixture
def fuse(context: rawaio.IOContext) -> Iterator[FuseServer]:
    with FuseServer() as server:
        if not server.async_dio:
            pytest.skip("the kernel does not offer FUSE_ASYNC_DIO")
        yield server


@pytest.fixture
def in_turn(context: rawaio.IOContext) -> Iterator[FuseServer]:
    """A server that does not want requests at the same time."""
    with FuseServer(async_dio=False) as server:
        yield server


def test_io_submit_returns_while_the_server_holds_a_read(
    context: rawaio.IOContext, fuse: FuseServer
) -> None:
    buffer = aligned_buffer(_BLOCK)
    with opened(fuse) as fd:
        fuse.hold("read")
        context.submit(Request.pread(fd, buffer, _BLOCK))
        fuse.wait_held(1)
        assert context.reap() == []
        assert fuse.held() == [FuseRequest("read", "file", _BLOCK, _BLOCK, None)]
        fuse.release()
        # Not even waiting is needed: the reply has completed it.
        assert results(context.reap()) == [_BLOCK]
        assert buffer == _DATA[_BLOCK : 2 * _BLOCK]
        assert fuse.requests() == [FuseRequest("read", "file", _BLOCK, _BLOCK, _BLOCK)]


def test_io_submit_returns_while_the_server_holds_a_write(
    context: rawaio.IOContext, fuse: FuseServer
) -> None:
    with opened(fuse) as fd:
        fuse.hold("write")
        context.submit(Request.pwrite(fd, aligned(b"x" * _BLOCK), _BLOCK))
        fuse.wait_held(1)
        assert context.reap() == []
        assert fuse.contents("file") == _DATA
        fuse.unhold()
        assert results(context.reap()) == [_BLOCK]
        assert fuse.contents("file") == _DATA[:_BLOCK] + b"x" * _BLOCK + _DATA[2 * _BLOCK :]


@pytest.mark.parametrize(
    ("order", "expected"),
    [("first", [0, 1, 2, 3]), ("last", [3, 2, 1, 0]), ([2, 0, 3, 1], [2, 0, 3, 1])],
)
def test_completions_come_in_the_order_of_release(
    context: rawaio.IOContext, fuse: FuseServer, order: Order, expected: list[int]
) -> None:
    with opened(fuse) as fd:
        submitted = [Request.pread(fd, buffer, _BLOCK * i) for i, buffer in enumerate(buffers(4))]
        fuse.hold()
        context.submit(*submitted)
        fuse.wait_held(4)
        fuse.release(order=order)
        assert requests(context.reap()) == [submitted[i] for i in expected]


def test_some_are_released(context: rawaio.IOContext, fuse: FuseServer) -> None:
    with opened(fuse) as fd:
        submitted = [Request.pread(fd, buffer, _BLOCK * i) for i, buffer in enumerate(buffers(4))]
        fuse.hold()
        context.submit(*submitted)
        fuse.wait_held(4)
        with pytest.raises(ValueError, match="4 requests are held, not 5"):
            fuse.release(5)
        fuse.release(1, order="last")
        assert requests(context.reap()) == submitted[3:]
        fuse.release(2)
        assert requests(context.reap()) == submitted[:2]
        assert [request.offset for request in fuse.held()] == [2 * _BLOCK]
        fuse.unhold()
        assert requests(context.reap()) == [submitted[2]]


@pytest.mark.parametrize("max_transfer", [_BLOCK, 2 * _BLOCK, 256 * _BLOCK])
def test_operations_are_cut_into_requests(context: rawaio.IOContext, max_transfer: int) -> None:
    nbytes = 4 * _BLOCK
    buffer = aligned_buffer(nbytes)
    with FuseServer(max_transfer=max_transfer) as fuse, opened(fuse) as fd:
        context.submit(Request.pread(fd, buffer, 0))
        assert results(context.drain(LIMIT_S)) == [nbytes]
        context.submit(Request.pwrite(fd, buffer, nbytes))
        assert results(context.drain(LIMIT_S)) == [nbytes]
        step = min(max_transfer, nbytes)
        assert [(r.kind, r.offset, r.nbytes) for r in fuse.requests()] == [
            ("read" if at < nbytes else "write", at, step) for at in range(0, 2 * nbytes, step)
        ]


def test_short_reads(context: rawaio.IOContext, fuse: FuseServer) -> None:
    buffer = aligned_buffer(4 * _BLOCK)
    with opened(fuse) as fd:
        fuse.short(1000, "read")
        context.submit(Request.pread(fd, buffer[:_BLOCK], 0), Request.pread(fd, buffer, _BLOCK))
        assert results(context.drain(LIMIT_S)) == [1000, 1000]
        fuse.short(None)
        context.submit(Request.pread(fd, buffer, 14 * _BLOCK))
        assert results(context.drain(LIMIT_S)) == [2 * _BLOCK]


def test_short_writes(context: rawaio.IOContext, in_turn: FuseServer) -> None:
    with opened(in_turn) as fd:
        in_turn.short(1024, "write")
        context.submit(Request.pwrite(fd, aligned(b"x" * 2 * _BLOCK), 0))
        assert results(context.drain(LIMIT_S)) == [1024]
        assert in_turn.contents("file") == b"x" * 1024 + _DATA[1024:]


@pytest.mark.parametrize("at", [0, len(_DATA)], ids=["within", "extending"])
def test_a_short_request_of_an_asynchronous_write(
    context: rawaio.IOContext, fuse: FuseServer, at: int
) -> None:
    with opened(fuse) as fd:
        fuse.short(1024, "write")
        context.submit(Request.pwrite(fd, aligned(b"x" * _BLOCK), at))
        assert results(context.drain(LIMIT_S)) == [-errno.EIO]
        # Of a longer file the kernel has cut off what was written behind its old end.
        written = _DATA[:at] + b"x" * 1024 + _DATA[at + 1024 :]
        assert fuse.contents("file") == written[: len(_DATA)]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("operation", [Request.pread, Request.pwrite])
def test_failures(
    context: rawaio.IOContext,
    fuse: FuseServer,
    code: int,
    operation: Callable[..., Request],
) -> None:
    kind: Kind = "read" if operation == Request.pread else "write"
    with opened(fuse) as fd:
        fuse.fail(kind, code, offset=range(2 * _BLOCK, 3 * _BLOCK))
        submitted = [operation(fd, buffer, _BLOCK * i) for i, buffer in enumerate(buffers(4))]
        context.submit(*submitted, operation(fd, aligned_buffer(4 * _BLOCK), 0))
        assert sorted(results(context.drain(LIMIT_S))) == [-code, -code, _BLOCK, _BLOCK, _BLOCK]
        assert [r.offset for r in fuse.requests(kind) if r.outcome == -code] == [2 * _BLOCK] * 2
        fuse.heal()
        context.submit(submitted[2])
        assert results(context.drain(LIMIT_S)) == [_BLOCK]


def test_what_came_before_a_failure_counts_in_turn(
    context: rawaio.IOContext, in_turn: FuseServer
) -> None:
    with opened(in_turn) as fd:
        in_turn.fail("write", errno.ENOSPC, offset=2 * _BLOCK)
        context.submit(Request.pwrite(fd, aligned_buffer(4 * _BLOCK), 0))
        assert results(context.drain(LIMIT_S)) == [2 * _BLOCK]
        context.submit(Request.pwrite(fd, aligned_buffer(2 * _BLOCK), 2 * _BLOCK))
        assert results(context.drain(LIMIT_S)) == [-errno.ENOSPC]


def test_the_nth_fails_and_only_so_often(context: rawaio.IOContext, fuse: FuseServer) -> None:
    with opened(fuse) as fd:
        fuse.fail("read", errno.EIO, after=1, times=2)
        for expected in (_BLOCK, -errno.EIO, -errno.EIO, _BLOCK):
            context.submit(Request.pread(fd, aligned_buffer(_BLOCK), 0))
            assert results(context.drain(LIMIT_S)) == [expected]


def test_which_fails_is_settled_by_who_came_first(
    context: rawaio.IOContext, fuse: FuseServer
) -> None:
    with opened(fuse) as fd:
        submitted = [Request.pread(fd, buffer, _BLOCK * i) for i, buffer in enumerate(buffers(3))]
        fuse.hold()
        fuse.fail("read", errno.EIO, after=1, times=1)
        context.submit(*submitted)
        fuse.wait_held(3)
        fuse.release(order="last")
        assert results(context.reap()) == [_BLOCK, -errno.EIO, _BLOCK]


def test_one_file_fails(context: rawaio.IOContext, fuse: FuseServer) -> None:
    with opened(fuse) as fd:
        fuse.fail("read", errno.EIO, name="other")
        context.submit(Request.pread(fd, aligned_buffer(_BLOCK), 0))
        assert results(context.drain(LIMIT_S)) == [_BLOCK]


@pytest.mark.parametrize(
    ("operation", "kind"), [(Request.fsync, "fsync"), (Request.fdsync, "fdatasync")]
)
def test_syncs(
    context: rawaio.IOContext,
    fuse: FuseServer,
    operation: Callable[[int], Request],
    kind: str,
) -> None:
    with opened(fuse) as fd:
        fuse.hold("fsync", "fdatasync")
        fuse.fail("fsync", errno.EIO)
        fuse.fail("fdatasync", errno.EIO)
        context.submit(operation(fd))
        fuse.wait_held(1)
        assert context.reap() == []
        assert [request.kind for request in fuse.held()] == [kind]
        fuse.unhold()
        assert results(context.drain(LIMIT_S)) == [-errno.EIO]


@pytest.mark.parametrize("opcode", [Opcode.PREAD, Opcode.PWRITE], ids=["read", "write"])
@pytest.mark.parametrize(
    ("options", "flags", "expected"),
    [
        ({}, os.O_DIRECT, False),
        ({}, 0, False),
        ({"cached": True}, os.O_DIRECT, False),
        ({"cached": True}, 0, True),
        ({"async_dio": False}, os.O_DIRECT, True),
        ({"max_background": 1}, os.O_DIRECT, True),
    ],
    ids=["direct", "no O_DIRECT", "direct beside cache", "cached", "in turn", "full"],
)
def test_where_io_submit_waits_for_the_server(
    context: rawaio.IOContext,
    threads: Threads,
    *,
    opcode: Opcode,
    options: dict[str, Any],
    flags: int,
    expected: bool,
) -> None:
    make = Request.pread if opcode is Opcode.PREAD else Request.pwrite
    with FuseServer(**options) as fuse, opened(fuse, flags) as fd:
        fuse.hold()
        thread = threads.start(context.submit, make(fd, aligned_buffer(2 * _BLOCK), 0))
        fuse.wait_held(1)
        assert waits_in_io_submit(thread) == expected
        fuse.unhold()
        threads.join()
        assert results(context.drain(LIMIT_S)) == [2 * _BLOCK]


def test_io_submit_waits_for_a_write_that_extends_the_file(
    context: rawaio.IOContext, fuse: FuseServer, threads: Threads
) -> None:
    with opened(fuse) as fd:
        fuse.hold()
        thread = threads.start(
            context.submit, Request.pwrite(fd, aligned_buffer(_BLOCK), len(_DATA))
        )
        fuse.wait_held(1)
        assert waits_in_io_submit(thread)
        fuse.unhold()
        threads.join()
        assert results(context.drain(LIMIT_S)) == [_BLOCK]
        assert fuse.contents("file") == _DATA + bytes(_BLOCK)


def test_a_file_with_a_page_cache(context: rawaio.IOContext) -> None:
    buffer = aligned_buffer(_BLOCK)
    with FuseServer(cached=True) as fuse, opened(fuse, 0) as fd:
        for _ in range(2):
            context.submit(Request.pread(fd, buffer, 0))
            assert results(context.drain(LIMIT_S)) == [_BLOCK]
        assert [r.offset for r in fuse.requests("read")].count(0) == 1


def test_other_requests(fuse: FuseServer) -> None:
    path = fuse.path("new")
    with pytest.raises(FileNotFoundError):
        path.open("rb")
    with path.open("xb", buffering=0) as file:
        assert file.write(b"hello") == 5
        os.posix_fallocate(file.fileno(), 0, 10)
        assert os.fstat(file.fileno()).st_size == 10
        file.truncate(7)
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
    assert path.read_bytes() == fuse.contents("new") == b"hello\0\0"
    assert [request.kind for request in fuse.requests()] == [
        *("open", "write", "fallocate", "truncate", "fsync", "fdatasync", "open"),
        *(["read"] * (len(fuse.requests()) - 7)),
    ]
    assert [entry.name for entry in fuse.root.iterdir()] == ["new"]
    assert os.statvfs(fuse.root).f_bsize == 4096
    with path.open("rb") as file:
        path.unlink()
        assert list(fuse.root.iterdir()) == []
        assert file.read() == b"hello\0\0"
    fuse.fail("fallocate", errno.ENOSPC)
    fuse.fail("open", errno.EACCES, times=1)
    with pytest.raises(PermissionError):
        fuse.path("other").open("xb")
    with fuse.path("other").open("wb") as file, pytest.raises(OSError) as caught:
        os.posix_fallocate(file.fileno(), 0, 10)
    assert caught.value.errno == errno.ENOSPC


def test_data_is_never_cached(fuse: FuseServer) -> None:
    with opened(fuse, 0) as fd:
        assert os.pread(fd, _BLOCK, 0) == _DATA[:_BLOCK]
        fuse.write_file("file", b"other")
        assert os.pread(fd, _BLOCK, 0) == b"other"
        assert os.fstat(fd).st_size == 5


def test_many_at_once(context: rawaio.IOContext, fuse: FuseServer) -> None:
    with opened(fuse) as fd:
        fuse.hold()
        context.submit(*(Request.pread(fd, b, 0) for b in buffers(16, 8 * _BLOCK)))
        fuse.wait_held(128)
        fuse.unhold()
        assert results(context.reap()) == [8 * _BLOCK] * 16


def test_two_servers(fuse: FuseServer, in_turn: FuseServer) -> None:
    assert not in_turn.async_dio
    fuse.write_file("file", b"one")
    in_turn.write_file("file", b"two")
    assert fuse.path("file").read_bytes() == b"one"
    assert in_turn.path("file").read_bytes() == b"two"


def test_closing_ends_what_is_held(context: rawaio.IOContext, fuse: FuseServer) -> None:
    pid, root = fuse.pid, fuse.root
    with opened(fuse) as fd:
        fuse.hold()
        context.submit(Request.pread(fd, aligned_buffer(_BLOCK), 0))
        fuse.wait_held(1)
        fuse.close()
        assert results(context.reap()) == [-errno.ECONNABORTED]
    assert not root.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_server_leaves_no_mount() -> None:
    with FuseServer() as fuse:
        root = fuse.root
        os.kill(fuse.pid, signal.SIGKILL)
    assert not root.exists()


def test_a_killed_test_leaves_no_mount(fuse: FuseServer) -> None:
    # Its I/O is held, and the kernel does not end the process before that: the server gives up.
    program = """
import os, signal, sys
import rawaio
from tests.fuse_server import FuseServer
context = rawaio.IOContext()
with FuseServer(held_limit=1) as fuse:
    print(fuse.root, flush=True)
    fuse.write_file("file", bytes(4096))
    fd = os.open(fuse.path("file"), os.O_RDWR | os.O_DIRECT)
    fuse.hold()
    context.submit(rawaio.Request.pread(fd, rawaio.aligned_buffer(4096), 0))
    fuse.wait_held(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    # The server inherits the pipe, so that its end is waited for too.
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == -signal.SIGKILL
    root = Path(done.stdout.strip())
    assert not os.path.ismount(root)
    root.rmdir()


def test_arguments() -> None:
    with pytest.raises(ValueError, match="4096 at least"):
        FuseServer(max_transfer=512)
    with FuseServer() as fuse:
        with pytest.raises(ValueError, match="step 1"):
            fuse.fail("read", errno.EIO, offset=range(0, 10, 2))
        with pytest.raises(KeyError, match="nothing"):
            fuse.contents("nothing")

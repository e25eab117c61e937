"""Checked by mypy and pyright, never executed: what type checkers accept, and what they refuse.

Every line that has to be refused says so; both type checkers complain of an unneeded remark.
"""

from __future__ import annotations

import select
from array import array
from mmap import mmap
from pathlib import Path
from typing import BinaryIO, assert_type

import rawaio
from rawaio import RWF, Completion, IOContext, Opcode, Request, State, Statistics, syscalls
from rawaio.request import TRANSITIONS, Step
from rawaio.ring import CompletionRing, SyscallEvents


def structures() -> None:
    request = syscalls.iocb()
    request.aio_nbytes = 1
    assert_type(request.aio_offset, int)
    assert_type(syscalls.io_event().res2, int)
    assert_type(syscalls.aio_ring().header_length, int)
    assert_type(syscalls.iovec().iov_len, int)
    assert_type(syscalls.timespec(1, 2).tv_nsec, int)

    request.aio_nbyte = 1  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    syscalls.io_event().rez = 1  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    syscalls.aio_ring().haed = 1  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    syscalls.iovec().base = 1  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    syscalls.timespec().sec = 1  # type: ignore[assignment]  # pyright: ignore[reportArgumentType]
    request.aio_nbytes = "1"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    n: int = request.aio_ofset  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    del n


def calls() -> None:
    ctx_id = syscalls.io_setup(8)
    assert_type(ctx_id, int)
    assert_type(syscalls.io_submit(ctx_id, 1, 4096), int)
    assert_type(syscalls.io_getevents(ctx_id, 0, 1, 4096, None), int)
    assert_type(syscalls.statx(Path("/"), 0, 0), bytes)
    assert_type(syscalls.statx(0, 0, 0), bytes)
    syscalls.io_submit(ctx_id, 1, b"")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    syscalls.io_setup()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def many(ctx: IOContext, fd: int, out: bytearray, read_only: bytes) -> None:
    assert_type(ctx.pread_many(fd, [0, 4096], 4096), bytearray)
    assert_type(ctx.pread_many(fd, array("q", [0]), 4096, out), int)
    assert_type(ctx.pwrite_many(fd, range(0, 8, 4), read_only), int)
    assert_type(ctx.pread_many(fd, [0, 8], lengths=[8, 4]), bytearray)
    assert_type(ctx.pread_many(fd, [0, 8], lengths=array("q", [8, 4]), out=out), int)
    assert_type(ctx.pread_many(fd, [0, 8], out=[out, memoryview(out)]), int)
    assert_type(ctx.pread_many(fd, [0, 8], None, lengths=(8, 4)), bytearray)
    assert_type(ctx.pread_many(fd, [0, 8], 8, [out, out], lengths=[8, 8]), int)
    assert_type(ctx.pwrite_many(fd, [0, 8], [read_only, out]), int)
    assert_type(ctx.pwrite_many(fd, [0, 8], read_only, lengths=[8, 4]), int)
    ctx.pread_many(fd, [0])  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    ctx.pread_many(fd, [0], out=out)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ctx.pread_many(fd, ["0"], 4096)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    assert_type(rawaio.BulkError({}, 1, 1).counts, dict[int, int])


async def files(path: Path, buffer: bytearray, read_only: bytes) -> None:
    async with rawaio.open(path, "r+", direct="prefer", engine="aio") as f:
        assert_type(f, rawaio.File)
    f = await rawaio.open(3, closefd=False)
    assert_type(await f.pread(1, 0), bytes)
    assert_type(await f.preadinto(buffer, 0), int)
    assert_type(await f.preadv([buffer, memoryview(buffer)], 0, zero_fill=True), int)
    assert_type(await f.pwrite(read_only, 0, dsync=True), int)
    assert_type(await f.pwritev([read_only, buffer], 0), int)
    assert_type(await f.append(read_only), int)
    assert_type(await f.pread_many([0], 1), bytearray)
    assert_type(await f.pread_many([0], 1, buffer), int)
    assert_type(await f.pread_many([0, 8], lengths=[8, 4]), bytearray)
    assert_type(await f.pread_many([0, 8], lengths=[8, 4], out=buffer), int)
    assert_type(await f.pread_many([0, 8], out=(buffer, memoryview(buffer))), int)
    assert_type(await f.pwrite_many([0], read_only, 1), int)
    assert_type(await f.pwrite_many([0, 8], [read_only, buffer]), int)
    assert_type(await f.pwrite_many([0, 8], read_only, lengths=array("q", [8, 4])), int)
    async for chunk in f.stream(0, None, chunk_size=4096, depth=2):
        assert_type(chunk, bytes)
    with f.plugged():
        pass
    assert_type(f.size, int)
    assert_type(f.statistics().threaded, int)
    await f.fsync()
    await f.fdatasync()
    await f.truncate(0)
    await f.allocate(0, 1)
    await f.close()
    await rawaio.shutdown()

    await rawaio.open(path, direct="maybe")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await rawaio.open(path, engine="uring")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await f.pwrite("text", 0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await f.pread(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def requests(fd: int, file: BinaryIO, pages: mmap, read_only: bytes) -> None:
    buffer = rawaio.aligned_buffer(4096, alignment=512)
    assert_type(Request.pread(fd, buffer, 0), Request)
    Request.pread(file, bytearray(8), 0, rw_flags=RWF.NOWAIT | RWF.HIPRI, priority=4)
    Request.pread(fd, array("d"), 0, callback=called, user_data=("any", "thing"))
    Request.pwrite(fd, pages, 0, rw_flags=8)
    Request.pwrite(fd, read_only, 0)
    Request.preadv(fd, [buffer, bytearray(8)], 0)
    Request.preadv(fd, (buffer, pages), 0)
    Request.pwritev(fd, [read_only, buffer], 512)
    Request.fsync(file, priority=None)
    Request.fdsync(fd, callback=called)
    Request.poll(fd, select.POLLIN)
    Request(Opcode.PREAD, fd, buffer, 0)

    Request.pread(fd, "text", 0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Request.pread("0", buffer, 0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Request.pread(fd, buffer)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Request.pread(fd, buffer, 0.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Request.pread(fd, buffer, 0, 8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Request.pread(fd, buffer, 0, flags=8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Request.pread(fd, buffer, 0, callback=print_two)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Request.preadv(fd, [1], 0)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    Request.fsync(fd, rw_flags=8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Request.poll(fd)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def called(completion: Completion) -> None:
    request, res, res2 = completion
    assert_type(request, Request)
    assert_type(res, int)
    assert_type(res2, int)
    assert_type(completion.request, Request)
    assert_type(completion.res, int)
    assert_type(completion.result(), int)
    completion.res = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    completion.result = 1  # type: ignore[assignment, method-assign]  # pyright: ignore[reportAttributeAccessIssue]


def print_two(completion: Completion, other: object) -> None:
    del completion, other


def changes(request: Request, file: BinaryIO) -> None:
    request.offset = 4096
    request.buffer = bytearray(8)
    request.buffers = [bytearray(8)]
    request.fd = file
    request.fd = 3
    request.rw_flags = RWF.DSYNC
    request.priority = None
    request.callback = called
    request.callback = None
    request.user_data = object()
    assert_type(request.state, State)
    assert_type(request.opcode, Opcode)
    assert_type(request.nbytes, int)
    assert_type(TRANSITIONS[State.NEW, Step.PUSH], State)

    request.offset = None  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    request.ofset = 1  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    request.state = State.NEW  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    request.nbytes = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def contexts(request: Request) -> None:
    with IOContext(128, max_batch=8, force_syscalls=True) as context:
        assert_type(context, IOContext)
        assert_type(context.submit(request, request), int)
        assert_type(context.submit(), int)
        with context.plugged():
            context.submit(request)
        for completion in context.reap(1, timeout=0.5):
            assert_type(completion, Completion)
        assert_type(context.reap(min_nr=1, max_nr=2, timeout=None), list[Completion])
        assert_type(context.drain(timeout=1), list[Completion])
        assert_type(context.process_completions(), list[Completion])
        assert_type(context.cancel(request), bool)
        assert_type(context.fileno(), int)
        assert_type(context.statistics(), Statistics)
        assert_type(context.statistics().in_flight, int)

        context.submit([request])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        context.reap("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        context.cancel(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        context.statistics().in_flight = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    IOContext(128, 32)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def rings() -> None:
    ring = CompletionRing(4096, counted=True)
    assert_type(ring.usable, bool)
    assert_type(ring.why_not, str | None)
    assert_type(ring.nr, int)
    assert_type(ring.peek(), int)
    assert_type(ring.decode(1), list[tuple[int, int, int, int]])
    assert_type(ring.columns(1), tuple[list[int], list[int], list[int]])
    assert_type(SyscallEvents(4096).advance_and_peek(1), int)
    ring.usable = True  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]

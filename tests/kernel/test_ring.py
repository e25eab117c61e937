"""The ring that the live kernel makes."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

from rawaio import syscalls
from rawaio.errors import ClosedError
from rawaio.protocols import CompletionSource
from rawaio.ring import CompletionRing, Ordering, SyscallEvents
from rawaio.syscalls import Opcode
from tests.support import HEAD, MAGIC, TAIL, mapping_of

ROOM = 64


@dataclass
class Context:
    """A context of the kernel, into which one-byte writes to /dev/null are submitted."""

    ctx_id: int
    eventfd: int
    null: int
    token: int = 1
    byte: ctypes.Array[ctypes.c_char] = field(
        default_factory=lambda: ctypes.create_string_buffer(b"x", 1)
    )

    def write(self, n: int) -> list[int]:
        """Write n times; each completes at once. Returns their tokens."""
        tokens = list(range(self.token, self.token + n))
        iocbs = (syscalls.iocb * n)()
        for it, token in zip(iocbs, tokens, strict=True):
            it.aio_data, it.aio_lio_opcode = token, Opcode.PWRITE
            it.aio_fildes, it.aio_buf, it.aio_nbytes = self.null, ctypes.addressof(self.byte), 1
            it.aio_flags, it.aio_resfd = syscalls.IOCB_FLAG_RESFD, self.eventfd
        pointers = (ctypes.c_uint64 * n)(*map(ctypes.addressof, iocbs))
        done = 0
        while done < n:
            done += syscalls.io_submit(self.ctx_id, n - done, ctypes.addressof(pointers) + 8 * done)
        self.token += n
        return tokens

    def fill(self) -> int:
        """Write until the kernel has no room; returns how often."""
        for accepted in range(100_000):
            try:
                self.write(1)
            except BlockingIOError:
                return accepted
        raise AssertionError("a context without end")

    def counted(self) -> int:
        """How many have completed since it was asked last."""
        return os.eventfd_read(self.eventfd)


@pytest.fixture
def context() -> Generator[Context, None, None]:
    try:
        ctx_id = syscalls.io_setup(ROOM)
    except OSError as error:
        pytest.skip(f"no context: {error}")
    it = Context(ctx_id, os.eventfd(0, os.EFD_NONBLOCK), os.open("/dev/null", os.O_WRONLY))
    yield it
    syscalls.io_destroy(ctx_id)
    os.close(it.eventfd)
    os.close(it.null)


def ring_of(context: Context, *, counted: bool = False) -> CompletionRing:
    ordering = (Ordering.COUNTED, None) if counted else None
    ring = CompletionRing(context.ctx_id, counted=counted, ordering=ordering)
    if not ring.usable:
        pytest.skip(f"the kernel's ring is not usable: {ring.why_not}")
    return ring


def take(source: CompletionSource, most: int | None = None) -> list[int]:
    """Reap, by columns and by rows in turns; returns the tokens."""
    tokens: list[int] = []
    n = source.peek()
    while n:
        if most is not None:
            n = min(n, most - len(tokens))
            if n == 0:
                break
        data, res, res2 = source.columns(n)
        assert source.decode(n) == [
            (d, o, r, 0) for d, (_, o, _, _), r in zip(data, source.decode(n), res, strict=True)
        ]
        assert (res, res2) == ([1] * n, [0] * n)
        tokens += data
        n = source.advance_and_peek(n)
    return tokens


def test_the_header_is_as_expected(context: Context) -> None:
    ring = ring_of(context)
    header = (ctypes.c_uint32 * 8).from_address(context.ctx_id)
    assert header[MAGIC] == 0xA10A10A1
    assert ring.nr == header[1] > ROOM
    assert (header[HEAD], header[TAIL], header[5], header[6], header[7]) == (0, 0, 1, 0, 32)
    mapping = mapping_of(context.ctx_id)
    assert mapping is not None
    assert 32 + 32 * ring.nr <= mapping.end - context.ctx_id < 32 + 32 * (ring.nr + 1)
    assert ring.peek() == 0


@pytest.mark.parametrize("counted", [False, True])
def test_many_times_round(context: Context, counted: bool) -> None:
    ring = ring_of(context, counted=counted)
    got: list[int] = []
    expected: list[int] = []
    while len(expected) < 5 * ring.nr:
        expected += context.write(1 + len(expected) % 37)
        if counted:
            assert ring.hidden
            assert ring.peek() == 0
            ring.credit(context.counted())
        got += take(ring)
        assert got == expected
    header = (ctypes.c_uint32 * 8).from_address(context.ctx_id)
    assert header[HEAD] == header[TAIL] == len(expected) % ring.nr


def test_the_kernel_believes_the_head_that_is_published(context: Context) -> None:
    ring = ring_of(context)
    accepted = context.fill()
    assert take(ring, 10) == list(range(1, 11))
    for _ in range(10):  # the kernel notices when it runs out
        context.write(1)
    assert len(take(ring)) == accepted
    assert take(ring) == []


def test_ring_and_system_call_in_turns(context: Context) -> None:
    ring, by_syscall = ring_of(context), SyscallEvents(context.ctx_id, 7)
    got: list[int] = []
    expected: list[int] = []
    while len(expected) < 2800:
        expected += context.write(ROOM)
        while len(got) < len(expected):
            got += take(ring, 5)
            got += take(by_syscall)
    assert got == expected


def test_what_is_left_in_the_ring_is_what_the_system_call_finds(context: Context) -> None:
    ring, by_syscall = ring_of(context), SyscallEvents(context.ctx_id)
    tokens = context.write(10)
    assert take(ring, 4) == tokens[:4]
    assert take(by_syscall) == tokens[4:]
    assert ring.peek() == 0
    # And what has been seen, but not been committed, is still the kernel's to give.
    tokens = context.write(3)
    assert ring.peek() == 3
    ring.columns(3)
    assert take(by_syscall) == tokens


def test_after_close_and_destroy_nothing_is_touched() -> None:
    try:
        ctx_id = syscalls.io_setup(1)
    except OSError as error:
        pytest.skip(f"no context: {error}")
    ring, by_syscall = CompletionRing(ctx_id), SyscallEvents(ctx_id)
    ring.close()
    syscalls.io_destroy(ctx_id)
    with pytest.raises(ClosedError):
        ring.peek()
    with pytest.raises(OSError, match="io_getevents") as caught:
        by_syscall.peek()
    assert caught.value.errno == errno.EINVAL
    by_syscall.close()
    with pytest.raises(ClosedError):
        by_syscall.peek()


def test_a_context_that_is_gone_is_not_usable() -> None:
    try:
        ctx_id = syscalls.io_setup(1)
    except OSError as error:
        pytest.skip(f"no context: {error}")
    syscalls.io_destroy(ctx_id)
    if mapping_of(ctx_id) is not None:
        pytest.skip("something else is mapped there by now")
    assert CompletionRing(ctx_id).why_not == f"nothing readable is mapped at {ctx_id:#x}"


def test_the_ring_of_a_known_kernel_is_usable(context: Context) -> None:
    """Not a skip: were it never usable, the tests above would say nothing."""
    header = (ctypes.c_uint32 * 8).from_address(context.ctx_id)
    if header[MAGIC] != 0xA10A10A1:
        pytest.skip("this kernel fills no ring")
    counted = platform.machine() == "aarch64"
    assert CompletionRing(context.ctx_id, counted=counted).usable

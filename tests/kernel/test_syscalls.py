"""The raw calls on the live kernel."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import threading
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import pytest

from rawaio import syscalls
from rawaio.syscalls import Opcode

ROOM = 8


@pytest.fixture
def ctx_id() -> Generator[int, None, None]:
    try:
        context = syscalls.io_setup(ROOM)
    except OSError as error:
        pytest.skip(f"no context: {error}")
    yield context
    with contextlib.suppress(OSError):  # EINVAL: the test has destroyed it
        syscalls.io_destroy(context)


@pytest.fixture
def null() -> Generator[int, None, None]:
    fd = os.open("/dev/null", os.O_WRONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Generator[tuple[int, int], None, None]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


class Batch(NamedTuple):
    """iocbs, what they refer to, and the array of their addresses."""

    iocbs: list[syscalls.iocb]
    byte: ctypes.Array[ctypes.c_char]
    pointers: ctypes.Array[ctypes.c_uint64]

    @property
    def address(self) -> int:
        return ctypes.addressof(self.pointers)


def writes(*fds: int) -> Batch:
    """A write of one byte to each, with aio_data 100, 101, ..."""
    byte = ctypes.create_string_buffer(b"x", 1)
    iocbs = [
        syscalls.iocb(
            aio_data=100 + i,
            aio_lio_opcode=Opcode.PWRITE,
            aio_fildes=fd & 0xFFFF_FFFF,
            aio_buf=ctypes.addressof(byte),
            aio_nbytes=1,
        )
        for i, fd in enumerate(fds)
    ]
    return Batch(iocbs, byte, (ctypes.c_uint64 * len(iocbs))(*map(ctypes.addressof, iocbs)))


def poll_for_input(fd: int) -> Batch:
    batch = writes(fd)
    it = batch.iocbs[0]
    it.aio_lio_opcode, it.aio_buf, it.aio_nbytes = Opcode.POLL, select.POLLIN, 0
    return batch


def reaped(ctx_id: int, min_nr: int, nr: int, timeout: int | None) -> list[tuple[int, int]]:
    events = (syscalls.io_event * max(nr, 1))()
    n = syscalls.io_getevents(ctx_id, min_nr, nr, ctypes.addressof(events), timeout)
    return [(e.data, e.res) for e in list(events)[:n]]


def submit(ctx_id: int, batch: Batch) -> int:
    return syscalls.io_submit(ctx_id, len(batch.iocbs), batch.address)


@contextlib.contextmanager
def failing(failure: int) -> Generator[None, None, None]:
    with pytest.raises(OSError, match="io_") as caught:
        yield
    assert caught.value.errno == failure


def test_a_context_from_setup_to_destroy(ctx_id: int, null: int) -> None:
    assert ctx_id > 0
    assert ctx_id % 4096 == 0
    assert reaped(ctx_id, 0, 8, None) == []
    batch = writes(null, null, null)
    assert submit(ctx_id, batch) == 3
    assert reaped(ctx_id, 2, 2, None) == [(100, 1), (101, 1)]
    no_wait = syscalls.timespec(0, 0)
    assert reaped(ctx_id, 1, 8, ctypes.addressof(no_wait)) == [(102, 1)]
    assert reaped(ctx_id, 1, 8, ctypes.addressof(no_wait)) == []
    syscalls.io_destroy(ctx_id)


def test_after_destroy_every_call_is_einval(ctx_id: int, null: int) -> None:
    syscalls.io_destroy(ctx_id)
    batch = writes(null)
    with failing(errno.EINVAL):
        syscalls.io_destroy(ctx_id)
    with failing(errno.EINVAL):
        submit(ctx_id, batch)
    with failing(errno.EINVAL):
        reaped(ctx_id, 0, 1, None)
    with pytest.raises(OSError, match="io_cancel") as caught:
        syscalls.io_cancel(ctx_id, ctypes.addressof(batch.iocbs[0]), 0)
    assert caught.value.errno in {errno.EINVAL, errno.ENOSYS}


def test_a_context_of_nothing_is_einval() -> None:
    with pytest.raises(OSError, match="io_setup") as caught:
        syscalls.io_setup(0)
    assert caught.value.errno in {errno.EINVAL, errno.ENOSYS, errno.EPERM}


def aio_number(name: str) -> int:
    try:
        return int(Path(f"/proc/sys/fs/{name}").read_text())
    except OSError as error:
        pytest.skip(f"cannot tell the limit: {error}")


@pytest.mark.usefixtures("ctx_id")
def test_more_than_the_system_has_left_is_eagain() -> None:
    # It is refused at once, so that nobody else finds the limit used up.
    limit = aio_number("aio-max-nr")
    with pytest.raises(OSError, match="io_setup") as caught:
        syscalls.io_setup(limit + 1)
    if caught.value.errno == errno.EINVAL:
        pytest.skip(f"a limit of {limit} is more than one context may have")
    assert caught.value.errno == errno.EAGAIN


@pytest.mark.parametrize(
    ("good_before", "expected"), [(0, errno.EBADF), (1, 1), (2, 2)], ids=["first", "second", "last"]
)
def test_the_error_of_a_later_request_is_not_told(
    ctx_id: int, null: int, good_before: int, expected: int
) -> None:
    fds = [null] * good_before + [-1] + [null] * (2 - good_before)
    batch = writes(*fds)
    if good_before == 0:
        with failing(expected):
            submit(ctx_id, batch)
    else:
        assert submit(ctx_id, batch) == expected
        rest = batch.address + 8 * expected
        with failing(errno.EBADF):
            syscalls.io_submit(ctx_id, len(fds) - expected, rest)
    assert reaped(ctx_id, 0, 8, None) == [(100 + i, 1) for i in range(good_before)]


def test_a_full_context_is_eagain_and_has_room_again_after_a_reap(ctx_id: int, null: int) -> None:
    batch = writes(null)
    accepted = 0

    def fill() -> None:
        nonlocal accepted
        for _ in range(100_000):
            accepted += submit(ctx_id, batch)

    with pytest.raises(BlockingIOError, match="io_submit"):
        fill()
    assert accepted >= ROOM
    assert len(reaped(ctx_id, 0, accepted + 1, None)) == accepted
    assert submit(ctx_id, batch) == 1


def test_bad_addresses_are_efault(ctx_id: int) -> None:
    with failing(errno.EFAULT):
        syscalls.io_submit(ctx_id, 1, 8)
    with failing(errno.EFAULT):
        syscalls.io_submit(ctx_id, 1, 2**64 - 8)
    batch = writes(1)
    batch.pointers[0] = 8
    with failing(errno.EFAULT):
        submit(ctx_id, batch)


@pytest.mark.parametrize("nr", [-1, -(2**40)])
def test_a_negative_number_is_einval(ctx_id: int, nr: int) -> None:
    with failing(errno.EINVAL):
        syscalls.io_submit(ctx_id, nr, 8)
    with failing(errno.EINVAL):
        syscalls.io_getevents(ctx_id, 0, nr, 8, None)


def started_poll(ctx_id: int, fd: int) -> Batch:
    batch = poll_for_input(fd)
    try:
        assert submit(ctx_id, batch) == 1
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this kernel has no IOCB_CMD_POLL")
    return batch


def test_a_cancelled_poll_still_completes(ctx_id: int, pipe: tuple[int, int]) -> None:
    batch = started_poll(ctx_id, pipe[0])
    syscalls.io_cancel(ctx_id, ctypes.addressof(batch.iocbs[0]), 0)
    assert [data for data, _ in reaped(ctx_id, 1, 8, None)] == [100]
    with failing(errno.EINVAL):
        syscalls.io_cancel(ctx_id, ctypes.addressof(batch.iocbs[0]), 0)


def test_cancel_of_what_was_never_submitted_is_einval(ctx_id: int, pipe: tuple[int, int]) -> None:
    batch = started_poll(ctx_id, pipe[0])
    other = poll_for_input(pipe[0])  # at another address, as long as the first one is there
    with failing(errno.EINVAL):
        syscalls.io_cancel(ctx_id, ctypes.addressof(other.iocbs[0]), 0)
    os.write(pipe[1], b"x")
    assert [data for data, _ in reaped(ctx_id, 1, 8, None)] == [100]
    del batch


def test_a_wait_lets_other_threads_run(ctx_id: int, pipe: tuple[int, int]) -> None:
    batch = started_poll(ctx_id, pipe[0])
    got: list[tuple[int, int]] = []
    waiter = threading.Thread(target=lambda: got.extend(reaped(ctx_id, 1, 8, None)))
    waiter.start()
    os.write(pipe[1], b"x")
    waiter.join()
    assert [(data, res & select.POLLIN) for data, res in got] == [(100, select.POLLIN)]
    del batch


def test_errors_of_two_threads_are_their_own(ctx_id: int, null: int) -> None:
    """Errno is the thread's own, however the threads take turns."""
    wrong: list[object] = []

    def fail(batch: Batch, context: int, failure: int) -> None:
        for _ in range(2000):
            try:
                submit(context, batch)
            except OSError as error:
                if error.errno != failure:
                    wrong.append(error)
            else:
                wrong.append("accepted")

    threads = [
        threading.Thread(target=fail, args=(writes(-1), ctx_id, errno.EBADF)),
        threading.Thread(target=fail, args=(writes(null), 4096, errno.EINVAL)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

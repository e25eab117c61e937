"""Decoding statx, and the ladder, on files that answer as told."""

from __future__ import annotations

import dataclasses
import errno
import os
import struct
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

import pytest

from rawaio import geometry, syscalls
from rawaio.geometry import (
    STATX_DIO_READ_ALIGN,
    STATX_DIOALIGN,
    Geometry,
    decode_statx,
    find_geometry,
)

SAFE = max(4096, os.sysconf("SC_PAGE_SIZE"))
ASSUMED = Geometry(SAFE, SAFE, SAFE, "assumed")


def statx_answer(mask: int, memory: int = 0, offset: int = 0, read: int = 0) -> bytes:
    buffer = bytearray(256)
    struct.pack_into("=I", buffer, 0, mask)
    struct.pack_into("=II", buffer, 0x98, memory, offset)
    struct.pack_into("=I", buffer, 0xB4, read)
    return bytes(buffer)


# ---- the class


def test_alignment_is_of_address_length_and_offset() -> None:
    found = Geometry(4, 4096, 512, "statx")
    assert found.is_aligned(4, 4096, 8192)
    assert not found.is_aligned(2, 4096, 8192)
    assert not found.is_aligned(4, 4095, 8192)
    assert not found.is_aligned(4, 4096, 8191)
    assert not found.is_aligned(4, 512, 1024)
    assert found.is_aligned(4, 512, 1024, read=True)
    assert not found.is_aligned(2, 512, 1024, read=True)
    assert not found.is_aligned(4, 512, 1023, read=True)


@pytest.mark.parametrize(
    ("offset", "down", "up"),
    [(0, 0, 0), (1, 0, 512), (511, 0, 512), (512, 512, 512), (2**62 + 1, 2**62, 2**62 + 512)],
)
def test_rounding(offset: int, down: int, up: int) -> None:
    found = Geometry(4, 512, 512, "statx")
    assert (found.round_down(offset), found.round_up(offset)) == (down, up)


def test_a_geometry_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast("Any", ASSUMED).source = "statx"


# ---- statx


def test_statx_says_it() -> None:
    answer = statx_answer(STATX_DIOALIGN, 4, 512)
    assert decode_statx(answer) == Geometry(4, 512, 512, "statx")


def test_statx_says_it_for_reads_apart() -> None:
    both = STATX_DIOALIGN | STATX_DIO_READ_ALIGN
    assert decode_statx(statx_answer(both, 4, 4096, 512)) == Geometry(4, 4096, 512, "statx")
    # Zero there means that reads are as writes are; without the bit the field means nothing.
    assert decode_statx(statx_answer(both, 4, 4096, 0)) == Geometry(4, 4096, 4096, "statx")
    answer = statx_answer(STATX_DIOALIGN, 4, 4096, 512)
    assert decode_statx(answer) == Geometry(4, 4096, 4096, "statx")


def test_offsets_good_for_writes_are_good_for_reads() -> None:
    both = STATX_DIOALIGN | STATX_DIO_READ_ALIGN
    assert decode_statx(statx_answer(both, 4, 512, 4096)) == Geometry(4, 4096, 4096, "statx")


def test_statx_does_not_say() -> None:
    assert decode_statx(statx_answer(STATX_DIO_READ_ALIGN | 0x7FF, 4, 512, 512)) is None


@pytest.mark.parametrize(("memory", "offset"), [(0, 0), (4, 0), (0, 512)])
def test_statx_says_that_there_is_no_direct_io(memory: int, offset: int) -> None:
    with pytest.raises(OSError) as caught:
        decode_statx(statx_answer(STATX_DIOALIGN, memory, offset))
    assert caught.value.errno == errno.EINVAL
    assert "directly" in caught.value.__notes__[0]


def test_a_statx_has_256_bytes() -> None:
    with pytest.raises(ValueError, match="^a struct statx has 256 bytes, not 255$"):
        decode_statx(bytes(255))


# ---- without statx


@pytest.fixture
def fd(tmp_path: Path) -> Generator[int, None, None]:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture(params=["unknown", "ENOSYS", "EPERM"])
def no_statx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def statx(path: int, flags: int, mask: int) -> bytes:
        assert flags == 0
        assert mask == STATX_DIOALIGN | STATX_DIO_READ_ALIGN
        if request.param == "unknown":
            return statx_answer(0x7FF)
        raise syscalls.kernel_error(getattr(errno, request.param), "statx")

    monkeypatch.setattr(syscalls, "statx", statx)


def disk(block: int, memory: int) -> Callable[[int, list[memoryview], int], int]:
    """A preadv for a direct file with these alignments; 0: everything is refused."""
    import ctypes

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        assert offset == 0
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        if not block or len(buffer) % block or address % memory:
            raise OSError(errno.EINVAL, "misaligned")
        return min(len(buffer), 8192)

    return preadv


@pytest.mark.usefixtures("no_statx")
@pytest.mark.parametrize(
    ("block", "memory", "expected"),
    [
        (512, 512, Geometry(512, 512, 512, "probed")),
        (4096, 512, Geometry(512, 4096, 4096, "probed")),
        (2048, 1024, Geometry(1024, 2048, 2048, "probed")),
        (512, 4096, Geometry(4096, 512, 512, "probed")),
        (4096, 4096, Geometry(4096, 4096, 4096, "probed")),
        (512, 1, Geometry(512, 512, 512, "probed")),  # every address is taken: nothing is known
        (4096, 1, Geometry(4096, 4096, 4096, "probed")),
        (1, 1, ASSUMED),  # every length is taken
    ],
)
def test_the_ladder_finds_it(
    monkeypatch: pytest.MonkeyPatch, fd: int, block: int, memory: int, expected: Geometry
) -> None:
    monkeypatch.setattr(os, "preadv", disk(block, memory))
    assert geometry._climb(fd) == expected


def test_addresses_beyond_the_ladder_are_aligned_as_blocks_are(
    monkeypatch: pytest.MonkeyPatch, fd: int
) -> None:
    monkeypatch.setattr(os, "preadv", disk(512, 8192))
    monkeypatch.setattr(geometry, "_SAFE", 8192)
    assert geometry._climb(fd) == Geometry(512, 512, 512, "probed")


def test_no_direct_read_is_taken(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    monkeypatch.setattr(os, "preadv", disk(0, 1))
    with pytest.raises(OSError) as caught:
        geometry._climb(fd)
    assert caught.value.errno == errno.EINVAL
    assert "refused" in caught.value.__notes__[0]


def test_another_error_comes_from_behind_the_check(
    monkeypatch: pytest.MonkeyPatch, fd: int
) -> None:
    """A disk that cannot be read has an alignment all the same."""

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL if len(buffers[0]) % 512 else errno.EIO, "no")

    monkeypatch.setattr(os, "preadv", preadv)
    assert geometry._climb(fd) == Geometry(512, 512, 512, "probed")


@pytest.mark.usefixtures("no_statx")
def test_a_descriptor_that_cannot_read_directly_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, fd: int
) -> None:
    opened: list[tuple[str, int]] = []
    closed: list[int] = []

    def open_(path: str, flags: int) -> int:
        opened.append((path, flags))
        return 987

    def climb(fd: int) -> Geometry:
        assert fd == 987
        return ASSUMED

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_)
        patched.setattr(os, "close", closed.append)
        patched.setattr(geometry, "_climb", climb)
        assert find_geometry(fd) == ASSUMED
    assert opened == [(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)]
    assert closed == [987]


@pytest.mark.usefixtures("no_statx")
@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_a_descriptor_that_can_is_used_itself(
    monkeypatch: pytest.MonkeyPatch, fd: int, access: int
) -> None:
    monkeypatch.setattr("fcntl.fcntl", lambda fd, command: os.O_DIRECT | access)
    monkeypatch.setattr(geometry, "_climb", lambda fd: ("climbed", fd))
    monkeypatch.setattr(os, "open", lambda path, flags: 987)
    monkeypatch.setattr(os, "close", lambda fd: None)
    used = 987 if access == os.O_WRONLY else fd
    assert cast("object", find_geometry(fd)) == ("climbed", used)
    monkeypatch.undo()


@pytest.mark.usefixtures("no_statx")
def test_it_is_assumed_where_nothing_can_be_read(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(os, "open", refuse)
    assert find_geometry(fd) == ASSUMED


@pytest.mark.usefixtures("no_statx")
def test_a_file_that_does_not_open_for_direct_io(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    def refuse(path: str, flags: int) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError) as caught:
        find_geometry(fd)
    assert caught.value.errno == errno.EINVAL
    assert "O_DIRECT" in caught.value.__notes__[0]


def test_an_error_of_statx_is_not_lost(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    def statx(path: int, flags: int, mask: int) -> bytes:
        raise syscalls.kernel_error(errno.ESTALE, "statx")

    monkeypatch.setattr(syscalls, "statx", statx)
    with pytest.raises(OSError) as caught:
        find_geometry(fd)
    assert caught.value.errno == errno.ESTALE


def test_only_files_and_block_devices() -> None:
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError) as caught:
            find_geometry(reader)
    finally:
        os.close(reader)
        os.close(writer)
    assert caught.value.errno == errno.EINVAL
    assert caught.value.__notes__ == ["direct I/O is for regular files and block devices"]


def test_a_closed_descriptor() -> None:
    with pytest.raises(OSError) as caught:
        find_geometry(2**30)
    assert caught.value.errno == errno.EBADF

"""What the kernel says of real files, against what it does with them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rawaio import aligned_buffer, geometry, syscalls
from rawaio.geometry import STATX_DIOALIGN, Geometry, decode_statx, find_geometry
from tests.loopdevice import loop_device

ROOT = Path(__file__).parents[2]
DIRECTORIES = [ROOT, Path("/dev/shm")]


@contextmanager
def temporary(directory: Path, nbytes: int, flags: int = os.O_RDWR) -> Generator[int, None, None]:
    if not os.access(directory, os.W_OK):
        pytest.skip(f"cannot write to {directory}")
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        file.write(os.urandom(nbytes))
        file.flush()
        os.fsync(file.fileno())
        try:
            fd = os.open(file.name, flags)
        except OSError as error:
            if not flags & os.O_DIRECT or error.errno != errno.EINVAL:
                raise
            pytest.skip(f"no O_DIRECT in {directory}")
        try:
            yield fd
        finally:
            os.close(fd)


def check_reads(fd: int, found: Geometry) -> None:
    """What is aligned is taken, at every place where that can be told."""
    memory, block = found.memory_alignment, found.read_offset_alignment
    buffer = aligned_buffer(3 * max(memory, block), max(memory, block))
    part = buffer[memory : memory + block]
    assert os.preadv(fd, [part], block) == block
    with pytest.raises(OSError) as caught:
        os.preadv(fd, [buffer[: block + 1]], 0)
    assert caught.value.errno == errno.EINVAL


def answer(fd: int) -> Geometry | None:
    """None: there is no direct I/O, as in tmpfs before Linux 6.6."""
    try:
        return find_geometry(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


@pytest.mark.parametrize("directory", DIRECTORIES, ids=str)
@pytest.mark.parametrize("nbytes", [0, 1, 511, 1 << 16])
@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_every_descriptor_gives_the_same_answer(directory: Path, nbytes: int, access: int) -> None:
    with temporary(directory, nbytes) as fd:
        expected = answer(fd)
    with temporary(directory, nbytes, access) as fd:
        assert answer(fd) == expected
    if expected is not None:
        with temporary(directory, nbytes, access | os.O_DIRECT) as fd:
            assert answer(fd) == expected


def test_statx_tells_the_truth() -> None:
    with temporary(ROOT, 1 << 16, os.O_RDONLY | os.O_DIRECT) as fd:
        found = find_geometry(fd)
        if found.source != "statx":
            pytest.skip("statx does not say")
        check_reads(fd, found)


def test_the_ladder_agrees_with_statx(monkeypatch: pytest.MonkeyPatch) -> None:
    with temporary(ROOT, 1 << 16) as fd:
        told = find_geometry(fd)
        if told.source != "statx":
            pytest.skip("statx does not say")
        monkeypatch.setattr(syscalls, "statx", lambda fd, flags, mask: bytes(256))
        found = find_geometry(fd)
        assert found.source == "probed"
        assert found.offset_alignment == told.read_offset_alignment
        # The ladder has no rung between one byte and 512, where statx knows 4 of some disks.
        assert found.memory_alignment in (max(told.memory_alignment, 512), found.offset_alignment)


@pytest.mark.parametrize("nbytes", [0, 1, 511])
def test_the_ladder_on_files_shorter_than_a_block(
    monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    monkeypatch.setattr(syscalls, "statx", lambda fd, flags, mask: bytes(256))
    with temporary(ROOT, 1 << 16) as fd:
        expected = find_geometry(fd)
    with temporary(ROOT, nbytes) as fd:
        found = find_geometry(fd)
    # Nothing to read may tell nothing; but it never tells less than what is needed.
    assert found.source in ("probed", "assumed")
    assert found.offset_alignment >= expected.offset_alignment
    assert found.memory_alignment >= expected.memory_alignment


def test_an_unlinked_file() -> None:
    with tempfile.TemporaryFile(dir=ROOT) as file:
        assert find_geometry(file.fileno()).offset_alignment >= 512


def test_the_descriptor_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "statx", lambda fd, flags, mask: bytes(256))
    with temporary(ROOT, 1 << 16, os.O_RDONLY | os.O_DIRECT) as fd:
        os.lseek(fd, 4096, os.SEEK_SET)
        find_geometry(fd)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 4096


def test_a_file_in_memory_takes_everything() -> None:
    with temporary(Path("/dev/shm"), 1 << 16) as fd:
        if decode_statx(syscalls.statx(fd, 0, STATX_DIOALIGN)) is not None:
            pytest.skip("statx says something about it")
        assert answer(fd) in (None, geometry._assumed())


def test_files_without_direct_io() -> None:
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as caught:
            find_geometry(fd)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EINVAL
    assert "O_DIRECT" in caught.value.__notes__[0]


@pytest.mark.parametrize("sector_size", [512, 4096])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_DIRECT])
def test_a_block_device_answers_through_a_descriptor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sector_size: int, flags: int
) -> None:
    with loop_device(tmp_path, sector_size=sector_size) as node:
        fd = os.open(node, flags)
        try:
            told = find_geometry(fd)
            assert told.offset_alignment == sector_size
            by_path = decode_statx(syscalls.statx(node, 0, STATX_DIOALIGN))
            if by_path is not None:
                assert told.source == "statx"
                assert told == by_path
            monkeypatch.setattr(syscalls, "statx", lambda fd, flags, mask: bytes(256))
            found = find_geometry(fd)
            assert found.source == "probed"
            assert found.offset_alignment == sector_size
            if flags & os.O_DIRECT:
                check_reads(fd, told)
        finally:
            os.close(fd)

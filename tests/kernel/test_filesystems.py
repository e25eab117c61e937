"""The file systems that other tests are given are what they are said to be, and leave nothing."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

import rawaio
from rawaio import Request, aligned_buffer
from rawaio.geometry import find_geometry
from tests.context_support import LIMIT_S, results
from tests.filesystems import (
    MIB,
    RECIPES,
    FileSystem,
    Mounts,
    Recipe,
    UnavailableError,
    file_size_limit,
    free,
    leave_free,
    made,
)
from tests.support import ROOT

_BLOCK = 4096


@contextmanager
def opened(path: Path, flags: int) -> Generator[int, None, None]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def direct(path: Path) -> Generator[int, None, None]:
    """A new file, open for direct I/O."""
    try:
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT) as fd:
            yield fd
    except OSError as error:
        if error.errno != errno.EINVAL or error.filename is None:
            raise
        pytest.skip("this kernel opens nothing there with O_DIRECT")


def pattern(nblocks: int) -> memoryview:
    """Aligned blocks, each different from the next."""
    data = aligned_buffer(nblocks * _BLOCK)
    for i in range(nblocks):
        data[i * _BLOCK : (i + 1) * _BLOCK] = bytes([i + 1]) * _BLOCK
    return data


def mount_type(path: Path) -> str | None:
    """The type of what is mounted there, as the kernel says."""
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[4] == str(path):
                return fields[fields.index("-") + 1]
    return None


def wait_unmounted(path: Path) -> None:
    """Wait until nothing is mounted there; the kernel tells of each change."""
    with open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        poll = select.poll()
        poll.register(mounts, select.POLLPRI)
        while mount_type(path) is not None:
            assert poll.poll(LIMIT_S * 1000), f"{path} is still mounted"


def attached(image: Path) -> bool:
    """Whether a loop device is on this file."""
    return any(
        path.read_text().startswith(str(image))
        for path in Path("/sys/block").glob("loop*/loop/backing_file")
    )


def unmade(recipe: Recipe, tmp_path: Path) -> str:
    """Why a file system cannot be made."""
    with pytest.raises(UnavailableError) as caught, made(recipe, tmp_path):
        pass
    return str(caught.value)


def test_each_is_what_it_is_called(filesystem: FileSystem, mounts: Mounts) -> None:
    recipe = RECIPES[filesystem.kind]
    root = mounts.root(filesystem.kind)
    assert mount_type(root) == recipe.type
    assert filesystem.path.parent == root
    assert os.stat(root).st_dev != os.stat(root.parent).st_dev
    assert free(root) > recipe.size // 4


def test_direct_io_through_a_context(filesystem: FileSystem) -> None:
    written = pattern(8)
    read = aligned_buffer(len(written))
    with direct(filesystem.path / "file") as fd, rawaio.IOContext() as ctx:
        for op, buffer in ((Request.pwrite, written), (Request.pread, read)):
            ctx.submit(*(op(fd, buffer[i : i + _BLOCK], i) for i in range(0, len(read), _BLOCK)))
            assert results(ctx.drain(LIMIT_S)) == [_BLOCK] * 8
        ctx.submit(Request.fdsync(fd))
        assert results(ctx.drain(LIMIT_S)) == [0]
    assert read == written


def test_a_device_of_long_sectors(ext4: Path, ext4_4k: Path) -> None:
    for folder, expected in ((ext4, 512), (ext4_4k, 4096)):
        with direct(folder / "file") as fd:
            os.pwrite(fd, pattern(1), 0)
            assert find_geometry(fd).offset_alignment == expected


def test_folders_are_new_and_go_away(mounts: Mounts) -> None:
    with mounts.folder("tmpfs") as first:
        (first / "file").write_bytes(b"x")
        with mounts.folder("tmpfs") as second:
            assert second.parent == first.parent
            assert list(second.iterdir()) == []
    assert not first.exists()
    assert not second.exists()


def test_a_full_file_system(small: Path) -> None:
    before = free(small)
    assert before >= 4 * MIB
    data = pattern(8)
    with direct(small / "file") as fd, rawaio.IOContext() as ctx:
        leave_free(small, 4 * _BLOCK)
        ctx.submit(Request.pwrite(fd, data[: 4 * _BLOCK], 0))
        assert results(ctx.drain(LIMIT_S)) == [4 * _BLOCK]
        ctx.submit(Request.pwrite(fd, data, 4 * _BLOCK))
        assert results(ctx.drain(LIMIT_S)) == [-errno.ENOSPC]


def test_a_write_that_has_room_for_its_beginning(tmpfs: Path, small: Path) -> None:
    data = pattern(8)
    # ext4 takes back what it has written directly (6.18), but nobody vouches for that.
    for folder, expected in ((tmpfs, [4 * _BLOCK]), (small, [4 * _BLOCK, -errno.ENOSPC])):
        with direct(folder / "file") as fd, rawaio.IOContext() as ctx:
            leave_free(folder, 4 * _BLOCK)
            ctx.submit(Request.pwrite(fd, data, 0))
            (res,) = results(ctx.drain(LIMIT_S))
            assert res in expected
            assert os.fstat(fd).st_size == max(res, 0)


def test_room_comes_back_after_each_test(mounts: Mounts) -> None:
    for kind in ("small", "tmpfs"):
        root = mounts.root(kind)
        before = free(root)
        for left in (MIB, 0):
            with mounts.folder(kind) as folder:
                leave_free(folder, left)
                assert free(root) == left
            assert free(root) == before


def test_a_limit_for_the_size_of_files(ext4: Path) -> None:
    data = pattern(4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    with direct(ext4 / "file") as fd, rawaio.IOContext() as ctx:
        with file_size_limit(2 * _BLOCK):
            ctx.submit(Request.pwrite(fd, data, 0), Request.pwrite(fd, data, 2 * _BLOCK))
        assert results(ctx.drain(LIMIT_S)) == [2 * _BLOCK, -errno.EFBIG]
        assert os.fstat(fd).st_size == 2 * _BLOCK
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
        ctx.submit(Request.pwrite(fd, data, 2 * _BLOCK))
        assert results(ctx.drain(LIMIT_S)) == [4 * _BLOCK]


def test_the_limit_goes_when_something_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(KeyError), file_size_limit(mmap.PAGESIZE):
        raise KeyError
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_nothing_is_left(mounts: Mounts, tmp_path: Path, kind: str) -> None:
    mounts.root(kind)  # skips
    with made(RECIPES[kind], tmp_path) as root:
        assert mount_type(root) == kind
        (root / "file").write_bytes(b"x")
    assert mount_type(root) is None
    assert list(tmp_path.iterdir()) == [root]
    assert list(root.iterdir()) == []


def test_an_open_descriptor_does_not_keep_it_mounted(mounts: Mounts, tmp_path: Path) -> None:
    mounts.root("ext4")  # skips
    with made(RECIPES["ext4"], tmp_path) as root:
        file = (root / "file").open("wb")
    with file:
        assert mount_type(root) is None
        file.write(b"still there")


def test_a_killed_session_leaves_nothing_mounted(mounts: Mounts, tmp_path: Path) -> None:
    mounts.root("ext4")  # skips
    program = """
import os, signal, sys
from pathlib import Path
from tests.filesystems import RECIPES, made
with made(RECIPES["ext4"], Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == -signal.SIGKILL
    wait_unmounted(tmp_path / "root")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = Recipe("ext4", MIB, ("mkfs.none",), packages="none-progs")
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        assert unmade(recipe, tmp_path) == "mounting ext4 needs root"
    if os.geteuid() != 0:
        pytest.skip("needs root")
    why_not = unmade(recipe, tmp_path)
    assert why_not == "no mkfs.none (Debian package none-progs)" or "losetup" in why_not
    assert not attached(tmp_path / "image")

"""What `rawaio.open` takes, what it refuses, and that it leaves nothing behind then."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import io
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import ClosedError, File
from tests.context_support import LIMIT_S
from tests.loopdevice import loop_device

DIRECT = pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def path(ext4: Path) -> Path:
    path = ext4 / "file"
    path.write_bytes(b"some data")
    return path


def attempt(runner: asyncio.Runner, *arguments: Any, **options: Any) -> File:
    """Open a file, within a time."""

    async def opened() -> File:
        return await rawaio.open(*arguments, **options)

    return runner.run(asyncio.wait_for(opened(), LIMIT_S))


def descriptors() -> dict[int, str]:
    """What is open, but for what belongs to the loop."""
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the folder itself
    return {fd: target for fd, target in found.items() if "eventfd" not in target}


@contextmanager
def no_leak(runner: asyncio.Runner) -> Generator[None, None, None]:
    """The same descriptors are open before and after."""
    runner.get_loop()
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


def closes(runner: asyncio.Runner, file: File) -> None:
    runner.run(file.close())


# -- taken ----------------------------------------------------------------------------------------


@DIRECT
@pytest.mark.parametrize("mode", ["r", "rb", "r+", "w", "wb", "w+", "wb+", "x", "x+", "xb"])
def test_modes(runner: asyncio.Runner, path: Path, direct: bool, mode: str) -> None:
    if mode[0] == "x":
        path.unlink()
    with no_leak(runner):
        file = attempt(runner, path, mode, direct=direct)
        assert file.mode == mode.replace("b", "")
        assert file.name == path
        assert file.direct is direct
        assert (file.geometry is not None) is direct
        assert file.size == (0 if mode[0] in "wx" else 9)
        assert bool(fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT) is direct
        assert not os.get_inheritable(file.fileno())
        assert not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
        if "+" in mode or mode[0] == "r":
            assert runner.run(file.pread(100, 0)) == (b"some data" if mode[0] == "r" else b"")
        if "+" in mode or mode[0] != "r":
            assert runner.run(file.pwrite(b"new", 1)) == 3
            wanted = b"snew data" if mode[0] == "r" else b"\0new"
            assert path.read_bytes() == wanted
        closes(runner, file)


@DIRECT
@pytest.mark.parametrize("kind", ["str", "bytes", "path", "pathlike of bytes"])
def test_names(runner: asyncio.Runner, path: Path, direct: bool, kind: str) -> None:
    class Named:
        def __fspath__(self) -> bytes:
            return os.fsencode(path)

    name: Any = {"str": str(path), "bytes": os.fsencode(path), "path": path}.get(kind, Named())
    file = attempt(runner, name, direct=direct)
    assert file.name is name
    assert repr(name) in repr(file)
    assert runner.run(file.pread(9, 0)) == b"some data"
    closes(runner, file)


def test_a_new_file_has_the_rights_that_umask_leaves(runner: asyncio.Runner, ext4: Path) -> None:
    before = os.umask(0o027)
    try:
        closes(runner, attempt(runner, ext4 / "new", "x"))
    finally:
        os.umask(before)
    assert (ext4 / "new").stat().st_mode & 0o777 == 0o640


@DIRECT
def test_an_opener(runner: asyncio.Runner, path: Path, direct: bool) -> None:
    asked: list[Any] = []
    folder = os.open(path.parent, os.O_RDONLY)

    def opener(name: str | bytes, flags: int) -> int:
        asked.append((name, flags & os.O_ACCMODE))
        return os.open(name, flags, dir_fd=folder)

    try:
        with no_leak(runner):
            file = attempt(runner, "file", "r+", direct=direct, opener=opener)
            assert asked == [("file", os.O_RDWR)]
            runner.run(file.pwrite(b"S", 0))
            closes(runner, file)
        assert path.read_bytes() == b"Some data"
    finally:
        os.close(folder)


@DIRECT
@pytest.mark.parametrize("closefd", [True, False])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_descriptor(
    runner: asyncio.Runner, path: Path, direct: bool, closefd: bool, mode: str
) -> None:
    flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
    fd = os.open(path, flags)
    file = attempt(runner, fd, mode, direct=direct, closefd=closefd)
    assert file.fileno() == file.name == fd
    assert runner.run(file.pread(9, 0)) == b"some data"
    closes(runner, file)
    if closefd:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    else:
        os.close(fd)


@pytest.mark.parametrize("has", [True, False])
def test_a_descriptor_is_preferred_as_it_is(runner: asyncio.Runner, path: Path, has: bool) -> None:
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if has else 0))
    file = attempt(runner, fd, direct="prefer")
    assert file.direct is has
    closes(runner, file)


def test_a_write_only_file_is_opened_where_reading_is_not_allowed(
    runner: asyncio.Runner, ext4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read all, so the refusal is made up.
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **options: Any) -> int:
        if name == str(path) and flags & os.O_ACCMODE != os.O_WRONLY:
            raise PermissionError(errno.EACCES, "no", name)
        return real(name, flags, *rest, **options)

    path = ext4 / "file"
    for direct in (True, False):
        path.write_bytes(b"x" * 5000)
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(PermissionError):
            attempt(runner, str(path), "w+", direct=direct)
        with no_leak(runner):
            file = attempt(runner, str(path), "w", direct=direct)
            runner.run(file.pwrite(b"a" * 5000, 0))
            runner.run(file.pwrite(b"b", 100))
            runner.run(file.pwrite(b"c" * 4096, 1))
            assert runner.run(file.append(b"d")) == 5000
            closes(runner, file)
        monkeypatch.undo()
        assert path.read_bytes() == b"a" + b"c" * 4096 + b"a" * 903 + b"d"


@DIRECT
@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_block_device(
    runner: asyncio.Runner, tmp_path: Path, direct: bool, sector_size: int
) -> None:
    with loop_device(tmp_path, sector_size=sector_size) as node:
        for mode in ("r+", "w", "w+"):
            with no_leak(runner):
                file = attempt(runner, node, mode, direct=direct)
                assert file.size == 4 << 20
                runner.run(file.pwrite(b"text", 1000))
                if mode != "w":
                    assert runner.run(file.pread(4, 1000)) == b"text"
                with pytest.raises(io.UnsupportedOperation):
                    runner.run(file.append(b"x"))
                with pytest.raises(OSError, match="Invalid argument"):
                    runner.run(file.truncate(0))
                closes(runner, file)
        fd = os.open(node, os.O_RDONLY)
        os.lseek(fd, 77, os.SEEK_SET)
        closes(runner, attempt(runner, fd, direct=False, closefd=False))
        assert os.lseek(fd, 0, os.SEEK_CUR) == 77
        os.close(fd)


def test_nodes_of_one_device_are_the_same_file(runner: asyncio.Runner, tmp_path: Path) -> None:
    async def main(nodes: list[str]) -> None:
        async with rawaio.open(nodes[0], "r+") as first, rawaio.open(nodes[1], "r+") as second:
            await asyncio.gather(
                *((first, second)[i % 2].pwrite(bytes([i]) * 3, 3 * i) for i in range(200))
            )
            assert await first.pread(600, 0) == bytes(i // 3 for i in range(600))

    with loop_device(tmp_path) as node:
        other = tmp_path / "node"
        try:
            os.mknod(other, os.stat(node).st_mode, os.stat(node).st_rdev)
            os.close(os.open(other, os.O_RDONLY))
        except PermissionError as error:
            pytest.skip(f"no other node: {error}")
        runner.run(main([node, str(other)]))


# -- without direct I/O ---------------------------------------------------------------------------


def test_without_direct_io(runner: asyncio.Runner) -> None:
    # A regular file of a file system that knows no O_DIRECT.
    with no_leak(runner):
        with pytest.raises(OSError) as caught:
            attempt(runner, "/proc/version")
        assert caught.value.errno == errno.EINVAL
        assert 'direct="prefer"' in "".join(caught.value.__notes__)
        for direct in ("prefer", False):
            file = attempt(runner, "/proc/version", direct=direct)
            assert not file.direct
            assert file.geometry is None
            assert runner.run(file.pread(5, 0)) == b"Linux"
            closes(runner, file)


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be written, and not directly."""
    root = tmp_path / "ramfs"
    root.mkdir()
    command = ["mount", "-t", "ramfs", "ramfs", str(root)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a ramfs")
    try:
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.parametrize("mode", ["r", "r+", "w", "w+", "x", "x+"])
def test_what_is_refused_is_neither_cut_nor_left(
    runner: asyncio.Runner, ramfs: Path, mode: str
) -> None:
    path = ramfs / "file"
    if mode[0] != "x":
        path.write_bytes(b"some data")
    with no_leak(runner):
        with pytest.raises(OSError) as caught:
            attempt(runner, path, mode)
        assert caught.value.errno == errno.EINVAL
        if mode[0] == "x":
            assert not path.exists()
        else:
            assert path.read_bytes() == b"some data"
        file = attempt(runner, path, mode, direct="prefer")
        assert not file.direct
        closes(runner, file)


@pytest.mark.parametrize("mode", ["r", "w", "x"])
def test_direct_io_that_is_refused_late(
    runner: asyncio.Runner, path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def find_geometry(fd: int) -> None:
        raise OSError(errno.EINVAL, "statx says no")

    monkeypatch.setattr("rawaio.descriptor.find_geometry", find_geometry)
    if mode == "x":
        path.unlink()
    with no_leak(runner):
        with pytest.raises(OSError, match="statx says no"):
            attempt(runner, path, mode)
        assert path.exists() is (mode != "x")
        if mode != "x":
            assert path.read_bytes() == b"some data"
        file = attempt(runner, path, mode, direct="prefer")
        assert not file.direct
        assert not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_DIRECT
        closes(runner, file)


# -- refused --------------------------------------------------------------------------------------


@DIRECT
@pytest.mark.parametrize("mode", ["r", "r+", "w"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "null", "tty"])
def test_what_is_no_file_is_refused_without_waiting(
    runner: asyncio.Runner, ext4: Path, direct: bool, mode: str, kind: str
) -> None:
    leader, follower = pty.openpty()
    listening = socket.socket(socket.AF_UNIX)
    path = {"null": "/dev/null", "tty": os.ttyname(follower)}.get(kind, str(ext4 / kind))
    if kind == "folder":
        os.mkdir(path)
    elif kind == "pipe":
        os.mkfifo(path)  # with nobody at the other end
    elif kind == "socket":
        folder = os.getcwd()
        os.chdir(ext4)  # names of sockets are short
        try:
            listening.bind(kind)
        finally:
            os.chdir(folder)
    with no_leak(runner):
        with pytest.raises(OSError) as caught:
            attempt(runner, path, mode, direct=direct)
        wanted = {"folder": errno.EISDIR, "socket": errno.ENXIO}.get(kind, errno.EINVAL)
        assert caught.value.errno == wanted
    for fd in (leader, follower):
        os.close(fd)
    listening.close()


@DIRECT
@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "null", "tty", "eventfd", "closed"])
def test_descriptors_of_what_is_no_file_are_refused_and_stay_open(
    runner: asyncio.Runner, ext4: Path, direct: bool, kind: str
) -> None:
    flags = os.O_DIRECT if direct and kind not in ("folder", "null") else 0
    opened: list[int] = []
    if kind == "folder":
        opened.append(os.open(ext4, os.O_RDONLY))
    elif kind == "null":
        opened.append(os.open("/dev/null", os.O_RDONLY))
    elif kind == "pipe":
        opened += os.pipe2(flags)
    elif kind == "tty":
        opened += pty.openpty()
    elif kind == "eventfd":
        opened.append(os.eventfd(0))
    elif kind == "socket":
        opened += [one.detach() for one in socket.socketpair()]
    fd = opened[0] if opened else 1 << 20
    with no_leak(runner):
        with pytest.raises((OSError, ValueError)) as caught:
            attempt(runner, fd, direct="prefer" if direct else False)
        if kind == "closed":
            assert isinstance(caught.value, OSError)
            assert caught.value.errno == errno.EBADF
    for one in opened:
        os.close(one)


@pytest.mark.parametrize(
    ("flags", "mode", "direct", "message"),
    [
        (os.O_RDONLY, "r+", False, "is not what descriptor"),
        (os.O_WRONLY, "r", False, "is not what descriptor"),
        (os.O_WRONLY, "r+", False, "is not what descriptor"),
        (os.O_RDWR | os.O_APPEND, "r+", False, "O_APPEND"),
        (os.O_RDWR, "w", False, "opened with"),
        (os.O_RDWR, "x+", False, "opened with"),
        (os.O_RDWR, "r+", True, "without O_DIRECT"),
        (os.O_RDWR | os.O_DIRECT, "r+", False, "with O_DIRECT"),
    ],
)
def test_descriptors_that_do_not_fit_are_refused_and_stay_open(  # noqa: PLR0917 - parameters
    runner: asyncio.Runner, path: Path, flags: int, mode: str, direct: bool, message: str
) -> None:
    fd = os.open(path, flags)
    with no_leak(runner), pytest.raises(ValueError, match=message):
        attempt(runner, fd, mode, direct=direct)
    os.close(fd)
    assert path.read_bytes() == b"some data"


def test_o_append_is_of_no_concern_to_who_reads(runner: asyncio.Runner, path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_APPEND)
    file = attempt(runner, fd, direct=False)
    assert runner.run(file.pread(4, 5)) == b"data"
    closes(runner, file)


@pytest.mark.parametrize(
    ("returned", "mode", "error"),
    [
        (None, "r", TypeError),
        (-1, "r", ValueError),
        (os.O_RDONLY, "r+", ValueError),
        (os.O_WRONLY, "w+", ValueError),
        (os.O_WRONLY, "r", ValueError),
        (os.O_RDWR | os.O_APPEND, "w", ValueError),
    ],
)
def test_what_an_opener_may_not_return(
    runner: asyncio.Runner, path: Path, returned: int | None, mode: str, error: type[Exception]
) -> None:
    def opener(name: str | bytes, flags: int) -> Any:
        return os.open(name, returned) if returned is not None and returned >= 0 else returned

    with no_leak(runner), pytest.raises(error):
        attempt(runner, path, mode, opener=opener)
    assert path.read_bytes() == b"some data"


def test_the_name_that_an_opener_was_given_is_not_removed(
    runner: asyncio.Runner, ramfs: Path, path: Path
) -> None:
    # It makes another file than the one that has this name here.
    def opener(name: str | bytes, flags: int) -> int:
        return os.open(ramfs / "other", flags)

    with no_leak(runner), pytest.raises(OSError, match="Invalid argument"):
        attempt(runner, path, "x", opener=opener)
    assert path.exists()


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("file", "a"), {}, ValueError),
        (("file", "rw"), {}, ValueError),
        (("file", 5), {}, TypeError),
        (("file",), {"direct": "yes"}, ValueError),
        (("file",), {"direct": None}, ValueError),
        (("file",), {"engine": "uring"}, ValueError),
        (("file",), {"closefd": False}, ValueError),
        ((-1,), {}, ValueError),
        ((0,), {"opener": os.open}, ValueError),
        ((None,), {}, TypeError),
        ((1.5,), {}, TypeError),
        (("a\0b",), {}, ValueError),
    ],
)
def test_arguments_that_make_no_sense(
    runner: asyncio.Runner, arguments: tuple[Any, ...], options: Any, error: type[Exception]
) -> None:
    with no_leak(runner), pytest.raises(error):
        attempt(runner, *arguments, **options)


@pytest.mark.parametrize(
    ("name", "mode", "error"),
    [
        ("nothing", "r", FileNotFoundError),
        ("nothing", "r+", FileNotFoundError),
        ("nowhere/file", "w", FileNotFoundError),
        ("file", "x", FileExistsError),
        ("file/file", "r", NotADirectoryError),
    ],
)
def test_errors_of_open(
    runner: asyncio.Runner, path: Path, name: str, mode: str, error: type[OSError]
) -> None:
    with no_leak(runner), pytest.raises(error) as caught:
        attempt(runner, path.parent / name, mode)
    assert caught.value.filename == str(path.parent / name)
    assert path.read_bytes() == b"some data"


# -- awaited, entered, cancelled, forgotten -------------------------------------------------------


def test_it_is_opened_once(runner: asyncio.Runner, path: Path) -> None:
    async def main() -> None:
        opening = rawaio.open(path)
        async with opening as file:
            assert await file.pread(4, 0) == b"some"
        assert file.closed
        with pytest.raises(RuntimeError, match="opened already"):
            await opening
        file = await rawaio.open(path)
        async with file as same:
            assert same is file
        with pytest.raises(ClosedError):
            await file.pread(1, 0)
        await file.close()

    with no_leak(runner):
        runner.run(main())


def test_nothing_is_opened_before_it_is_awaited(path: Path) -> None:
    opening = rawaio.open(path, "w")
    del opening
    assert path.read_bytes() == b"some data"


@DIRECT
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("turns", range(6))
def test_cancelled_while_it_is_opened(
    runner: asyncio.Runner, path: Path, direct: bool, given: bool, turns: int
) -> None:
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))

    async def main() -> None:
        async def opened() -> File:
            return await rawaio.open(fd if given else path, direct=direct)

        task = asyncio.ensure_future(opened())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        try:
            file = await task
        except asyncio.CancelledError:
            return
        # It was too late.
        await file.close()
        closed.append(given)

    closed: list[bool] = []
    with no_leak(runner):
        runner.run(main())
        runner.run(rawaio.shutdown())  # and so what was left to threads has ended
        if closed == [True]:
            fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    os.close(fd)


@DIRECT
def test_a_forgotten_file_is_closed_and_complained_about(
    runner: asyncio.Runner, path: Path, direct: bool
) -> None:
    async def main() -> None:
        files = [await rawaio.open(path, "r+", direct=direct)]
        await files[0].pread(4, 0)
        await files[0].pwrite(b"x", 0)
        await files[0].fsync()
        with pytest.warns(ResourceWarning, match=f"unclosed rawaio.File .*{path.name}"):
            forget(files)

    def forget(files: list[File]) -> None:
        files.clear()  # at once: it is in no circle
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            gc.collect()  # the thread that made the descriptor is asleep, and has to be asked

    with no_leak(runner):
        runner.run(main())


def test_a_forgotten_file_leaves_the_caller_s_descriptor_open(
    runner: asyncio.Runner, path: Path
) -> None:
    fd = os.open(path, os.O_RDONLY)

    async def main() -> None:
        file = await rawaio.open(fd, direct=False, closefd=False)
        await file.pread(4, 0)

    runner.run(main())
    gc.collect()
    os.close(fd)


@DIRECT
def test_an_error_of_close_is_raised_once(
    runner: asyncio.Runner, path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    real: Callable[[int], None] = os.close

    def close(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, "what was written is lost")

    async def main() -> None:
        file = await rawaio.open(path, "r+", direct=direct)
        await file.pwrite(b"x" * 700, 0)  # its end by the second descriptor
        monkeypatch.setattr(os, "close", close)
        with pytest.raises(OSError, match="lost"):
            await file.close()
        monkeypatch.undo()
        await file.close()
        assert file.closed

    with no_leak(runner):
        runner.run(main())

"""L2: open files, and what is found out about them when they are opened. All of it can block.

Facts about the kernel:

- io_submit on a pipe, a terminal or a socket can block for ever; directories cannot be read.
- RWF_NOWAIT makes a transfer that would wait fail with EAGAIN. Not every file system knows it:
  then it is EOPNOTSUPP, for each file of it alike.
- A file that is open for writing alone can be written in whole blocks; to change a part of one, the
  rest has to be read.

What this means here: only regular files and block devices are taken; "w" and "x" open for reading
too where that is allowed; one read of a block says whether RWF_NOWAIT works; and "w" cuts the file
only when everything else has been found good.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from . import syscalls
from .geometry import Geometry, find_geometry
from .memory import aligned_buffer
from .syscalls import RWF

if TYPE_CHECKING:
    from collections.abc import Callable

    Path = int | str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = [
    "Descriptor",
    "Mode",
    "OpenedFile",
    "buffered_twin",
    "open_file",
    "parse_mode",
    "size_of",
]

_STATX_SIZE_AT: Final = 0x28
_STATX_SIZE: Final = 0x200
_AT_STATX_DONT_SYNC: Final = 0x4000
_CREATE: Final = {"r": 0, "w": os.O_CREAT, "x": os.O_CREAT | os.O_EXCL}


@dataclass(frozen=True, slots=True)
class Mode:
    """What "r", "r+", "w" and "x", with or without "b" and "+", mean."""

    text: str
    readable: bool
    writable: bool
    create: int  # flags of open(2)


def parse_mode(mode: str) -> Mode:
    """Raises ValueError for a mode that there is not."""
    if not isinstance(mode, str):
        raise TypeError(f"mode must be a str, not {type(mode).__name__}")
    kind = mode[:1]
    rest = mode[1:]
    if kind == "a":
        raise ValueError('mode "a" is not for files with offsets; open with "r+" and use append()')
    if kind not in _CREATE or len(set(rest)) != len(rest) or not set(rest) <= {"b", "+"}:
        raise ValueError(f'mode must be "r", "r+", "w", "w+", "x" or "x+", not {mode!r}')
    update = "+" in rest
    return Mode(
        text=kind + "+" * update,
        readable=update or kind == "r",
        writable=update or kind != "r",
        create=_CREATE[kind],
    )


class Descriptor:
    """An open file's number. Requests refer to it: it stays open while they are under way."""

    __slots__ = ("__weakref__", "_fd", "_name", "_owned", "_pid", "_right")

    def __init__(self, fd: int, name: object, *, owned: bool = True) -> None:
        self._fd = fd
        self._name = name
        self._owned = owned
        self._pid = os.getpid()
        self._right = [True]

    def fileno(self) -> int:
        """The number; -1 when closed."""
        return self._fd

    def own(self) -> None:
        """Close it from now on."""
        self._owned = True

    def close(self) -> None:
        """Close it, unless that was done, or it is the caller's. Can block."""
        self._close(os.close)

    def _close(self, close: Callable[[int], None]) -> None:
        fd, self._fd = self._fd, -1
        # Of two threads that come here one takes it. Not a lock: a forked child could find it held.
        if fd >= 0 and self._owned:
            try:
                self._right.pop()
            except IndexError:
                return
            close(fd)

    def __del__(
        self,
        # Kept here: at the program's end this may be called when modules have nothing left in them.
        close: Callable[[int], None] = os.close,
        getpid: Callable[[], int] = os.getpid,
        warn: Callable[..., None] = warnings.warn,
        refused: type[OSError] = OSError,
        warning: type[Warning] = ResourceWarning,
    ) -> None:
        # -1 when __init__ did not get far. A forked child closes its copy and does not complain.
        if getattr(self, "_fd", -1) >= 0 and self._owned:
            try:
                self._close(close)
            except refused:
                pass
            if self._pid == getpid():
                warn(
                    f"unclosed rawaio.File {self._name!r}",
                    warning,
                    stacklevel=2,
                    source=self,
                )


@dataclass(slots=True)
class OpenedFile:
    """What `open_file` found."""

    descriptor: Descriptor
    mode: Mode
    geometry: Geometry | None  # None: not direct
    nowait: bool  # whether RWF_NOWAIT is known to work
    identity: tuple[int, int, int]  # device, inode, and device it stands for
    device_size: int | None  # of a block device, which does not change
    #: Whether the edges of unaligned writes can be read.
    edges_readable: bool
    #: Whether the descriptor is the caller's, and closed with the file that is made of it.
    given: bool = False


def open_file(
    path: Path,
    mode: Mode,
    *,
    direct: bool | str,
    opener: Callable[[str | bytes, int], int] | None,
    closefd: bool,
) -> OpenedFile:
    """Open a file and look at it. Can block.

    Raises: as `rawaio.open` says.
    """
    descriptor, is_direct = (
        _adopt(path, mode, direct=direct)
        if isinstance(path, int)
        else _open_path(path, mode, direct=direct, opener=opener)
    )
    try:
        found = _look_at(descriptor, path, mode, direct, is_direct)
        found.given = isinstance(path, int) and closefd
        return found
    except BaseException:
        _refuse(descriptor, path, mode, opener)
        raise


def _open_path(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: Mode,
    *,
    direct: bool | str,
    opener: Callable[[str | bytes, int], int] | None,
) -> tuple[Descriptor, bool]:
    name = os.fspath(path)
    # O_NONBLOCK: not to wait for the other end of a named pipe. O_NOCTTY: no terminal becomes ours.
    flags = mode.create | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    flags |= os.O_RDWR if mode.writable else os.O_RDONLY
    try:
        descriptor = _opened(name, flags, opener)
    except PermissionError:
        if mode.readable:
            raise
        descriptor = _opened(name, flags & ~os.O_RDWR | os.O_WRONLY, opener)
    try:
        if opener is not None:
            _check_access(descriptor.fileno(), mode, writes_alone=not mode.readable)
        return descriptor, _set_direct(descriptor.fileno(), direct)
    except BaseException:
        _refuse(descriptor, path, mode, opener)
        raise


def _refuse(
    descriptor: Descriptor,
    path: int | str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: Mode,
    opener: Callable[[str | bytes, int], int] | None,
) -> None:
    """Leave nothing behind of what was opened and turned out to be of no use."""
    # What an opener has made of a name, and where, only it knows.
    if mode.text[0] == "x" and opener is None and not isinstance(path, int):
        try:
            os.unlink(path)  # it was not there before
        except FileNotFoundError:
            pass
    descriptor.close()


def _check_access(fd: int, mode: Mode, *, writes_alone: bool = False) -> int:
    """The flags of a descriptor that somebody else opened; ValueError when they do not fit."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    access = flags & os.O_ACCMODE
    if (access == os.O_WRONLY and not writes_alone) or (mode.writable and access == os.O_RDONLY):
        raise ValueError(f"mode {mode.text!r} is not what descriptor {fd} is open for")
    if flags & os.O_APPEND and mode.writable:
        raise ValueError(f"descriptor {fd} has O_APPEND, with which writes have no offset")
    return flags


def _set_direct(fd: int, direct: bool | str) -> bool:
    """Whether O_DIRECT could be set. Afterwards and not in open(2), which has side effects."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~(os.O_NONBLOCK | os.O_DIRECT)
    if direct and _is_file(os.fstat(fd).st_mode):
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            if direct is True or error.errno != errno.EINVAL:
                error.add_note(
                    "The file system has no direct I/O (O_DIRECT) on this file; "
                    'direct="prefer" or direct=False goes on without it.'
                )
                raise
        else:
            return True
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return False


def _is_file(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def _opened(
    name: str | bytes, flags: int, opener: Callable[[str | bytes, int], int] | None
) -> Descriptor:
    if opener is None:
        return Descriptor(os.open(name, flags, 0o666), name)
    fd = opener(name, flags)
    if not isinstance(fd, int):
        raise TypeError(f"opener must return a descriptor, not {type(fd).__name__}")
    if fd < 0:
        raise ValueError(f"opener returned {fd}")
    return Descriptor(fd, name)


def _adopt(fd: int, mode: Mode, *, direct: bool | str) -> tuple[Descriptor, bool]:
    if mode.text[0] != "r":
        raise ValueError(f'a descriptor is opened with "r" or "r+", not {mode.text!r}')
    has = bool(_check_access(fd, mode) & os.O_DIRECT)
    if direct is True and not has:
        raise ValueError(
            f'descriptor {fd} was opened without O_DIRECT; use direct="prefer" or direct=False'
        )
    if direct is False and has:
        raise ValueError(f"descriptor {fd} was opened with O_DIRECT; use direct=True")
    return Descriptor(fd, fd, owned=False), has  # refused, it stays the caller's


def _look_at(
    descriptor: Descriptor, path: Path, mode: Mode, direct: bool | str, is_direct: bool
) -> OpenedFile:
    fd = descriptor.fileno()
    status = os.fstat(fd)
    block_device = stat.S_ISBLK(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), _shown(path))
    if not _is_file(status.st_mode):
        raise _not_a_file(path, status.st_mode)
    geometry: Geometry | None = None
    if is_direct:
        try:
            geometry = find_geometry(fd)
        except OSError as error:
            if error.errno != errno.EINVAL or direct is True:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
    readable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
    if mode.text[0] == "w" and not block_device:
        os.ftruncate(fd, 0)  # the last: nothing is refused after it
    return OpenedFile(
        descriptor=descriptor,
        mode=mode,
        geometry=geometry,
        nowait=_knows_nowait(fd, geometry) if readable else True,
        # One device has as many nodes as one likes.
        identity=((0, 0, status.st_rdev) if block_device else (status.st_dev, status.st_ino, 0)),
        device_size=_device_size(fd) if block_device else None,
        edges_readable=readable,
    )


def _device_size(fd: int) -> int:
    place = os.lseek(fd, 0, os.SEEK_CUR)  # the caller's, if it is his descriptor
    size = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, place, os.SEEK_SET)
    return size


def _not_a_file(path: Path, mode: int) -> OSError:
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a terminal or another character device"),
    )
    what = next((name for test, name in kinds if test(mode)), "neither file nor block device")
    error = OSError(errno.EINVAL, f"{what} cannot be opened as a file", _shown(path))
    error.add_note(
        "io_submit could block on it for ever. rawaio.open takes regular files and block devices."
    )
    return error


def _shown(path: Path) -> str | bytes | int:
    return path if isinstance(path, int) else os.fspath(path)


def _knows_nowait(fd: int, geometry: Geometry | None) -> bool:
    size = 1
    if geometry is not None:
        size = max(geometry.memory_alignment, geometry.read_offset_alignment)
    try:
        os.preadv(fd, [aligned_buffer(size, size)], 0, RWF.NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        # EOPNOTSUPP; or what the first read that counts will say again.
        return False
    return True


def size_of(descriptor: Descriptor) -> int:
    """The file's size in bytes as the kernel knows it, without asking a server. Does not block."""
    fd = descriptor.fileno()
    try:
        answer = syscalls.statx(fd, _AT_STATX_DONT_SYNC, _STATX_SIZE)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        return os.fstat(fd).st_size
    return int.from_bytes(answer[_STATX_SIZE_AT : _STATX_SIZE_AT + 8], "little")


def buffered_twin(descriptor: Descriptor) -> Descriptor:
    """The same file once more, open for writing and not direct. Can block.

    Raises:
        OSError: of open(2); with a note, where /proc is not mounted.
    """
    try:
        fd = os.open(f"/proc/self/fd/{descriptor.fileno()}", os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        error.add_note(
            "A direct file whose size is not a multiple of the block size is written by a second, "
            "buffered descriptor, which comes from /proc/self/fd."
        )
        raise
    return Descriptor(fd, f"{descriptor._name!r}, buffered")

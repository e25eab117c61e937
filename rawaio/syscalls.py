"""L0: the kernel's interface, as `<linux/aio_abi.h>` and the system call tables have it.

Facts about the kernel, and what they mean here:

- `uname` names the kernel, not the process. In a 32-bit process on an x86_64 kernel
  206 is setgroups32 and not io_setup, and on 32-bit ARM 1 is exit. So the numbers are keyed by
  machine *and* pointer size, and are looked up before the first call: a process that is not in
  the table makes no system call at all.
- A bare Python int is passed by ctypes as a C int, 32 bits of it. So every function object here
  has argument types, or is called with boxed arguments only.
- errno is stale after a success. So the return value decides, and errno is read only behind it.
- io_submit can block (buffered reads, extending writes, a full device queue). `ctypes.CDLL`
  releases the GIL around each call, and is used for that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

from ._light import cache, named_tuple
from .errors import UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, NamedTuple, Never, NoReturn

    from .enums import RWF, Opcode
else:  # not for checkers, which would believe in any name

    def __getattr__(name: str) -> object:
        if name in {"Opcode", "RWF"}:
            from . import enums  # noqa: PLC0415 - see there

            globals()[name] = found = getattr(enums, name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AIO_RING_INCOMPAT_FEATURES",
    "AIO_RING_MAGIC",
    "IOCB_CMD_FDSYNC",
    "IOCB_CMD_FSYNC",
    "IOCB_CMD_POLL",
    "IOCB_CMD_PREAD",
    "IOCB_CMD_PREADV",
    "IOCB_CMD_PWRITE",
    "IOCB_CMD_PWRITEV",
    "IOCB_FLAG_IOPRIO",
    "IOCB_FLAG_RESFD",
    "MAX_RW_COUNT",
    "RWF",
    "UIO_MAXIOV",
    "Opcode",
    "SyscallNumbers",
    "aio_ring",
    "fallocate",
    "fixed",
    "io_cancel",
    "io_destroy",
    "io_event",
    "io_getevents",
    "io_setup",
    "io_submit",
    "iocb",
    "iovec",
    "kernel_error",
    "numbers",
    "raw_syscall",
    "statx",
    "timespec",
]


if TYPE_CHECKING:

    class SyscallNumbers(NamedTuple):
        """System call numbers of one machine and pointer size."""

        io_setup: int
        io_destroy: int
        io_getevents: int
        io_submit: int
        io_cancel: int
        io_pgetevents: int
        eventfd2: int
        statx: int
        io_uring_setup: int
        fallocate: int

else:
    SyscallNumbers = named_tuple(
        __name__,
        "SyscallNumbers",
        "io_setup io_destroy io_getevents io_submit io_cancel io_pgetevents "
        "eventfd2 statx io_uring_setup fallocate",
    )


# Keyed by machine and pointer size in bytes. The generic table has submit 2, cancel 3, getevents 4.
_NUMBERS: Final = {
    ("x86_64", 8): SyscallNumbers(206, 207, 208, 209, 210, 333, 290, 332, 425, 285),
    ("aarch64", 8): SyscallNumbers(0, 1, 4, 2, 3, 292, 19, 291, 425, 47),
}

AIO_RING_MAGIC: Final = 0xA10A10A1
AIO_RING_INCOMPAT_FEATURES: Final = 0
IOCB_FLAG_RESFD: Final = 1 << 0
IOCB_FLAG_IOPRIO: Final = 1 << 1
# The kernel cuts a longer transfer to this without a word (INT_MAX rounded down to a page).
MAX_RW_COUNT: Final = 0x7FFFF000
UIO_MAXIOV: Final = 1024

IOCB_CMD_PREAD: Final = 0
IOCB_CMD_PWRITE: Final = 1
IOCB_CMD_FSYNC: Final = 2
IOCB_CMD_FDSYNC: Final = 3
IOCB_CMD_POLL: Final = 5
IOCB_CMD_PREADV: Final = 7
IOCB_CMD_PWRITEV: Final = 8

_AT_EMPTY_PATH: Final = 0x1000


class _KernelStructure(ctypes.Structure):
    """Base of the kernel's structures. A mistyped field is an error, also to type checkers."""

    __slots__ = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> object: ...
        def __setattr__(self, name: str, value: Never) -> None: ...


class iocb(_KernelStructure):
    """One request, as io_submit reads it; 64 bytes (little-endian layout)."""

    __slots__ = ()
    _fields_ = (
        ("aio_data", ctypes.c_uint64),
        ("aio_key", ctypes.c_uint32),
        ("aio_rw_flags", ctypes.c_int32),
        ("aio_lio_opcode", ctypes.c_uint16),
        ("aio_reqprio", ctypes.c_int16),
        ("aio_fildes", ctypes.c_uint32),
        ("aio_buf", ctypes.c_uint64),
        ("aio_nbytes", ctypes.c_uint64),
        ("aio_offset", ctypes.c_int64),
        ("aio_reserved2", ctypes.c_uint64),
        ("aio_flags", ctypes.c_uint32),
        ("aio_resfd", ctypes.c_uint32),
    )
    if TYPE_CHECKING:
        aio_data: int
        aio_key: int
        aio_rw_flags: int
        aio_lio_opcode: int
        aio_reqprio: int
        aio_fildes: int
        aio_buf: int
        aio_nbytes: int
        aio_offset: int
        aio_reserved2: int
        aio_flags: int
        aio_resfd: int


class io_event(_KernelStructure):
    """One completion, as the kernel writes it; 32 bytes."""

    __slots__ = ()
    _fields_ = (
        ("data", ctypes.c_uint64),
        ("obj", ctypes.c_uint64),
        ("res", ctypes.c_int64),
        ("res2", ctypes.c_int64),
    )
    if TYPE_CHECKING:
        data: int
        obj: int
        res: int
        res2: int


class aio_ring(_KernelStructure):
    """The header of the completion ring, which the context id is the address of; 32 bytes."""

    __slots__ = ()
    _fields_ = (
        ("id", ctypes.c_uint32),
        ("nr", ctypes.c_uint32),
        ("head", ctypes.c_uint32),
        ("tail", ctypes.c_uint32),
        ("magic", ctypes.c_uint32),
        ("compat_features", ctypes.c_uint32),
        ("incompat_features", ctypes.c_uint32),
        ("header_length", ctypes.c_uint32),
    )
    if TYPE_CHECKING:
        id: int
        nr: int
        head: int
        tail: int
        magic: int
        compat_features: int
        incompat_features: int
        header_length: int


class iovec(_KernelStructure):
    """One segment of a vectored request; 16 bytes."""

    __slots__ = ()
    _fields_ = (("iov_base", ctypes.c_uint64), ("iov_len", ctypes.c_uint64))
    if TYPE_CHECKING:
        iov_base: int
        iov_len: int


class timespec(_KernelStructure):
    """Seconds and nanoseconds; 16 bytes. A negative tv_sec makes io_getevents wait for ever."""

    __slots__ = ()
    _fields_ = (("tv_sec", ctypes.c_int64), ("tv_nsec", ctypes.c_int64))
    if TYPE_CHECKING:
        tv_sec: int
        tv_nsec: int


assert ctypes.sizeof(iocb) == 64
assert ctypes.sizeof(io_event) == 32
assert ctypes.sizeof(aio_ring) == 32
assert ctypes.sizeof(iovec) == 16
assert ctypes.sizeof(timespec) == 16


@cache
def machine() -> str:
    """What `platform.machine()` says, which takes 3 ms to import."""
    return os.uname().machine if hasattr(os, "uname") else "unknown"


def numbers() -> SyscallNumbers:
    """The system call numbers of this process. Does not enter the kernel for a foreign machine.

    Raises:
        UnsupportedError: not Linux, or neither a 64-bit x86_64 nor a 64-bit aarch64 process.
    """
    name, pointer_size = machine(), struct.calcsize("P")
    found = _NUMBERS.get((name, pointer_size))
    if found is None or sys.platform != "linux" or sys.byteorder != "little":
        known = ", ".join(f"{m} ({8 * size}-bit)" for m, size in _NUMBERS)
        raise UnsupportedError(
            f"rawaio has no system call numbers for {8 * pointer_size}-bit processes on "
            f"{sys.platform} {name}; it knows: linux {known}"
        )
    return found


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@cache
def raw_syscall() -> Callable[..., int]:
    """`syscall(2)` of the C library, for boxed arguments; -1 is failure, then `ctypes.get_errno()`.

    Safety: every argument must be a ctypes object of 8 bytes (`c_long`, `c_ulong`, `c_void_p`), or
    made by `fixed` or `ctypes.byref`: a bare int is cut to 32 bits.
    """
    numbers()
    function: Any = _libc()["syscall"]
    function.restype = ctypes.c_long
    return function  # type: ignore[no-any-return]


def fixed(kind: type[ctypes._SimpleCData[Any]], value: int) -> object:
    """An argument for `raw_syscall` that never changes: it is converted here, and not each time.

    kind: of 8 bytes, as there.
    """
    return kind.from_param(value)


@cache
def _typed(*argtypes: type) -> Callable[..., int]:
    numbers()
    # Indexing gives a function object of its own, so its types are nobody else's.
    function: Any = _libc()["syscall"]
    function.restype = ctypes.c_long
    function.argtypes = (ctypes.c_long, *argtypes)
    return function  # type: ignore[no-any-return]


def kernel_error(failure: int, call: str, *notes: str) -> OSError:
    """The `OSError` for an errno, that names the system call, with advice as notes."""
    error = OSError(failure, f"{call}: {os.strerror(failure)}")
    for note in notes:
        error.add_note(note)
    return error


def _fail(call: str, *notes: str) -> NoReturn:
    raise kernel_error(ctypes.get_errno(), call, *notes)


def io_setup(nr_events: int) -> int:
    """Make a context for at least nr_events requests, and return its id, the ring's address.

    nr_events is charged to the system-wide limit `/proc/sys/fs/aio-max-nr`.

    Raises:
        OSError: EAGAIN over that limit; EINVAL for 0 or far too many; ENOMEM; ENOSYS where the
            kernel has no AIO; EPERM where a seccomp filter denies it.
        UnsupportedError: no system call numbers for this process.

    Source: io_setup(2); Linux 2.5.
    """
    number = numbers().io_setup
    ctx_id = ctypes.c_ulong(0)
    setup = _typed(ctypes.c_ulong, ctypes.c_void_p)
    if setup(number, _unsigned("nr_events", nr_events), ctypes.addressof(ctx_id)) < 0:
        _fail("io_setup")
    return ctx_id.value


def io_destroy(ctx_id: int) -> None:
    """Cancel polls, wait for all other requests, drop unreaped events, and unmap the ring.

    Can block: until every request is done, uninterruptibly, and then for about 30 ms more.

    Safety: nothing may look at the ring afterwards: it is unmapped.

    Raises:
        OSError: EINVAL, no such context (also when it is the parent's, in a forked child).

    Source: io_destroy(2); Linux 2.5.
    """
    if _typed(ctypes.c_ulong)(numbers().io_destroy, _unsigned("ctx_id", ctx_id)) < 0:
        _fail("io_destroy")


def io_submit(ctx_id: int, nr: int, iocbpp: int) -> int:
    """Start up to nr requests; iocbpp is the address of an array of nr iocb addresses.

    Returns how many were accepted, at least 1. The error of a later one is not told: submit the
    rest again. Can block: see the module's text.

    Safety: iocbs, iovecs and the array are copied; the data buffers are the kernel's until the
    completion.

    Raises:
        OSError: for the first request. EAGAIN no room; EBADF, EFAULT, EINVAL, EOPNOTSUPP what is
            wrong with it; EINVAL also no such context.

    Source: io_submit(2); Linux 2.5.
    """
    submit = _typed(ctypes.c_ulong, ctypes.c_long, ctypes.c_void_p)
    accepted = submit(
        numbers().io_submit,
        _unsigned("ctx_id", ctx_id),
        _signed("nr", nr),
        _unsigned("iocbpp", iocbpp),
    )
    if accepted < 0:
        _fail("io_submit")
    return accepted


def io_getevents(ctx_id: int, min_nr: int, nr: int, events: int, timeout: int | None) -> int:
    """Reap min_nr to nr completions into the io_event array at address events; return how many.

    timeout is the address of a timespec; 0 or None waits for ever, `{0, 0}` never. Can block:
    until min_nr have completed, unless min_nr is 0.

    Raises:
        OSError: EINTR before the first one was there; EINVAL no such context or a bad number.

    Source: io_getevents(2); Linux 2.5.
    """
    getevents = _typed(
        ctypes.c_ulong, ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p
    )
    reaped = getevents(
        numbers().io_getevents,
        _unsigned("ctx_id", ctx_id),
        _signed("min_nr", min_nr),
        _signed("nr", nr),
        _unsigned("events", events),
        _unsigned("timeout", timeout or 0),
    )
    if reaped < 0:
        _fail("io_getevents")
    return reaped


def io_cancel(ctx_id: int, iocb: int, result: int) -> None:
    """Cancel the request that was submitted from the iocb at this address; only polls can be.

    The kernel says EINPROGRESS for success, and the request still completes through the ring.
    result is the address of an io_event that no kernel since 3.11 writes.

    Raises:
        OSError: EINVAL, not a request that can be cancelled or no longer there; ENOSYS on gVisor.

    Source: io_cancel(2); Linux 2.5.
    """
    cancel = _typed(ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p)
    done = cancel(
        numbers().io_cancel,
        _unsigned("ctx_id", ctx_id),
        _unsigned("iocb", iocb),
        _unsigned("result", result),
    )
    if done < 0 and ctypes.get_errno() != errno.EINPROGRESS:
        _fail("io_cancel")


def statx(path: int | str | bytes | os.PathLike[str], flags: int, mask: int) -> bytes:
    """`struct statx`, 256 bytes, of a path or an open descriptor.

    By raw system call, because musl and older glibc have no function for it.

    Raises:
        OSError: as stat(2) does; ENOSYS before Linux 4.11.

    Source: statx(2).
    """
    if isinstance(path, int):
        if not -1 << 31 <= path < 1 << 31:
            raise ValueError(f"a descriptor must be a 32-bit number, not {path}")
        dirfd, name, flags = path, b"", flags | _AT_EMPTY_PATH
    else:
        dirfd, name = -100, os.fsencode(path)  # AT_FDCWD
        if b"\0" in name:
            raise ValueError("embedded null byte in path")
    buffer = ctypes.create_string_buffer(256)
    call = _typed(ctypes.c_long, ctypes.c_char_p, ctypes.c_long, ctypes.c_ulong, ctypes.c_void_p)
    if call(numbers().statx, dirfd, name, flags, mask, ctypes.addressof(buffer)) < 0:
        _fail("statx")
    return buffer.raw


def fallocate(fd: int, mode: int, offset: int, nbytes: int) -> None:
    """Allocate or free space of a file; mode is 0 or `FALLOC_FL_*`. Can block.

    By raw system call: `os.posix_fallocate` writes into the file where it is not supported.

    Raises:
        OSError: EOPNOTSUPP, ENOSPC, EFBIG, EINVAL, ESPIPE and others.

    Source: fallocate(2).
    """
    call = _typed(ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    if call(numbers().fallocate, fd, mode, offset, nbytes) < 0:
        _fail("fallocate")


def _unsigned(name: str, value: int) -> int:
    # ctypes takes any int modulo 2**64; a negative one is never what was meant.
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be within 0..2**64-1, not {value}")
    return value


def _signed(name: str, value: int) -> int:
    if not -1 << 63 <= value < 1 << 63:
        raise ValueError(f"{name} must be a 64-bit number, not {value}")
    return value

"""L1: requests, what became of them, and the iocbs they are made into.

Laws:

- A request is refused here, by TypeError or ValueError, when it could not be right on any file.
- Only this module and `slab`, which copies what is made here, write fields of an iocb.
- The life cycle is the table `TRANSITIONS`; a step that is not in it raises and changes nothing.
- From push to completion the request holds a live export of its buffer, and references what its
  descriptor came from. A buffer that could move (`memory.resizable`) is let go on completion and
  pinned again by the next push; any other is kept, for the request to be used again at no cost.
"""

from __future__ import annotations

import ctypes
import struct
from _collections_abc import Sequence  # all of `collections` takes 2 ms to import

from . import memory, syscalls
from ._light import cache, index, tuplegetter
from .errors import BusyError
from .syscalls import (
    IOCB_CMD_FDSYNC,
    IOCB_CMD_FSYNC,
    IOCB_CMD_POLL,
    IOCB_CMD_PREAD,
    IOCB_CMD_PREADV,
    IOCB_CMD_PWRITE,
    IOCB_CMD_PWRITEV,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .enums import TRANSITIONS, Opcode, State, Step
    from .protocols import HasFileno
else:  # not for checkers, which would believe in any name

    def __getattr__(name: str) -> object:
        if name in {"TRANSITIONS", "State", "Step"}:
            from . import enums  # noqa: PLC0415 - see there

            globals()[name] = found = getattr(enums, name)
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "COMPLETED",
    "IMAGE_SIZE",
    "IN_FLIGHT",
    "IOCB_SIZE",
    "NEW",
    "OPCODE_BYTE",
    "PENDING",
    "RELEASED",
    "SERIES",
    "TRANSITIONS",
    "Completion",
    "Request",
    "State",
    "Step",
    "fileno_of",
]


# The numbers of `State`: enumerations are for who looks from outside.
NEW: Final = 0
PENDING: Final = 1
IN_FLIGHT: Final = 2
COMPLETED: Final = 3
RELEASED: Final = 4
_UNDER_WAY: Final = (PENDING, IN_FLIGHT)

# What is skipped is zero: aio_data and aio_offset are written by `slab`, and aio_key and
# aio_reserved2 by nobody. The last field, aio_resfd, is the slab's and not in the image.
_IOCB: Final = struct.Struct("=8x4xiHhIQQ8x8xI")
IMAGE_SIZE: Final = _IOCB.size
IOCB_SIZE: Final = IMAGE_SIZE + 4
assert ctypes.sizeof(syscalls.iocb) == IOCB_SIZE
OPCODE_BYTE: Final = 16  # where the low byte of aio_lio_opcode is
#: Requests that are submitted together have tokens that count up from a multiple of this, which is
#: another each time; so that from one time to the next only what is above changes.
SERIES: Final = 1 << 16
_MAX_OFFSET: Final = (1 << 63) - 1
_MAX_FD: Final = (1 << 31) - 1
_MAX_RW_FLAGS: Final = (1 << 31) - 1
_MAX_PRIORITY: Final = (1 << 15) - 1  # aio_reqprio is a signed 16-bit word
# POLLERR, POLLHUP and POLLNVAL, the same everywhere. `select` is for who uses it.
_ALWAYS_POLLED: Final = 0x8 | 0x10 | 0x20

_SINGLE: Final = (IOCB_CMD_PREAD, IOCB_CMD_PWRITE)
_VECTORED: Final = (IOCB_CMD_PREADV, IOCB_CMD_PWRITEV)
_READS: Final = (IOCB_CMD_PREAD, IOCB_CMD_PREADV)
_TRANSFERS: Final = _SINGLE + _VECTORED
_NAMES: Final = {
    IOCB_CMD_PREAD: "PREAD",
    IOCB_CMD_PWRITE: "PWRITE",
    IOCB_CMD_FSYNC: "FSYNC",
    IOCB_CMD_FDSYNC: "FDSYNC",
    IOCB_CMD_POLL: "POLL",
    IOCB_CMD_PREADV: "PREADV",
    IOCB_CMD_PWRITEV: "PWRITEV",
}


class Request:
    """One operation: what to do, and what to call when it is done.

    Made by `pread`, `pwrite`, `preadv`, `pwritev`, `fsync`, `fdsync` and `poll`. A completed
    request can be changed by assignment and submitted again; one that is under way cannot.

    `callback` is called with the `Completion`, by the reap that takes it. `user_data` is the
    caller's own. Both may be assigned at any time.
    """

    __slots__ = (
        "__weakref__",
        "_anchor",
        "_buffer",
        "_events",  # of a poll alone
        "_fd",
        "_fileno",
        "_iocb",  # the image and the offset; another tuple whenever one of them is another
        "_nbytes",
        "_opcode",
        "_own_iocb",
        "_pinned_at",
        "_priority",
        "_resizable",
        "_rw_flags",
        "_state",
        "_transfers",
        "callback",
        "user_data",
    )

    def __init__(
        self,
        opcode: int,
        fd: int | HasFileno,
        buffer: ReadableBuffer | Sequence[ReadableBuffer] | None = None,
        offset: int = 0,
        *,
        events: int = 0,
        rw_flags: int = 0,
        priority: int | None = None,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> None:
        """The general form; the constructors named after the opcodes say what each takes.

        Raises:
            TypeError, ValueError: no request that the kernel could take.
        """
        # What is most often given is looked at here: a call of each check would cost as much as
        # the rest.
        self._opcode = opcode if type(opcode) is int and opcode in _NAMES else _opcode_of(opcode)
        self._state = NEW
        self.callback = callback
        self.user_data = user_data
        self._fd = fd
        self._fileno = fd if type(fd) is int and 0 <= fd <= _MAX_FD else fileno_of(fd)
        self._rw_flags = (
            rw_flags
            if type(rw_flags) is int and 0 <= rw_flags <= _MAX_RW_FLAGS
            else _checked_rw_flags(rw_flags)
        )
        self._priority = None if priority is None else _checked_priority(priority)
        self._anchor: object = None
        self._buffer: Any = None
        self._iocb: tuple[bytes, int]
        self._nbytes = 0
        self._pinned_at = 0
        self._resizable = False
        self._transfers = self._opcode in _TRANSFERS
        if self._transfers:
            if events:
                raise ValueError(f"{_NAMES[self._opcode]} takes no events")
            if type(offset) is not int or not 0 <= offset <= _MAX_OFFSET:
                offset = _checked_offset(offset)
            self._pin(buffer, offset)
            if self._resizable:
                self._anchor = None
        else:
            if buffer is not None or offset:
                raise ValueError(f"{_NAMES[self._opcode]} takes neither buffer nor offset")
            if rw_flags:
                raise ValueError(f"{_NAMES[self._opcode]} takes no rw_flags")
            if self._opcode == IOCB_CMD_POLL:
                self._events = self._pinned_at = _checked_events(events)
                block = (ctypes.c_char * IOCB_SIZE)()
                self._own_iocb = memoryview(block).cast("B"), ctypes.addressof(block)
            elif events:
                raise ValueError(f"{_NAMES[self._opcode]} takes no events")
            self._iocb = self._image(self._fileno, 0, self._priority, self._pinned_at, 0), 0

    # -- constructors -------------------------------------------------------------------------

    @classmethod
    def pread(
        cls,
        fd: int | HasFileno,
        buffer: WriteableBuffer,
        offset: int,
        *,
        rw_flags: int = 0,
        priority: int | None = None,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> Request:
        """Read buffer.nbytes bytes at offset into buffer. Does not enter the kernel.

        fd: a descriptor, or an object with fileno(), which is kept alive. buffer: any writable,
        contiguous buffer; with O_DIRECT its address, its size and offset must be aligned. offset:
        bytes, from 0. rw_flags: `RWF` (Linux 4.13 and later). priority: an ioprio value, as of
        ioprio_set(2) (Linux 4.18).

        Raises:
            TypeError: fd or buffer of a wrong kind, read-only or not contiguous.
            ValueError: offset, rw_flags or priority out of range, or more than 0x7ffff000 bytes.

        Source: pread(2), io_submit(2).
        """
        return cls(
            IOCB_CMD_PREAD,
            fd,
            buffer,
            offset,
            rw_flags=rw_flags,
            priority=priority,
            callback=callback,
            user_data=user_data,
        )

    @classmethod
    def pwrite(
        cls,
        fd: int | HasFileno,
        buffer: ReadableBuffer,
        offset: int,
        *,
        rw_flags: int = 0,
        priority: int | None = None,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> Request:
        """Write buffer, which may be read-only, at offset. Otherwise as `pread`.

        Source: pwrite(2), io_submit(2).
        """
        return cls(
            IOCB_CMD_PWRITE,
            fd,
            buffer,
            offset,
            rw_flags=rw_flags,
            priority=priority,
            callback=callback,
            user_data=user_data,
        )

    @classmethod
    def preadv(
        cls,
        fd: int | HasFileno,
        buffers: Sequence[WriteableBuffer],
        offset: int,
        *,
        rw_flags: int = 0,
        priority: int | None = None,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> Request:
        """Read at offset into the buffers, one after another. At most 1024; else as `pread`.

        Source: preadv(2), io_submit(2).
        """
        return cls(
            IOCB_CMD_PREADV,
            fd,
            buffers,
            offset,
            rw_flags=rw_flags,
            priority=priority,
            callback=callback,
            user_data=user_data,
        )

    @classmethod
    def pwritev(
        cls,
        fd: int | HasFileno,
        buffers: Sequence[ReadableBuffer],
        offset: int,
        *,
        rw_flags: int = 0,
        priority: int | None = None,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> Request:
        """Write the buffers, one after another, at offset. At most 1024; else as `pread`.

        Source: pwritev(2), io_submit(2).
        """
        return cls(
            IOCB_CMD_PWRITEV,
            fd,
            buffers,
            offset,
            rw_flags=rw_flags,
            priority=priority,
            callback=callback,
            user_data=user_data,
        )

    @classmethod
    def fsync(
        cls,
        fd: int | HasFileno,
        *,
        priority: int | None = None,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> Request:
        """Flush the file's data and metadata (Linux 4.18).

        It is not ordered after writes that are still under way. Files that cannot do it complete
        with -EINVAL.

        Source: fsync(2), io_submit(2).
        """
        return cls(IOCB_CMD_FSYNC, fd, priority=priority, callback=callback, user_data=user_data)

    @classmethod
    def fdsync(
        cls,
        fd: int | HasFileno,
        *,
        priority: int | None = None,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> Request:
        """Flush the file's data, and the metadata needed to read it. Otherwise as `fsync`.

        Source: fdatasync(2), io_submit(2).
        """
        return cls(IOCB_CMD_FDSYNC, fd, priority=priority, callback=callback, user_data=user_data)

    @classmethod
    def poll(
        cls,
        fd: int | HasFileno,
        events: int,
        *,
        callback: Callable[[Completion], object] | None = None,
        user_data: object = None,
    ) -> Request:
        """Wait once for one of the events, a mask of `select.POLLIN` and others (Linux 4.18).

        `Completion.result` is the mask of what was found, of the events asked for and of POLLERR,
        POLLHUP and POLLNVAL. The only request that the kernel can cancel. gVisor has none.

        Source: poll(2), io_submit(2).
        """
        return cls(IOCB_CMD_POLL, fd, events=events, callback=callback, user_data=user_data)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where it is in its life cycle; RELEASED counts as COMPLETED."""
        return _states()[self._state]

    @property
    def opcode(self) -> Opcode:
        """What it does."""
        from .enums import Opcode  # noqa: PLC0415 - see there

        return Opcode(self._opcode)

    @property
    def nbytes(self) -> int:
        """How many bytes it asks for, of all its buffers."""
        return self._nbytes

    @property
    def address(self) -> int:
        """Where its buffer is, while it is pinned; of a vectored request, its array of iovecs."""
        return self._pinned_at

    @property
    def addresses(self) -> list[int]:
        """Where the buffers of a vectored request are, while they are pinned."""
        anchor: Any = self._anchor
        iovecs = anchor[0] if self._opcode in _VECTORED and anchor else ()
        return [iovec.iov_base or 0 for iovec in iovecs]

    @property
    def offset(self) -> int:
        """Where in the file, in bytes. Assignable while the request is not under way."""
        return self._iocb[1]

    @offset.setter
    def offset(self, offset: int) -> None:
        state = self._state
        if state is PENDING or state is IN_FLIGHT:
            self._refuse_change()
        if not self._transfers:
            raise TypeError(f"{_NAMES[self._opcode]} has no offset")
        if type(offset) is int and 0 <= offset <= _MAX_OFFSET:
            self._iocb = self._iocb[0], offset
        else:
            self._iocb = self._iocb[0], _checked_offset(offset)

    @property
    def buffer(self) -> object:
        """The buffer, or the sequence of buffers. Assignable while the request is not under way."""
        return self._buffer

    @buffer.setter
    def buffer(self, buffer: ReadableBuffer | Sequence[ReadableBuffer]) -> None:
        if self._state in _UNDER_WAY:
            self._refuse_change()
        if not self._transfers:
            raise TypeError(f"{_NAMES[self._opcode]} has no buffer")
        self._pin(buffer, self._iocb[1])
        if self._resizable:
            if self._state is COMPLETED:
                self._state = RELEASED
            self._anchor = None

    buffers = buffer

    @property
    def fd(self) -> int | HasFileno:
        """The descriptor or its owner. Assignable while the request is not under way."""
        return self._fd

    @fd.setter
    def fd(self, fd: int | HasFileno) -> None:
        if self._state in _UNDER_WAY:
            self._refuse_change()
        number = fileno_of(fd)
        iocb = self._encoded(number, self._rw_flags, self._priority)
        self._fd, self._fileno, self._iocb = fd, number, iocb

    @property
    def rw_flags(self) -> int:
        """`RWF` flags. Assignable while the request is not under way."""
        return self._rw_flags

    @rw_flags.setter
    def rw_flags(self, rw_flags: int) -> None:
        if self._state in _UNDER_WAY:
            self._refuse_change()
        if not self._transfers:
            raise TypeError(f"{_NAMES[self._opcode]} has no rw_flags")
        rw_flags = _checked_rw_flags(rw_flags)
        iocb = self._encoded(self._fileno, rw_flags, self._priority)
        self._rw_flags, self._iocb = rw_flags, iocb

    @property
    def priority(self) -> int | None:
        """The ioprio value. Assignable while the request is not under way."""
        return self._priority

    @priority.setter
    def priority(self, priority: int | None) -> None:
        if self._state in _UNDER_WAY:
            self._refuse_change()
        priority = None if priority is None else _checked_priority(priority)
        iocb = self._encoded(self._fileno, self._rw_flags, priority)
        self._priority, self._iocb = priority, iocb

    def __repr__(self) -> str:
        what = f"{_NAMES[self._opcode].lower()} fd {self._fileno}"
        if self._transfers:
            what += f", {self._nbytes} bytes at offset {self.offset}"
        elif self._opcode == IOCB_CMD_POLL:
            what += f", events {self._events:#x}"
        return f"<rawaio.Request {what}, {self.state.name}>"

    # -- for the layers above -----------------------------------------------------------------

    def error(self, errno: int) -> OSError:
        """The `OSError` for this request with that errno; says what was asked for."""
        return syscalls.kernel_error(errno, _NAMES[self._opcode].lower(), repr(self))

    def poll_result(self, res: int) -> int:
        """A poll's res without the bits that nobody asked for (the kernel adds aliases)."""
        if self._opcode == IOCB_CMD_POLL:
            return res & (self._events | _ALWAYS_POLLED)
        return res

    def own_iocb(self) -> tuple[memoryview, int]:
        """64 bytes that hold an iocb of this poll alone, and their address.

        io_cancel finds a request by the address of the iocb it was submitted from. It is the same
        from the beginning on: one thread may ask for it to cancel, while another submits.
        """
        return self._own_iocb

    def _refuse_change(self) -> None:
        raise BusyError(f"{self!r} is under way and cannot be changed")

    def _pin(self, buffer: object, offset: int) -> None:
        """Export a buffer, find its address, make iovecs and iocb; or raise and change nothing."""
        pin = memory.pin_destination if self._opcode in _READS else memory.pin_source
        whole: Any = buffer
        if self._opcode in _SINGLE:
            address, nbytes, anchor = pin(whole)
            count = nbytes
            movable = type(whole) is not memoryview and memory.resizable(whole)
        else:
            if isinstance(buffer, (bytes, bytearray, memoryview)) or not isinstance(
                buffer, Sequence
            ):
                name = _NAMES[self._opcode]
                raise TypeError(f"{name} takes a sequence of buffers, not {type(whole).__name__}")
            whole = tuple(whole)  # the caller may change a list
            if len(whole) > syscalls.UIO_MAXIOV:
                raise ValueError(
                    f"at most {syscalls.UIO_MAXIOV} segments in a request, not {len(whole)}"
                )
            pins = [pin(segment) for segment in whole]
            iovecs = (syscalls.iovec * len(pins))(
                *[syscalls.iovec(p.address, p.nbytes) for p in pins]
            )
            address, nbytes = ctypes.addressof(iovecs), sum(p.nbytes for p in pins)
            anchor = iovecs, pins
            count = len(pins)
            movable = any(map(memory.resizable, whole))
        if nbytes > syscalls.MAX_RW_COUNT:
            raise ValueError(
                f"the kernel transfers at most {syscalls.MAX_RW_COUNT} bytes a request, "
                f"not {nbytes}"
            )
        image = self._image(self._fileno, self._rw_flags, self._priority, address, count)
        # From here on there is no call: an exception from outside finds all of it new, or nothing.
        self._buffer = whole
        self._pinned_at, self._nbytes, self._anchor = address, nbytes, anchor
        self._resizable = movable
        self._iocb = image, offset

    def _make_ready(self) -> None:
        """Pin again what was let go, as it is resizable; it may be elsewhere, and longer, now."""
        self._pin(self._buffer, self._iocb[1])

    def _encoded(self, fileno: int, rw_flags: int, priority: int | None) -> tuple[bytes, int]:
        """What `_iocb` is to be, with the buffer and the offset that there are."""
        count = len(self._buffer) if self._opcode in _VECTORED else self._nbytes
        return self._image(fileno, rw_flags, priority, self._pinned_at, count), self._iocb[1]

    def _image(
        self, fileno: int, rw_flags: int, priority: int | None, address: int, count: int
    ) -> bytes:
        """The iocb, but for aio_data, aio_offset and aio_resfd, which `slab` writes."""
        flags = syscalls.IOCB_FLAG_RESFD
        if priority is not None:
            flags |= syscalls.IOCB_FLAG_IOPRIO
        return _IOCB.pack(rw_flags, self._opcode, priority or 0, fileno, address, count, flags)


class Completion(tuple[Request, int, int]):
    """What became of a request: `(request, res, res2)`, immutable.

    Made from one tuple of the three.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def request(self) -> Request:
            """The request, which may be under way again by now."""
            ...

        @property
        def res(self) -> int:
            """Bytes, 0, a mask of events, or a negative errno, as the kernel gave it."""
            ...

        @property
        def res2(self) -> int:
            """The kernel's second word, 0 for every request of today."""
            ...

    else:
        # A named tuple's fields are read by C code; a property's function would be called.
        request = tuplegetter(0, "The request, which may be under way again by now.")
        res = tuplegetter(1, "Bytes, 0, a mask of events, or a negative errno.")
        res2 = tuplegetter(2, "The kernel's second word, 0 for requests of today.")

    def result(self) -> int:
        """Bytes transferred, 0 for a sync, the mask for a poll; 64 bits. Does not enter the kernel.

        A short count is the end of the file, a full disk, or a file system that serves less; it
        is not an error.

        Raises:
            OSError: the request failed, with its errno; also ECANCELED.
        """
        request, res, res2 = self
        if res2:
            res = (res2 << 32 | res) & 0xFFFF_FFFF_FFFF_FFFF
            res -= (res & 1 << 63) << 1
        if res < 0:
            raise request.error(-res)
        return request.poll_result(res)

    def __repr__(self) -> str:
        return f"<rawaio.Completion res {self[1]}, res2 {self[2]}, of {self[0]!r}>"


@cache
def _states() -> tuple[State, ...]:
    """By number. RELEASED counts as COMPLETED."""
    from .enums import State  # noqa: PLC0415 - see there

    return State.NEW, State.PENDING, State.IN_FLIGHT, State.COMPLETED, State.COMPLETED


# -- checks ------------------------------------------------------------------------------------


def fileno_of(fd: int | HasFileno) -> int:
    """The descriptor's number; TypeError or ValueError for what is none."""
    if isinstance(fd, int):
        number = fd
    else:
        try:
            number = fd.fileno()
        except AttributeError:
            raise TypeError(
                f"fd must be an int or have fileno(), not {type(fd).__name__}"
            ) from None
    number = index(number)
    if not 0 <= number <= _MAX_FD:
        raise ValueError(f"fd must be within 0..2**31-1, not {number}")
    return number


def _opcode_of(opcode: int) -> int:
    if opcode not in _NAMES:
        known = ", ".join(f"{name} {number}" for number, name in _NAMES.items())
        raise ValueError(f"unknown opcode {opcode!r}; known are {known}")
    return index(opcode)


def _checked_offset(offset: int) -> int:
    offset = index(offset)
    if not 0 <= offset <= _MAX_OFFSET:
        raise ValueError(f"offset must be within 0..2**63-1, not {offset}")
    return offset


def _checked_rw_flags(rw_flags: int) -> int:
    rw_flags = index(rw_flags)
    if not 0 <= rw_flags <= _MAX_RW_FLAGS:
        raise ValueError(f"rw_flags must be within 0..2**31-1, not {rw_flags}")
    return rw_flags


def _checked_priority(priority: int) -> int:
    priority = index(priority)
    if not 0 <= priority <= _MAX_PRIORITY:
        raise ValueError(f"priority must be within 0..{_MAX_PRIORITY}, not {priority}")
    return priority


def _checked_events(events: int) -> int:
    events = index(events)
    if not 0 < events < 1 << 16:
        raise ValueError(f"events must be a mask of 16 bits with one set at least, not {events}")
    return events

"""L3: an open file: what is known of it, what its operations need of it, and who waits for whom."""

from __future__ import annotations

import errno
import io
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from .blocking import (
    MAX_SEGMENTS,
    close_all,
)
from .descriptor import OpenedFile, size_of
from .errors import ClosedError, set_written
from .rangelock import RangeLock
from .syscalls import RWF
from .transfer import FileCall, Patience, Slot

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from .descriptor import Descriptor
    from .driver import Driver, Plug
    from .geometry import Geometry
    from .operation import Waiter
    from .rangelock import Hold
    from .request import Request

    Path = int | str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["FileStatistics", "Handle"]

_T = TypeVar("_T")

_NOWAIT: Final = int(RWF.NOWAIT)
MAX_OFFSET: Final = (1 << 63) - 1
# Up to this many bytes, what is cached is copied in the loop's thread.
AT_ONCE: Final = 1 << 18
# One piece of a long transfer through buffers.
PIECE: Final = 1 << 20
# As far as the page cache may treat pages as one: a folio.
FOLIO: Final = 1 << 21
# Reads of up to this many bytes have their buffer kept for the next one, in all up to the second
# number a file; and those of a stream while it lasts.
_SLOT: Final = 1 << 17
_SLOTS: Final = 1 << 21


@dataclass(frozen=True, slots=True)
class FileStatistics:
    """A snapshot of a file's counters."""

    reads: int
    """Reads that were asked for."""
    writes: int
    """Writes that were asked for, appends among them."""
    cached: int
    """Reads and writes that the page cache took or gave at once."""
    unaligned_writes: int
    """Writes of parts of blocks."""
    threaded: int
    """Operations that threads performed, because they could have blocked."""
    continued: int
    """Requests for the rest of a short transfer."""
    under_way: int
    """Operations that wait or are under way."""
    engine: Literal["aio", "threads"]
    """What performs the others."""


class _Shared:
    """What all files of one driver that are the same file have in common."""

    __slots__ = ("__weakref__", "appending", "direct", "lock", "unaligned")

    def __init__(self) -> None:
        self.lock = RangeLock()
        #: Of no bytes of the file, but of a place in a row: who appends has 0, and who writes
        #: unaligned has one of the others.
        self.appending = RangeLock()
        self.unaligned = RangeLock()
        #: How many of them write past the page cache.
        self.direct = 0


class Handle:
    """An open file: what it is, and what its operations need of it."""

    def __init__(
        self,
        driver: Driver,
        found: OpenedFile,
        path: Path,
        engine: Literal["aio", "threads"],
        asked: Literal["auto", "aio", "threads"],
    ) -> None:
        self.driver = driver
        self.descriptor: Descriptor = found.descriptor
        self._fd = found.descriptor.fileno()
        self._name = path
        self._mode = found.mode
        self._geometry = found.geometry
        self._engine: Literal["aio", "threads"] = engine
        self._identity = found.identity
        self._device_size = found.device_size
        self._edges_readable = found.edges_readable
        self._closing = False
        self._twin: Descriptor | None = None
        self._slots: dict[int, list[Slot]] = {}
        self._slots_free = _SLOTS
        # How large the buffers of each stream are, and how many it has.
        self._reserved: dict[object, tuple[int, int]] = {}
        self._reserved_sizes: frozenset[int] = frozenset()
        direct = found.geometry is not None
        #: Alignments; 1 where there is none.
        self.memory_alignment = found.geometry.memory_alignment if found.geometry else 1
        self._block = found.geometry.offset_alignment if found.geometry else 1
        self.mask = -self._block
        #: Flag of every request, so that none makes io_submit wait.
        self.nowait_flag = _NOWAIT if found.nowait else 0
        #: Whether transfers are performed by threads: what could block has no business in
        #: io_submit.
        self.offloads = engine == "threads" or not direct or not found.nowait
        if asked == "aio" and direct and not found.nowait:
            self.offloads = False
        #: Whether syncs are performed by threads.
        self.syncs_offload = engine == "threads"
        # Whether what is cached can be read, and written, at once.
        self._reads_cached = not direct and found.nowait and found.mode.readable
        self._writes_cached = not direct and found.nowait and found.mode.writable
        shared = driver.shared.get(found.identity)
        if shared is None:
            shared = driver.shared[found.identity] = _Shared()
        self._shared: _Shared = shared
        shared.direct += direct and found.mode.writable
        #: Which bytes are being written.
        self.lock: RangeLock = shared.lock
        #: Operations that wait or are under way.
        self.under_way: set[object] = set()
        self._last: list[Waiter] = []
        # Whether who called close was cancelled: then the last operation closes the file.
        self._left = False
        self._reads: int = 0
        # Reads that the page cache answered, and that are counted nowhere else.
        self._at_once: int = 0
        self._writes: int = 0
        self._cached: int = 0
        self._unaligned: int = 0
        self.continued: int = 0
        self.threaded: int = 0
        self.read_patience, self.write_patience = Patience(), Patience()

    # -- what it is -----------------------------------------------------------------------------

    @property
    def name(self) -> Path:
        """What it was opened by."""
        return self._name

    @property
    def mode(self) -> str:
        """How it was opened: "r", "r+", "w", "w+", "x" or "x+"."""
        return self._mode.text

    @property
    def direct(self) -> bool:
        """Whether it goes past the page cache."""
        return self._geometry is not None

    @property
    def geometry(self) -> Geometry | None:
        """Alignments with which transfers are made without a copy; None when not direct."""
        return self._geometry

    @property
    def engine(self) -> Literal["aio", "threads"]:
        """What performs what cannot be answered at once."""
        return self._engine

    @property
    def size(self) -> int:
        """The size in bytes, now; of a block device too. One system call that does not block."""
        if self._device_size is not None:
            return self._device_size
        if self._fd < 0:
            raise self._closed_error()
        return size_of(self.descriptor)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    def fileno(self) -> int:
        """The descriptor; -1 when closed."""
        return self._fd

    def statistics(self) -> FileStatistics:
        """A snapshot of the counters. Does not enter the kernel."""
        return FileStatistics(
            reads=self._reads + self._at_once,
            writes=self._writes,
            cached=self._cached + self._at_once,
            unaligned_writes=self._unaligned,
            threaded=self.threaded,
            continued=self.continued,
            under_way=len(self.under_way),
            engine=self._engine,
        )

    def plugged(self) -> Plug:
        """A `with` block, without await, whose operations are submitted together at its end.

        It holds for all files of the event loop.
        """
        return self.driver.plugged()

    def __repr__(self) -> str:
        state = "closed" if self._closing else "direct" if self.direct else "buffered"
        return f"<rawaio.File {self._name!r}, mode {self._mode.text!r}, {state}, {self._engine}>"

    # -- for the operations ---------------------------------------------------------------------

    def round_down(self, offset: int) -> int:
        """The last block boundary up to offset."""
        return offset & self.mask

    def round_up(self, offset: int) -> int:
        """The first block boundary from offset on."""
        return -(-offset & self.mask)

    def take_slot(self, nbytes: int) -> Slot:
        """A buffer of nbytes bytes, used before or new."""
        slots = self._slots.get(nbytes)
        if slots:
            self._slots_free += nbytes
            return slots.pop()
        return Slot(self, nbytes)

    def give_slot(self, slot: Slot) -> None:
        """Keep a buffer for the next operation, unless there are enough."""
        nbytes = slot.nbytes
        if (
            nbytes <= self._slots_free
            and (nbytes <= _SLOT or nbytes in self._reserved_sizes)
            and not self._closing
        ):
            self._slots_free -= nbytes
            try:
                self._slots[nbytes].append(slot)
            except KeyError:
                self._slots[nbytes] = [slot]

    def reserve_slots(self, stream: object, nbytes: int, n: int) -> None:
        """Keep so many buffers more, and of any size, until `release_slots` of the same stream."""
        self._reserved[stream] = nbytes, n
        self._count_slots()

    def release_slots(self, stream: object) -> None:
        """Keep no more than without it; nothing changes when nothing is reserved."""
        self._reserved.pop(stream, None)
        self._count_slots()

    def _count_slots(self) -> None:
        """Make the limits anew, and drop what is beyond them."""
        self._reserved_sizes = frozenset(nbytes for nbytes, _ in self._reserved.values())
        for nbytes in [n for n in self._slots if n > _SLOT and n not in self._reserved_sizes]:
            del self._slots[nbytes]
        room = _SLOTS + sum(nbytes * n for nbytes, n in self._reserved.values())
        kept = sum(nbytes * len(slots) for nbytes, slots in self._slots.items())
        if kept > room:
            self._slots.clear()
            kept = 0
        self._slots_free = room - kept

    def no_nowait(self) -> None:
        """The file system turned out not to know RWF_NOWAIT."""
        self.nowait_flag = 0
        self.offloads = True
        self._slots.clear()
        self._count_slots()

    def _disown(self) -> list[Descriptor]:
        """What there is to close, when nothing is under way; nothing new is."""
        if self._fd >= 0:
            self._shared.direct -= self.direct and self._mode.writable
        self._fd = -1
        self._slots.clear()
        return [d for d in (self._twin, self.descriptor) if d and d.fileno() >= 0]

    async def settle_cached(self) -> None:
        """Wait for what is being written through the page cache of a file that was just opened.

        Those writes keep away from each other's bytes only; from now on they keep away from direct
        ones too.
        """
        if self.direct and self._mode.writable and len(self.lock):
            self.lock.release(await self.hold(self.lock, 0, MAX_OFFSET))

    def forgo(self) -> None:
        """Close a file that nobody has seen, in a thread."""
        self._closing = True
        self.driver.dispose(partial(close_all, self._disown()))

    def ended(self, operation: object) -> None:
        """An operation is not under way any more. May be repeated."""
        self.under_way.discard(operation)
        if self._left and not self.under_way:
            self._close_left()
        if self._last and not self.under_way:
            last, self._last = self._last, []
            for waiter in last:
                if not waiter.done():
                    self.driver.wake(waiter, None, None)

    # -- inside ---------------------------------------------------------------------------------

    def _close_left(self) -> None:
        """Close a file whose `close` was cancelled, in a thread."""
        descriptors = self._disown()
        if self.driver.refusal is not None:
            self._left = False
            self.driver.dispose(partial(close_all, descriptors))
        elif descriptors:
            # Counted, as in `close`: another one that closes it waits until close(2) has returned.
            closing = FileCall(self, partial(close_all, descriptors))
            self._left = False
            self.under_way.add(closing)
            try:
                self.driver.offload(closing)
            except BaseException:
                self.under_way.discard(closing)
                self._left = True
                raise
        else:
            self._left = False

    def _counted(self) -> _Counted:
        return _Counted(self)

    async def _call(self, function: Callable[[], _T]) -> _T:
        """Call a function in a thread; when cancelled, wait for its end."""
        operation = FileCall(self, function)
        operation.begin()
        result: _T = await self.driver.settle(operation)
        return result

    async def hold(self, lock: RangeLock, start: int, stop: int, *, exclusive: bool = True) -> Hold:
        """Wait for a range; release it by `RangeLock.release`."""
        self.driver.admit()
        waiter = self.driver.waiter()
        hold = lock.acquire(start, stop, exclusive=exclusive, granted=partial(self._grant, waiter))
        if not hold.granted:
            try:
                await waiter
            except BaseException:
                lock.release(hold)
                raise
        return hold

    async def hold_cached(self, start: int, stop: int) -> Hold:
        """Wait for a range to be written through the page cache.

        As far as the cache may write back around it, it overwrites what others write directly. And
        one of those may have read a block, before, to write it whole, afterwards.
        """
        return await self.hold(
            self.lock, start & -FOLIO, -(-stop & -FOLIO), exclusive=self._shared.direct > 0
        )

    def _grant(self, waiter: Waiter) -> None:
        if not waiter.done():
            self.driver.wake(waiter, None, None)

    def is_aligned(self, address: int, bits: int = 0) -> bool:
        """Whether direct I/O takes an address, and lengths and offsets or-ed together."""
        return not (address & (self.memory_alignment - 1) or bits & ~self.mask)

    def _are_aligned(
        self, views: list[memoryview], offset: int, request: Request | None = None
    ) -> bool:
        """Whether the lengths of a vector are; with its request, whether the addresses are too."""
        if request is not None:
            return all(map(self.is_aligned, request.addresses))
        lengths = 0
        for view in views:
            lengths |= len(view)
        return len(views) <= MAX_SEGMENTS and not (lengths | offset) & ~self.mask

    def _checked(self, nbytes: int, offset: int, allowed: bool) -> tuple[int, int]:
        if self._closing:
            raise self._closed_error()
        if not allowed:
            what = "reading" if self._mode.writable else "writing"
            raise io.UnsupportedOperation(
                f"mode {self._mode.text!r} of {self._name!r} is not for {what}"
            )
        nbytes, offset = index(nbytes), index(offset)
        if nbytes < 0:
            raise ValueError(f"nbytes must not be negative, got {nbytes}")
        if not 0 <= offset <= MAX_OFFSET:
            raise ValueError(f"offset must be within 0..2**63-1, not {offset}")
        if nbytes + offset > MAX_OFFSET:
            raise ValueError(f"{nbytes} bytes at offset {offset} are beyond 2**63-1")
        return nbytes, offset

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the file {self._name!r} is closed")

    def _not_cached(self, error: OSError, *, writing: bool = False) -> None:
        """What an answer at once failed with: go on if it would only have had to wait."""
        if self._closing:
            raise self._closed_error()
        if error.errno == errno.EAGAIN:
            return
        if error.errno == errno.EOPNOTSUPP:
            if writing:
                self._writes_cached = False
            else:
                self._reads_cached = False
            return
        if writing:
            set_written(error, 0)
        error.add_note(f"of {self!r}")
        raise error


class _Counted:
    """An operation in several steps, which counts until all are done."""

    __slots__ = ("_file",)

    def __init__(self, file: Handle) -> None:
        self._file = file

    def __enter__(self) -> None:
        self._file.under_way.add(self)

    def __exit__(self, *exception: object) -> None:
        self._file.ended(self)

"""L3: files, for asynchronous programs: any offset, any length.

A direct file (`direct=True`) is read and written in blocks, past the page cache, by native AIO.
What is aligned in memory, offset and length goes straight to and from the caller's memory.
Everything else is made of it: reads go through an aligned buffer; writes read the rest of the
blocks at their edges and write them whole, while they hold them. A write that ends inside of the
file's last block is done there by a second, buffered descriptor, so that the file is never longer
than it is said to be, not even for an instant.

A buffered file (`direct=False`) is read from the page cache at once where RWF_NOWAIT says that it
is there, and by threads where it is not.

Laws:

- The loop is not blocked, whatever the file system does.
- Writers in this event loop never lose each other's bytes, however they share blocks. Writers in
  other processes, and in other event loops, have to share no block.
- A read is short at the end of the file only. A write is whole, or an `OSError` that says how much
  of it was written (`characters_written`).
"""

from __future__ import annotations

import errno
import io
import os
from collections import deque
from dataclasses import dataclass
from functools import partial
from operator import index
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, overload

from .blocking import (
    MAX_SEGMENTS,
    allocate,
    behind,
    close_all,
    fstat_size,
    read_bytes,
    read_whole,
    readable,
    sequence,
    truncate,
    writable,
    write_whole,
)
from .bulk import check_sizes, column, evenly
from .descriptor import OpenedFile, buffered_twin, open_file, parse_mode, size_of
from .errors import ClosedError, ForkedError, set_written, written
from .loops import running_driver
from .many import transfer_many
from .rangelock import RangeLock
from .request import Request
from .syscalls import RWF, Opcode
from .transfer import MOST, BouncedRead, FileCall, Patience, ReadInto, Slot, Sync, Vector, Write

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Sequence
    from types import TracebackType

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .bulk import Offsets
    from .descriptor import Descriptor
    from .driver import Driver, Plug, Waiter
    from .geometry import Geometry
    from .rangelock import Hold

    Path = int | str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["File", "FileStatistics", "Opening", "open"]

_T = TypeVar("_T")

_NOWAIT: Final = int(RWF.NOWAIT)
_DSYNC: Final = int(RWF.DSYNC)
_MAX_OFFSET: Final = (1 << 63) - 1
# Up to this many bytes, what is cached is read into memory that is used again and again; and up to
# this many it is copied in the loop's thread at all.
_SCRATCH: Final = 1 << 16
_AT_ONCE: Final = 1 << 18
# Behind it, such a read could end beyond what there is.
_LAST_OFFSET: Final = _MAX_OFFSET - _SCRATCH
# Reads of up to this many bytes have their buffer kept for the next one, in all up to the second
# number a file.
_SLOT: Final = 1 << 17
_SLOTS: Final = 1 << 21
# One piece of a long transfer through buffers, and how many of them there are at a time.
_PIECE: Final = 1 << 20
_PIECES: Final = 4
# As far as the page cache may treat pages as one: a folio.
_FOLIO: Final = 1 << 21
# How many unaligned writes of one file there are at a time; the others wait.
_UNALIGNED: Final = 64


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


def open(
    path: Path,
    mode: str = "r",
    *,
    direct: bool | Literal["prefer"] = True,
    engine: Literal["auto", "aio", "threads"] = "auto",
    opener: Callable[[str | bytes, int], int] | None = None,
    closefd: bool = True,
) -> Opening:
    """Open a regular file or a block device; to be awaited, or used by `async with`.

    mode: "r", "r+", "w" (made or cut to nothing), "w+", "x" (made; it must not exist), "x+"; a "b"
    may be there. path: of the file, or a descriptor, which is closed with the file unless
    closefd=False, and is left open when this raises. direct: True, with O_DIRECT; False, through
    the page cache; "prefer", as True where the file system can, else as False. engine: "aio",
    native AIO or an error; "threads"; "auto", native AIO, or threads with one RuntimeWarning where
    io_setup says ENOSYS or EPERM.
    opener: as of the built-in open.

    Does not block the event loop.

    Raises, when awaited:
        OSError: of open(2). EINVAL: no direct I/O on this file, or neither a regular file nor a
            block device, said in a note. io_setup's, with advice.
        ValueError, TypeError: an argument that makes no sense.
        RuntimeError: no event loop is running.
        UnsupportedError: no native AIO in this process at all; with engine="threads" there is none.
    """
    parsed = parse_mode(mode)
    if direct not in (True, False, "prefer"):
        raise ValueError(f'direct must be True, False or "prefer", not {direct!r}')
    if engine not in ("auto", "aio", "threads"):
        raise ValueError(f'engine must be "auto", "aio" or "threads", not {engine!r}')
    if isinstance(path, int):
        if opener is not None:
            raise ValueError("a descriptor has no use for an opener")
        if path < 0:
            raise ValueError(f"a descriptor is not negative, as {path} is")
    else:
        os.fspath(path)
        if not closefd:
            raise ValueError("closefd=False is for descriptors")

    def opened() -> OpenedFile:
        return open_file(path, parsed, direct=direct, opener=opener, closefd=closefd)

    return Opening(opened, path, engine)


class Opening:
    """A file about to be opened: await it, or enter it with `async with`; once."""

    __slots__ = ("_engine", "_file", "_open", "_path")

    def __init__(
        self,
        opened: Callable[[], OpenedFile],
        path: Path,
        engine: Literal["auto", "aio", "threads"],
    ) -> None:
        self._open: Callable[[], OpenedFile] | None = opened
        self._path = path
        self._engine: Literal["auto", "aio", "threads"] = engine
        self._file: File | None = None

    async def _opened(self) -> File:
        opened, self._open = self._open, None
        if opened is None:
            raise RuntimeError("this file was opened already; call rawaio.open again")
        driver = running_driver()
        await driver.guard()
        has_aio = self._engine != "threads" and driver.aio(required=self._engine == "aio")
        operation = driver.call(opened, lambda found: found.descriptor.close())
        try:
            found: OpenedFile = await operation.waiter
        except BaseException:
            operation.forgo()
            raise
        if found.given:
            found.descriptor.own()
        return File(driver, found, self._path, "aio" if has_aio else "threads", self._engine)

    def __await__(self) -> Generator[Any, None, File]:
        return self._opened().__await__()

    async def __aenter__(self) -> File:
        self._file = await self._opened()
        return self._file

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            await self._file.close()


class File:
    """An open file. Made by `rawaio.open`; to be used in the event loop that it was opened in."""

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
        self._reads = self._writes = self._cached = self._unaligned = 0
        self.continued = self.threaded = 0
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
            reads=self._reads,
            writes=self._writes,
            cached=self._cached,
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

    # -- reading --------------------------------------------------------------------------------

    async def pread(self, nbytes: int, offset: int, *, zero_fill: bool = False) -> bytes:
        """The bytes from offset on, nbytes of them; fewer at the end of the file only.

        zero_fill: what is behind the end reads as zeroes. Cancelled, it ends at once.

        Raises:
            OSError: of pread(2).
            ValueError, TypeError: nbytes or offset negative, too large, or not an int.
            ClosedError, ForkedError. io.UnsupportedOperation: not open for reading.
        """
        self._reads += 1
        if self._reads_cached and 0 < nbytes <= _SCRATCH and 0 <= offset <= _LAST_OFFSET:
            driver = self.driver
            if driver.thread != get_ident():
                driver.check_running()
            if driver.credit <= 0:
                await driver.breathe()
            try:
                view, views = driver.scratch[nbytes]
            except KeyError:
                view, views = driver.more_scratch(nbytes)
            try:
                n = os.preadv(self._fd, views, offset, _NOWAIT)
            except OSError as error:
                self._not_cached(error)
            else:
                if n == nbytes:
                    driver.credit -= 1 + (n >> 13)
                    self._cached += 1
                    return view.tobytes()
        nbytes, offset = self._checked(nbytes, offset, self._mode.readable)
        if not nbytes:
            return b""
        if self._geometry is not None:
            operation = BouncedRead(self, nbytes, offset)
            driver = self.driver
            if driver.admitted and not operation.offloaded and driver.thread == get_ident():
                driver.begin(operation)
            else:
                operation.begin()
            data: bytes = await operation.waiter
        else:
            memory = bytearray(nbytes)
            n = await self._read_buffered([memoryview(memory)], offset, lent=False)
            data = bytes(memory) if n == nbytes else bytes(memory[:n])
        return data.ljust(nbytes, b"\0") if zero_fill else data

    async def preadinto(
        self, buffer: WriteableBuffer, offset: int, *, zero_fill: bool = False
    ) -> int:
        """Fill buffer with the bytes from offset on; how many, fewer at the end of the file only.

        Without a copy where address, length and offset are aligned as `geometry` says. Cancelled,
        it ends when the kernel is done with buffer. Otherwise as `pread`.
        """
        if self._reads_cached and 0 <= offset <= _MAX_OFFSET - _AT_ONCE:
            driver = self.driver
            if driver.thread != get_ident():
                driver.check_running()
            if driver.credit <= 0:
                await driver.breathe()
            view = writable(buffer)
            if 0 < len(view) <= _AT_ONCE and self._reads_cached:
                try:
                    n = os.preadv(self._fd, (view,), offset, _NOWAIT)
                except OSError as error:
                    self._not_cached(error)
                else:
                    if n == len(view):
                        driver.credit -= 1 + (n >> 13)
                        self._cached += 1
                        self._reads += 1
                        return n
        elif self._geometry is not None and not zero_fill:
            view = writable(buffer)
            nbytes, offset = self._checked(len(view), offset, self._mode.readable)
            if 0 < nbytes <= MOST and not (nbytes | offset) & ~self.mask:
                request = Request.pread(self.descriptor, view, offset, rw_flags=self.nowait_flag)
                if self.is_aligned(request.address):
                    operation = ReadInto(self, request, view)
                    operation.begin()
                    self._reads += 1
                    done: int = await self.driver.settle(operation)
                    return done
        return await self.preadv((buffer,), offset, zero_fill=zero_fill)

    async def preadv(
        self, buffers: Sequence[WriteableBuffer], offset: int, *, zero_fill: bool = False
    ) -> int:
        """Fill the buffers, one after another, with the bytes from offset on. As `preadinto`."""
        self._reads += 1
        views = [view for view in map(writable, sequence(buffers)) if view.nbytes]
        total, offset = self._checked(sum(map(len, views)), offset, self._mode.readable)
        if not total:
            return 0
        with self._counted():
            if self._geometry is None:
                done = await self._read_buffered(views, offset, lent=True)
            elif len(views) == 1:
                done = await self.read_direct(views[0], offset)
            else:
                done = await self._read_vector(views, offset, total)
        if zero_fill and done < total:
            for view in behind(views, done):
                view[:] = bytes(len(view))
            return total
        return done

    async def read_direct(self, view: memoryview, offset: int) -> int:
        """Read a direct file into the caller's memory; how much, to the end of the file."""
        if not (len(view) | offset) & ~self.mask:
            request = Request.pread(self.descriptor, view[:MOST], offset, rw_flags=self.nowait_flag)
            if self.is_aligned(request.address):
                operation = ReadInto(self, request, view)
                operation.begin()
                done: int = await self.driver.settle(operation)
                return done
        return await self._read_pieces(view, offset)

    async def _read_pieces(self, view: memoryview, offset: int) -> int:
        """The same through buffers, a few at a time."""
        ahead: deque[BouncedRead] = deque()
        begun = done = 0
        nbytes = len(view)
        try:
            while True:
                while begun < nbytes and len(ahead) < _PIECES:
                    # Up to a block boundary, and so the next piece begins at one.
                    n = min(_PIECE - ((offset + begun) & ~self.mask), nbytes - begun)
                    operation = BouncedRead(self, n, offset + begun, view[begun : begun + n])
                    operation.begin()
                    ahead.append(operation)
                    begun += n
                if not ahead:
                    return done
                operation = ahead.popleft()
                got: int = await operation.waiter
                done += got
                if got < operation.wanted_bytes:
                    return done
        finally:
            for operation in ahead:
                self.driver.abandon(operation)

    async def _read_vector(self, views: list[memoryview], offset: int, total: int) -> int:
        if total <= MOST and self._are_aligned(views, offset):
            request = Request.preadv(self.descriptor, views, offset, rw_flags=self.nowait_flag)
            if self._are_aligned(views, offset, request):
                operation = Vector(self, request)
                operation.begin()
                done: int = await self.driver.settle(operation)
                if done in (0, total) or offset + done >= self.size:
                    return done
                self.continued += 1
                return done + await self._read_each(behind(views, done), offset + done)
        elif total <= _PIECE:
            together = BouncedRead(self, total, offset)
            together.begin()
            data = memoryview(await together.waiter)
            at = 0
            for view in views:
                part = data[at : at + len(view)]
                view[: len(part)] = part
                at += len(part)
            return at
        return await self._read_each(views, offset)

    async def _read_each(self, views: Sequence[memoryview], offset: int) -> int:
        done = 0
        for view in views:
            n = await self.read_direct(view, offset + done)
            done += n
            if n < len(view):
                break
        return done

    async def _read_buffered(self, views: list[memoryview], offset: int, *, lent: bool) -> int:
        """Read a buffered file, from the page cache or in a thread. lent: by the caller."""
        driver = self.driver
        total = sum(map(len, views))
        done = 0
        if self._reads_cached and total <= _AT_ONCE:
            driver.check_running()
            if driver.credit <= 0:
                await driver.breathe()
            try:
                done = os.preadv(self._fd, views[:MAX_SEGMENTS], offset, _NOWAIT)
            except OSError as error:
                self._not_cached(error)
            else:
                driver.credit -= 1 + (done >> 13)
                if done in (0, total):
                    self._cached += 1
                    return done
        rest = behind(views, done)
        operation = FileCall(self, partial(read_whole, self.descriptor, rest, offset + done))
        operation.begin()
        n: int = await (driver.settle(operation) if lent else operation.waiter)
        return done + n

    @overload
    async def pread_many(self, offsets: Offsets, nbytes: int, out: None = None) -> bytearray: ...

    @overload
    async def pread_many(self, offsets: Offsets, nbytes: int, out: WriteableBuffer) -> int: ...

    async def pread_many(
        self, offsets: Offsets, nbytes: int, out: WriteableBuffer | None = None
    ) -> int | bytearray:
        """Read nbytes bytes at each of the offsets, the i-th into out[i * nbytes:(i + 1) * nbytes].

        offsets: any sequence of int, or a buffer of int64 (`array("q")`, NumPy). out: one writable,
        contiguous buffer of len(offsets) * nbytes bytes; then how many bytes that is is returned.
        Without it, a new bytearray. Each means the same as one `preadinto`, in any order, and costs
        a small part of it. Other tasks run meanwhile. Cancelled, it ends when the kernel is done
        with out.

        Raises:
            BulkError: some were short, at the end of the file, or failed; all ran to their end, and
                the data of the others are valid.
            ValueError, TypeError, ClosedError, ForkedError, io.UnsupportedOperation: as `pread`.
        """
        places = column(offsets)
        memory = bytearray(len(places) * nbytes) if out is None else out
        self._reads += len(places)
        total = await self._many(
            Opcode.PREAD, places, nbytes, writable(memory), self._mode.readable
        )
        return memory if isinstance(memory, bytearray) and out is None else total

    async def pwrite_many(
        self, offsets: Offsets, data: ReadableBuffer, nbytes: int | None = None
    ) -> int:
        """Write the i-th nbytes bytes of data at the i-th of the offsets; how many bytes in all.

        nbytes: left out, data is divided among the offsets, without rest. The order is not that of
        the offsets: they must not overlap. Otherwise as `pread_many`.
        """
        places = column(offsets)
        if nbytes is None:
            nbytes = evenly(data, len(places))
        self._writes += len(places)
        return await self._many(Opcode.PWRITE, places, nbytes, readable(data), self._mode.writable)

    async def _many(
        self, opcode: Opcode, places: memoryview, nbytes: int, memory: memoryview, allowed: bool
    ) -> int:
        nbytes, _ = self._checked(nbytes, 0, allowed)
        check_sizes(places, nbytes, memory)
        self.driver.admit()
        if places:
            with self._counted():
                await transfer_many(self, opcode, places, nbytes, memory)
        return len(places) * nbytes

    def stream(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        chunk_size: int = 1 << 20,
        depth: int = 4,
    ) -> AsyncGenerator[bytes, None]:
        """The file's bytes from offset on, length of them or to its end, in chunks, in order.

        Reads ahead: at most depth chunks are there or under way at a time, the one that was handed
        out among them. Closed early (`aclosing`), or after an error, it leaves nothing behind.

        Raises: as `pread`; ValueError also for chunk_size or depth below 1.
        """
        chunk_size, depth = index(chunk_size), index(depth)
        if chunk_size < 1 or depth < 1:
            raise ValueError(f"chunk_size {chunk_size} and depth {depth} must be 1 at least")
        if length is None:
            length = _MAX_OFFSET - index(offset)
        length, offset = self._checked(length, offset, self._mode.readable)
        return self._chunks(offset, offset + length, chunk_size, depth)

    async def _chunks(
        self, offset: int, stop: int, chunk_size: int, depth: int
    ) -> AsyncGenerator[bytes, None]:
        ahead: deque[tuple[BouncedRead | FileCall, int]] = deque()
        try:
            while True:
                while offset < stop and len(ahead) < depth:
                    n = min(chunk_size, stop - offset)
                    self._checked(n, offset, self._mode.readable)
                    self._reads += 1
                    operation: BouncedRead | FileCall
                    if self._geometry is not None:
                        operation = BouncedRead(self, n, offset)
                    else:
                        operation = FileCall(self, partial(read_bytes, self.descriptor, n, offset))
                    operation.begin()
                    ahead.append((operation, n))
                    offset += n
                if not ahead:
                    return
                operation, n = ahead.popleft()
                chunk: bytes = await operation.waiter
                if chunk:
                    yield chunk
                if len(chunk) < n:
                    return
        finally:
            for operation, _ in ahead:
                self.driver.abandon(operation)

    # -- writing --------------------------------------------------------------------------------

    async def pwrite(self, data: ReadableBuffer, offset: int, *, dsync: bool = False) -> int:
        """Write all of data at offset; how many bytes that was.

        dsync: it is on stable storage when this returns (RWF_DSYNC). Without a copy where address,
        length and offset are aligned as `geometry` says. A write behind the end leaves zeroes
        between. Cancelled, it ends when the kernel is done with data; how much was written then is
        not known.

        Raises:
            OSError: of pwrite(2): ENOSPC, EFBIG, EIO, ... `characters_written` bytes were written.
            ValueError, TypeError: offset negative or too large, or no buffer.
            ClosedError, ForkedError. io.UnsupportedOperation: not open for writing.
        """
        return await self.pwritev((data,), offset, dsync=dsync)

    async def pwritev(
        self, buffers: Sequence[ReadableBuffer], offset: int, *, dsync: bool = False
    ) -> int:
        """Write all of the buffers, one after another, at offset. As `pwrite`."""
        self._writes += 1
        views = [view for view in map(readable, sequence(buffers)) if view.nbytes]
        total, offset = self._checked(sum(map(len, views)), offset, self._mode.writable)
        if not total:
            return 0
        flags = _DSYNC if dsync else 0
        with self._counted():
            if self._geometry is None:
                await self._write_buffered(views, offset, flags)
            elif len(views) == 1:
                await self.write_direct(views[0], offset, flags)
            else:
                await self._write_vector(views, offset, total, flags)
        return total

    async def append(self, data: ReadableBuffer, *, dsync: bool = False) -> int:
        """Write data at the end of the file; the offset at which that was.

        Appends of this event loop follow one another and never overlap. What is written in part is
        not tried again: it raises ENOSPC, and `characters_written` tells how much there is of it.

        Raises: as `pwrite`; io.UnsupportedOperation also on a block device.
        """
        self._writes += 1
        view = readable(data)
        self._checked(view.nbytes, 0, self._mode.writable)
        if self._device_size is not None:
            raise io.UnsupportedOperation("nothing can be appended to a block device")
        flags = _DSYNC if dsync else 0
        with self._counted():
            turn = await self.hold(self._shared.appending, 0, 1)
            try:
                offset = await self._call(partial(fstat_size, self.descriptor))
                _, offset = self._checked(view.nbytes, offset, self._mode.writable)
                if not view.nbytes:
                    pass
                elif self._geometry is None:
                    await self._write_cache([view], offset, flags, once=True)
                else:
                    await self.write_direct(view, offset, flags, once=True)
            finally:
                self._shared.appending.release(turn)
        return offset

    async def write_direct(
        self, view: memoryview, offset: int, flags: int, *, once: bool = False
    ) -> None:
        """Write all of view to a direct file. once: what is short is not written again."""
        if not (len(view) | offset) & ~self.mask:
            request = Request.pwrite(
                self.descriptor, view[:MOST], offset, rw_flags=flags | self.nowait_flag
            )
            if self.is_aligned(request.address):
                operation = Write(self, view, offset, flags, request=request, once=once)
                operation.begin()
                await self.driver.settle(operation)
                return
        self._unaligned += 1
        # Holds are compared with all others: there must not be very many.
        place = self._unaligned % _UNALIGNED
        turn = await self.hold(self._shared.unaligned, place, place + 1)
        try:
            await self._write_unaligned(view, offset, flags, once)
        finally:
            self._shared.unaligned.release(turn)

    async def _write_unaligned(self, view: memoryview, offset: int, flags: int, once: bool) -> None:
        stop = offset + len(view)
        first, last = self.round_down(offset), self.round_up(stop)
        ragged = first != offset or last != stop
        while True:
            # From where on the buffered twin writes: the block that the file ends in.
            cut = stop
            if ragged and not self._edges_readable:
                cut = offset
            elif stop != last and self._device_size is None:
                size = await self._call(partial(fstat_size, self.descriptor))
                if size < last:
                    cut = max(offset, last - self._block)
            if cut < stop:
                # The page cache may write back as much as a folio around it.
                hold = await self.hold(self.lock, min(cut & -_FOLIO, first), _MAX_OFFSET)
            else:
                hold = await self.hold(self.lock, first, last, exclusive=ragged)
            try:
                if cut == stop != last and self._device_size is None and self.size < last:
                    continue  # it was cut meanwhile
                end = self.round_down(cut) if cut < stop else last
                for start in range(first, end, _PIECE):
                    await self._write_piece(
                        view, offset, flags, start, min(start + _PIECE, end), once=once
                    )
                if cut < stop:
                    await self._write_twin(view, offset, flags, cut - offset, once=once)
                return
            finally:
                self.lock.release(hold)

    async def _write_piece(
        self, view: memoryview, offset: int, flags: int, start: int, stop: int, *, once: bool
    ) -> None:
        """Write whole blocks, from start to stop, that view covers but for their edges; held.

        Raises:
            OSError: says how much of view was written, by this piece and those before.
        """
        end = offset + len(view)
        slot = self.take_slot(stop - start)
        block = self._block
        edges: list[int] = []
        if start < offset:
            edges.append(start)
        if stop > end and (stop - block) not in edges:
            edges.append(stop - block)
        for edge in edges:
            part = slot.buffer[edge - start : edge - start + block]
            try:
                got = await self.read_direct(part, edge)
            except OSError as error:  # it says how much was read
                set_written(error, max(start - offset, 0))
                raise
            part[got:] = bytes(block - got)  # behind the end of the file
        here, there = max(offset, start), min(end, stop)
        slot.buffer[here - start : there - start] = view[here - offset : there - offset]
        operation = Write(self, slot.buffer, start, flags, held=True, once=once)
        operation.begin()
        try:
            await self.driver.settle(operation)
        except OSError as error:
            set_written(error, min(max(start + written(error) - offset, 0), len(view)))
            raise
        self.give_slot(slot)

    async def _write_twin(
        self, view: memoryview, offset: int, flags: int, before: int, *, once: bool
    ) -> None:
        """Write through the page cache where the file ends; held. before: written already."""

        def write() -> None:
            if self._twin is None:
                try:
                    self._twin = buffered_twin(self.descriptor)
                except OSError as error:
                    set_written(error, before)
                    raise
            rest = [view[before:]]
            write_whole(self._twin, rest, offset + before, flags, before=before, once=once)

        await self._call(write)

    async def _write_vector(
        self, views: list[memoryview], offset: int, total: int, flags: int
    ) -> None:
        if total <= MOST and self._are_aligned(views, offset):
            request = Request.pwritev(
                self.descriptor, views, offset, rw_flags=flags | self.nowait_flag
            )
            if self._are_aligned(views, offset, request):
                hold = await self.hold(self.lock, offset, offset + total, exclusive=False)
                try:
                    operation = Vector(self, request)
                    operation.begin()
                    done: int = await self.driver.settle(operation)
                finally:
                    self.lock.release(hold)
                if done == total:
                    return
                self.continued += 1
                if done == 0:
                    raise _no_space(request, done, total)
                views = behind(views, done)
                offset += done
                try:
                    await self.write_direct(memoryview(b"".join(views)), offset, flags)
                except OSError as error:
                    set_written(error, done + written(error))
                    raise
                return
        await self.write_direct(memoryview(b"".join(views)), offset, flags)

    async def _write_buffered(self, views: list[memoryview], offset: int, flags: int) -> None:
        driver = self.driver
        total = sum(map(len, views))
        done = 0
        if self._writes_cached and total <= _AT_ONCE and not flags and not self._shared.direct:
            driver.check_running()
            if driver.credit <= 0:
                await driver.breathe()
            try:
                done = os.pwritev(self._fd, views[:MAX_SEGMENTS], offset, _NOWAIT)
            except OSError as error:
                self._not_cached(error, writing=True)
            else:
                driver.credit -= 1 + (done >> 13)
                if done == total:
                    self._cached += 1
                    return
        await self._write_cache(behind(views, done), offset + done, flags, before=done)

    async def _write_cache(
        self,
        views: list[memoryview],
        offset: int,
        flags: int,
        *,
        before: int = 0,
        once: bool = False,
    ) -> None:
        """Write through the page cache, in a thread. before: written already."""
        hold = await self.hold_cached(offset, offset + sum(map(len, views)))
        try:
            await self._call(
                partial(
                    write_whole, self.descriptor, views, offset, flags, before=before, once=once
                )
            )
        finally:
            self.lock.release(hold)

    # -- the file as a whole --------------------------------------------------------------------

    async def fsync(self) -> None:
        """Have what was written, and all about the file, on stable storage. Linux 4.18.

        Writes that are still under way may be left out.

        Raises:
            OSError: of fsync(2): EIO, ENOSPC, ...
            ClosedError, ForkedError.
        """
        await self._sync(data_only=False)

    async def fdatasync(self) -> None:
        """As `fsync`, without what is not needed to read the data again, such as times."""
        await self._sync(data_only=True)

    async def _sync(self, *, data_only: bool) -> None:
        self._checked(0, 0, True)
        operation = Sync(self, data_only=data_only)
        operation.begin()
        await self.driver.settle(operation)

    async def truncate(self, nbytes: int) -> None:
        """Cut the file to nbytes bytes, or make it so long by zeroes that take no space.

        Raises:
            OSError: of ftruncate(2): EFBIG, EINVAL on a block device, ...
            ValueError, ClosedError, ForkedError. io.UnsupportedOperation: not open for writing.
        """
        nbytes, _ = self._checked(nbytes, 0, self._mode.writable)
        with self._counted():
            hold = await self.hold(self.lock, nbytes & -_FOLIO, _MAX_OFFSET)
            try:
                await self._call(partial(truncate, self.descriptor, nbytes))
            finally:
                self.lock.release(hold)

    async def allocate(self, offset: int, nbytes: int) -> None:
        """Have space for nbytes bytes at offset, and the file as long; what is new reads as zeroes.

        Direct writes into it need not extend the file any more, and so do not wait.

        Raises:
            OSError: of fallocate(2): ENOSPC, EFBIG; EOPNOTSUPP where the file system cannot.
            ValueError, ClosedError, ForkedError. io.UnsupportedOperation: not open for writing.
        """
        nbytes, offset = self._checked(nbytes, offset, self._mode.writable)
        if not nbytes:
            raise ValueError("nbytes must be 1 at least")
        with self._counted():
            hold = await self.hold(self.lock, offset & -_FOLIO, _MAX_OFFSET)
            try:
                await self._call(partial(allocate, self.descriptor, offset, nbytes))
            finally:
                self.lock.release(hold)

    async def close(self) -> None:
        """Wait for what is under way, and close the file, in a thread. Idempotent.

        Cancelled, it ends at once, and the file is closed when nothing is under way any more. In a
        forked child it closes the child's descriptor, and waits for nothing.

        Raises:
            OSError: of close(2): EIO, ENOSPC of writes that were not synced.
            RuntimeError: called from another loop.
        """
        driver = self.driver
        if driver.refusal is None:
            driver.check_running()
        self._closing = True
        self._reads_cached = self._writes_cached = False
        try:
            while self.under_way and not isinstance(driver.refusal, ForkedError):
                waiter = driver.waiter()
                self._last.append(waiter)
                await waiter
            descriptors = self._disown()
            if descriptors:
                await driver.last_call(partial(close_all, descriptors))
        except OSError:
            raise
        except BaseException:
            self._left = True
            self.ended(None)
            raise

    def _disown(self) -> list[Descriptor]:
        """What there is to close, when nothing is under way; nothing new is."""
        if self._fd >= 0:
            self._shared.direct -= self.direct and self._mode.writable
        self._fd = -1
        self._slots.clear()
        return [d for d in (self._twin, self.descriptor) if d and d.fileno() >= 0]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

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
        if nbytes <= self._slots_free and nbytes <= _SLOT and not self._closing:
            self._slots_free -= nbytes
            try:
                self._slots[nbytes].append(slot)
            except KeyError:
                self._slots[nbytes] = [slot]

    def no_nowait(self) -> None:
        """The file system turned out not to know RWF_NOWAIT."""
        self.nowait_flag = 0
        self.offloads = True
        self._slots.clear()
        self._slots_free = _SLOTS

    def ended(self, operation: object) -> None:
        """An operation is not under way any more. May be repeated."""
        self.under_way.discard(operation)
        if self._left and not self.under_way:
            self._left = False
            self.driver.dispose(partial(close_all, self._disown()))
        if self._last and not self.under_way:
            last, self._last = self._last, []
            for waiter in last:
                if not waiter.done():
                    self.driver.wake(waiter, None, None)

    # -- inside ---------------------------------------------------------------------------------

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
            self.lock, start & -_FOLIO, -(-stop & -_FOLIO), exclusive=self._shared.direct > 0
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
        if not 0 <= offset <= _MAX_OFFSET:
            raise ValueError(f"offset must be within 0..2**63-1, not {offset}")
        if nbytes + offset > _MAX_OFFSET:
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

    def __init__(self, file: File) -> None:
        self._file = file

    def __enter__(self) -> None:
        self._file.under_way.add(self)

    def __exit__(self, *exception: object) -> None:
        self._file.ended(self)


def _no_space(request: Request, done: int, total: int) -> OSError:
    error = request.error(errno.ENOSPC)
    set_written(error, done)
    error.add_note(f"{done} of {total} bytes were written")
    return error

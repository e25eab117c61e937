"""L3: reading files, direct and buffered, at any offset and of any length."""

from __future__ import annotations

import errno
import os
from collections import deque
from functools import partial
from operator import index
from threading import get_ident
from typing import TYPE_CHECKING, Final

from .blocking import (
    MAX_SEGMENTS,
    behind,
    read_bytes,
    read_whole,
    sequence,
    writable,
)
from .handle import AT_ONCE, MAX_OFFSET, PIECE, Handle
from .request import Request
from .syscalls import RWF
from .transfer import MOST, BouncedRead, FileCall, ReadInto, Vector

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from _typeshed import WriteableBuffer

    Path = int | str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["Reading"]

_NOWAIT: Final = int(RWF.NOWAIT)
# Up to this many bytes, what is cached is read into memory that is used again and again.
_SCRATCH: Final = 1 << 16
# Behind this one, a read of what is cached could end beyond what there is.
_LAST_AT_ONCE: Final = MAX_OFFSET - AT_ONCE
# How many pieces of a long transfer there are at a time.
_PIECES: Final = 4


class Reading(Handle):
    """The methods that read."""

    async def pread(self, nbytes: int, offset: int, *, zero_fill: bool = False) -> bytes:
        """The bytes from offset on, nbytes of them; fewer at the end of the file only.

        zero_fill: what is behind the end reads as zeroes. Cancelled, it ends at once.

        Raises:
            OSError: of pread(2).
            ValueError, TypeError: nbytes or offset negative, too large, or not an int.
            ClosedError, ForkedError. io.UnsupportedOperation: not open for reading.
        """
        if self._reads_cached and 0 < nbytes <= _SCRATCH and offset >= 0:
            driver = self.driver
            if driver.thread != get_ident():
                driver.check_running()
            if driver.credit <= 0:
                await driver.breathe()
            if type(nbytes) is not int:
                nbytes = index(nbytes)  # 1.0 is the key that 1 is
            try:
                view, views, price = driver.scratch[nbytes]
            except KeyError:
                view, views, price = driver.more_scratch(nbytes)
            try:
                # The kernel refuses offsets that are too large. By -1 it means the file's position.
                if os.preadv(self._fd, views, offset, _NOWAIT) == nbytes:
                    driver.credit -= price
                    self._at_once += 1
                    return view.tobytes()
            except OverflowError:
                pass
            except OSError as error:
                self._reads += 1
                self._checked(nbytes, offset, self._mode.readable)
                self._not_cached(error)
                self._reads -= 1  # it goes on, and is counted below
        self._reads += 1
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
        if self._reads_cached and 0 <= offset <= _LAST_AT_ONCE:
            driver = self.driver
            if driver.thread != get_ident():
                driver.check_running()
            if driver.credit <= 0:
                await driver.breathe()
            view = writable(buffer)
            if 0 < len(view) <= AT_ONCE and self._reads_cached:
                try:
                    n = os.preadv(self._fd, (view,), offset, _NOWAIT)
                except OSError as error:
                    self._not_cached(error)
                else:
                    if n == len(view):
                        driver.credit -= 1 + (n >> 13)
                        self._at_once += 1
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
                    n = min(PIECE - ((offset + begun) & ~self.mask), nbytes - begun)
                    ahead.append(BouncedRead(self, n, offset + begun, view[begun : begun + n]))
                    ahead[-1].begin()
                    begun += n
                if not ahead:
                    return done
                got: int = await ahead[0].waiter
                done += got
                if got < ahead.popleft().wanted_bytes:
                    return done
        finally:
            # An error has this frame in its traceback: nothing that has the error stays here.
            while ahead:
                ahead[0].forget_target()
                self.driver.abandon(ahead.popleft())

    async def _read_vector(self, views: list[memoryview], offset: int, total: int) -> int:
        if total <= MOST and self._are_aligned(views, offset):
            request = Request.preadv(self.descriptor, views, offset, rw_flags=self.nowait_flag)
            if self._are_aligned(views, offset, request):
                operation = Vector(self, request)
                operation.begin()
                try:
                    done: int = await self.driver.settle(operation)
                except OSError as error:
                    # So some file systems say that there is nothing behind the end.
                    if error.errno == errno.EINVAL and offset >= self.size:
                        return 0
                    raise
                if done in (0, total) or offset + done >= self.size:
                    return done
                self.continued += 1
                return done + await self._read_each(behind(views, done), offset + done)
        elif total <= PIECE:
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
        if self._reads_cached and total <= AT_ONCE:
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
            length = MAX_OFFSET - index(offset)
        length, offset = self._checked(length, offset, self._mode.readable)
        return self._chunks(offset, offset + length, chunk_size, depth)

    async def _chunks(
        self, offset: int, stop: int, chunk_size: int, depth: int
    ) -> AsyncGenerator[bytes, None]:
        ahead: deque[tuple[BouncedRead | FileCall, int]] = deque()
        size = -(-((offset & ~self.mask) + min(chunk_size, stop - offset)) & self.mask)
        stream = object()
        try:
            if self._geometry is not None:
                self.reserve_slots(stream, size, depth)
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
            self.release_slots(stream)

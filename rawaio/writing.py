"""L3: writing files, direct and buffered, at any offset and of any length."""

from __future__ import annotations

import errno
import io
import os
from functools import partial
from typing import TYPE_CHECKING, Final

from .blocking import (
    MAX_SEGMENTS,
    behind,
    fstat_size,
    readable,
    sequence,
    write_whole,
)
from .descriptor import buffered_twin
from .errors import set_written, written
from .handle import AT_ONCE, FOLIO, MAX_OFFSET, PIECE
from .reading import Reading
from .request import Request
from .syscalls import RWF
from .transfer import MOST, Vector, Write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import ReadableBuffer

    Path = int | str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["Writing"]

_NOWAIT: Final = int(RWF.NOWAIT)
_DSYNC: Final = int(RWF.DSYNC)
# How many unaligned writes of one file there are at a time; the others wait.
_UNALIGNED: Final = 64


class Writing(Reading):
    """The methods that write; those that read come first, because blocks are read to be changed."""

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
                hold = await self.hold(self.lock, min(cut & -FOLIO, first), MAX_OFFSET)
            else:
                hold = await self.hold(self.lock, first, last, exclusive=ragged)
            try:
                if cut == stop != last and self._device_size is None and self.size < last:
                    continue  # it was cut meanwhile
                end = self.round_down(cut) if cut < stop else last
                for start in range(first, end, PIECE):
                    await self._write_piece(
                        view, offset, flags, start, min(start + PIECE, end), once=once
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
        # Not a function in here: an error would hold it, and it would hold view.
        await self._call(partial(self._write_to_twin, view, offset, flags, before, once))

    def _write_to_twin(
        self, view: memoryview, offset: int, flags: int, before: int, once: bool
    ) -> None:
        """In a thread."""
        if self._twin is None:
            try:
                self._twin = buffered_twin(self.descriptor)
            except OSError as error:
                set_written(error, before)
                raise
        rest = [view[before:]]
        write_whole(self._twin, rest, offset + before, flags, before=before, once=once)

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
        if self._writes_cached and total <= AT_ONCE and not flags and not self._shared.direct:
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


def _no_space(request: Request, done: int, total: int) -> OSError:
    error = request.error(errno.ENOSPC)
    set_written(error, done)
    error.add_note(f"{done} of {total} bytes were written")
    return error

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

import os
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from .blocking import allocate, close_all, truncate
from .descriptor import OpenedFile, open_file, parse_mode
from .errors import ForkedError
from .handle import FOLIO, MAX_OFFSET, FileStatistics
from .loops import running_driver
from .many import transfer_many
from .pieces import Pieces
from .syscalls import Opcode
from .transfer import Sync
from .writing import Writing

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from types import TracebackType

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .pieces import Buffers, Numbers

    Path = int | str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["File", "FileStatistics", "Opening", "open"]


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
        file = File(driver, found, self._path, "aio" if has_aio else "threads", self._engine)
        try:
            await file.settle_cached()
        except BaseException:
            file.forgo()
            raise
        return file

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


class File(Writing):
    """An open file. Made by `rawaio.open`; to be used in the event loop that it was opened in."""

    @overload
    async def pread_many(
        self,
        offsets: Numbers,
        nbytes: int,
        out: None = None,
        *,
        lengths: Numbers | None = None,
    ) -> bytearray: ...

    @overload
    async def pread_many(
        self, offsets: Numbers, nbytes: None = None, out: None = None, *, lengths: Numbers
    ) -> bytearray: ...

    @overload
    async def pread_many(
        self,
        offsets: Numbers,
        nbytes: int,
        out: WriteableBuffer | Buffers,
        *,
        lengths: Numbers | None = None,
    ) -> int: ...

    @overload
    async def pread_many(
        self,
        offsets: Numbers,
        nbytes: None = None,
        *,
        out: WriteableBuffer | Buffers,
        lengths: Numbers,
    ) -> int: ...

    @overload
    async def pread_many(
        self,
        offsets: Numbers,
        nbytes: None = None,
        *,
        out: Buffers,
        lengths: Numbers | None = None,
    ) -> int: ...

    async def pread_many(
        self,
        offsets: Numbers,
        nbytes: int | None = None,
        out: WriteableBuffer | Buffers | None = None,
        *,
        lengths: Numbers | None = None,
    ) -> int | bytearray:
        """Read at each of the offsets; how many bytes in all.

        offsets: any sequence of int, or a buffer of int64 (`array("q")`, NumPy). out is one of:

        - one writable, contiguous buffer, with nbytes: the i-th nbytes bytes of it are for the
          i-th offset; or with lengths, given as offsets are: the pieces are packed, one after
          another;
        - a list or a tuple of such buffers, one for each offset. Each is filled. nbytes and lengths
          are not needed, and have to agree;
        - left out: with nbytes or lengths, a new bytearray, which is returned.

        A length may be 0, nbytes may not. Each means the same as one `preadinto`, in any order, and
        costs a small part of it. Other tasks run meanwhile. Cancelled, it ends when the kernel is
        done with the memory, which may not be resized before.

        Raises:
            BulkError: some were short, at the end of the file, or failed; all ran to their end, and
                the data of the others are valid.
            ValueError, TypeError, ClosedError, ForkedError, io.UnsupportedOperation: as `pread`;
                ValueError also for what does not agree. Then nothing is started.
        """
        result: int | bytearray = await self._many(Opcode.PREAD, offsets, out, nbytes, lengths)
        return result

    async def pwrite_many(
        self,
        offsets: Numbers,
        data: ReadableBuffer | Sequence[ReadableBuffer],
        nbytes: int | None = None,
        *,
        lengths: Numbers | None = None,
    ) -> int:
        """Write at each of the offsets; how many bytes in all.

        data: one contiguous buffer, with nbytes or lengths, or a list or a tuple of buffers, as out
        of `pread_many`. With neither, one buffer is divided among the offsets, without rest. The
        order is not that of the offsets: they must not overlap. Otherwise as `pread_many`.
        """
        written: int = await self._many(Opcode.PWRITE, offsets, data, nbytes, lengths)
        return written

    async def _many(
        self,
        opcode: Opcode,
        offsets: Numbers,
        memory: Any,  # noqa: ANN401 - checked where it is pinned
        nbytes: int | None,
        lengths: Numbers | None,
    ) -> Any:  # noqa: ANN401 - bytes or their number
        reading = opcode is Opcode.PREAD
        self._checked(0, 0, self._mode.readable if reading else self._mode.writable)
        pieces = Pieces(offsets, memory, nbytes, lengths, reading=reading)
        self.driver.admit()
        count = len(pieces.offsets)
        if reading:
            self._reads += count
        else:
            self._writes += count
        if count:
            with self._counted():
                await transfer_many(self, opcode, pieces)
        return pieces.total if pieces.made is None else pieces.made

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
            # The block that the file ends in now is cleared through the page cache when it grows.
            hold = await self.hold(self.lock, min(nbytes, self.size) & -FOLIO, MAX_OFFSET)
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
            hold = await self.hold(self.lock, min(offset, self.size) & -FOLIO, MAX_OFFSET)
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
            # Counted: another one that closes it waits until close(2) has returned.
            with self._counted():
                descriptors = self._disown()
                if descriptors:
                    await driver.last_call(partial(close_all, descriptors))
        except OSError:
            raise
        except BaseException:
            self._left = True
            self.ended(None)
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

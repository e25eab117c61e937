"""L2: what a context does at many places of a file in one call, and the lanes it does that on.

Laws:

- A lane is used by one thread at a time: who takes it from the list has it, and puts it back after
  a job that ran to its end. One that an exception cut short is dropped, and waits for the kernel.
- None is left when the context has been closed: who comes back later closes it.
"""

from __future__ import annotations

from .syscalls import IOCB_CMD_PREAD, IOCB_CMD_PWRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, overload

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .bulk import BulkLane
    from .busypoll import BusyPoll
    from .pieces import Buffers, Numbers
    from .protocols import HasFileno
    from .queue import SubmissionQueue

__all__ = ["BulkCalls"]


class BulkCalls:
    """The part of a context that has the calls for many operations."""

    # Of the context, whose other parts set them.
    _queue: SubmissionQueue
    _use_ring: bool
    _busy: BusyPoll | None
    _closed: bool

    def __init__(self) -> None:
        #: Kernel contexts for `pread_many` and `pwrite_many`, that no thread uses just now.
        self._lanes: list[BulkLane] = []
        self._bulk_operations = 0
        self._bulk_calls = 0

    def _check(self) -> None:
        """Raise what says that the context can do nothing any more, if so."""
        raise NotImplementedError

    if TYPE_CHECKING:

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: int,
            out: None = None,
            *,
            lengths: Numbers | None = None,
        ) -> bytearray: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: None = None,
            out: None = None,
            *,
            lengths: Numbers,
        ) -> bytearray: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: int,
            out: WriteableBuffer | Buffers,
            *,
            lengths: Numbers | None = None,
        ) -> int: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: None = None,
            *,
            out: WriteableBuffer | Buffers,
            lengths: Numbers,
        ) -> int: ...

        @overload
        def pread_many(
            self,
            fd: int | HasFileno,
            offsets: Numbers,
            nbytes: None = None,
            *,
            out: Buffers,
            lengths: Numbers | None = None,
        ) -> int: ...

    def pread_many(
        self,
        fd: int | HasFileno,
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

        A length may be 0, nbytes may not. The memory may not be resized before this returns. The
        operations have places in the kernel of their own, as many as nr_events, and none of them is
        seen by `reap`. Can block: until all have ended.

        Raises:
            BulkError: some were short or failed; all ran to their end, and the data of the others
                are valid.
            OSError: io_setup's, with advice; at the first call of each thread at a time.
            TypeError, ValueError: arguments that could not be right on any file, or do not agree;
                then nothing is started.
            ClosedError, ForkedError.
        """
        result: int | bytearray = self._many(
            IOCB_CMD_PREAD, fd, offsets, out, nbytes, lengths=lengths
        )
        return result

    def pwrite_many(
        self,
        fd: int | HasFileno,
        offsets: Numbers,
        data: ReadableBuffer | Sequence[ReadableBuffer],
        nbytes: int | None = None,
        *,
        lengths: Numbers | None = None,
    ) -> int:
        """Write at each of the offsets; how many bytes in all.

        data: one contiguous buffer, with nbytes or lengths, or a list or a tuple of buffers, as out
        of `pread_many`. With neither, one buffer is divided among the offsets, without rest. The
        order is not that of the offsets. Otherwise as `pread_many`.
        """
        written: int = self._many(IOCB_CMD_PWRITE, fd, offsets, data, nbytes, lengths=lengths)
        return written

    def _many(
        self,
        opcode: int,
        fd: int | HasFileno,
        offsets: Numbers,
        memory: Any,  # noqa: ANN401 - checked where it is pinned
        nbytes: int | None,
        *,
        lengths: Numbers | None,
    ) -> Any:  # noqa: ANN401 - bytes or their number
        self._check()
        from .bulk import Bulk, BulkLane  # noqa: PLC0415 - only for who uses it
        from .pieces import Pieces  # noqa: PLC0415

        pieces = Pieces(offsets, memory, nbytes, lengths, reading=opcode == IOCB_CMD_PREAD)
        job = Bulk(opcode, fd, pieces)
        if job.total:
            try:
                lane = self._lanes.pop()
            except IndexError:
                lane = BulkLane(
                    self._queue.max_offer,
                    portion=self._queue.max_batch,
                    force_syscalls=not self._use_ring,
                    busy=self._busy,
                )
            calls = lane.io_submit_calls
            lane.run(job)
            with self._queue.lock:
                self._bulk_operations += job.total
                self._bulk_calls += lane.io_submit_calls - calls
            self._lanes.append(lane)
            if self._closed:
                self._close_lanes()
            job.check()
        return pieces.total if pieces.made is None else pieces.made

    def _close_lanes(self) -> None:
        while True:
            try:
                lane = self._lanes.pop()
            except IndexError:  # maybe another thread has just closed it
                return
            lane.close()

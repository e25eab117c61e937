"""L1: the iocbs of one io_submit.

A request brings its iocb made (`Request._iocb`), but for the last field, aio_resfd, which is the
same in all iocbs of a slab. What changes from one submission to the next, aio_data and aio_offset,
is written here. The kernel copies iocbs and pointers during io_submit, so one slab serves each
batch in turn.
"""

from __future__ import annotations

import ctypes
import struct

from ._light import cache, itemgetter
from .request import IMAGE_SIZE, IOCB_SIZE, OPCODE_BYTE
from .syscalls import IOCB_CMD_POLL

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from .request import Request

__all__ = ["IocbSlab"]

# From how many requests on a column is cheaper than a store for each.
_FEW: Final = 4
_image_of: Final = itemgetter(0)
_offset_of: Final = itemgetter(1)


@cache
def _column(n: int) -> struct.Struct:
    """Packs n 64-bit words, in half the time that `array` takes."""
    return struct.Struct(f"={n}q")


class IocbSlab:
    """The iocbs of one io_submit, and the array of their addresses, which never moves.

    The kernel copies both during io_submit, so one slab serves each batch in turn.
    """

    __slots__ = (
        "_addresses",
        "_array",
        "_block",
        "_bytes",
        "_first",
        "_images",
        "_iocbs",
        "_own",
        "_pointer_block",
        "_pointers",
        "_polls",
        "_resfd",
        "_series",
        "_words",
        "address",
        "capacity",
    )

    def __init__(self, capacity: int, resfd: int) -> None:
        """capacity: requests in one batch. resfd: the eventfd that each completion signals."""
        from array import array  # noqa: PLC0415 - only for who has a context

        self.capacity = capacity
        self._array = array
        self._block = (ctypes.c_char * (IOCB_SIZE * capacity))()
        self._bytes = memoryview(self._block).cast("B")
        self._words = self._bytes.cast("q")
        # A token is made of 16 bits that count, 32 that are the same in all of a batch, which are
        # the first of each 16 words here, and 16 that hardly ever change.
        self._series = self._bytes[2:-2].cast("I")
        # The first token of as many as there are images, -1 when not all of them are written.
        self._first = -1
        # It stands between images, and behind the last one of a batch from the beginning on.
        self._resfd = struct.pack("=I", resfd)
        self._bytes[:] = (bytes(IMAGE_SIZE) + self._resfd) * capacity
        base = ctypes.addressof(self._block)
        self._addresses = [base + IOCB_SIZE * i for i in range(capacity)]
        self._pointer_block = (ctypes.c_uint64 * capacity)(*self._addresses)
        self._pointers = memoryview(self._pointer_block).cast("B").cast("Q")
        self._own: list[int] = []
        # What the first iocbs are, and their images alone; None while that is changed, or is not
        # known. The same requests often come again, and in the same batches.
        self._iocbs: list[tuple[bytes, int]] | None = None
        self._images: list[bytes] | None = None
        self._polls = False
        self.address = ctypes.addressof(self._pointer_block)

    def fill(self, first_token: int, batch: Sequence[Request]) -> None:
        """Write the iocbs of a batch, whose aio_data count up from first_token.

        first_token: a multiple of `SERIES`.
        """
        n = len(batch)
        words = self._words
        if self._own:
            for i in self._own:
                self._pointers[i] = self._addresses[i]
            self._own.clear()
        if n == 1:
            request = batch[0]
            image, offset = request._iocb
            known = self._images
            self._iocbs = None
            if not known or known[0] is not image:
                self._images = None
                self._bytes[:IMAGE_SIZE] = image
                self._images = [image]
            self._first = -1
            words[0] = first_token
            words[5] = offset
            if request._opcode == IOCB_CMD_POLL:
                self._fill_own(batch)
            return
        iocbs = [r._iocb for r in batch]
        if iocbs != self._iocbs:
            self._iocbs = None
            images, offsets = [*map(_image_of, iocbs)], map(_offset_of, iocbs)
            if images != self._images:
                self._images = None
                self._first = -1
                joined = self._resfd.join(images)
                self._bytes[: len(joined)] = joined
                self._polls = IOCB_CMD_POLL in joined[OPCODE_BYTE::IOCB_SIZE]
                self._images = images
            if n <= _FEW:
                for i, offset in enumerate(offsets):
                    words[8 * i + 5] = offset
            else:
                words[5 : 8 * n : 8] = memoryview(_column(n).pack(*offsets)).cast("q")
            self._iocbs = iocbs
        if first_token != self._first:
            self._number(first_token, n)
        if self._polls:
            self._fill_own(batch)

    def _number(self, first_token: int, n: int) -> None:
        """Write the n tokens from first_token on; when as many were there, what is another."""
        words = self._words
        same = first_token >> 48 == self._first >> 48
        self._first = -1
        if n <= _FEW:
            for i in range(n):
                words[8 * i] = first_token + i
        elif same:
            series = first_token >> 16 & 0xFFFF_FFFF
            self._series[0 : 16 * n : 16] = self._array("I", (series,)) * n
        else:
            words[0 : 8 * n : 8] = self._array("q", range(first_token, first_token + n))
        self._first = first_token

    def tokens(self, first_token: int, n: int) -> memoryview[int]:
        """The n tokens from first_token on, if they are those that were filled last.

        Otherwise others, or fewer: to be compared with what the kernel has completed, which has no
        token twice, and none that is not submitted.
        """
        words = self._words
        start = 8 * (first_token - words[0])
        return words[start : start + 8 * n : 8] if start >= 0 else words[:0]

    def _fill_own(self, batch: Sequence[Request]) -> None:
        for i, request in enumerate(batch):
            if request._opcode == IOCB_CMD_POLL:
                block, address = request.own_iocb()
                block[:] = self._bytes[IOCB_SIZE * i : IOCB_SIZE * (i + 1)]
                self._own.append(i)
                self._pointers[i] = address

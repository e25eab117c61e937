"""L1: the iocbs of one io_submit.

A request brings its iocb made (`Request._image`), but for the last field, aio_resfd, which is the
same in all iocbs of a slab. What changes from one submission to the next, aio_data and aio_offset,
is written here. The kernel copies iocbs and pointers during io_submit, so one slab serves each
batch in turn.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache

from .request import IMAGE_SIZE, IOCB_SIZE, OPCODE_BYTE
from .syscalls import Opcode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from .request import Request

__all__ = ["IocbSlab"]

_POLL: Final = Opcode.POLL
# From how many requests on a column is cheaper than a store for each.
_FEW: Final = 4


@cache
def _ramp(n: int) -> tuple[int, int]:
    """0, 1, 2, ... and 1, 1, 1, ... as n 64-bit words of one int: columns by arithmetic in C."""
    return sum(i << 64 * i for i in range(n)), sum(1 << 64 * i for i in range(n))


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
        "_block",
        "_bytes",
        "_images",
        "_offsets",
        "_own",
        "_pointer_block",
        "_pointers",
        "_polls",
        "_resfd",
        "_words",
        "address",
        "capacity",
    )

    def __init__(self, capacity: int, resfd: int) -> None:
        """capacity: requests in one batch. resfd: the eventfd that each completion signals."""
        self.capacity = capacity
        self._block = (ctypes.c_char * (IOCB_SIZE * capacity))()
        self._bytes = memoryview(self._block).cast("B")
        self._words = self._bytes.cast("q")
        # It stands between images, and behind the last one of a batch from the beginning on.
        self._resfd = struct.pack("=I", resfd)
        self._bytes[:] = (bytes(IMAGE_SIZE) + self._resfd) * capacity
        base = ctypes.addressof(self._block)
        self._addresses = [base + IOCB_SIZE * i for i in range(capacity)]
        self._pointer_block = (ctypes.c_uint64 * capacity)(*self._addresses)
        self._pointers = memoryview(self._pointer_block).cast("B").cast("Q")
        self._own: list[int] = []
        # What the iocbs were made of, from the first on, and their offsets; None while that is
        # changed, or is not known. The same requests often come again, and in the same batches.
        self._images: list[bytes] | None = None
        self._offsets: list[int] | None = None
        self._polls = False
        self.address = ctypes.addressof(self._pointer_block)

    def fill(self, first_token: int, batch: Sequence[Request]) -> None:
        """Write the iocbs of a batch, whose aio_data count up from first_token."""
        n = len(batch)
        words = self._words
        if self._own:
            for i in self._own:
                self._pointers[i] = self._addresses[i]
            self._own.clear()
        known = self._images
        if n == 1:
            request = batch[0]
            image = request._image
            if not known or known[0] is not image:
                self._images = self._offsets = None
                self._bytes[:IMAGE_SIZE] = image
                self._images = [image]
            words[0] = first_token
            self._offsets = None
            words[5] = request._offset
            if request._opcode is _POLL:
                self._fill_own(batch)
            return
        images = [r._image for r in batch]
        offsets = [r._offset for r in batch]
        if images != known:
            self._images = self._offsets = None
            joined = self._resfd.join(images)
            self._bytes[: len(joined)] = joined
            self._polls = _POLL in joined[OPCODE_BYTE::IOCB_SIZE]
            self._images = images
        if n <= _FEW:
            self._offsets = None
            for i, offset in enumerate(offsets):
                words[8 * i] = first_token + i
                words[8 * i + 5] = offset
        else:
            ramp, ones = _ramp(n)
            tokens = (ramp + first_token * ones).to_bytes(8 * n, "little")
            words[0 : 8 * n : 8] = memoryview(tokens).cast("q")
            if offsets != self._offsets:
                self._offsets = None
                words[5 : 8 * n : 8] = memoryview(_column(n).pack(*offsets)).cast("q")
                self._offsets = offsets
        if self._polls:
            self._fill_own(batch)

    def _fill_own(self, batch: Sequence[Request]) -> None:
        for i, request in enumerate(batch):
            if request._opcode is _POLL:
                block, address = request.own_iocb()
                block[:] = self._bytes[IOCB_SIZE * i : IOCB_SIZE * (i + 1)]
                self._own.append(i)
                self._pointers[i] = address

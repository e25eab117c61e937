"""L2: where many operations are, in the file and in memory, and how long each is.

Three shapes: equal, all of one length, packed one after another in one buffer; packed, each of its
own length, in one buffer too; scattered, each with a buffer of its own.

Laws:

- What is made here is right for any file: no offset is negative, the kernel takes each length as a
  whole, and there is memory for all of it.
- The memory is pinned for as long as the pieces live.
- Columns are made of columns, in C: only what is refused is looked at one by one. Of equal and
  packed pieces nothing is kept for each that was not given.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import cache
from itertools import accumulate
from operator import attrgetter, index

from . import syscalls
from .memory import _Anchor, contiguous, pin_destination, pin_source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Final, NoReturn

    from _typeshed import ReadableBuffer, WriteableBuffer

    Numbers = Sequence[int] | ReadableBuffer

    Buffers = Sequence[WriteableBuffer]

__all__ = ["MOST_OPERATIONS", "Pieces", "column"]

#: Operations of one call: with an index, 31 bits are left for it beside a length.
MOST_OPERATIONS: Final = (1 << 31) - (1 << 16)
# How many numbers are looked at together.
_CHUNK: Final = 1 << 13
_NBYTES: Final = attrgetter("nbytes")


def column(numbers: Numbers, what: str = "offset") -> memoryview:
    """Any sequence of ints as a column of 64-bit words; int64 buffers without a copy.

    what: one of the numbers is called so in errors.

    Raises:
        TypeError, ValueError: not ints, not within 0..2**63-1, or too many.
    """
    given: Any = numbers
    words: memoryview | None = None
    kind: Any = given.__class__
    if kind is list or kind is tuple:
        try:
            # "Q", because it is made of ints in half the time of "q".
            words = _words(array("Q", given))
        except OverflowError:
            pass  # a negative number, or worse
    elif kind is not range:
        try:
            view = memoryview(given)
        except TypeError:
            pass  # another sequence
        else:
            if view.format not in ("q", "l") or view.itemsize != 8 or view.ndim != 1:
                raise TypeError(
                    f"a buffer of {what}s must be of one dimension and int64, not of format "
                    f"{view.format!r} and {view.ndim} dimensions"
                )
            words = contiguous(view).cast("B").cast("q") if view.nbytes else memoryview(array("q"))
            given = words
    if words is None:
        words = _signed(given, what)
    n = len(words)
    if n > MOST_OPERATIONS:
        raise ValueError(f"{n} operations are too many for one call")
    for first in range(0, n, _CHUNK):
        # The highest byte of each, which no number has a use for that is not refused, or is
        # immense. Bytes are sliced and compared at a tenth of what a view of them takes.
        high = words[first : first + _CHUNK].tobytes()[7::8]
        if high != bytes(len(high)) and max(high) > 127:
            _signed(given, what)
            bad = next(i for i in range(first, n) if words[i] < 0)
            raise ValueError(f"{what} {bad} is negative: {words[bad]}")
    return words


def _signed(given: Any, what: str) -> memoryview:  # noqa: ANN401 - is looked at here
    """A column of what may be negative."""
    try:
        return memoryview(array("q", given))
    except OverflowError:
        raise ValueError(f"{what}s have to be within 0..2**63-1; one is beyond") from None


def _words(unsigned: array[int]) -> memoryview:
    """What is in an array("Q"), as signed words."""
    # An empty view cannot be cast.
    return memoryview(unsigned).cast("B").cast("q") if unsigned else memoryview(array("q"))


@cache
def _ramp(n: int) -> tuple[int, int]:
    """0, 1, 2, ... and 1, 1, 1, ... as n 64-bit words of one int: columns by arithmetic in C."""
    return (
        int.from_bytes(array("Q", range(n)).tobytes(), "little"),
        int.from_bytes((array("Q", [1]) * n).tobytes(), "little"),
    )


class Pieces:
    """Many operations: the i-th is at offsets[i] of the file."""

    __slots__ = (
        "_addresses",
        "_anchor",
        "_bytes",
        "_mark",
        "_run",
        "_step",
        "address",
        "lengths",
        "made",
        "memory",
        "nbytes",
        "offsets",
        "total",
        "views",
    )

    def __init__(
        self,
        offsets: Numbers,
        memory: ReadableBuffer | WriteableBuffer | Sequence[ReadableBuffer] | None,
        nbytes: int | None = None,
        lengths: Numbers | None = None,
        *,
        reading: bool,
    ) -> None:
        """memory: one buffer; a list or a tuple of them; None, to read into a new bytearray.

        nbytes: of each, or lengths; both may be left out with several buffers, and nbytes when one
        is written from, which is divided among the offsets then.

        Raises:
            TypeError, ValueError: what could not be right on any file; it names the first index
                at which something is wrong.
        """
        self.offsets = column(offsets)
        #: Of each operation, where all are equal; otherwise the lengths are in a column.
        self.nbytes: int | None = None
        self.lengths: memoryview | None = None
        #: Of the first, where they are not scattered.
        self.address = 0
        #: What was made to be read into.
        self.made: bytearray | None = None
        #: One buffer, or one for each.
        self.memory: memoryview | None = None
        self.views: Sequence[memoryview] = ()
        self._addresses: memoryview | None = None
        self._bytes: memoryview | None = None
        # Of equal pieces, the last stretch: its length, its first, and its addresses as one int;
        # and what was added to those of the one before, so many operations further.
        self._run = 0, 0, 0
        self._step = 0, 0
        self._anchor: object = None
        if isinstance(memory, (list, tuple)):
            self._scatter(memory, nbytes, lengths, reading)
            return
        one: Any = memory
        n = len(self.offsets)
        if lengths is not None:
            self.lengths = column(lengths, "length")
            self._as_many(len(self.lengths), "length")
            self.total = _sum(self.lengths)
            self._agree(self.lengths, nbytes, None)
        else:
            if nbytes is None:
                if reading:
                    raise TypeError("nbytes, lengths, or a list of buffers is needed")
                nbytes = _evenly(contiguous(one).nbytes, n)
            self.nbytes = nbytes = index(nbytes)
            if not 1 <= nbytes <= syscalls.MAX_RW_COUNT:
                raise ValueError(f"nbytes must be within 1..{syscalls.MAX_RW_COUNT}, not {nbytes}")
            self.total = n * nbytes
        if one is None:
            one = self.made = bytearray(self.total)
        self.address, size, self._anchor = pin_destination(one) if reading else pin_source(one)
        if size != self.total:
            what = f"{n} operations of {nbytes} bytes" if lengths is None else f"{n} operations"
            raise ValueError(f"{what} need {self.total} bytes of memory, not {size}")
        self.memory = memoryview(one)
        self._mark = 0, self.address

    def __len__(self) -> int:
        """How many operations there are."""
        return len(self.offsets)

    def _scatter(
        self,
        buffers: Sequence[Any],
        nbytes: int | None,
        lengths: Numbers | None,
        reading: bool,
    ) -> None:
        buffers = tuple(buffers)  # nobody changes these
        self._as_many(len(buffers), "buffer")
        try:
            views = [memoryview(buffer) for buffer in buffers]
            self.views = views
            self._addresses = _addresses(buffers, views, reading)
        except (TypeError, ValueError, BufferError):
            _refuse_first(buffers, pin_destination if reading else pin_source)
        self.lengths = _words(array("Q", list(map(_NBYTES, views))))
        self.total = _sum(self.lengths)
        self._agree(self.lengths, nbytes, lengths)

    def _as_many(self, there: int, what: str) -> None:
        n = len(self.offsets)
        if there != n:
            missing = what if there < n else "offset"
            raise ValueError(
                f"{there} {what}s and {n} offsets: operation {min(there, n)} has no {missing}"
            )

    def _agree(self, lengths: memoryview, nbytes: int | None, also: Numbers | None) -> None:
        """Refuse what was said twice, and not the same."""
        if nbytes is not None:
            nbytes = index(nbytes)
            for first in range(0, len(lengths), _CHUNK):
                part = lengths[first : first + _CHUNK].tolist()
                if part.count(nbytes) != len(part):
                    bad = first + next(i for i, length in enumerate(part) if length != nbytes)
                    raise ValueError(
                        f"operation {bad} is of {lengths[bad]} bytes, and nbytes is {nbytes}"
                    )
        if also is not None:
            said = column(also, "length")
            self._as_many(len(said), "length")
            if said != lengths:
                bad = next(i for i, length in enumerate(lengths) if length != said[i])
                raise ValueError(
                    f"operation {bad} has a buffer of {lengths[bad]} bytes, and length {said[bad]}"
                )

    # -- for lanes ------------------------------------------------------------------------------

    def stretch(self, first: int, n: int) -> tuple[memoryview, memoryview | None]:
        """Where n of them are in memory, and their lengths where they differ: 64-bit words.

        For calls that go on from one to the next: what is before the first is passed over once.

        Raises:
            RuntimeError: the caller's lengths are not what they were.
        """
        if self._addresses is not None:
            assert self.lengths is not None
            return self._addresses[first : first + n], self.lengths[first : first + n]
        if self.lengths is None:
            return self._progression(first, n), None
        # A copy, because the caller's buffer may change under way, and an address must not.
        lengths = array("q", self.lengths[first : first + n].tobytes())
        before, address = self._mark
        if before > first:
            before, address = 0, self.address
        while before < first:
            stop = min(before + _CHUNK, first)
            address += sum(self.lengths[before:stop].tolist())
            before = stop
        places = list(accumulate(lengths.tolist(), initial=address))
        if (
            min(lengths) < 0
            or not self.address <= address <= places[n] <= self.address + self.total
        ):
            raise RuntimeError("lengths were changed while they were used")
        self._mark = first + n, places[n]
        return _words(array("Q", places))[:n], memoryview(lengths)

    def _progression(self, first: int, n: int) -> memoryview:
        nbytes = self._equal
        # Few lengths, because what is made of each is kept; beyond the last one none is used.
        length = 1 << (n - 1).bit_length()
        ramp, ones = _ramp(length)
        known, before, addresses = self._run
        if known == length and before < first:
            # From the stretch before: what is added to each is the same.
            step, added = self._step
            if step != first - before:
                added = (first - before) * nbytes * ones
                self._step = first - before, added
            addresses += added
        else:
            addresses = ramp * nbytes + (self.address + first * nbytes) * ones
        self._run = length, first, addresses
        return memoryview(addresses.to_bytes(8 * length, "little")).cast("q")[:n]

    # -- for files ------------------------------------------------------------------------------

    def part(self, first: int, n: int) -> Pieces:
        """Some of them, n from the first-th on. To be called in order, as `stretch`."""
        part = Pieces.__new__(Pieces)
        part.offsets = self.offsets[first : first + n]
        part.nbytes = self.nbytes
        part.views = self.views[first : first + n]
        part._anchor = self._anchor
        part.made = part.memory = part._bytes = part._addresses = None
        part._run, part._step = (0, 0, 0), (0, 0)
        if self.lengths is None:
            part.lengths = None
            part.total = n * self._equal
            part.address = self.address + first * self._equal
        else:
            part._addresses, part.lengths = self.stretch(first, n)
            assert part.lengths is not None
            part.total = sum(part.lengths)
            part.address = part._addresses[0]
        if self.memory is not None:
            if self._bytes is None:
                self._bytes = _as_bytes(self.memory)
            start = part.address - self.address
            part.memory = self._bytes[start : start + part.total]
        return part

    @property
    def addresses(self) -> Sequence[int]:
        """Where each of a part is in memory."""
        if self._addresses is not None:
            return self._addresses
        nbytes = self._equal
        return range(self.address, self.address + self.total, nbytes)

    def length(self, i: int) -> int:
        """How many bytes the i-th is of."""
        length: int = self._equal if self.lengths is None else self.lengths[i]
        return length

    def view(self, i: int) -> memoryview:
        """The bytes of the i-th of a part."""
        if self.memory is None:
            return _as_bytes(self.views[i])
        start = self.addresses[i] - self.address
        return self.memory[start : start + self.length(i)]

    @property
    def _equal(self) -> int:
        assert self.nbytes is not None
        return self.nbytes


def _as_bytes(view: memoryview) -> memoryview:
    if view.format == "B" and view.ndim == 1:
        return view
    # An array with a 0 in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def _evenly(size: int, n: int) -> int:
    """How many bytes there are for each of n operations, without rest."""
    if not n:
        if size:
            raise ValueError(f"{size} bytes of data, and no offsets for them")
        return 1
    if size % n:
        raise ValueError(f"{size} bytes of data cannot be divided among {n} offsets evenly")
    return size // n


def _sum(lengths: memoryview) -> int:
    """All lengths together; refuse, by ValueError, what the kernel would cut."""
    total = 0
    for first in range(0, len(lengths), _CHUNK):
        part = lengths[first : first + _CHUNK].tolist()
        if max(part) > syscalls.MAX_RW_COUNT:
            bad = first + next(i for i, n in enumerate(part) if n > syscalls.MAX_RW_COUNT)
            raise ValueError(
                f"operation {bad} is of {lengths[bad]} bytes, more than {syscalls.MAX_RW_COUNT}"
            )
        total += sum(part)
    return total


def _addresses(buffers: Sequence[Any], views: list[memoryview], reading: bool) -> memoryview:
    """Where each buffer is; views export them.

    Raises:
        TypeError, ValueError, BufferError: one cannot be had, or is read-only.
    """
    if not reading and set(map(type, buffers)) == {bytes}:
        pointers = (ctypes.c_char_p * len(buffers))(*buffers)
        return memoryview(bytes(pointers)).cast("q")
    try:
        anchors: Any = map(_Anchor.from_buffer, views)
        places = array("Q", list(map(ctypes.addressof, anchors)))
    except TypeError:
        if reading:
            raise
        places = array("Q", [pin_source(view).address for view in views])
    return _words(places)


def _refuse_first(buffers: Sequence[Any], pin: Callable[[Any], object]) -> NoReturn:
    """Say which of them cannot be pinned, and why."""
    for i, buffer in enumerate(buffers):
        try:
            pin(buffer)
        except (TypeError, ValueError, BufferError) as error:
            raise type(error)(f"buffer {i}: {error}") from None
    raise TypeError("a buffer cannot be pinned")

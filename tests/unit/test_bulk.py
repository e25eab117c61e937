"""Columns, where each of many operations is, and the error that names what was not whole."""

from __future__ import annotations

import ctypes
import errno
import mmap
from array import array
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rawaio
from rawaio import pieces as module
from rawaio.pieces import MOST_OPERATIONS, Pieces, column
from rawaio.syscalls import MAX_RW_COUNT

OFFSETS = st.integers(0, (1 << 63) - 1)


@given(st.lists(OFFSETS))
def test_a_column_is_what_was_given(offsets: list[int]) -> None:
    for given_as in (offsets, tuple(offsets), array("q", offsets), memoryview(array("q", offsets))):
        words = column(given_as)
        assert words.tolist() == offsets
        assert words.format == "q"


def test_a_range_is_a_column() -> None:
    assert column(range(0, 40960, 4096)).tolist() == list(range(0, 40960, 4096))
    assert column(range(0)).tolist() == []


def test_int64_buffers_are_not_copied() -> None:
    offsets = array("q", [1, 2, 3])
    words = column(offsets)
    offsets[1] = 7
    assert words.tolist() == [1, 7, 3]


def test_numpy_arrays_are_columns() -> None:
    numpy = pytest.importorskip("numpy", reason="NumPy is not installed")
    assert column(numpy.arange(5, dtype=numpy.int64)).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(TypeError, match="int64"):
        column(numpy.arange(5, dtype=numpy.int32))
    with pytest.raises(TypeError, match="2 dimensions"):
        column(numpy.zeros((2, 2), dtype=numpy.int64))
    with pytest.raises(TypeError, match="contiguous"):
        column(numpy.arange(10, dtype=numpy.int64)[::2])


@given(st.lists(OFFSETS, min_size=1), st.integers(-(1 << 63), -1), st.data())
def test_a_negative_offset_is_refused(offsets: list[int], bad: int, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, len(offsets) - 1))
    offsets[i] = bad
    for wrong in (offsets, array("q", offsets)):
        with pytest.raises(ValueError, match=f"offset {i} is negative: {bad}$"):
            column(wrong)


@pytest.mark.parametrize("bad", [1 << 63, -(1 << 63) - 1, 1 << 200])
def test_an_offset_of_more_than_64_bits_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match="beyond"):
        column([0, bad])


@pytest.mark.parametrize("bad", [[0, "1"], [0.5], 7, None, b"12345678", array("d", [1.0])])
def test_what_are_no_ints_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError):
        column(bad)


def test_sizes_that_do_not_fit_are_refused() -> None:
    offsets = [0, 1, 2]
    assert Pieces(offsets, bytearray(12), 4, reading=True).total == 12
    for nbytes, size in ((4, 11), (4, 13), (5, 12)):
        with pytest.raises(ValueError, match="bytes of memory"):
            Pieces(offsets, bytearray(size), nbytes, reading=True)
    for nbytes in (0, -1, 0x7FFFF001):
        with pytest.raises(ValueError, match="nbytes"):
            Pieces(offsets, bytearray(), nbytes, reading=True)


def test_data_are_divided_evenly() -> None:
    assert Pieces([0, 1, 2], bytes(12), reading=False).nbytes == 4
    assert Pieces([0, 1, 2], array("i", [1, 2, 3]), reading=False).nbytes == 4
    assert Pieces([], b"", reading=False).total == 0
    with pytest.raises(ValueError, match="evenly"):
        Pieces([0, 1, 2], bytes(13), reading=False)
    with pytest.raises(ValueError, match="no offsets"):
        Pieces([], b"x", reading=False)


# -- where each of them is -------------------------------------------------------------------------

SHAPES = ["equal", "packed", "scattered"]
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=40)


def address_of(buffer: bytearray | memoryview) -> int:
    return ctypes.addressof((ctypes.c_char * 0).from_buffer(buffer))


def pieces_of(shape: str, lengths: list[int]) -> tuple[Pieces, list[tuple[int, int]]]:
    """Pieces, and address and length of each, found in another way. Equal ones are as the first."""
    offsets = range(len(lengths))
    if shape == "scattered":
        buffers = [bytearray(n) for n in lengths]
        found = [(address_of(buffer), len(buffer)) for buffer in buffers]
        return Pieces(offsets, buffers, reading=True), found
    nbytes = lengths[0] + 1
    if shape == "equal":
        lengths = [nbytes] * len(lengths)
    memory = bytearray(sum(lengths))
    starts = accumulate(lengths, initial=address_of(memory))
    made = (
        Pieces(offsets, memory, nbytes, reading=True)
        if shape == "equal"
        else Pieces(offsets, memory, lengths=lengths, reading=True)
    )
    return made, list(zip(starts, lengths, strict=False))


@pytest.mark.parametrize("shape", SHAPES)
@given(LENGTHS, st.lists(st.integers(1, 20)), st.data())
def test_stretches_tell_where_each_is(
    shape: str, lengths: list[int], sizes: list[int], data: st.DataObject
) -> None:
    """In order, whatever their lengths, and again from anywhere."""
    pieces, expected = pieces_of(shape, lengths)
    assert pieces.total == sum(length for _, length in expected)
    assert (pieces.nbytes is None) == (shape != "equal")

    def told(first: int, n: int) -> list[tuple[int, int]]:
        addresses, column = pieces.stretch(first, n)
        assert addresses.format == "q"
        assert (column is None) == (shape == "equal")
        lengths = [pieces.nbytes or 0] * n if column is None else column.tolist()
        return list(zip(addresses.tolist(), lengths, strict=True))

    first = 0
    for size in (*sizes, 1000):
        n = min(size, len(lengths) - first)
        if n:
            assert told(first, n) == expected[first : first + n]
        first += n
    again = data.draw(st.integers(0, len(lengths) - 1))
    n = data.draw(st.integers(1, len(lengths) - again))
    assert told(again, n) == expected[again : again + n]


def test_stretches_of_like_lengths_go_on_from_each_other() -> None:
    """Each is made of the one before, however much further it begins, and back."""
    pieces = Pieces(range(100), None, 3, reading=True)
    sizes = (5, 6, 8, 8, 7, 5, 5, 6)
    told = list(zip(accumulate(sizes, initial=0), sizes, strict=False))
    told += [(first, 6) for first in (0, 5, 11, 27, 3, 13, 13, 1, 2, 40)]
    for first, n in told:
        addresses, _ = pieces.stretch(first, n)
        assert addresses.tolist() == [pieces.address + 3 * i for i in range(first, first + n)]


@pytest.mark.parametrize("begun", [0, 3])
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_stretches_of_one(part: bool, begun: int) -> None:
    pieces = Pieces(range(9), None, 3, reading=True)
    if part:
        pieces = pieces.part(2, 7)
    for i in range(begun, 7):
        assert pieces.stretch(i, 1)[0].tolist() == [pieces.address + 3 * i]


@pytest.mark.parametrize("shape", SHAPES)
@given(LENGTHS, st.data())
def test_parts_are_some_of_them(shape: str, lengths: list[int], data: st.DataObject) -> None:
    pieces, expected = pieces_of(shape, lengths)
    first = data.draw(st.integers(0, len(lengths) - 1))
    n = data.draw(st.integers(1, len(lengths) - first))
    part = pieces.part(first, n)
    assert part.offsets.tolist() == list(range(first, first + n))
    expected = expected[first : first + n]
    assert part.total == sum(length for _, length in expected)
    assert list(part.addresses) == [address for address, _ in expected]
    for i, (address, length) in enumerate(expected):
        view = part.view(i)
        assert (view.nbytes, view.format, part.length(i)) == (length, "B", length)
        if length:
            assert address_of(view) == address
    again = part.part(0, n)
    assert list(again.addresses) == [address for address, _ in expected]


def test_parts_of_many_are_made_of_columns() -> None:
    """Beyond what is looked at together, forwards and back."""
    lengths = array("q", [1, 2, 3]) * 10_000
    pieces = Pieces(range(30_000), None, lengths=lengths, reading=True)
    for first in (29_998, 9_999, 0, 20_000):
        start = 6 * (first // 3) + (0, 1, 3)[first % 3]
        assert pieces.part(first, 2).addresses[0] == pieces.address + start


BUFFERS: list[Any] = [
    b"bytes",
    bytearray(b"bytearray"),
    memoryview(b"read-only"),
    memoryview(bytearray(b"writable"))[2:],
    array("i", [1, 2, 3]),
    memoryview(array("d", [1.0])),
    b"",
    bytearray(),
    array("d"),
    (ctypes.c_short * 2 * 0)(),
    memoryview(b"abcdef").cast("B", (2, 3)),
]


@pytest.mark.parametrize(
    "buffers",
    [[], [b"a", b"", b"bcd"], BUFFERS, BUFFERS[1:2] * 3, tuple(BUFFERS[3:6])],
    ids=["none", "bytes", "all kinds", "one again and again", "writable"],
)
def test_any_buffers_can_be_written_from(buffers: Any) -> None:
    pieces = Pieces(range(len(buffers)), buffers, reading=False)
    assert pieces.total == sum(memoryview(buffer).nbytes for buffer in buffers)
    if buffers:
        addresses, lengths = pieces.stretch(0, len(buffers))
        assert lengths is not None
        assert addresses.format == lengths.format == "q"
        for address, length, buffer in zip(addresses, lengths, buffers, strict=True):
            assert ctypes.string_at(address, length) == bytes(buffer)


@pytest.mark.parametrize("buffer", [*BUFFERS, memoryview(bytearray(12)).cast("b", (3, 4))])
def test_views_are_bytes_of_any_buffer(buffer: Any) -> None:
    nbytes = memoryview(buffer).nbytes
    scattered = Pieces([0, 1], [b"before", buffer], reading=False).part(0, 2)
    packed = Pieces([0, 1], buffer, lengths=[0, nbytes], reading=False).part(0, 2)
    for pieces in (scattered, packed):
        view = pieces.view(1)
        assert (view.format, view.shape) == ("B", (nbytes,))
        assert view == memoryview(buffer).tobytes()


def test_buffers_are_pinned() -> None:
    one, several, packed = bytearray(8), [bytearray(4), bytearray(4)], bytearray(8)
    pieces = [
        Pieces([0, 1], one, 4, reading=True),
        Pieces([0, 1], several, reading=True),
        Pieces([0, 1], packed, lengths=[3, 5], reading=False),
    ]
    parts = [each.part(1, 1) for each in pieces]
    for held in (pieces, parts):
        for buffer in (one, several[1], packed):
            with pytest.raises(BufferError):
                buffer.append(0)
        held.clear()
    for buffer in (one, *several, packed):
        buffer.append(0)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    # Nothing says how much.
    ({"memory": bytearray(4)}, TypeError, "nbytes, lengths, or a list"),
    ({"memory": None}, TypeError, "nbytes, lengths, or a list"),
    # As many of each.
    ({"memory": bytearray(4), "lengths": [4]}, ValueError, "operation 1 has no length"),
    ({"memory": bytearray(4), "lengths": [1, 1, 2]}, ValueError, "operation 2 has no offset"),
    ({"memory": [bytearray(4)]}, ValueError, "operation 1 has no buffer"),
    ({"memory": (bytearray(4),) * 3}, ValueError, "operation 2 has no offset"),
    # What is said twice.
    ({"memory": None, "lengths": [4, 5], "nbytes": 4}, ValueError, "operation 1 is of 5 bytes"),
    (
        {"memory": [bytearray(4), bytearray(3)], "nbytes": 4},
        ValueError,
        "operation 1 is of 3 bytes, and nbytes is 4",
    ),
    (
        {"memory": [bytearray(4), bytearray(3)], "lengths": [4, 4]},
        ValueError,
        "operation 1 has a buffer of 3 bytes, and length 4",
    ),
    (
        {"memory": [bytearray(4), bytearray(3)], "lengths": [4]},
        ValueError,
        "operation 1 has no length",
    ),
    (
        {"memory": [bytearray(4), bytearray(3)], "lengths": [4, -3]},
        ValueError,
        "length 1 is negative: -3",
    ),
    # What is no length, or no memory.
    ({"memory": bytearray(4), "lengths": [5, -1]}, ValueError, "length 1 is negative: -1"),
    ({"memory": None, "lengths": [1 << 63, 0]}, ValueError, "lengths .* beyond"),
    ({"memory": None, "lengths": [1 << 64, 0]}, ValueError, "lengths .* beyond"),
    ({"memory": None, "lengths": [0, 0x7FFFF001]}, ValueError, "operation 1 is of 2147479553"),
    ({"memory": None, "lengths": [0x7FFFF000, 0x7FFFF001]}, ValueError, "operation 1 is of"),
    ({"memory": None, "lengths": [0.5, 1]}, TypeError, "float"),
    ({"memory": None, "lengths": 4}, TypeError, "int"),
    ({"memory": None, "nbytes": 4.0}, TypeError, "float"),
    ({"memory": None, "nbytes": None, "lengths": array("i", [1, 1])}, TypeError, "of lengths"),
    (
        {"memory": bytearray(8), "lengths": [4, 3]},
        ValueError,
        "^2 operations need 7 bytes of memory, not 8",
    ),
    (
        {"memory": bytearray(9), "nbytes": 4},
        ValueError,
        "^2 operations of 4 bytes need 8 bytes of memory, not 9",
    ),
    ({"memory": b"12345678", "nbytes": 4}, TypeError, "read-only"),
    ({"memory": [bytearray(4), b"123"]}, TypeError, "buffer 1: .*read-only"),
    ({"memory": [b"1234", b"123"]}, TypeError, "buffer 0: .*read-only"),
    ({"memory": [bytearray(4), 7]}, TypeError, "buffer 1: a buffer is needed"),
    ({"memory": [bytearray(4), memoryview(bytearray(8))[::2]]}, TypeError, "buffer 1: .*contig"),
    ({"memory": "text", "nbytes": 2}, TypeError, "a buffer is needed"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), REFUSED)
def test_what_cannot_be_right_is_refused(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        Pieces([0, 8], reading=True, **arguments)


def test_what_is_written_has_to_be_contiguous() -> None:
    with pytest.raises(TypeError, match="buffer 1: .*contiguous"):
        Pieces([0, 8], [b"1234", memoryview(b"12345678")[::2]], reading=False)


def test_what_is_said_twice_may_agree() -> None:
    for memory in (None, [bytearray(4), bytearray(4)]):
        assert Pieces([0, 8], memory, 4, lengths=array("q", [4, 4]), reading=True).total == 8
    assert Pieces([], [], 4, lengths=[], reading=True).total == 0


@pytest.mark.parametrize("bad", [0, 9_000, 19_999])
def test_of_many_the_first_that_does_not_agree_is_named(bad: int) -> None:
    lengths = array("q", [1]) * 20_000
    offsets = range(len(lengths))
    assert Pieces(offsets, None, 1, lengths=lengths, reading=True).total == 20_000
    lengths[bad] = lengths[-1] = 2
    with pytest.raises(ValueError, match=f"operation {bad} is of 2 bytes, and nbytes is 1"):
        Pieces(offsets, None, 1, lengths=lengths, reading=True)


def test_the_longest_that_the_kernel_takes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(MAX_RW_COUNT)
        pages = mmap.mmap(file.fileno(), 0)
    assert Pieces([0], pages, lengths=[MAX_RW_COUNT], reading=True).total == MAX_RW_COUNT
    assert Pieces([0], pages, MAX_RW_COUNT, reading=True).total == MAX_RW_COUNT


def test_lengths_of_nothing() -> None:
    pieces = Pieces([5, 6], None, lengths=[0, 0], reading=True)
    assert pieces.total == 0
    assert pieces.made == bytearray()
    assert pieces.part(0, 2).view(1).nbytes == 0


def test_lengths_that_change_meanwhile_write_nowhere_else() -> None:
    """An address beyond the memory is not made, whatever the caller does to the buffer."""
    beyond = [0, -(1 << 62), 1], [(1 << 63) - 1] * 3
    for changed in ([2, 9, 4], [2, -3, 4], [9, 3, 4], [2, -3, 10], [12, -5, 2], *beyond):
        for n in (1, 3):
            lengths = array("q", [2, 3, 4])
            pieces = Pieces(range(3), None, lengths=lengths, reading=True)
            lengths[:] = array("q", changed)
            with pytest.raises(RuntimeError, match="changed"):
                [pieces.stretch(first, n) for first in range(0, 3, n)]


def test_the_first_negative_one_is_named() -> None:
    for bad in (9_000, 19_999):
        # Where 0 comes before it, too.
        offsets = array("q", [0, 1]) * 10_000
        offsets[bad] = offsets[-1] = -7
        for wrong in (offsets, offsets.tolist()):
            with pytest.raises(ValueError, match=f"offset {bad} is negative: -7"):
                column(wrong)


def test_offsets_that_need_all_of_63_bits() -> None:
    offsets = [(1 << 63) - 1] * 10_000
    assert column(offsets).tolist() == offsets


def test_more_operations_than_there_are_indexes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("w+b") as file:
        file.truncate(8 * (MOST_OPERATIONS + 1))
        pages = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
    # The index is the upper half of a signed word.
    assert MOST_OPERATIONS <= 1 << 31
    with pytest.raises(ValueError, match="too many"):
        column(pages)
    assert len(column(pages[:100_000])) == 100_000


def test_as_many_operations_as_there_are_indexes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OPERATIONS", 3)
    assert len(column(range(3))) == 3
    with pytest.raises(ValueError, match="4 operations are too many"):
        column(range(4))


# -- what is raised --------------------------------------------------------------------------------


def test_the_error_names_what_was_not_whole() -> None:
    error = rawaio.BulkError({7: (0, 100), 3: (errno.EIO, 0), 9: (errno.ENOSPC, 512)}, 10, 4096)
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO
    assert error.indexes == [3, 7, 9]
    assert error.errors == {3: errno.EIO, 7: 0, 9: errno.ENOSPC}
    assert error.counts == {3: 0, 7: 100, 9: 512}
    assert error.total == 10
    assert "of 10 operations of 4096 bytes 2 failed and 1 were short" in str(error)
    assert "3: Input/output error, 7: 100 bytes, 9: No space left" in str(error)


def test_the_error_stays_short() -> None:
    error = rawaio.BulkError(dict.fromkeys(range(1000), (errno.EIO, 0)), 1000, 1)
    assert len(str(error)) < 300
    assert len(error.indexes) == 1000


def test_only_short_operations_have_no_errno() -> None:
    error = rawaio.BulkError({0: (0, 1)}, 1, 2)
    assert error.errno == 0
    assert "1 were short" in str(error)


def test_operations_of_several_lengths_have_no_length_in_common() -> None:
    error = rawaio.BulkError({1: (0, 3)}, 2)
    assert "of 2 operations 1 were short (1: 3 bytes)" in str(error)

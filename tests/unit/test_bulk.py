"""Columns of offsets, sizes that fit together, and the error that names what was not whole."""

from __future__ import annotations

import errno
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rawaio
from rawaio.pieces import Pieces, column

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
    offsets[data.draw(st.integers(0, len(offsets) - 1))] = bad
    with pytest.raises(ValueError, match="negative"):
        column(offsets)
    with pytest.raises(ValueError, match="negative"):
        column(array("q", offsets))


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

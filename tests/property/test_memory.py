"""Aligned buffers and pins, for all sizes and shapes."""

from __future__ import annotations

import ctypes
import mmap
from array import array
from math import prod
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rawaio import aligned_buffer
from rawaio.memory import pin_destination, pin_source
from tests.support import address_of

NO_DEADLINE = settings(deadline=None)  # an emulated machine is slow, not wrong

SIZES = st.one_of(
    st.integers(0, 3 * mmap.PAGESIZE),
    st.sampled_from([k * mmap.PAGESIZE + d for k in range(4) for d in (-1, 0, 1)]).filter(
        lambda n: n >= 0
    ),
)
IntFormat = Literal["b", "B", "h", "H", "i", "I", "q", "Q"]
FORMATS: list[IntFormat] = ["b", "B", "h", "H", "i", "I", "q", "Q"]


@NO_DEADLINE
@given(SIZES, st.integers(0, 21).map(lambda i: 1 << i))
def test_every_aligned_buffer(nbytes: int, alignment: int) -> None:
    buffer = aligned_buffer(nbytes, alignment)
    assert buffer.nbytes == nbytes
    assert pin_destination(buffer).address % alignment == 0
    assert buffer.tobytes() == bytes(nbytes)
    data = bytes(i * 37 % 251 for i in range(nbytes))
    buffer[:] = data
    assert ctypes.string_at(pin_source(buffer).address, nbytes) == data


@NO_DEADLINE
@given(st.integers(-(2**40), 2**40).filter(lambda n: n < 1 or n & (n - 1)))
def test_every_other_alignment_is_refused(alignment: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        aligned_buffer(1, alignment)


@st.composite
def views(draw: st.DrawFn) -> memoryview:
    """A view of some bytes: sliced, strided, cast, of several dimensions, read-only."""
    code = draw(st.sampled_from(FORMATS))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    items = prod(shape)
    raw = draw(st.binary(min_size=items * 8, max_size=items * 8))
    data = raw[: items * array(code).itemsize]
    owner = draw(st.sampled_from(["bytes", "bytearray", "array"]))
    if owner == "array":
        it = array(code)
        it.frombytes(data)
        view = memoryview(it)
    else:
        view = memoryview(data if owner == "bytes" else bytearray(data)).cast(code)
    if len(shape) > 1:
        view = view.cast("B").cast(code, tuple(shape))
    start = draw(st.integers(0, shape[0]))
    stop = draw(st.integers(0, shape[0]))
    step = draw(st.sampled_from([1, 1, 1, 2, -1]))
    view = view[start:stop:step]
    return view.toreadonly() if draw(st.booleans()) else view


@NO_DEADLINE
@given(views())
@example(memoryview(b""))
@example(memoryview(bytearray()))
def test_every_view(view: memoryview) -> None:
    expected = view.tobytes()
    if not view.c_contiguous:
        for pin in (pin_source, pin_destination):
            with pytest.raises(TypeError, match="contiguous"):
                pin(view)
        return
    source = pin_source(view)
    assert source.nbytes == len(expected)
    assert ctypes.string_at(source.address, source.nbytes) == expected
    if view.readonly:
        with pytest.raises(TypeError, match="read-only memoryview"):
            pin_destination(view)
        return
    destination = pin_destination(view)
    assert destination[:2] == source[:2]
    new = bytes(b ^ 0x5A for b in expected)
    ctypes.memmove(destination.address, new, len(new))
    assert view.tobytes() == new


@NO_DEADLINE
@given(st.binary(max_size=64), st.integers(0, 64), st.integers(0, 64))
def test_the_address_of_a_slice_is_that_of_its_first_byte(
    data: bytes, start: int, stop: int
) -> None:
    owner = bytearray(data or b"x")
    part = memoryview(owner)[start:stop]
    if part.nbytes:
        first = len(range(len(owner))[:start])
        for pin in (pin_source, pin_destination):
            assert pin(part).address == address_of(owner) + first


@NO_DEADLINE
@given(st.sampled_from(["bytearray", "array"]), st.integers(0, 100), st.integers(1, 4))
def test_a_buffer_is_held_until_its_last_pin_is_gone(kind: str, nbytes: int, pins: int) -> None:
    buffer = bytearray(nbytes) if kind == "bytearray" else array("b", bytes(nbytes))
    held = [(pin_source, pin_destination)[i % 2](buffer) for i in range(pins)]
    while held:
        with pytest.raises(BufferError):
            buffer.append(1)
        held.pop()
    buffer.append(1)
    assert len(buffer) == nbytes + 1

"""Aligned buffers, and buffers that stay where they are."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rawaio import aligned_buffer, memory
from rawaio.memory import Pin, pin_destination, pin_source, resizable
from tests.support import address_of, mapping_of

PINS = [pin_source, pin_destination]
ALIGNMENTS = [1 << i for i in range(22)]  # up to 2 MiB
HUGE = 2 << 20


def pages_of(buffer: memoryview) -> mmap.mmap:
    """The mapping that an aligned buffer is a part of."""
    assert isinstance(buffer.obj, mmap.mmap)
    return buffer.obj


# -- aligned_buffer ----------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("nbytes", [1, 511, 512, 4096, 4097, 100_000])
def test_aligned_zeroed_and_writable(nbytes: int, alignment: int) -> None:
    buffer = aligned_buffer(nbytes, alignment)
    assert isinstance(buffer, memoryview)
    assert (buffer.nbytes, buffer.itemsize, buffer.ndim) == (nbytes, 1, 1)
    assert (buffer.readonly, buffer.c_contiguous, buffer.format) == (False, True, "B")
    assert address_of(buffer) % alignment == 0
    assert buffer.tobytes() == bytes(nbytes)
    buffer[:] = b"\xff" * nbytes
    assert buffer.tobytes() == b"\xff" * nbytes


def test_many_are_aligned_wherever_they_come_to_lie() -> None:
    buffers = [aligned_buffer(1, 1 << 16) for _ in range(50)]
    addresses = [address_of(b) for b in buffers]
    assert all(address % (1 << 16) == 0 for address in addresses)
    assert len(set(addresses)) == 50


def test_the_alignment_is_4096_unless_said_otherwise() -> None:
    assert address_of(aligned_buffer(1)) % 4096 == 0


@pytest.mark.parametrize("alignment", [1, 4096, 1 << 21])
def test_no_bytes(alignment: int) -> None:
    buffer = aligned_buffer(0, alignment)
    assert buffer.nbytes == 0
    assert not buffer.readonly
    for pin in PINS:
        assert pin(buffer).address % alignment == 0


@pytest.mark.parametrize("alignment", [512, mmap.PAGESIZE, 2 * mmap.PAGESIZE, 1 << 20, 1 << 21])
def test_no_more_is_mapped_than_the_alignment_takes(alignment: int) -> None:
    for pages in (1, 3):
        nbytes = pages * mmap.PAGESIZE
        mapped = len(pages_of(aligned_buffer(nbytes, alignment)))
        assert nbytes <= mapped <= nbytes + max(alignment - mmap.PAGESIZE, 0)


def test_the_last_byte_is_within_the_mapping() -> None:
    for alignment in ALIGNMENTS:
        for nbytes in (1, mmap.PAGESIZE, mmap.PAGESIZE + 1):
            buffer = aligned_buffer(nbytes, alignment)
            pages = pages_of(buffer)
            whole = address_of(pages)
            start = address_of(buffer)
            assert whole <= start
            assert start + nbytes <= whole + len(pages)


def test_the_memory_is_the_process_s_own() -> None:
    # A shared mapping would be seen, and written, by a forked child.
    buffer = aligned_buffer(4096)
    mapping = mapping_of(address_of(buffer))
    assert mapping is not None
    assert mapping.access == "rw-p"


def advice_of(buffer: memoryview) -> list[list[str]]:
    """VmFlags of each mapping that the buffer lies in."""
    start = address_of(buffer)
    found: list[list[str]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name:
            low, high = (int(limit, 16) for limit in name.split("-"))
            inside = low < start + buffer.nbytes and start < high
        elif inside and name == "VmFlags:":
            found.append(rest.split())
    return found


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_huge_pages_are_asked_for_where_one_fits() -> None:
    small, large = aligned_buffer(HUGE - 4096), aligned_buffer(HUGE, 512)
    assert all("hg" not in flags for flags in advice_of(small))
    advice = advice_of(large)
    assert advice
    assert all("hg" in flags for flags in advice)


def test_a_kernel_without_huge_pages_gives_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, option: int, *_: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), option)

    monkeypatch.setattr(mmap, "mmap", Plain)
    buffer = aligned_buffer(HUGE)
    buffer[-1] = 7
    assert (buffer.nbytes, buffer[0], buffer[-1]) == (HUGE, 0, 7)


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def test_freed_with_the_last_reference() -> None:
    each = 64 << 20
    gc.collect()
    before = virtual_bytes()
    buffer = aligned_buffer(each, 1 << 21)
    part = buffer[5:6]
    assert virtual_bytes() - before >= each
    del buffer
    assert virtual_bytes() - before >= each  # a slice holds it
    part[0] = 7
    assert part.tobytes() == b"\7"
    del part
    assert virtual_bytes() - before < each
    for _ in range(1000):
        aligned_buffer(each)
    assert virtual_bytes() - before < each


@pytest.mark.parametrize("nbytes", [-1, -4096])
def test_a_negative_size_is_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"nbytes must not be negative, got {nbytes}"):
        aligned_buffer(nbytes)


@pytest.mark.parametrize("alignment", [0, -1, -4096, 3, 5, 6, 4095, 4097, 12288])
def test_an_alignment_that_is_no_power_of_two_is_refused(alignment: int) -> None:
    with pytest.raises(ValueError, match=f"alignment must be a power of two, got {alignment}"):
        aligned_buffer(1, alignment)


@pytest.mark.parametrize(("nbytes", "alignment"), [(1.0, 1), ("1", 1), (None, 1), (1, 2.0)])
def test_what_is_no_number_is_refused(nbytes: Any, alignment: Any) -> None:
    with pytest.raises(TypeError):
        aligned_buffer(nbytes, alignment)


@pytest.mark.parametrize(("nbytes", "alignment"), [(2**62, 1), (2**63 - 1, 4096), (1, 2**62)])
def test_more_than_there_is_is_enomem(nbytes: int, alignment: int) -> None:
    with pytest.raises(OSError, match="Cannot allocate memory|Out of memory"):
        aligned_buffer(nbytes, alignment)


@pytest.mark.parametrize(("nbytes", "alignment"), [(2**63, 1), (1, 2**70), (2**63 - 1, 1 << 21)])
def test_more_than_can_be_addressed_is_one_of_the_errors_that_are_promised(
    nbytes: int, alignment: int
) -> None:
    with pytest.raises((ValueError, OSError), match=r".*"):
        aligned_buffer(nbytes, alignment)


# -- pins --------------------------------------------------------------------------------------


def a_mmap() -> mmap.mmap:
    it = mmap.mmap(-1, 4096)
    it[:8] = b"contents"
    return it


class Pair(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint16), ("second", ctypes.c_uint64)]


WRITABLE: dict[str, Callable[[], Any]] = {
    "bytearray": lambda: bytearray(b"some bytes"),
    "memoryview": lambda: memoryview(bytearray(b"some bytes")),
    "slice": lambda: memoryview(bytearray(b"some bytes"))[3:7],
    "cast": lambda: memoryview(bytearray(b"some byt")).cast("I"),
    "two dimensions": lambda: memoryview(bytearray(range(12))).cast("B", (3, 4)),
    "row": lambda: memoryview(bytearray(range(12)))[4:8],
    "array f": lambda: array("f", [1.0, 2.0, 3.0]),
    "array q": lambda: array("q", [1, 2, 3]),
    "mmap": a_mmap,
    "ctypes array": lambda: (ctypes.c_uint32 * 5)(*range(5)),
    "ctypes structure": lambda: Pair(1, 2),
    "ctypes scalar": lambda: ctypes.c_uint64(2**40 + 5),
    "aligned": lambda: aligned_buffer(777, 512),
    "one item, strided": lambda: memoryview(bytearray(b"abc"))[::5],
}
EMPTY: dict[str, Callable[[], Any]] = {
    "bytearray": bytearray,
    "memoryview": lambda: memoryview(bytearray()),
    "slice": lambda: memoryview(bytearray(b"abc"))[2:2],
    "array": lambda: array("d"),
    "ctypes array": ctypes.c_char * 0,
    "aligned": lambda: aligned_buffer(0),
}
READ_ONLY: dict[str, Callable[[], Any]] = {
    "bytes": lambda: b"some bytes",
    "memoryview of bytes": lambda: memoryview(b"some bytes"),
    "slice": lambda: memoryview(b"some bytes")[3:7],
    "cast": lambda: memoryview(b"some byt").cast("H"),
    "two dimensions": lambda: memoryview(bytes(range(12))).cast("B", (3, 4)),
    "of a bytearray": lambda: memoryview(bytearray(b"some bytes")).toreadonly(),
    "of an array": lambda: memoryview(array("f", [1.0, 2.0])).toreadonly(),
    "no bytes": lambda: b"",
    "empty memoryview": lambda: memoryview(b""),
}


def contents(pin: Pin) -> bytes:
    return ctypes.string_at(pin.address, pin.nbytes)


@pytest.mark.parametrize("kind", WRITABLE | {f"empty {k}": v for k, v in EMPTY.items()})
@pytest.mark.parametrize("pin", PINS)
def test_a_writable_buffer_is_found_at_its_address(pin: Callable[[Any], Pin], kind: str) -> None:
    buffer = (WRITABLE | {f"empty {k}": v for k, v in EMPTY.items()})[kind]()
    expected = memoryview(buffer).tobytes()
    pinned = pin(buffer)
    assert pinned.nbytes == len(expected)
    assert contents(pinned) == expected
    new = bytes(255 - b for b in expected)
    ctypes.memmove(pinned.address, new, len(new))  # as the kernel would
    assert memoryview(buffer).tobytes() == new
    assert pin(buffer)[:2] == pinned[:2]


@pytest.mark.parametrize("kind", READ_ONLY)
def test_a_read_only_buffer_can_be_written_from(kind: str) -> None:
    buffer = READ_ONLY[kind]()
    expected = memoryview(buffer).tobytes()
    pinned = pin_source(buffer)
    assert pinned.nbytes == len(expected)
    assert contents(pinned) == expected


@pytest.mark.parametrize("kind", READ_ONLY)
def test_a_read_only_buffer_cannot_be_read_into(kind: str) -> None:
    buffer = READ_ONLY[kind]()
    name = type(buffer).__name__
    with pytest.raises(TypeError, match=f"cannot read into a read-only {name}"):
        pin_destination(buffer)


def test_bytes_are_counted_and_not_items() -> None:
    for pin in PINS:
        assert pin(array("f", [0.0] * 10)).nbytes == 40
        assert pin(memoryview(bytearray(40)).cast("d")).nbytes == 40
        assert pin(memoryview(bytearray(40)).cast("H", (4, 5))).nbytes == 40
        assert pin((Pair * 3)()).nbytes == 48


NOT_CONTIGUOUS: dict[str, Callable[[], Any]] = {
    "every second": lambda: memoryview(bytearray(10))[::2],
    "backwards": lambda: memoryview(bytearray(10))[::-1],
    "every second, read-only": lambda: memoryview(bytes(10))[::2],
    "rows backwards": lambda: memoryview(array("i", range(4)))[::-1],
}


@pytest.mark.parametrize("kind", NOT_CONTIGUOUS)
@pytest.mark.parametrize("pin", PINS)
def test_a_buffer_that_is_not_contiguous_is_refused(pin: Callable[[Any], Pin], kind: str) -> None:
    with pytest.raises(TypeError, match="must be one contiguous block in C order") as caught:
        pin(NOT_CONTIGUOUS[kind]())
    assert "this memoryview has shape (" in str(caught.value)
    assert "and strides (" in str(caught.value)


@pytest.mark.parametrize("pin", PINS)
def test_a_buffer_in_fortran_s_order_is_refused(pin: Callable[[Any], Pin]) -> None:
    testbuffer = pytest.importorskip("_testbuffer", reason="this CPython has no _testbuffer")
    columns = testbuffer.ndarray(
        list(range(12)),
        shape=[3, 4],
        flags=testbuffer.ND_FORTRAN | testbuffer.ND_WRITABLE,
    )
    with pytest.raises(TypeError, match="must be one contiguous block in C order"):
        pin(columns)


@pytest.mark.parametrize("pin", PINS)
def test_no_bytes_at_no_address(pin: Callable[[Any], Pin]) -> None:
    nowhere = (ctypes.c_char * 0).from_address(0)
    assert pin(nowhere)[:2] == (0, 0)
    if pin is pin_source:
        assert pin(memoryview(nowhere).toreadonly())[:2] == (0, 0)


@pytest.mark.parametrize("thing", [None, 5, "text", 1.5, [b"a"], object(), {}])
@pytest.mark.parametrize("pin", PINS)
def test_what_is_no_buffer_is_refused(pin: Callable[[Any], Pin], thing: object) -> None:
    expected = rf"a buffer is needed \(.*\), not {type(thing).__name__}"
    with pytest.raises(TypeError, match=expected) as caught:
        pin(thing)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("pin", PINS)
def test_a_released_memoryview_is_refused(pin: Callable[[Any], Pin]) -> None:
    view = memoryview(bytearray(5))
    view.release()
    with pytest.raises(ValueError, match="released"):
        pin(view)


def test_a_read_only_view_that_was_released_leaves_the_bytes_in_place() -> None:
    """What is pinned is an export of its own, and not the caller's view."""
    memory = bytearray(8)
    view = memoryview(memory).toreadonly()
    pin = pin_source(view)
    view.release()
    with pytest.raises(BufferError):
        memory.append(1)
    del pin
    memory.append(1)


# -- exports -----------------------------------------------------------------------------------


def grow(buffer: Any) -> None:
    buffer.extend([1] * 100_000)


def shrink(buffer: Any) -> None:
    del buffer[:]


@pytest.mark.parametrize("change", [grow, shrink])
@pytest.mark.parametrize("make", [lambda: bytearray(b"12345678"), lambda: array("i", [1, 2])])
@pytest.mark.parametrize("pin", PINS)
def test_a_pinned_buffer_cannot_be_resized(
    pin: Callable[[Any], Pin], make: Callable[[], Any], change: Callable[[Any], None]
) -> None:
    buffer = make()
    pinned = pin(buffer)
    address, nbytes = pinned[:2]
    with pytest.raises(BufferError):
        change(buffer)
    assert ctypes.string_at(address, nbytes) == bytes(buffer)
    anchor = pinned.anchor
    del pinned
    with pytest.raises(BufferError):
        change(buffer)  # the anchor is what holds it
    del anchor
    change(buffer)
    assert len(buffer) in {0, 100_008, 100_002}


@pytest.mark.parametrize("view", [memoryview, lambda b: memoryview(b).toreadonly()])
def test_a_pinned_view_holds_what_it_is_a_view_of(view: Callable[[Any], memoryview]) -> None:
    buffer = bytearray(b"12345678")
    pinned = pin_source(view(buffer))
    with pytest.raises(BufferError):
        buffer.append(1)
    assert contents(pinned) == b"12345678"
    del pinned
    buffer.append(1)


def test_a_view_that_was_released_in_between_changes_nothing() -> None:
    buffer = bytearray(b"12345678")
    for pin, view in [
        (pin_source, memoryview(buffer)),
        (pin_source, memoryview(buffer).toreadonly()),
        (pin_destination, memoryview(buffer)),
    ]:
        pinned = pin(view)
        view.release()
        with pytest.raises(BufferError):
            buffer.append(1)
        assert contents(pinned) == b"12345678"
        del pinned
    buffer.append(1)


def test_a_pinned_mmap_cannot_be_closed() -> None:
    for pin in PINS:
        pages = a_mmap()
        pinned = pin(pages)
        with pytest.raises(BufferError):
            pages.close()
        del pinned
        pages.close()


def test_a_pin_keeps_alive_what_nobody_else_has() -> None:
    pins = [pin_source(bytes([i]) * 1000) for i in range(100)]
    pins += [pin_destination(bytearray([i]) * 1000) for i in range(100)]
    noise = [b"\xff" * 1000 for _ in range(1000)]
    gc.collect()
    for i, pinned in enumerate(pins):
        assert contents(pinned) == bytes([i % 100]) * 1000
    del noise


def test_a_refused_buffer_is_not_held() -> None:
    buffer = bytearray(10)
    with pytest.raises(TypeError):
        pin_destination(memoryview(buffer).toreadonly())
    with pytest.raises(TypeError):
        pin_source(memoryview(buffer)[::2])
    gc.collect()
    buffer.append(1)


def test_resizable() -> None:
    class Own(bytearray):
        pass

    assert all(map(resizable, [bytearray(), array("b"), Own()]))
    fixed: list[object] = [b"", memoryview(bytearray(4)), a_mmap(), (ctypes.c_char * 4)(), None]
    assert not any(map(resizable, fixed))


def test_py_buffer_is_as_cpython_has_it() -> None:
    """A buffer that CPython fills in, read through every field of our declaration."""
    raw = memory._PyBuffer()
    view = memoryview(b"abcdefgh").cast("I")
    get = ctypes.pythonapi.PyObject_GetBuffer
    full = 0x011C  # PyBUF_FULL_RO
    assert get(ctypes.py_object(view), ctypes.byref(raw), ctypes.c_int(full)) == 0
    fields: Any = raw
    assert ctypes.string_at(fields.buf, 8) == b"abcdefgh"
    assert (fields.len, fields.itemsize, fields.readonly, fields.ndim) == (8, 4, 1, 1)
    assert ctypes.string_at(fields.format) == b"I"
    assert ctypes.c_ssize_t.from_address(fields.shape).value == 2
    assert ctypes.c_ssize_t.from_address(fields.strides).value == 4
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(raw))
    assert ctypes.sizeof(memory._PyBuffer) == 80

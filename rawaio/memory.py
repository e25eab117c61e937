"""L0: memory that the kernel may read and write while Python goes on.

A reference keeps an object alive, but does not keep its bytes in place: a bytearray that is only
referenced moves when it is resized. A live export of the buffer protocol does both: with it the
resize is a BufferError. So what is handed to the kernel is an address together with the object
that holds the export, its anchor.
"""

from __future__ import annotations

import ctypes
import sys

from ._light import named_tuple, new_tuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final, NamedTuple

    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Pin", "aligned_buffer", "contiguous", "pin_destination", "pin_source", "resizable"]

# A ctypes array of no items holds an export of a buffer of any length, and knows its address.
_Anchor: Final[Any] = ctypes.c_char * 0
# Of x86_64, and of aarch64 with pages of 4 KiB; where huge pages are larger, it is asked in vain.
_HUGE_PAGE: Final = 2 << 20


if TYPE_CHECKING:

    class Pin(NamedTuple):
        """The bytes of a buffer, in place for as long as the anchor is referenced."""

        address: int
        nbytes: int
        anchor: object

else:
    Pin = named_tuple(__name__, "Pin", "address nbytes anchor")

_any_new_tuple: Final[Any] = new_tuple
# A Pin in a quarter of the time.
_new_pin: Final[Callable[[type[Pin], tuple[int, int, object]], Pin]] = _any_new_tuple


class _PyBuffer(ctypes.Structure):
    """`Py_buffer` of CPython's stable ABI (3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def aligned_buffer(nbytes: int, alignment: int = 4096) -> memoryview:
    """A writable, zeroed buffer of nbytes bytes whose address is a multiple of alignment.

    alignment is a power of two, in bytes. The memory is the process's own anonymous mapping, freed
    when the last reference to the buffer and to slices of it is gone. From 2 MiB on, huge pages are
    asked for: the kernel finds, pins and maps those with less work.

    Raises:
        TypeError, ValueError: nbytes negative, or alignment not a power of two.
        OSError: ENOMEM.
    """
    import mmap  # noqa: PLC0415 - only for who uses it

    if nbytes < 0:
        raise ValueError(f"nbytes must not be negative, got {nbytes}")
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment must be a power of two, got {alignment}")
    slack = max(alignment - mmap.PAGESIZE, 0)
    if nbytes + slack >= 1 << 63:
        raise ValueError(f"{nbytes} bytes aligned to {alignment} are more than an address space")
    # Private: with the default, a shared mapping, parent and forked child would share the bytes.
    pages = mmap.mmap(-1, max(nbytes + slack, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(_Anchor.from_buffer(pages)) % alignment if slack else 0
    if nbytes >= _HUGE_PAGE:
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them, and nothing else changes
    return memoryview(pages)[start : start + nbytes]


def resizable(buffer: object) -> bool:
    """Whether the object could give its bytes another place when nothing is exported."""
    module = sys.modules.get("array")  # or else there is none
    return isinstance(buffer, bytearray if module is None else (bytearray, module.array))


def pin_destination(buffer: WriteableBuffer) -> Pin:
    """Pin a buffer that the kernel will write into.

    Raises:
        TypeError: no buffer, read-only, or not one contiguous block in C order.
    """
    # A view needs no other one to be looked at, which would cost as much as the rest.
    view = buffer if type(buffer) is memoryview and buffer.c_contiguous else contiguous(buffer)
    if view.readonly:
        raise TypeError(f"cannot read into a read-only {type(buffer).__name__}")
    anchor = _Anchor.from_buffer(buffer)
    return _new_pin(Pin, (ctypes.addressof(anchor), view.nbytes, anchor))


def pin_source(buffer: ReadableBuffer) -> Pin:
    """Pin a buffer that the kernel will read from; it may be read-only, as bytes are.

    Raises:
        TypeError: no buffer, or not one contiguous block in C order.
    """
    if type(buffer) is memoryview and buffer.c_contiguous and not buffer.readonly:
        view = buffer
    else:
        view = contiguous(buffer)
    if not view.readonly:
        anchor = _Anchor.from_buffer(buffer)
        return _new_pin(Pin, (ctypes.addressof(anchor), view.nbytes, anchor))
    raw = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(raw), ctypes.c_int(0))
    address: int = raw.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(raw))
    return Pin(address, view.nbytes, view)  # the view is an export of its own


def contiguous(buffer: ReadableBuffer) -> memoryview:
    """A view of a buffer, which exports it.

    Raises:
        TypeError: no buffer, or not one contiguous block in C order.
    """
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"a buffer is needed (bytes, bytearray, memoryview, array, NumPy array, ...), "
            f"not {type(buffer).__name__}"
        ) from None
    if not view.c_contiguous:
        raise TypeError(
            f"the buffer must be one contiguous block in C order; this {type(buffer).__name__} "
            f"has shape {view.shape} and strides {view.strides}"
        )
    return view

"""L3: transfers by plain system calls, which block, for threads; and the views that they take."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final

from . import syscalls
from .errors import set_written
from .memory import contiguous
from .transfer import MOST

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import ReadableBuffer, WriteableBuffer

    from .descriptor import Descriptor

__all__ = [
    "MAX_SEGMENTS",
    "allocate",
    "behind",
    "close_all",
    "fstat_size",
    "read_bytes",
    "read_whole",
    "readable",
    "sequence",
    "truncate",
    "writable",
    "write_whole",
]

MAX_SEGMENTS: Final = syscalls.UIO_MAXIOV


def sequence(buffers: Sequence[Any]) -> Sequence[Any]:
    """Refuse, by TypeError, one buffer where a sequence of them is needed."""
    if isinstance(buffers, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"a sequence of buffers is needed, not {type(buffers).__name__}")
    return buffers


def readable(buffer: ReadableBuffer) -> memoryview:
    """The bytes of a buffer, exported as long as the view lives."""
    view = contiguous(buffer)
    return view if view.format == "B" and view.ndim == 1 else _as_bytes(view)


def writable(buffer: WriteableBuffer) -> memoryview:
    """As `readable`; TypeError for what is read-only."""
    view = readable(buffer)
    if view.readonly:
        raise TypeError(f"cannot read into a read-only {type(buffer).__name__}")
    return view


def _as_bytes(view: memoryview) -> memoryview:
    # An array with a 0 in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def behind(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of the views after done bytes."""
    rest: list[memoryview] = []
    for view in views:
        if done < len(view):
            rest.append(view[done:] if done else view)
        done = max(done - len(view), 0)
    return rest


def fstat_size(descriptor: Descriptor) -> int:
    """The size in bytes; a server is asked. Blocks."""
    return os.fstat(descriptor.fileno()).st_size


def truncate(descriptor: Descriptor, nbytes: int) -> None:
    """ftruncate(2). Blocks."""
    os.ftruncate(descriptor.fileno(), nbytes)


def allocate(descriptor: Descriptor, offset: int, nbytes: int) -> None:
    """fallocate(2), mode 0. Blocks."""
    syscalls.fallocate(descriptor.fileno(), 0, offset, nbytes)


def close_all(descriptors: list[Descriptor]) -> None:
    """close(2) each; then raise the first error there was. Blocks."""
    errors: list[OSError] = []
    for descriptor in descriptors:
        try:
            descriptor.close()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def read_whole(descriptor: Descriptor, views: list[memoryview], offset: int) -> int:
    """Read until the views are full, or the file ends; how much. Blocks."""
    done = 0
    while views:
        n = os.preadv(descriptor.fileno(), views[:MAX_SEGMENTS], offset + done)
        if n == 0:
            break
        done += n
        views = behind(views, n)
    return done


def read_bytes(descriptor: Descriptor, nbytes: int, offset: int) -> bytes:
    """Read nbytes bytes, fewer at the end of the file. Blocks."""
    data = os.pread(descriptor.fileno(), min(nbytes, MOST), offset)
    if len(data) == nbytes or not data:
        return data
    memory = bytearray(nbytes)
    memory[: len(data)] = data
    n = len(data) + read_whole(descriptor, [memoryview(memory)[len(data) :]], offset + len(data))
    return bytes(memoryview(memory)[:n])


def write_whole(
    descriptor: Descriptor,
    views: list[memoryview],
    offset: int,
    flags: int,
    *,
    before: int = 0,
    once: bool = False,
) -> None:
    """Write until all is written. Blocks. before: what was written already, for the error."""
    total = sum(map(len, views))
    done = 0
    try:
        while views:
            n = os.pwritev(descriptor.fileno(), views[:MAX_SEGMENTS], offset + done, flags)
            done += n
            views = behind(views, n)
            if n == 0 or (once and views):
                raise OSError(errno.ENOSPC, f"pwritev: {os.strerror(errno.ENOSPC)}")
    except OSError as error:
        set_written(error, before + done)
        error.add_note(f"{before + done} of {before + total} bytes were written")
        raise

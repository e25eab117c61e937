"""L2: what direct I/O on an open file wants its addresses, lengths and offsets to be multiples of.

Facts about the kernel:

- statx tells it (STATX_DIOALIGN, Linux 6.1), and for reads apart where they may be finer
  (STATX_DIO_READ_ALIGN, Linux 6.14). A bit that is missing in the answer's mask means that the
  file system did not say. A bit that is there with a 0 means: no direct I/O on this file.
- A block device answers when its node is asked, through a descriptor as well as by path.
- `st_blksize` is not the contract: the offset wants the logical block size, the address only what
  the device's DMA wants.
- A misaligned direct read is EINVAL. But some file systems quietly read through the page cache
  instead, and take everything; so does a file that has no page cache to go around, as in tmpfs.

What this means here: statx first; then the ladder that QEMU climbs, reads of growing lengths and
then at growing addresses, of which the first without EINVAL is the answer; and where even one byte
is taken, that says nothing, and what every disk can do is assumed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from . import syscalls
from .memory import aligned_buffer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import NoReturn

__all__ = [
    "STATX_DIOALIGN",
    "STATX_DIO_READ_ALIGN",
    "Geometry",
    "decode_statx",
    "find_geometry",
]

STATX_DIOALIGN: Final = 0x2000
STATX_DIO_READ_ALIGN: Final = 0x20000
# struct statx: stx_mask; stx_dio_mem_align and stx_dio_offset_align; stx_dio_read_offset_align.
_MASK_AT, _DIOALIGN_AT, _READ_ALIGN_AT = 0x00, 0x98, 0xB4
_STATX_SIZE: Final = 256
# QEMU's. One byte asks whether alignment is looked at; the others are logical block sizes.
_LADDER: Final = (1, 512, 1024, 2048, 4096)
# No disk has longer logical blocks unless its file system can also answer statx.
_SAFE: Final = max(_LADDER[-1], mmap.PAGESIZE)
# statx is not there (before Linux 4.11), or an old sandbox denies what it does not know.
_NO_STATX: Final = frozenset({errno.ENOSYS, errno.EPERM})


@dataclass(frozen=True, slots=True)
class Geometry:
    """Alignments of direct I/O on one file: powers of two, in bytes."""

    memory_alignment: int  # of a buffer's address
    offset_alignment: int  # of an offset and of a length
    read_offset_alignment: int  # the same for reads: a divisor of offset_alignment
    source: Literal["statx", "probed", "assumed"]  # asked, tried out, or what is safe on any disk

    def is_aligned(self, address: int, nbytes: int, offset: int, *, read: bool = False) -> bool:
        """Whether direct I/O takes this transfer: a write, or a read where that may be finer."""
        block = self.read_offset_alignment if read else self.offset_alignment
        return not (address & (self.memory_alignment - 1) or (nbytes | offset) & (block - 1))

    def round_down(self, offset: int) -> int:
        """The last offset up to this one that both reads and writes can start at."""
        return offset & -self.offset_alignment

    def round_up(self, offset: int) -> int:
        """The first offset from this one on that both reads and writes can end at."""
        return -(-offset & -self.offset_alignment)


def decode_statx(buffer: bytes) -> Geometry | None:
    """What a `struct statx` of 256 bytes says; None when it does not say. Pure.

    Raises:
        OSError: EINVAL, it says that there is no direct I/O on this file.
        ValueError: not 256 bytes.
    """
    if len(buffer) != _STATX_SIZE:
        raise ValueError(f"a struct statx has {_STATX_SIZE} bytes, not {len(buffer)}")
    (mask,) = struct.unpack_from("=I", buffer, _MASK_AT)
    if not mask & STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("=II", buffer, _DIOALIGN_AT)
    if not memory or not offset:
        _unsupported("statx says that this file cannot be read or written directly")
    (read,) = struct.unpack_from("=I", buffer, _READ_ALIGN_AT)
    if not mask & STATX_DIO_READ_ALIGN or not read:
        read = offset
    return Geometry(memory, max(offset, read), read, "statx")


def find_geometry(fd: int) -> Geometry:
    """The alignments of direct I/O on an open regular file or block device.

    fd need not be open for direct I/O, nor for reading; its offset stays where it is, and nothing
    is written. Can block: where statx does not say, up to ten reads of one page or less are tried.

    Raises:
        OSError: EINVAL no direct I/O on this file, or neither a regular file nor a block device,
            said in a note; EBADF; ESTALE, EIO and others of statx(2).
        UnsupportedError: no system call numbers for this process.

    Source: statx(2); QEMU's `raw_probe_alignment`.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        _unsupported("direct I/O is for regular files and block devices")
    try:
        answer = syscalls.statx(fd, 0, STATX_DIOALIGN | STATX_DIO_READ_ALIGN)
    except OSError as error:
        if error.errno not in _NO_STATX:
            raise
        return _probe(fd)
    return decode_statx(answer) or _probe(fd)


def _unsupported(note: str) -> NoReturn:
    raise syscalls.kernel_error(errno.EINVAL, "find_geometry", note)


def _probe(fd: int) -> Geometry:
    """Find out by reading, through a descriptor that can: fd, or one of our own."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_DIRECT and flags & os.O_ACCMODE != os.O_WRONLY:
        return _climb(fd)
    try:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL:
            _unsupported("the file system does not open this file with O_DIRECT")
        return _assumed()  # it may be written but not read, or /proc is missing
    try:
        return _climb(reader)
    finally:
        os.close(reader)


def _climb(fd: int) -> Geometry:
    """Climb the ladder on fd, which is open for direct reads."""
    buffer = aligned_buffer(2 * _SAFE, _SAFE)
    block = _first_taken(fd, ((n, buffer[:n]) for n in _LADDER))
    if block is None:
        _unsupported(f"direct reads of up to {_LADDER[-1]} bytes are refused")
    if block == 1:
        return _assumed()
    # Misplaced by n, an address is aligned to n and to nothing more.
    memory = _first_taken(fd, ((n, buffer[n : n + _SAFE]) for n in _LADDER))
    if memory is None or memory == 1:
        memory = block
    return Geometry(memory, block, block, "probed")


def _first_taken(fd: int, rungs: Iterable[tuple[int, memoryview]]) -> int | None:
    for n, buffer in rungs:
        try:
            os.preadv(fd, [buffer], 0)
        except OSError as error:
            # Any other error comes from behind the check of the alignment.
            if error.errno == errno.EINVAL:
                continue
        return n
    return None


def _assumed() -> Geometry:
    return Geometry(_SAFE, _SAFE, _SAFE, "assumed")

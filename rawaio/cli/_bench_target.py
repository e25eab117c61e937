"""What `rawaio bench` reads: a file of its own, or one that is there."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import rawaio
from rawaio.geometry import find_geometry

from ._bench_settings import BenchError, format_size
from ._path import mount_of

if TYPE_CHECKING:
    from collections.abc import Generator

    from ._bench_settings import Settings
    from ._progress import Progress

__all__ = [
    "Target",
    "check_length",
    "choose_offsets",
    "existing_target",
    "temporary_target",
    "warm",
]

# Blocks before the order repeats. Keeping more would not make the order any more random to a disk.
_MOST_BLOCKS: Final = 1 << 16
_CHUNK: Final = 1 << 20
# File systems without a disk.
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class Target:
    """An open file and what is known of it."""

    fd: int
    path: str
    kind: str  # "temporary file", "file" or "block device"
    file_system: str  # "" when not known
    direct: bool  # opened with O_DIRECT
    memory_alignment: int  # bytes, of buffers
    nr_blocks: int  # that are read, from the beginning
    warnings: tuple[str, ...]


def _describe(fd: int, path: str, kind: str, size: int, settings: Settings) -> Target:
    """Find out how the file can be read; leaves fd with O_DIRECT set if it can be."""
    mount = None if kind == "block device" else mount_of(fd)
    file_system = mount.file_system if mount else ""
    block_size = settings.block_size
    on = f" on {file_system}" if file_system else ""
    warnings: list[str] = []
    memory_alignment = 1
    direct = True
    try:
        geometry = find_geometry(fd)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        direct = False
        warnings.append(
            f"no direct I/O{on}: these are buffered reads, mostly of memory, "
            "and native AIO does them inside io_submit"
        )
    else:
        memory_alignment = geometry.memory_alignment
        if geometry.source != "assumed" and block_size % geometry.read_offset_alignment:
            raise BenchError(
                f"direct reads of {path} are of multiples of {geometry.read_offset_alignment} "
                f"bytes, which --block-size {block_size} is not"
            )
        if file_system in _IN_MEMORY:
            warnings.append(
                f"{file_system} keeps its files in memory: there is no disk in these figures"
            )
    nr_blocks = min(size, settings.size) // block_size
    if nr_blocks == 0:
        raise BenchError(
            f"{path} has {min(size, settings.size)} bytes to read, less than one block of "
            f"{block_size}"
        )
    return Target(fd, path, kind, file_system, direct, memory_alignment, nr_blocks, tuple(warnings))


@contextmanager
def existing_target(path: str, settings: Settings) -> Generator[Target]:
    """Open a file or a block device, for reading only.

    Raises:
        BenchError: it is something else, or shorter than a block.
        OSError: stat's, open's.
    """
    # Before opening: to open a FIFO would wait, to open a tape would wind it.
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise BenchError(f"{path} is neither a regular file nor a block device")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        kind = "file" if stat.S_ISREG(mode) else "block device"
        yield _describe(fd, path, kind, os.lseek(fd, 0, os.SEEK_END), settings)
    finally:
        os.close(fd)


@contextmanager
def temporary_target(directory: str, settings: Settings, progress: Progress) -> Generator[Target]:
    """Make a file without a name, which is gone when it is closed, whatever ends the process.

    Raises:
        BenchError: not enough space.
        OSError: of any of the calls that make it.
    """
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < settings.size:
        raise _no_space(directory, settings.size, free)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        # Bytes that neither a file system nor a disk can keep in less space than they take.
        noise = random.Random(settings.seed)
        for start in range(0, settings.size, _CHUNK):
            progress.show(f"writing {format_size(settings.size)}", start / settings.size)
            data = noise.randbytes(min(_CHUNK, settings.size - start))
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise _no_space(directory, settings.size, start) from None
        progress.show("fsync", 1.0)
        os.fsync(file.fileno())
        yield _describe(file.fileno(), directory, "temporary file", settings.size, settings)


def _no_space(directory: str, wanted: int, free: int) -> BenchError:
    return BenchError(
        f"a temporary file of {format_size(wanted)} does not fit in {directory}, where "
        f"{format_size(free)} are free; take a smaller --size, another directory, or an "
        "existing file as PATH"
    )


def warm(target: Target, settings: Settings, progress: Progress) -> None:
    """Read all the blocks once, in order: hosts of virtual disks serve a first read slowly."""
    span = target.nr_blocks * settings.block_size
    chunk = max(_CHUNK // settings.block_size, 1) * settings.block_size
    buffer = rawaio.aligned_buffer(chunk, max(target.memory_alignment, 4096))
    for start in range(0, span, chunk):
        progress.show(f"reading {format_size(span)} once", start / span)
        wanted = min(chunk, span - start)
        check_length(os.preadv(target.fd, [buffer[:wanted]], start), wanted)


def check_length(got: int, wanted: int) -> None:
    if got != wanted:
        raise BenchError(f"a read gave {got} bytes instead of {wanted}; is the file being changed?")


def choose_offsets(nr_blocks: int, block_size: int, seed: int) -> list[int]:
    """Offsets of blocks at random, in bytes; the same for the same arguments."""
    choice = random.Random(seed)
    return choice.choices(
        range(0, nr_blocks * block_size, block_size), k=min(4 * nr_blocks, _MOST_BLOCKS)
    )

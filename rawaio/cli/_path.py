"""What `doctor` finds out about a place: its file system, direct I/O there, and io_submit.

A file or block device that was named is only read. In a directory a temporary file is made, which
is gone afterwards, whatever happens.
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import stat
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import TYPE_CHECKING, Final

from rawaio import IOContext, Request, aligned_buffer
from rawaio.geometry import Geometry, find_geometry

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

__all__ = [
    "Behaviour",
    "Mount",
    "Place",
    "Timing",
    "examine",
    "find_mount",
    "mount_of",
    "time_reads",
]

# Large enough for the disk's time to stand out from that of the call.
_READ_SIZE: Final = 64 << 10
# Several reads per io_submit: a fast disk may be done with the first before the call returns, but
# not with all.
_READS_PER_CALL: Final = 4
_MOST_READS: Final = 64
_LONGEST_NS: Final = 400_000_000  # for each kind of read; a slow disk gets fewer
_TEMPORARY_SIZE: Final = 16 << 20
# The page cache keeps a folio of which only a part is to be dropped, and most are 2 MiB at most.
_DROPPED_AT_ONCE: Final = 4 << 20
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


class Behaviour(Enum):
    """What io_submit does with reads."""

    ASYNCHRONOUS = "returns before the I/O is done"
    IMMEDIATE = "finds all there and has nothing to wait for"
    BLOCKING = "blocks until the I/O is done"


@dataclass(frozen=True, slots=True)
class Timing:
    """Reads at random offsets, `reads_per_call` to an io_submit; times are medians of the calls."""

    mode: str  # "direct", "buffered" or "memory"
    nbytes: int  # of one read
    reads_per_call: int
    calls: int
    inside_us: float  # from the call of submit to its return
    total_us: float  # from the call of submit to the last completion
    slept: int  # calls in which the thread gave up the CPU inside submit
    done_on_return: int  # calls after which all was completed

    @property
    def behaviour(self) -> Behaviour:
        """What most of the calls did."""
        if 2 * self.slept > self.calls:
            return Behaviour.BLOCKING
        if 2 * self.done_on_return > self.calls:
            return Behaviour.IMMEDIATE
        return Behaviour.ASYNCHRONOUS


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    file_system: str
    mount_point: str
    source: str


@dataclass(frozen=True, slots=True)
class Place:
    """A file, directory or block device."""

    path: str
    kind: str  # "file", "directory" or "block device"
    size: int  # of what was read, in bytes
    mount: Mount | None  # of a block device: where its file system is mounted
    geometry: Geometry | None
    direct_error: str | None  # why direct reads do not work; None when they do
    timings: tuple[Timing, ...]

    @property
    def in_memory(self) -> bool:
        """Whether the file system has no disk at all."""
        return self.mount is not None and self.mount.file_system in _IN_MEMORY

    def timing(self, mode: str) -> Timing | None:
        """The measurement of a mode, if there is one."""
        return next((t for t in self.timings if t.mode == mode), None)


def examine(path: str) -> Place:
    """Look at a file, directory or block device, and time some reads.

    Can block: for about two seconds, and longer where the disk hangs.

    Raises:
        OSError: what is wrong with the path, or with reading there.
    """
    with _opened(path) as (fd, kind), IOContext() as context:
        size = _size(fd)
        geometry: Geometry | None = None
        direct_error: str | None = None
        timings: list[Timing] = []
        try:
            geometry = find_geometry(fd)
            with _reopened(fd, os.O_DIRECT) as direct:
                offsets, nbytes = _choose_reads(size, geometry.offset_alignment)
                if offsets:
                    timings.append(time_reads(context, direct, "direct", offsets, nbytes))
        except OSError as error:
            direct_error = _words(error)
        offsets, nbytes = _choose_reads(size, 1)
        if offsets:
            timings.append(_time_buffered(context, fd, offsets, nbytes))
        return Place(path, kind, size, mount_of(fd), geometry, direct_error, tuple(timings))


def _words(error: OSError) -> str:
    code = error.errno or 0
    notes: list[str] = getattr(error, "__notes__", [])
    return f"{errno.errorcode.get(code, code)}, {'; '.join(notes) or os.strerror(code)}"


@contextmanager
def _opened(path: str) -> Generator[tuple[int, str]]:
    """A descriptor for reading, and of what kind it is."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        # Unlinked from the start where the file system can do that (O_TMPFILE).
        with tempfile.TemporaryFile(dir=path, prefix=".rawaio-doctor-", buffering=0) as file:
            try:
                for _ in range(_TEMPORARY_SIZE >> 20):
                    file.write(os.urandom(1 << 20))  # nothing that could be compressed
                os.fsync(file.fileno())
            except OSError as error:
                raise OSError(error.errno, f"temporary file: {error.strerror}", path) from error
            yield file.fileno(), "directory"
        return
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise OSError(errno.EINVAL, "neither a file nor a directory nor a block device", path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd, "file" if stat.S_ISREG(mode) else "block device"
    finally:
        os.close(fd)


def _size(fd: int) -> int:
    status = os.fstat(fd)
    # A block device's node has none; files of /proc do not seek to their ends.
    return os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size


@contextmanager
def _reopened(fd: int, flags: int) -> Generator[int]:
    """The same file once more, by a descriptor with flags of its own."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield again
    finally:
        os.close(again)


# -- mounts -------------------------------------------------------------------------------------


def mount_of(fd: int) -> Mount | None:
    status = os.fstat(fd)
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            table = file.read()
        if stat.S_ISBLK(status.st_mode):
            device = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            return find_mount(table, device=device)
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
            found = re.search(r"^mnt_id:\s*(\d+)$", file.read(), re.MULTILINE)
    except OSError:
        return None
    return find_mount(table, mount_id=found[1]) if found else None


def find_mount(table: str, *, mount_id: str = "", device: str = "") -> Mount | None:
    """The first line of a mountinfo table with this mount id, or this "major:minor". Pure.

    Source: proc_pid_mountinfo(5).
    """
    for line in table.splitlines():
        # Optional fields stand between the sixth one and a lone hyphen.
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if mount_id == fields[0] or device == fields[2]:
            return Mount(rest[0], _unescape(fields[4]), _unescape(rest[1]))
    return None


def _unescape(field: str) -> str:
    """Blanks, tabs, newlines and backslashes are written in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


# -- reads --------------------------------------------------------------------------------------


def _choose_reads(size: int, block: int) -> tuple[list[int], int]:
    """Offsets in random order, no two reads overlapping, and the bytes that each reads."""
    nbytes = max(min(_READ_SIZE, size) // block, 1) * block
    places = range(size // nbytes or min(size, 1))  # one cut short, where less than one is there
    return [nbytes * n for n in random.sample(places, min(_MOST_READS, len(places)))], nbytes


def time_reads(
    context: IOContext,
    fd: int,
    mode: str,
    offsets: Sequence[int],
    nbytes: int,
    *,
    prepare: Callable[[int], object] | None = None,
) -> Timing:
    """Read nbytes at each of the offsets, some at a time, and take the time of io_submit.

    `prepare(offset)` is called before a read is submitted. Ends early when it takes long. Can
    block: until the reads are done.

    Raises:
        OSError: a read's.
    """
    width = min(_READS_PER_CALL, len(offsets))
    requests = [Request.pread(fd, aligned_buffer(nbytes), 0) for _ in range(width)]
    inside: list[int] = []
    total: list[int] = []
    slept = done_on_return = 0
    begin = time.perf_counter_ns()
    for first in range(0, len(offsets) - width + 1, width):
        for request, offset in zip(requests, offsets[first:], strict=False):
            if prepare is not None:
                prepare(offset)
            request.offset = offset
        sleeps = _sleeps()
        start = time.perf_counter_ns()
        context.submit(*requests)
        returned = time.perf_counter_ns()
        slept += _sleeps() > sleeps
        done = context.reap()
        done_on_return += len(done) == width
        while len(done) < width:
            done += context.reap(width - len(done))
        inside.append(returned - start)
        total.append(time.perf_counter_ns() - start)
        for completion in done:
            completion.result()
        if time.perf_counter_ns() - begin > _LONGEST_NS:
            break
    return Timing(
        mode,
        nbytes,
        width,
        len(total),
        round(median(inside) / 1000, 1),
        round(median(total) / 1000, 1),
        slept,
        done_on_return,
    )


def _time_buffered(context: IOContext, fd: int, offsets: Sequence[int], nbytes: int) -> Timing:
    """Reads through the page cache, of what has been dropped from it."""

    def drop(offset: int) -> None:
        start = offset - offset % _DROPPED_AT_ONCE
        os.posix_fadvise(fd, start, _DROPPED_AT_ONCE, os.POSIX_FADV_DONTNEED)

    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead, by this descriptor
    return time_reads(context, fd, "buffered", offsets, nbytes, prepare=drop)


def _sleeps() -> int:
    """How often this thread has given up the CPU because it had to wait."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

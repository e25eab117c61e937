"""Real file systems for tests: ext4, xfs and btrfs on loop devices, tmpfs, and full ones.

A test asks for a fixture of tests/conftest.py, and gets a new folder:

    def test_it(xfs: Path) -> None: ...                  # also ext4, ext4_4k, btrfs, tmpfs
    def test_all(filesystem: FileSystem) -> None: ...    # once on each of KINDS
    def test_no_room(small: Path) -> None: ...           # ext4, a few MiB; see `leave_free`

A file system is made at its first use and kept for the session. It needs root, loop devices and
its mkfs; where something is missing, the test skips and says what. `held_disk` makes one whose
device does nothing until the test lets it.

What they do, measured with Linux 6.18 (held_disk and FuseServer tell "returns", which is to say:
with the device's answer still held, io_submit has come back, from "waits", which is to say: it
sleeps until the device answers):

                         ext4      xfs       btrfs     tmpfs    FUSE
    open with O_DIRECT   yes       yes       yes       yes      yes
    STATX_DIOALIGN       yes       yes       no        no       no
    direct read          returns   returns   [1]       [2]      returns [3]
    direct overwrite     returns   returns   waits [4] [2]      returns [3]
    direct, into a hole  returns   returns   waits [4] [2]      returns [3]
    direct, extending    waits     returns   waits [4] [2]      waits
    cold buffered read   waits     waits     waits     [2]      waits [5]
    fsync, fdsync        returns   returns   returns   [2]      returns
    RWF_NOWAIT direct    yes       yes       [6]       no       no
     buffered read       yes       yes       yes       no       no
     buffered write      no        yes       [6]       no       no

"no" to RWF_NOWAIT is EOPNOTSUPP. Where it is "yes", EAGAIN still comes from what is not cached,
from a write that extends the file, and from one that has to change a time stamp; a direct write
over cached pages gets it too.

1. Returns when the pages of the buffer are there. Into one that nobody has touched yet it goes
   through the page cache and waits, as btrfs takes no page faults there: so touch buffers first.
2. There is no device: all is done before io_submit returns.
3. With FUSE_ASYNC_DIO, which libfuse 3 asks for; without, it waits. tests/fuse_server.py has more.
4. Data with checksums, the default, is written through the page cache. With `-o nodatasum` it
   returns, an extending write too.
5. With FOPEN_DIRECT_IO it is a direct read, and returns.
6. Nothing but EAGAIN was seen, of direct reads too.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.fuse_server import FuseServer

MIB = 1 << 20


class UnavailableError(Exception):
    """A file system cannot be had here; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """How to make a file system: of what size, on what device, with which mkfs."""

    type: str
    size: int  # of the sparse image, in bytes
    mkfs: tuple[str, ...] = ()  # the device is added; none for what lives in memory
    sector_size: int = 512
    packages: str = ""  # of Debian, that have the mkfs


RECIPES = {
    "ext4": Recipe("ext4", 64 * MIB, ("mkfs.ext4", "-q", "-b", "4096"), packages="e2fsprogs"),
    # Direct I/O in units of 4096 bytes and nothing less.
    "ext4_4k": Recipe("ext4", 64 * MIB, ("mkfs.ext4", "-q"), 4096, "e2fsprogs"),
    # mkfs.xfs refuses less than 300 MB.
    "xfs": Recipe("xfs", 320 * MIB, ("mkfs.xfs", "-q"), packages="xfsprogs"),
    # mkfs.btrfs refuses less than 109 MiB, and little more is full of metadata at once.
    "btrfs": Recipe("btrfs", 256 * MIB, ("mkfs.btrfs", "-q"), packages="btrfs-progs"),
    "tmpfs": Recipe("tmpfs", 64 * MIB),
    # No journal and no blocks kept for root: what statvfs calls free can be written.
    "small": Recipe(
        "ext4",
        8 * MIB,
        ("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-O", "^has_journal"),
        packages="e2fsprogs",
    ),
}
KINDS = ("ext4", "ext4_4k", "xfs", "btrfs", "tmpfs")


@dataclass(frozen=True)
class FileSystem:
    """A new folder on a file system."""

    kind: str  # a key of RECIPES
    path: Path


def _run(*command: str, packages: str = "") -> str:
    """What a command prints.

    Raises:
        UnavailableError: there is no such command, or it fails.
    """
    # Debian's mkfs are where only root looks.
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    program = shutil.which(command[0], path=path)
    if program is None:
        hint = f" (Debian package {packages})" if packages else ""
        raise UnavailableError(f"no {command[0]}{hint}")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UnavailableError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def _mounted(source: str, directory: Path, *options: str) -> Generator[None, None, None]:
    """Mount, and unmount at the end, or when this process is killed.

    Unmounting is left to a shell that waits for a line or for our end. Where a descriptor is still
    open, of a test that failed, it takes the folder away at once and the device after the last
    close.
    """
    keeper = subprocess.Popen(
        ["sh", "-c", 'read -r line; umount "$1" || umount --lazy "$1"', "sh", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    # A line and not only the end of the pipe, which a forked child may hold open.
    try:
        _run("mount", *options, source, str(directory))
        yield
    finally:
        keeper.communicate(b"\n")


@contextmanager
def _loop_device(image: Path, sector_size: int) -> Generator[str, None, None]:
    """A loop device on an image; at the end it goes away together with its last user."""
    attach = ("losetup", "--find", "--show", "--sector-size", str(sector_size))
    node = _run(*attach, str(image), packages="util-linux")
    try:
        yield node
    finally:
        # Mounted, it is only marked: whatever happens from here on, unmounting detaches it.
        _run("losetup", "--detach", node)


@contextmanager
def made(recipe: Recipe, directory: Path, image: Path | None = None) -> Generator[Path, None, None]:
    """A new file system of this recipe; its root is a folder in directory.

    image: what the device is on, instead of a file in directory.

    Raises:
        UnavailableError: it cannot be had here.
    """
    if os.geteuid() != 0:
        raise UnavailableError(f"mounting {recipe.type} needs root")
    root = directory / "root"
    root.mkdir()
    with ExitStack() as stack:
        if not recipe.mkfs:
            size = f"size={recipe.size}"
            stack.enter_context(_mounted(recipe.type, root, "-t", recipe.type, "-o", size))
        else:
            own = directory / "image"
            try:
                if image is None:
                    with own.open("xb") as file:
                        file.truncate(recipe.size)
                with _loop_device(image or own, recipe.sector_size) as node:
                    # On the node and not on the image: so mkfs sees the size of the sectors.
                    _run(*recipe.mkfs, node, packages=recipe.packages)
                    stack.enter_context(_mounted(node, root, "-t", recipe.type))
            finally:
                own.unlink(missing_ok=True)  # the device holds it, and nothing is left behind
        yield root


@contextmanager
def held_disk(kind: str, directory: Path) -> Generator[tuple[Path, FuseServer], None, None]:
    """The root of a new file system, and the server that has the bytes of its device.

    Reads and writes of the device are `fuse`'s to hold, and to fail, with offsets on the device.
    Its root is a folder in directory. Skips the test when it cannot be had.
    """
    recipe = RECIPES[kind]
    with ExitStack() as stack:
        fuse = stack.enter_context(FuseServer(max_transfer=MIB))
        image = fuse.path("image")
        with image.open("xb") as file:
            file.truncate(recipe.size)
        try:
            root = stack.enter_context(made(recipe, directory, image))
        except UnavailableError as why_not:
            pytest.skip(str(why_not))
        os.sync()
        # Unmounting writes.
        stack.callback(fuse.heal)
        stack.callback(fuse.unhold)
        yield root, fuse


class Mounts:
    """The file systems of a session: each made at its first use, all unmounted at the end."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._found: dict[str, Path | UnavailableError] = {}

    def root(self, kind: str) -> Path:
        """Where a file system of RECIPES is mounted; skips the test when it cannot be had."""
        if kind not in self._found:
            directory = self._directory / kind
            directory.mkdir()
            try:
                root = self._stack.enter_context(made(RECIPES[kind], directory))
            except UnavailableError as why_not:
                self._found[kind] = why_not
            else:
                self._found[kind] = root
        found = self._found[kind]
        if isinstance(found, UnavailableError):
            pytest.skip(str(found))
        return found

    @contextmanager
    def folder(self, kind: str) -> Generator[Path, None, None]:
        """A new folder on it; at the end all that is in it is removed, and its room free again."""
        folder = Path(tempfile.mkdtemp(dir=self.root(kind)))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()


def free(folder: Path) -> int:
    """How many bytes can still be written. ext4 keeps some of f_bfree for itself."""
    answer = os.statvfs(folder)
    return answer.f_bavail * answer.f_frsize


# As many as a long file may need, in a file system in pieces, for the map of where it is.
_LAST_BLOCKS = 16


def leave_free(folder: Path, nbytes: int) -> None:
    """Fill a file system up but for some bytes, by files in this folder.

    For `small` and `tmpfs`: in others there is more that takes and gives room, and not at once.
    nbytes: a multiple of the file system's blocks. A file that is written next needs blocks of
    these for itself too when it is in many pieces. tmpfs then writes what there is room for, also
    directly; ext4 directly all or nothing, else in folios of up to 2 MiB all or nothing of each.
    """
    block = os.statvfs(folder).f_frsize
    with (folder / "filler").open("xb") as file:
        # In steps: the file needs blocks for its own map too, and how many only the end shows.
        while (more := free(folder) - nbytes) > _LAST_BLOCKS * block:
            step = max((more - _LAST_BLOCKS * block) // 2 // block, 1) * block
            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)
    # A file of one block needs no map.
    for i in range(max(free(folder) - nbytes, 0) // block):
        with (folder / f"filler {i}").open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, block)
    assert free(folder) == nbytes, f"{free(folder)} bytes are left"


@contextmanager
def file_size_limit(nbytes: int) -> Generator[None, None, None]:
    """No file can be made longer than this by this process: EFBIG, RLIMIT_FSIZE.

    A write that begins before the limit and ends behind it is short. Each that fails also sends
    SIGXFSZ, which CPython ignores from its start. All files count, those of pytest and of
    coverage too, so let nothing but the operation itself run inside.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

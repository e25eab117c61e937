"""A file system whose every request a test holds, reorders, fails and cuts short.

    with FuseServer() as fuse:
        fuse.write_file("file", data)
        fd = os.open(fuse.path("file"), os.O_RDWR | os.O_DIRECT)
        fuse.hold("read")
        ctx.submit(Request.pread(fd, buffer, 0))         # returns: the read is under way
        fuse.wait_held(4)                                # 16 KiB are four requests
        fuse.release(order=[3, 0])                       # these two are done, in this order
        fuse.fail("write", errno.ENOSPC, offset=range(8192, 1 << 62), times=1)

The server is a process of its own, tests/fuse_daemon.py. Any number of them may be there at once.

What the kernel makes of it (found with Linux 6.18, shown by tests/kernel/test_fuse_server.py):

- An operation is cut into requests of max_transfer bytes. With FUSE_ASYNC_DIO, which libfuse 3
  asks for and this server too (`async_dio`), io_submit sends them all and returns while they are
  held. It waits for the server: without FUSE_ASYNC_DIO; for a write that extends the file; when
  max_background requests are under way; and in a `cached` file without O_DIRECT.
- Data is never cached, as files are opened with FOPEN_DIRECT_IO (not so with `cached`): with and
  without O_DIRECT each read and write reaches the server.
- Of a read, a short request makes the result short, whatever comes after it. Of a write it does so
  only without FUSE_ASYNC_DIO; with it the result is EIO, and the data of the request is written.
- Of an operation with FUSE_ASYNC_DIO one request that fails makes all of it fail; without, what
  came before it counts.
- There is no RWF_NOWAIT (EOPNOTSUPP) and no STATX_DIOALIGN.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import pytest

from tests import fuse_daemon

Kind = Literal["read", "write", "fsync", "fdatasync", "fallocate", "truncate", "open"]
Order = Literal["first", "last"] | Sequence[int]
LIMIT_S = 20.0  # what takes longer hangs


class FuseRequest(NamedTuple):
    """A request as it reached the server."""

    kind: Kind
    name: str
    offset: int  # the new size, of "truncate"
    nbytes: int
    outcome: int | None  # bytes, or -errno; None while it is held

    @property
    def blocked(self) -> bool:
        return self.outcome is None


class FuseServer:
    """One folder of files in memory, mounted while the `with` block runs. Thread-safe.

    max_transfer: bytes of one request at most, both ways; the kernel wants 4096 at least. async_dio
    and max_background: see above. cached: files have a page cache, which O_DIRECT goes around.
    Skips the test where FUSE cannot be had. At the end the folder is unmounted whoever uses it
    still, and what is held fails with ECONNABORTED; so it does when this process ends in any way.
    held_limit: seconds after which the server ends so when a request is still held: a killed
    process whose requests are held cannot end before.
    """

    def __init__(
        self,
        *,
        max_transfer: int = 4096,
        async_dio: bool = True,
        max_background: int = 256,
        cached: bool = False,
        held_limit: float = 60.0,
    ) -> None:
        if max_transfer < 4096:
            raise ValueError(f"max_transfer must be 4096 at least, not {max_transfer}")
        self._options = json.dumps(
            {
                "max_transfer": max_transfer,
                "async_dio": async_dio,
                "max_background": max_background,
                "cached": cached,
                "held_limit": held_limit,
            }
        )
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: Connection | None = None
        self.root = Path()
        self.protocol = (0, 0)  # the kernel's
        self.async_dio = False  # whether both sides have agreed on it

    def __enter__(self) -> Self:
        why_not = unavailable()
        if why_not is not None:
            pytest.skip(why_not)
        self.root = Path(tempfile.mkdtemp(prefix="rawaio-fuse-"))
        self._control, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                # Without site: it starts sooner, and what measures coverage is not for it.
                [
                    *(sys.executable, "-I", "-S", fuse_daemon.__file__),
                    *(str(theirs.fileno()), str(self.root), self._options),
                ],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is not for it
            )
        try:
            state, told = self._receive()
            if state == "unavailable":
                pytest.skip(f"no FUSE: {told}")
            major, minor, self.async_dio = told
            self.protocol = (major, minor)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmount and end the server. Idempotent."""
        if self._process is None or self._control is None:
            return
        self._control.close()
        try:
            self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        fuse_daemon.unmount(str(self.root))  # if the server was killed
        self._process = self._control = None
        self.root.rmdir()

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    # -- files ----------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.root / name

    def write_file(self, name: str, data: bytes | memoryview = b"") -> None:
        """Give a file these contents, past the kernel; make it if need be."""
        self._command("write_file", name, bytes(data))

    def contents(self, name: str) -> bytes:
        """What is in a file, past the kernel."""
        data: bytes = self._command("contents", name)
        return data

    # -- faults ---------------------------------------------------------------------------------

    def fail(
        self,
        kind: Kind,
        code: int,
        *,
        name: str | None = None,
        offset: int | range | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> None:
        """Let requests of this kind fail with this errno, and do nothing.

        offset: only those that touch this byte, or any of this range. after: so many of these
        still work, in the order in which they come. times: how many fail, None for all. Of several
        rules the first that holds counts. They hold until `heal`.
        """
        start: int
        stop: int | None
        if isinstance(offset, range):
            if offset.step != 1:
                raise ValueError(f"a range of bytes has the step 1: {offset}")
            start, stop = offset.start, offset.stop
        else:
            start, stop = (0, None) if offset is None else (offset, offset + 1)
        self._command("fail", kind, code, name, start, stop, after, times)

    def heal(self) -> None:
        """Let nothing fail any more that has not been marked to, when it came."""
        self._command("heal")

    def short(self, limit: int | None, *kinds: Literal["read", "write"]) -> None:
        """Do only the first bytes of each read and write; None: all of them."""
        self._command("short", kinds or ("read", "write"), limit)

    # -- time -----------------------------------------------------------------------------------

    def hold(self, *kinds: Kind) -> None:
        """Hold all requests of these kinds that come from now on; reads and writes if none is said.

        Kinds that were held before and are not named are not held any more; what is held stays so.
        """
        self._command("hold", kinds or ("read", "write"))

    def unhold(self) -> None:
        """Hold nothing any more, and release all."""
        self._command("hold", ())
        self.release()

    def wait_held(self, n: int) -> None:
        """Wait until so many requests are held.

        Raises:
            TimeoutError: there are fewer after LIMIT_S; the server can be closed then, no more.
        """
        self._command("wait_held", n)

    def held(self) -> list[FuseRequest]:
        """What is held, in the order in which it came."""
        return _requests(self._command("held"))

    def release(self, n: int | None = None, order: Order = "first") -> None:
        """Do n of the held requests, or all; each is through to the kernel before the next.

        order: the first n as they came, the last n in reverse, or these indices into `held`.
        """
        which: Sequence[int]
        with self._lock:
            if isinstance(order, str):
                total = len(self._exchange("held"))
                n = total if n is None else n
                if n > total:
                    raise ValueError(f"{total} requests are held, not {n}")
                which = range(n) if order == "first" else range(total - 1, total - n - 1, -1)
            else:
                which = order if n is None else order[:n]
            self._exchange("release", tuple(which))

    # -- what has been --------------------------------------------------------------------------

    def requests(self, *kinds: Kind) -> list[FuseRequest]:
        """All requests of these kinds, or of all, in the order in which they came."""
        every = _requests(self._command("requests"))
        return [request for request in every if not kinds or request.kind in kinds]

    def forget(self) -> None:
        """Begin `requests` anew."""
        self._command("forget")

    def _command(self, name: str, *arguments: object) -> Any:
        with self._lock:
            return self._exchange(name, *arguments)

    def _exchange(self, name: str, *arguments: object) -> Any:
        assert self._control is not None, "not started, or closed"
        self._control.send((name, arguments))
        state, result = self._receive()
        if state == "raised":
            raise result
        return result

    def _receive(self) -> tuple[str, Any]:
        assert self._control is not None
        if not self._control.poll(LIMIT_S):
            raise TimeoutError("the FUSE server does not answer")
        state, result = self._control.recv()
        return state, result


def _requests(reports: Sequence[tuple[Any, ...]]) -> list[FuseRequest]:
    return [FuseRequest(*report) for report in reports]


def unavailable() -> str | None:
    """Why there is no FUSE here, as far as can be told without mounting."""
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse"
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return "no fusermount3 (Debian package fuse3), which those who are not root need"
    return None

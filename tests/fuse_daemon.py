"""A FUSE server made for tests: the program that `tests.fuse_server.FuseServer` commands.

It serves one folder of regular files in memory, and speaks the kernel's protocol (<linux/fuse.h>)
on /dev/fuse itself. libfuse will not do: it reads requests with many threads, so that neither which
request is the n-th nor in what order replies reach the kernel is known to anyone. Here one thread
takes a request, and a reply has completed what it is for when its write(2) returns.

Nothing in here waits but for the kernel and for commands. Imports the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import selectors
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from multiprocessing.connection import Connection
from typing import Any

ROOT_ID = 1
MINOR = 31  # of the protocol's version 7; what came later is not used
FOPEN_DIRECT_IO = 1 << 0
FOPEN_NOFLUSH = 1 << 5  # Linux 5.16; close works with the server gone
FATTR_SIZE = 1 << 3
FSYNC_FDATASYNC = 1
INIT_ASYNC_READ = 1 << 0
INIT_BIG_WRITES = 1 << 5
INIT_ASYNC_DIO = 1 << 15
INIT_MAX_PAGES = 1 << 22
FALLOC_FL_KEEP_SIZE = 1
MNT_DETACH = 2
MS_NOSUID_NODEV = 6

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
INIT_IN = struct.Struct("=IIII")
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
ATTR = struct.Struct("=6Q10I")
ENTRY_OUT = struct.Struct("=QQQQII")
ATTR_OUT = struct.Struct("=QII")
OPEN_OUT = struct.Struct("=QII")
SETATTR_IN = struct.Struct("=IIQQ")
CREATE_IN = struct.Struct("=IIII")
READ_WRITE_IN = struct.Struct("=QQIIQII")
WRITE_OUT = struct.Struct("=II")
FSYNC_IN = struct.Struct("=QII")
FALLOCATE_IN = struct.Struct("=QQQII")
STATFS_OUT = struct.Struct("=5QIII28x")
DIRENT = struct.Struct("=QQII")


class Opcode(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    UNLINK = 10
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})


@dataclass
class File:
    ino: int
    data: bytearray = field(default_factory=bytearray)


@dataclass
class Rule:
    """Which requests fail: those of a kind whose bytes touch a range, past the first so many."""

    kind: str
    errno: int
    name: str | None
    start: int
    stop: int | None
    after: int
    times: int | None

    def strikes(self, request: Request) -> bool:
        """Whether it fails this request, which is counted."""
        end = request.offset + max(request.nbytes, 1)
        if (
            self.kind != request.kind
            or (self.name is not None and self.name != request.name)
            or end <= self.start
            or (self.stop is not None and request.offset >= self.stop)
        ):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            if self.times == 0:
                return False
            self.times -= 1
        return True


@dataclass
class Request:
    """A request for a file's data, which may be held, failed and cut short."""

    unique: int
    kind: str
    name: str
    file: File
    offset: int
    nbytes: int
    run: Callable[[Request], bytes]
    payload: bytes = b""
    outcome: int | None = None  # bytes, or -errno; None while it is held
    errno: int = 0
    since: float = 0.0

    def report(self) -> tuple[str, str, int, int, int | None]:
        return self.kind, self.name, self.offset, self.nbytes, self.outcome


class Server:
    """Files, rules, and the requests of the kernel. All of it runs in one thread."""

    def __init__(self, fuse: int, control: Connection, options: dict[str, Any]) -> None:
        self.fuse = fuse
        self.control = control
        self.options = options
        self.files: dict[str, File] = {}
        self.by_ino: dict[int, tuple[str, File]] = {}
        self.rules: list[Rule] = []
        self.limits: dict[str, int] = {}
        self.holding: frozenset[str] = frozenset()
        self.held: list[Request] = []
        self.log: list[Request] = []
        self.awaited: int | None = None  # how many held requests a command waits for
        self.size = 1 << 16

    # -- kernel ---------------------------------------------------------------------------------

    def reply(self, unique: int, payload: bytes = b"", failure: int = 0) -> None:
        try:
            os.write(
                self.fuse,
                OUT_HEADER.pack(OUT_HEADER.size + len(payload), -failure, unique) + payload,
            )
        except OSError as error:
            if error.errno != errno.ENOENT:  # it was interrupted, and nobody wants it any more
                raise

    def take(self) -> bool:
        """Take a request of the kernel's; False when it is gone."""
        try:
            message = os.read(self.fuse, self.size)
        except OSError as error:
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                return True
            if error.errno == errno.ENODEV:  # unmounted
                return False
            raise
        length, opcode, unique, nodeid, *_ = IN_HEADER.unpack_from(message)
        if opcode in UNANSWERED:
            return True
        body = message[IN_HEADER.size : length]
        try:
            method = getattr(self, Opcode(opcode).name.lower())
        except ValueError:
            self.reply(unique, failure=errno.ENOSYS)
            return True
        try:
            answer = method(unique, nodeid, body)
        except OSError as error:
            self.reply(unique, failure=error.errno or errno.EIO)
        else:
            if answer is not None:
                self.reply(unique, answer)
        return True

    def init(self, unique: int, nodeid: int, body: bytes) -> None:
        major, minor, readahead, offered = INIT_IN.unpack_from(body)
        transfer: int = self.options["max_transfer"]
        wanted = INIT_ASYNC_READ | INIT_BIG_WRITES | INIT_MAX_PAGES
        if self.options["async_dio"]:
            wanted |= INIT_ASYNC_DIO
        flags = offered & wanted
        background: int = self.options["max_background"]
        pages = -(-transfer // 4096)
        self.size = max(transfer + 4096, 1 << 16)
        # congestion_threshold is not reached before max_background is.
        answer = INIT_OUT.pack(
            7, MINOR, readahead, flags, background, background, transfer, 1, pages, 0, 0
        )
        self.reply(unique, answer)
        self.control.send(("ready", (major, minor, bool(flags & INIT_ASYNC_DIO))))

    def attributes(self, nodeid: int) -> bytes:
        if nodeid == ROOT_ID:
            size, mode = 0, stat.S_IFDIR | 0o755
        else:
            size, mode = len(self.found(nodeid)[1].data), stat.S_IFREG | 0o644
        ids = os.getuid(), os.getgid()
        return ATTR.pack(nodeid, size, -(-size // 512), 0, 0, 0, 0, 0, 0, mode, 1, *ids, 0, 4096, 0)

    def found(self, nodeid: int) -> tuple[str, File]:
        try:
            return self.by_ino[nodeid]
        except KeyError:
            raise OSError(errno.ESTALE, "") from None

    def entry(self, file: File) -> bytes:
        # Valid for no time: what a command changes is seen at once.
        return ENTRY_OUT.pack(file.ino, 0, 0, 0, 0, 0) + self.attributes(file.ino)

    def lookup(self, unique: int, nodeid: int, body: bytes) -> bytes:
        try:
            return self.entry(self.files[os.fsdecode(body.split(b"\0")[0])])
        except KeyError:
            raise OSError(errno.ENOENT, "") from None

    def getattr(self, unique: int, nodeid: int, body: bytes) -> bytes:
        return ATTR_OUT.pack(0, 0, 0) + self.attributes(nodeid)

    def setattr(self, unique: int, nodeid: int, body: bytes) -> bytes | None:
        valid, _, _, size = SETATTR_IN.unpack_from(body)
        if not valid & FATTR_SIZE:
            return self.getattr(unique, nodeid, body)

        def run(request: Request) -> bytes:
            resize(request.file.data, size)
            return self.getattr(unique, nodeid, body)

        self.arrive(unique, "truncate", nodeid, run, offset=size)
        return None

    def unlink(self, unique: int, nodeid: int, body: bytes) -> bytes:
        try:
            del self.files[os.fsdecode(body.split(b"\0")[0])]
        except KeyError:
            raise OSError(errno.ENOENT, "") from None
        return b""

    def open_out(self) -> bytes:
        cached: bool = self.options["cached"]
        return OPEN_OUT.pack(0, FOPEN_NOFLUSH | (0 if cached else FOPEN_DIRECT_IO), 0)

    def open(self, unique: int, nodeid: int, body: bytes) -> None:
        self.arrive(unique, "open", nodeid, lambda _: self.open_out())

    def create(self, unique: int, nodeid: int, body: bytes) -> None:
        name = os.fsdecode(body[CREATE_IN.size :].split(b"\0")[0])
        file = self.make(name)
        self.arrive(unique, "open", file.ino, lambda _: self.entry(file) + self.open_out())

    def read(self, unique: int, nodeid: int, body: bytes) -> None:
        _, offset, nbytes, *_ = READ_WRITE_IN.unpack_from(body)

        def run(request: Request) -> bytes:
            wanted = min(nbytes, self.limits.get("read", nbytes))
            data = bytes(request.file.data[offset : offset + wanted])
            request.outcome = len(data)
            return data

        self.arrive(unique, "read", nodeid, run, offset=offset, nbytes=nbytes)

    def write(self, unique: int, nodeid: int, body: bytes) -> None:
        _, offset, nbytes, *_ = READ_WRITE_IN.unpack_from(body)
        payload = body[READ_WRITE_IN.size :]

        def run(request: Request) -> bytes:
            data = payload[: self.limits.get("write", nbytes)]
            if len(request.file.data) < offset:
                resize(request.file.data, offset)
            request.file.data[offset : offset + len(data)] = data
            request.outcome = len(data)
            return WRITE_OUT.pack(len(data), 0)

        self.arrive(unique, "write", nodeid, run, offset=offset, nbytes=nbytes)

    def fsync(self, unique: int, nodeid: int, body: bytes) -> None:
        _, flags, _ = FSYNC_IN.unpack_from(body)
        kind = "fdatasync" if flags & FSYNC_FDATASYNC else "fsync"
        self.arrive(unique, kind, nodeid, lambda _: b"")

    def fallocate(self, unique: int, nodeid: int, body: bytes) -> None:
        _, offset, nbytes, mode, _ = FALLOCATE_IN.unpack_from(body)
        if mode & ~FALLOC_FL_KEEP_SIZE:
            raise OSError(errno.EOPNOTSUPP, "")

        def run(request: Request) -> bytes:
            if not mode & FALLOC_FL_KEEP_SIZE and len(request.file.data) < offset + nbytes:
                resize(request.file.data, offset + nbytes)
            return b""

        self.arrive(unique, "fallocate", nodeid, run, offset=offset, nbytes=nbytes)

    def statfs(self, unique: int, nodeid: int, body: bytes) -> bytes:
        return STATFS_OUT.pack(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096)

    def opendir(self, unique: int, nodeid: int, body: bytes) -> bytes:
        return OPEN_OUT.pack(0, 0, 0)

    def readdir(self, unique: int, nodeid: int, body: bytes) -> bytes:
        _, offset, nbytes, *_ = READ_WRITE_IN.unpack_from(body)
        answer = b""
        for i, (name, file) in enumerate(self.files.items()):
            encoded = os.fsencode(name)
            one = DIRENT.pack(file.ino, i + 1, len(encoded), stat.S_IFREG >> 12) + encoded
            one += bytes(-len(one) % 8)
            if i >= offset:
                if len(answer) + len(one) > nbytes:
                    break
                answer += one
        return answer

    def nothing(self, unique: int, nodeid: int, body: bytes) -> bytes:
        return b""

    release = releasedir = flush = destroy = nothing

    # -- requests for data ----------------------------------------------------------------------

    def arrive(
        self,
        unique: int,
        kind: str,
        nodeid: int,
        run: Callable[[Request], bytes],
        *,
        offset: int = 0,
        nbytes: int = 0,
    ) -> None:
        """Log a request, and hold it or do it."""
        name, file = self.found(nodeid)
        request = Request(unique, kind, name, file, offset, nbytes, run, since=time.monotonic())
        self.log.append(request)
        # Here and not when it is done: so the n-th is the n-th that came, in whatever order.
        for rule in self.rules:
            if rule.strikes(request):
                request.errno = rule.errno
                break
        if kind in self.holding:
            self.held.append(request)
            self.tell()
        else:
            self.finish(request)

    def finish(self, request: Request) -> None:
        if request.errno:
            request.outcome = -request.errno
            self.reply(request.unique, failure=request.errno)
            return
        answer = request.run(request)
        if request.outcome is None:
            request.outcome = 0
        self.reply(request.unique, answer)

    def tell(self) -> None:
        """Answer the command that waits for requests to be held, when there are enough."""
        if self.awaited is not None and len(self.held) >= self.awaited:
            self.awaited = None
            self.control.send(("done", len(self.held)))

    # -- commands -------------------------------------------------------------------------------

    def make(self, name: str) -> File:
        file = self.files[name] = File(ROOT_ID + 1 + len(self.by_ino))
        self.by_ino[file.ino] = name, file
        return file

    def do_write_file(self, name: str, data: bytes) -> None:
        file = self.files.get(name) or self.make(name)
        file.data[:] = data

    def do_contents(self, name: str) -> bytes:
        return bytes(self.files[name].data)

    def do_fail(self, *rule: Any) -> None:
        self.rules.append(Rule(*rule))

    def do_heal(self) -> None:
        self.rules.clear()

    def do_short(self, kinds: list[str], limit: int | None) -> None:
        for kind in kinds:
            if limit is None:
                self.limits.pop(kind, None)
            else:
                self.limits[kind] = limit

    def do_hold(self, kinds: list[str]) -> None:
        self.holding = frozenset(kinds)

    def do_release(self, which: list[int]) -> int:
        """Finish held requests, in this order: a reply is through before the next is begun."""
        chosen = [self.held[i] for i in which]
        for request in chosen:
            self.held.remove(request)
        for request in chosen:
            self.finish(request)
        return len(self.held)

    def do_held(self) -> list[tuple[str, str, int, int, int | None]]:
        return [request.report() for request in self.held]

    def do_requests(self) -> list[tuple[str, str, int, int, int | None]]:
        return [request.report() for request in self.log]

    def do_forget(self) -> None:
        self.log.clear()

    def command(self) -> bool:
        """Do a command; False when there will be no more."""
        try:
            name, arguments = self.control.recv()
        except (EOFError, ConnectionResetError):
            return False
        if name == "wait_held":
            (self.awaited,) = arguments
            self.tell()
            return True
        try:
            result = getattr(self, f"do_{name}")(*arguments)
        except Exception as error:  # noqa: BLE001 - it is the commander's
            self.control.send(("raised", error))
        else:
            self.control.send(("done", result))
        return True

    # -- all of it ------------------------------------------------------------------------------

    def serve(self) -> None:
        """Until the control channel or the mount has gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.fuse, selectors.EVENT_READ, self.take)
            selector.register(self.control, selectors.EVENT_READ, self.command)
            limit: float = self.options["held_limit"]
            while True:
                oldest = min((request.since for request in self.held), default=None)
                left = None if oldest is None else oldest + limit - time.monotonic()
                # A process that is killed waits in the kernel for what is held before it closes
                # its descriptors: then nobody else can let go of it.
                if left is not None and left <= 0:
                    print(f"FUSE: a request was held for {limit} s", file=sys.stderr)
                    return
                if not all(key.data() for key, _ in selector.select(left)):
                    return


def resize(data: bytearray, nbytes: int) -> None:
    del data[nbytes:]
    data.extend(bytes(nbytes - len(data)))


def mount(mountpoint: str, max_read: int) -> int:
    """Mount, and return the descriptor that requests are read from. Root needs no fusermount3."""
    if os.geteuid() == 0:
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,max_read={max_read}"
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (os.fsencode(mountpoint), b"fuse", ctypes.c_ulong(MS_NOSUID_NODEV))
        if libc.mount(b"rawaio-test", *arguments, options.encode()) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"mount: {os.strerror(code)}")
        return fuse
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            ["fusermount3", "-o", f"max_read={max_read},fsname=rawaio-test", "--", mountpoint],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise OSError(errno.EPERM, done.stderr.strip())
        _, (fuse,), _, _ = socket.recv_fds(ours, 1, 1)
    return fuse


def unmount(mountpoint: str) -> None:
    """Take it away at once, whoever still uses it; nothing happens when it is not there."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).umount2(os.fsencode(mountpoint), MNT_DETACH)
    else:
        command = ["fusermount3", "-u", "-z", "--", mountpoint]
        subprocess.run(command, capture_output=True, check=False)


def main() -> None:
    control, mountpoint = Connection(int(sys.argv[1])), sys.argv[2]
    options: dict[str, Any] = json.loads(sys.argv[3])
    try:
        fuse = mount(mountpoint, options["max_transfer"])
    except OSError as error:
        control.send(("unavailable", str(error)))
        return
    try:
        Server(fuse, control, options).serve()
    finally:
        unmount(mountpoint)
        # Ends what is held, with ECONNABORTED.
        os.close(fuse)


if __name__ == "__main__":
    main()

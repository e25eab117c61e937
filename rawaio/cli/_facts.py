"""What `doctor` finds out about the place it runs in: plain data, and the asking.

Nothing is judged here. Each call is tried in a way that changes nothing; where a filter may kill
the process for it, in a forked child first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from rawaio import IOContext, RawAIOError, UnsupportedError, syscalls
from rawaio.cli._path import Place, Timing, examine, time_reads
from rawaio.ring import CompletionRing, Ordering

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping

__all__ = [
    "CONTEXT_SIZE",
    "OF_A_CONTEXT",
    "Call",
    "Facts",
    "IOUring",
    "Limits",
    "Ring",
    "System",
    "Trial",
    "gather",
]

CONTEXT_SIZE: Final = 128  # IOContext's default for nr_events
_HEADER_SIZE: Final = ctypes.sizeof(syscalls.aio_ring)
_STATX_BASIC_STATS: Final = 0x7FF
_SECCOMP: Final = {"0": "none", "1": "strict", "2": "filter"}
# Without these no context is made, used and closed.
OF_A_CONTEXT: Final = ("io_setup", "io_submit", "io_destroy", "eventfd2")
_KILLS: Final = "the process is killed (seccomp)"
# What the kernel says to a call with the context 0, which never exists. So the call is there.
_NO_CONTEXT: Final = frozenset({errno.EINVAL})
_MEANING: Final = {
    errno.ENOSYS: "not in this kernel, or hidden by a sandbox",
    errno.EPERM: "denied by a sandbox (seccomp)",
    errno.EACCES: "denied by a sandbox (seccomp or LSM)",
    errno.EAGAIN: "over the system-wide limit fs.aio-max-nr",
}


@dataclass(frozen=True, slots=True)
class System:
    """Kernel, process and interpreter."""

    kernel: str
    machine: str
    pointer_bits: int
    page_size: int
    libc: str
    python: str
    gil: bool
    seccomp: str  # "none", "strict", "filter" or "unknown"


@dataclass(frozen=True, slots=True)
class Call:
    """One system call, tried."""

    name: str
    works: bool
    error: str | None  # the errno's name, also where it is what a call that works says
    meaning: str
    fatal: bool = False  # the process is killed for it, by the signal that error names


@dataclass(frozen=True, slots=True)
class IOUring:
    """io_uring, which rawaio does not use."""

    works: bool
    error: str | None
    meaning: str
    disabled: int | None  # the sysctl kernel.io_uring_disabled; None where there is none


@dataclass(frozen=True, slots=True)
class Limits:
    """The system-wide limit of requests; None where the kernel does not tell."""

    aio_nr: int | None
    aio_max_nr: int | None

    @property
    def contexts_left(self) -> int | None:
        """How many contexts of the default size still fit."""
        if self.aio_nr is None or self.aio_max_nr is None:
            return None
        return max(self.aio_max_nr - self.aio_nr, 0) // CONTEXT_SIZE


@dataclass(frozen=True, slots=True)
class Ring:
    """The completion ring of a context of the default size."""

    header: dict[str, int] | None  # the eight words; None when there is no ring to read
    why_not: str | None  # None: usable
    ordering: str
    ordering_means: str

    @property
    def suffices(self) -> bool:
        """Whether everything can be reaped from it, without io_getevents.

        Not where it is read as far as the eventfd has counted: an event that is there, and not yet
        counted, comes by io_getevents.
        """
        return self.why_not is None and self.ordering != Ordering.COUNTED.name


@dataclass(frozen=True, slots=True)
class Trial:
    """Reads of memory through an `IOContext`: whether everything works together, and how fast."""

    error: str | None
    advice: tuple[str, ...] = ()
    mechanism: str | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything. Where the process is not supported, nothing is tried and the rest is None."""

    system: System
    unsupported: str | None
    limits: Limits
    calls: tuple[Call, ...] = ()
    io_uring: IOUring | None = None
    ring: Ring | None = None
    trial: Trial | None = None
    place: Place | None = None


def gather(path: str | None = None) -> Facts:
    """Find out everything; about the place at path only when AIO works at all.

    Can block: with a path for about two seconds. Makes no AIO system call where rawaio has no
    numbers.

    Raises:
        OSError: what is wrong with the path, or with reading there.
    """
    if path is not None:
        os.stat(path)
    system, limits = ask_system(), ask_limits()
    try:
        syscalls.numbers()
    except UnsupportedError as error:
        return Facts(system, str(error), limits)
    fatal = find_fatal() if system.seccomp != "none" else {}
    calls, ring = try_calls(fatal)
    used = OF_A_CONTEXT if ring.suffices else (*OF_A_CONTEXT, "io_getevents")
    deadly = [name for name in used if name in fatal]
    trial = Trial(f"not tried, because of {', '.join(deadly)}") if deadly else try_reads()
    place = None
    if path is not None and trial.error is None and "statx" not in fatal:
        place = examine(path)
    return Facts(system, None, limits, calls, ask_io_uring(fatal), ring, trial, place)


# -- the system ---------------------------------------------------------------------------------


def ask_system() -> System:
    """Kernel, process and interpreter. Makes no system call that depends on the machine."""
    gil: Callable[[], bool] | None = getattr(sys, "_is_gil_enabled", None)  # Python 3.13
    build = ", free-threaded build" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    status = _fields("/proc/self/status")
    return System(
        kernel=f"{platform.system()} {platform.release()}",
        machine=syscalls.machine(),
        pointer_bits=8 * struct.calcsize("P"),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        libc=_libc(),
        python=f"{platform.python_implementation()} {platform.python_version()}{build}",
        gil=gil is None or gil(),
        seccomp=_SECCOMP.get(status.get("Seccomp", ""), "unknown"),
    )


def _libc() -> str:
    try:
        version = os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):  # not glibc
        version = None
    if version:
        return version
    name, number = platform.libc_ver()
    if name:
        return f"{name} {number}".strip()
    return "musl" if "/ld-musl-" in (_text("/proc/self/maps") or "") else "unknown"


def ask_limits() -> Limits:
    """The sysctls fs.aio-nr and fs.aio-max-nr."""
    return Limits(_number("/proc/sys/fs/aio-nr"), _number("/proc/sys/fs/aio-max-nr"))


def ask_io_uring(fatal: Mapping[str, str]) -> IOUring:
    """Whether io_uring could be used. Makes none: without parameters the kernel says EFAULT."""
    number = syscalls.numbers().io_uring_setup
    call = _try(fatal, "io_uring_setup", _raw(number, 1, 0), {errno.EFAULT})
    disabled = _number("/proc/sys/kernel/io_uring_disabled")
    meaning = call.meaning
    if disabled and not call.works and not call.fatal:
        meaning = f"switched off: sysctl kernel.io_uring_disabled={disabled}"
    return IOUring(call.works, call.error, meaning, disabled)


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def _number(path: str) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None


def _fields(path: str) -> dict[str, str]:
    lines = (line.partition(":") for line in (_text(path) or "").splitlines())
    return {name: value.strip() for name, _, value in lines}


# -- the calls ----------------------------------------------------------------------------------


def find_fatal() -> dict[str, str]:
    """The calls that this process would be killed for, and the names of the signals that do it.

    A seccomp filter may do that instead of giving an errno. Each call is made in a forked child.
    """
    numbers = syscalls.numbers()._asdict().items()
    killers = {name: _killer(number) for name, number in numbers}
    return {name: killer for name, killer in killers.items() if killer is not None}


def _killer(number: int) -> str | None:
    """What signal kills who makes this call; None when none does, or it cannot be found out."""
    try:
        child = os.fork()
    except OSError:
        return None
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may die, but leave nothing
            # Zeros are wrong for each of them, but for eventfd2, whose result is gone with the
            # child. A filter sees numbers only, and does not follow addresses.
            syscalls.raw_syscall()(*map(ctypes.c_long, (number, 0, 0, 0, 0, 0, 0)))
        finally:
            os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return signal.Signals(-status).name if status < 0 else None


def try_calls(fatal: Mapping[str, str]) -> tuple[tuple[Call, ...], Ring]:
    """Try each system call with nothing to do for it, on a context of its own if there is one.

    fatal: as `find_fatal` says; these are not made.
    """
    made: list[int] = []
    setup = _try(fatal, "io_setup", lambda: made.append(syscalls.io_setup(CONTEXT_SIZE)))
    ctx_id = made[0] if made else 0
    harmless = frozenset[int]() if made else _NO_CONTEXT
    events, no_wait = syscalls.io_event(), syscalls.timespec(0, 0)
    event, zero = ctypes.addressof(events), ctypes.addressof(no_wait)
    idle = syscalls.iocb()  # in no context, so that there is nothing to cancel
    iocb = ctypes.addressof(idle)
    numbers = syscalls.numbers()
    ring = _ask_ring(ctx_id)
    attempt = partial(_try, fatal)
    calls = (
        setup,
        attempt("io_submit", lambda: syscalls.io_submit(ctx_id, 0, 0), harmless),
        attempt("io_getevents", lambda: syscalls.io_getevents(ctx_id, 0, 1, event, zero), harmless),
        attempt("io_cancel", lambda: syscalls.io_cancel(ctx_id, iocb, event), {errno.EINVAL}),
        # Last of all, it takes the context away.
        attempt("io_destroy", lambda: syscalls.io_destroy(ctx_id), harmless),
        attempt("io_pgetevents", _raw(numbers.io_pgetevents, 0, 0, 1, event, zero, 0), _NO_CONTEXT),
        attempt("eventfd2", lambda: os.close(os.eventfd(0, os.EFD_CLOEXEC))),
        attempt("statx", lambda: syscalls.statx("/", 0, _STATX_BASIC_STATS)),
    )
    return calls, ring


def _try(
    fatal: Mapping[str, str],
    name: str,
    call: Callable[[], object],
    harmless: Collection[int] = (),
) -> Call:
    """harmless: what a call that works answers to a question that makes no sense."""
    if name in fatal:
        return Call(name, False, fatal[name], _KILLS, fatal=True)
    try:
        call()
    except OSError as error:
        code = error.errno or 0
        known = errno.errorcode.get(code, str(code))
        if code in harmless:
            return Call(name, True, known, f"works: {known} is right when there is nothing to do")
        return Call(name, False, known, _MEANING.get(code, os.strerror(code)))
    return Call(name, True, None, "works")


def _raw(number: int, *arguments: int) -> Callable[[], None]:
    def call() -> None:
        boxed = map(ctypes.c_ulong, arguments)
        if syscalls.raw_syscall()(ctypes.c_long(number), *boxed) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return call


def _ask_ring(ctx_id: int) -> Ring:
    # As IOContext has it, where every request signals the eventfd.
    ring = CompletionRing(ctx_id, counted=True)
    why_not = ring.why_not if ctx_id else "there is no context: io_setup failed"
    found = Ring(_header(ctx_id), why_not, ring.ordering.name, ring.ordering.value)
    ring.close()
    return found


def _header(ctx_id: int) -> dict[str, int] | None:
    if not ctx_id:
        return None
    try:
        # Not by its address: what is no memory is an error here, and not a fault.
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            header = os.pread(memory.fileno(), _HEADER_SIZE, ctx_id)
    except OSError:
        return None
    if len(header) < _HEADER_SIZE:
        return None
    words = struct.unpack("=8I", header)
    return dict(zip((name for name, *_ in syscalls.aio_ring._fields_), words, strict=True))


# -- together -----------------------------------------------------------------------------------


def try_reads() -> Trial:
    """Read memory through an `IOContext`: also the yardstick for what a read of a disk takes."""
    try:
        with _memory() as fd, IOContext(CONTEXT_SIZE) as context:
            timing = time_reads(context, fd, "memory", [0] * 64, 1 << 16)
            return Trial(None, mechanism=context.statistics().mechanism, timing=timing)
    except (OSError, RawAIOError) as error:
        return Trial(str(error), tuple(getattr(error, "__notes__", ())))


@contextmanager
def _memory() -> Generator[int]:
    fd = os.memfd_create("rawaio-doctor")
    try:
        os.truncate(fd, 1 << 16)
        yield fd
    finally:
        os.close(fd)

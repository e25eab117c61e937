"""The system call layer without the kernel: what is passed, and what is made of the answer."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from rawaio import errors, syscalls
from rawaio.errors import UnsupportedError

# From asm/unistd_64.h and asm-generic/unistd.h: setup, destroy, getevents, submit, cancel,
# pgetevents, eventfd2, statx, io_uring_setup.
TABLES = {
    "x86_64": (206, 207, 208, 209, 210, 333, 290, 332, 425, 285),
    "aarch64": (0, 1, 4, 2, 3, 292, 19, 291, 425, 47),
}
FOREIGN = [
    ("x86_64", 4),  # there, 206 is setgroups32 and 208 setresuid32
    ("aarch64", 4),  # there, 1 is exit and 2 is fork
    ("i686", 4),
    ("armv7l", 4),
    ("armv8l", 4),
    ("i686", 8),
    ("riscv64", 8),
    ("ppc64le", 8),
    ("s390x", 8),
    ("arm64", 8),
    ("AMD64", 8),
    ("", 8),
]

Call = Callable[[], object]
# Each call, with arguments that can do no harm if it is made after all.
CALLS: dict[str, Call] = {
    "io_setup": lambda: syscalls.io_setup(0),
    "io_destroy": lambda: syscalls.io_destroy(0),
    "io_submit": lambda: syscalls.io_submit(0, 0, 0),
    "io_getevents": lambda: syscalls.io_getevents(0, 0, 0, 0, 0),
    "io_cancel": lambda: syscalls.io_cancel(0, 0, 0),
    "statx": lambda: syscalls.statx("/", 0, 0),
    "statx of a descriptor": lambda: syscalls.statx(0, 0, 0),
    "raw_syscall": syscalls.raw_syscall,
}


CACHED = (syscalls._libc, syscalls._typed, syscalls.raw_syscall)


def forget_functions() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture(autouse=True)
def fresh_functions() -> Generator[None, None, None]:
    forget_functions()
    yield
    forget_functions()


class FakeFunction:
    """`syscall` of a C library whose kernel gives one answer."""

    def __init__(self, result: int, failure: int) -> None:
        self.result, self.failure = result, failure
        self.restype: Any = None
        self.argtypes: Any = None
        self.passed: list[int | bytes | None] = []

    def __call__(self, *arguments: Any) -> int:
        assert self.restype is ctypes.c_long
        assert len(self.argtypes) == len(arguments)
        # As ctypes would do it; all are of 8 bytes.
        assert all(ctypes.sizeof(t) == 8 for t in self.argtypes)
        self.passed = [t(a).value for t, a in zip(self.argtypes, arguments, strict=True)]
        ctypes.set_errno(self.failure)
        return self.result


class FakeLibrary:
    def __init__(self) -> None:
        self.result = 0
        self.failure = 0
        self.functions: list[FakeFunction] = []
        self.looked_up: list[str] = []

    def __getitem__(self, name: str) -> FakeFunction:
        self.looked_up.append(name)
        self.functions.append(FakeFunction(self.result, self.failure))
        return self.functions[-1]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(syscalls, "_libc", lambda: fake)
    monkeypatch.setattr(syscalls, "numbers", lambda: syscalls.SyscallNumbers(*range(101, 111)))
    return fake


# -- numbers -----------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, pointer_size: int) -> None:
    calcsize = struct.calcsize
    monkeypatch.setattr(syscalls, "machine", lambda: machine)
    monkeypatch.setattr(
        struct, "calcsize", lambda code: pointer_size if code == "P" else calcsize(code)
    )


@pytest.mark.parametrize("machine", sorted(TABLES))
def test_known_machines(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    with monkeypatch.context() as patch:
        pretend(patch, machine, 8)
        found = syscalls.numbers()
    assert found == TABLES[machine]
    assert found._fields == (
        "io_setup",
        "io_destroy",
        "io_getevents",
        "io_submit",
        "io_cancel",
        "io_pgetevents",
        "eventfd2",
        "statx",
        "io_uring_setup",
        "fallocate",
    )


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("machine", "pointer_size"), FOREIGN)
def test_a_process_that_is_not_in_the_table_makes_no_call(
    monkeypatch: pytest.MonkeyPatch, machine: str, pointer_size: int, call: str, warm: bool
) -> None:
    if warm and call == "raw_syscall":
        return  # whoever has it was let in
    fake = FakeLibrary()
    monkeypatch.setattr(syscalls, "_libc", lambda: fake)
    if warm:
        CALLS[call]()  # the function object is at hand, then
        for function in fake.functions:
            function.passed.clear()
    else:
        monkeypatch.setattr(ctypes, "CDLL", None)
    looked_up = len(fake.looked_up)
    with monkeypatch.context() as patch:
        pretend(patch, machine, pointer_size)
        with pytest.raises(UnsupportedError) as caught:
            CALLS[call]()
    assert len(fake.looked_up) == looked_up
    assert all(function.passed == [] for function in fake.functions)
    message = str(caught.value)
    assert f"{8 * pointer_size}-bit processes on {sys.platform} {machine};" in message
    assert message.endswith("it knows: linux x86_64 (64-bit), aarch64 (64-bit)")


@pytest.mark.parametrize(
    ("name", "value"), [("byteorder", "big"), ("platform", "darwin"), ("platform", "win32")]
)
@pytest.mark.parametrize("machine", sorted(TABLES))
def test_only_little_endian_linux(
    monkeypatch: pytest.MonkeyPatch, machine: str, name: str, value: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, value)
        pretend(patch, machine, 8)
        with pytest.raises(UnsupportedError):
            syscalls.numbers()


def test_an_unsupported_machine_is_rawaio_s_own_error() -> None:
    assert issubclass(UnsupportedError, errors.RawAIOError)
    assert not issubclass(UnsupportedError, OSError)


# -- errno -------------------------------------------------------------------------------------

ERRNOS = sorted(errno.errorcode)
KERNEL_CALLS = {name: call for name, call in CALLS.items() if name != "raw_syscall"}


@pytest.mark.parametrize("call", KERNEL_CALLS)
def test_errno_is_never_lost_or_remapped(library: FakeLibrary, call: str) -> None:
    name = call.partition(" ")[0]
    for failure in ERRNOS:
        if name == "io_cancel" and failure == errno.EINPROGRESS:
            continue
        forget_functions()
        library.result, library.failure = -1, failure
        with pytest.raises(OSError, match=f"{name}: ") as caught:
            KERNEL_CALLS[call]()
        assert caught.value.errno == failure
        assert caught.value.strerror == f"{name}: {os.strerror(failure)}"
        assert type(caught.value) is type(OSError(failure, ""))
        assert not isinstance(caught.value, errors.RawAIOError)


@pytest.mark.parametrize("call", KERNEL_CALLS)
@pytest.mark.parametrize("stale", [errno.EINVAL, errno.EINPROGRESS])
def test_the_return_value_decides_and_not_a_stale_errno(
    library: FakeLibrary, call: str, stale: int
) -> None:
    library.result, library.failure = 0, stale
    KERNEL_CALLS[call]()


@pytest.mark.parametrize("result", [0, 1, 5, 2**31, 2**40])
def test_counts_are_given_back_whole(library: FakeLibrary, result: int) -> None:
    library.result, library.failure = result, errno.EAGAIN
    assert syscalls.io_submit(1, 2, 3) == result
    forget_functions()
    assert syscalls.io_getevents(1, 2, 3, 4, None) == result


def test_io_cancel_s_einprogress_is_success(library: FakeLibrary) -> None:
    library.result, library.failure = -1, errno.EINPROGRESS
    syscalls.io_cancel(1, 2, 3)
    assert library.functions[0].passed == [105, 1, 2, 3]


def test_other_calls_einprogress_is_a_failure(library: FakeLibrary) -> None:
    library.result, library.failure = -1, errno.EINPROGRESS
    with pytest.raises(OSError, match="io_submit") as caught:
        syscalls.io_submit(1, 2, 3)
    assert caught.value.errno == errno.EINPROGRESS


def test_kernel_error_carries_advice() -> None:
    error = syscalls.kernel_error(errno.EAGAIN, "io_setup", "first", "second")
    assert isinstance(error, BlockingIOError)
    assert error.__notes__ == ["first", "second"]
    assert not hasattr(syscalls.kernel_error(errno.EAGAIN, "io_setup"), "__notes__")


# -- arguments ---------------------------------------------------------------------------------

HIGH = 0xFFFF_8123_4567_89A8


def test_the_kernel_s_order_of_arguments_and_all_64_bits(library: FakeLibrary) -> None:
    syscalls.io_destroy(HIGH)
    syscalls.io_submit(HIGH, 77, HIGH + 8)
    syscalls.io_getevents(HIGH, 1, 2, HIGH + 8, HIGH + 16)
    syscalls.io_cancel(HIGH, HIGH + 8, HIGH + 16)
    passed = [function.passed for function in library.functions]
    assert passed == [
        [102, HIGH],
        [104, HIGH, 77, HIGH + 8],
        [103, HIGH, 1, 2, HIGH + 8, HIGH + 16],
        [105, HIGH, HIGH + 8, HIGH + 16],
    ]


@pytest.mark.parametrize("timeout", [None, 0])
def test_no_timeout_is_a_null_pointer(library: FakeLibrary, timeout: int | None) -> None:
    syscalls.io_getevents(1, 2, 3, 4, timeout)
    assert library.functions[0].passed == [103, 1, 2, 3, 4, None]


def test_io_setup_passes_a_zeroed_context_id_and_returns_what_it_finds_there(
    monkeypatch: pytest.MonkeyPatch, library: FakeLibrary
) -> None:
    class Setup(FakeFunction):
        def __call__(self, *arguments: Any) -> int:
            number, nr_events, address = arguments
            cell = ctypes.c_uint64.from_address(address)
            assert (number, nr_events, cell.value) == (101, 2**32 + 5, 0)
            cell.value = HIGH
            return 0

    monkeypatch.setattr(FakeLibrary, "__getitem__", lambda self, name: Setup(0, 0))
    assert syscalls.io_setup(2**32 + 5) == HIGH


def test_each_call_has_argument_types_of_its_own() -> None:
    one, other = (syscalls._typed(t) for t in (ctypes.c_ulong, ctypes.c_void_p))
    assert one is not other
    assert syscalls._typed(ctypes.c_ulong) is one
    assert getattr(one, "argtypes", None) == (ctypes.c_long, ctypes.c_ulong)
    assert getattr(other, "argtypes", None) == (ctypes.c_long, ctypes.c_void_p)
    raw = syscalls.raw_syscall()
    assert syscalls.raw_syscall() is raw
    assert getattr(raw, "argtypes", 1) is None
    assert {getattr(f, "restype", None) for f in (one, other, raw)} == {ctypes.c_long}


# Where each parameter goes that must arrive as it is, or not at all.
ADDRESSES: dict[str, Callable[[int], object]] = {
    "io_setup nr_events": syscalls.io_setup,
    "io_destroy ctx_id": syscalls.io_destroy,
    "io_submit ctx_id": lambda v: syscalls.io_submit(v, 1, 2),
    "io_submit iocbpp": lambda v: syscalls.io_submit(1, 2, v),
    "io_getevents ctx_id": lambda v: syscalls.io_getevents(v, 1, 2, 3, 4),
    "io_getevents events": lambda v: syscalls.io_getevents(1, 2, 3, v, 4),
    "io_getevents timeout": lambda v: syscalls.io_getevents(1, 2, 3, 4, v),
    "io_cancel ctx_id": lambda v: syscalls.io_cancel(v, 1, 2),
    "io_cancel iocb": lambda v: syscalls.io_cancel(1, v, 2),
    "io_cancel result": lambda v: syscalls.io_cancel(1, 2, v),
}


@pytest.mark.parametrize("parameter", ADDRESSES)
def test_an_address_of_more_than_64_bits_is_refused(library: FakeLibrary, parameter: str) -> None:
    name = parameter.split()[1]
    for address in (-1, -(2**63), 2**64, 2**64 + 4096):
        expected = rf"{name} must be within 0\.\.2\*\*64-1, not {address}"
        with pytest.raises(ValueError, match=expected):
            ADDRESSES[parameter](address)
    assert all(function.passed == [] for function in library.functions)


@pytest.mark.parametrize("address", [1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("parameter", ADDRESSES)
def test_an_address_of_64_bits_arrives(library: FakeLibrary, parameter: str, address: int) -> None:
    ADDRESSES[parameter](address)
    assert address in library.functions[0].passed


NUMBERS: dict[str, Callable[[int], object]] = {
    "io_submit nr": lambda v: syscalls.io_submit(1, v, 2),
    "io_getevents min_nr": lambda v: syscalls.io_getevents(1, v, 2, 3, 4),
    "io_getevents nr": lambda v: syscalls.io_getevents(1, 2, v, 3, 4),
}


@pytest.mark.parametrize("parameter", NUMBERS)
def test_a_number_never_arrives_as_another_one(library: FakeLibrary, parameter: str) -> None:
    for number in (2**63, 2**64 + 1, -(2**63) - 1, -(2**64) + 1):
        with pytest.raises((ValueError, OverflowError), match=r".*"):
            NUMBERS[parameter](number)
    assert all(function.passed == [] for function in library.functions)


@pytest.mark.parametrize("number", [-1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("parameter", NUMBERS)
def test_a_wrong_number_is_the_kernel_s_to_refuse(
    library: FakeLibrary, parameter: str, number: int
) -> None:
    NUMBERS[parameter](number)
    assert number in library.functions[0].passed


# -- statx -------------------------------------------------------------------------------------


def test_statx_passes_descriptors_and_paths(library: FakeLibrary) -> None:
    paths: list[int | str | bytes | os.PathLike[str]] = [7, "/a/b", b"/c", Path("/d")]
    for path in paths:
        forget_functions()
        assert syscalls.statx(path, 0x100, 0x7FF) == bytes(256)
    passed = [function.passed[:5] for function in library.functions]
    assert passed == [
        [108, 7, b"", 0x1100, 0x7FF],
        [108, -100, b"/a/b", 0x100, 0x7FF],
        [108, -100, b"/c", 0x100, 0x7FF],
        [108, -100, b"/d", 0x100, 0x7FF],
    ]


def test_statx_is_what_os_stat_says(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_bytes(b"12345")
    expected = os.stat(file)
    with file.open() as opened:
        for path in (file, str(file), os.fsencode(file), opened.fileno()):
            try:
                raw = syscalls.statx(path, 0, 0x7FF)
            except OSError as error:
                if error.errno == errno.ENOSYS:
                    pytest.skip("no statx in this kernel")
                raise
            assert len(raw) == 256
            mode, inode, size = struct.unpack_from("=28xH2xQQ", raw)
            assert (mode, inode, size) == (expected.st_mode, expected.st_ino, 5)
    with pytest.raises(FileNotFoundError, match="statx: No such file"):
        syscalls.statx(tmp_path / "no file", 0, 0x7FF)
    with pytest.raises(OSError, match="statx") as caught:
        syscalls.statx(-1, 0, 0x7FF)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("path", ["/\0x", b"/\0x"])
def test_statx_of_a_path_with_a_null_byte_is_refused_as_by_os_stat(path: str | bytes) -> None:
    with pytest.raises(ValueError, match="null"):
        os.stat(path)
    with pytest.raises(ValueError, match="null"):
        syscalls.statx(path, 0, 0x7FF)


@pytest.mark.parametrize("fd", [2**32, 2**31, -(2**32)])
def test_statx_of_no_descriptor_is_not_that_of_another_one(fd: int) -> None:
    """The kernel takes 32 bits of it: 2**32 would be descriptor 0."""
    with pytest.raises((OverflowError, ValueError, OSError), match=r".*"):
        syscalls.statx(fd, 0, 0x7FF)


# -- structures --------------------------------------------------------------------------------

STRUCTURES: dict[type[ctypes.Structure], int] = {
    syscalls.iocb: 64,
    syscalls.io_event: 32,
    syscalls.aio_ring: 32,
    syscalls.iovec: 16,
    syscalls.timespec: 16,
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_mistyped_field_is_an_error(structure: type[ctypes.Structure]) -> None:
    it: Any = structure()
    right = [name for name, *_ in structure._fields_]
    for name in right:
        setattr(it, name, 1)
        assert getattr(it, name) == 1
    for name in right:
        wrong = name[:-1] + "_"
        with pytest.raises(AttributeError):
            setattr(it, wrong, 1)
        with pytest.raises(AttributeError):
            getattr(it, wrong)
        with pytest.raises(AttributeError):
            structure(**{wrong: 1})
    assert not hasattr(it, "__dict__")
    assert ctypes.sizeof(structure) == STRUCTURES[structure]


def test_the_mistyped_field_of_the_house_style() -> None:
    it: Any = syscalls.iocb()
    with pytest.raises(AttributeError, match="aio_nbyte"):
        it.aio_nbyte = 1
    it.aio_nbytes = 1


def test_flags_and_opcodes() -> None:
    assert {o.name: o.value for o in syscalls.Opcode} == {
        "PREAD": 0,
        "PWRITE": 1,
        "FSYNC": 2,
        "FDSYNC": 3,
        "POLL": 5,
        "PREADV": 7,
        "PWRITEV": 8,
    }
    assert [f.value for f in syscalls.RWF] == [1 << i for i in range(8)]
    assert syscalls.RWF.DSYNC | syscalls.RWF.NOWAIT == 0xA
    assert (syscalls.AIO_RING_MAGIC, syscalls.AIO_RING_INCOMPAT_FEATURES) == (0xA10A10A1, 0)
    assert (syscalls.IOCB_FLAG_RESFD, syscalls.IOCB_FLAG_IOPRIO) == (1, 2)
    assert syscalls.MAX_RW_COUNT == 2**31 - 4096
    assert syscalls.UIO_MAXIOV == 1024

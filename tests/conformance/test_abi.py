"""The structures, constants and numbers of rawaio.syscalls against the system's headers."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest

from rawaio import syscalls
from rawaio.syscalls import RWF, Opcode

HEADERS = ["linux/aio_abi.h", "linux/fs.h", "linux/stat.h", "sys/uio.h", "time.h", "fcntl.h"]

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "struct iocb": syscalls.iocb,
    "struct io_event": syscalls.io_event,
    "struct iovec": syscalls.iovec,
    "struct timespec": syscalls.timespec,
}

# By the names of the headers.
ENUMERATORS = {f"IOCB_CMD_{opcode.name}": opcode.value for opcode in Opcode}
MACROS = {
    "IOCB_FLAG_RESFD": syscalls.IOCB_FLAG_RESFD,
    "IOCB_FLAG_IOPRIO": syscalls.IOCB_FLAG_IOPRIO,
    "UIO_MAXIOV": syscalls.UIO_MAXIOV,
    "AT_EMPTY_PATH": syscalls._AT_EMPTY_PATH,
    "AT_FDCWD": -100,
} | {f"RWF_{flag.name}": flag.value for flag in RWF}
# Old headers may lack these, and no others.
YOUNG = {"RWF_NOAPPEND", "RWF_ATOMIC", "RWF_DONTCACHE", "UIO_MAXIOV", "AT_EMPTY_PATH"}


def compiled_and_run(folder: Path, lines: list[str], headers: list[str]) -> dict[str, int]:
    """What a program prints, `name value` a line; skips where it cannot be compiled."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    includes = "".join(f"#include <{header}>\n" for header in headers)
    for program, body in (("probe", []), ("program", lines)):
        source = folder / f"{program}.c"
        text = "\n".join(body)
        source.write_text(
            f"#define _GNU_SOURCE\n#include <stddef.h>\n#include <stdio.h>\n{includes}"
            "#define IS_SIGNED(type) ((type)-1 < (type)1)\n"
            f"int main(void) {{\n{text}\nreturn 0;\n}}\n"
        )
        done = subprocess.run(
            [compiler, "-o", folder / program, source], capture_output=True, text=True, check=False
        )
        if program == "probe" and done.returncode:
            pytest.skip(f"{compiler} cannot compile with {', '.join(headers)}: {done.stderr}")
        assert done.returncode == 0, done.stderr
    output = subprocess.run(
        [folder / "program"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = (line.rpartition(" ") for line in output)
    return {name: int(value) for name, _, value in found}


def show(name: str, expression: str) -> str:
    return f'printf("%s %lld\\n", "{name}", (long long)({expression}));'


def show_if_defined(name: str) -> str:
    return f"#ifdef {name}\n{show(name, name)}\n#endif"


def test_structures(tmp_path: Path) -> None:
    lines: list[str] = []
    ours: dict[str, int] = {}
    for c_name, structure in STRUCTURES.items():
        lines.append(show(c_name, f"sizeof({c_name})"))
        ours[c_name] = ctypes.sizeof(structure)
        for name, kind in [field[:2] for field in structure._fields_]:
            member = f"(({c_name} *)0)->{name}"
            field = getattr(structure, name)
            what = f"{c_name} {name}"
            lines.append(show(f"{what} offset", f"offsetof({c_name}, {name})"))
            lines.append(show(f"{what} size", f"sizeof({member})"))
            ours[f"{what} offset"], ours[f"{what} size"] = field.offset, field.size
            if name != "iov_base":  # a pointer, there
                lines.append(show(f"{what} signed", f"IS_SIGNED(__typeof__({member}))"))
                ours[f"{what} signed"] = int(cast("Any", kind)(-1).value < 0)
    theirs = compiled_and_run(tmp_path, lines, HEADERS)
    # Where ours has wider access than theirs, or the other way round, a field would differ.
    assert ours == theirs


def test_every_byte_of_a_structure_has_a_field() -> None:
    for structure in STRUCTURES.values():
        assert sum(getattr(structure, f[0]).size for f in structure._fields_) == ctypes.sizeof(
            structure
        )


def test_the_header_of_the_ring_is_eight_words() -> None:
    # <linux/aio_abi.h> has it not: fs/aio.c alone does.
    offsets = {f[0]: getattr(syscalls.aio_ring, f[0]).offset for f in syscalls.aio_ring._fields_}
    assert offsets == {
        "id": 0,
        "nr": 4,
        "head": 8,
        "tail": 12,
        "magic": 16,
        "compat_features": 20,
        "incompat_features": 24,
        "header_length": 28,
    }


def test_constants(tmp_path: Path) -> None:
    lines = [show(name, name) for name in ENUMERATORS] + list(map(show_if_defined, MACROS))
    lines.append(show("struct statx", "sizeof(struct statx)"))
    theirs = compiled_and_run(tmp_path, lines, HEADERS)
    ours = ENUMERATORS | MACROS | {"struct statx": 256}
    assert {name: ours[name] for name in theirs} == theirs
    assert ours.keys() - theirs.keys() <= YOUNG


def calls_of(header: str, folder: Path) -> dict[str, int]:
    names = syscalls.SyscallNumbers._fields
    found = compiled_and_run(folder, [show_if_defined(f"__NR_{name}") for name in names], [header])
    return {name.removeprefix("__NR_"): number for name, number in found.items()}


def agree(table: syscalls.SyscallNumbers, found: dict[str, int]) -> None:
    ours = table._asdict()
    assert {name: ours[name] for name in found} == found
    assert ours.keys() - found.keys() <= {"io_pgetevents", "statx", "io_uring_setup"}


def test_numbers_of_this_machine(tmp_path: Path) -> None:
    key = platform.machine(), ctypes.sizeof(ctypes.c_void_p)
    if key not in syscalls._NUMBERS:
        pytest.skip(f"no table for {key}")
    agree(syscalls._NUMBERS[key], calls_of("sys/syscall.h", tmp_path))


def test_numbers_of_the_generic_table(tmp_path: Path) -> None:
    # aarch64's, on whatever machine of 64 bits this is.
    agree(syscalls._NUMBERS["aarch64", 8], calls_of("asm-generic/unistd.h", tmp_path))

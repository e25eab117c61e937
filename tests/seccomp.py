"""Run a program with some system calls denied, by a real seccomp filter. Also imported by tests.

    python tests/seccomp.py --deny io_setup --answer EPERM -- python -m rawaio doctor

The answer is an errno, or what ends the program: KILL_PROCESS, or TRAP, which is SIGSYS. The calls
are those that `rawaio.syscalls.numbers()` names. The filter stays on in everything that
the program starts. Needs neither root nor a compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From <linux/audit.h>: the machine that a call is made for, which the filter has to check.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# From <linux/prctl.h>, <linux/seccomp.h> and <linux/bpf_common.h>.
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
DEADLY = {"KILL_PROCESS": 0x80000000, "TRAP": 0x00030000}  # SECCOMP_RET_*
LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K
NR_AT, ARCH_AT = 0, 4  # in struct seccomp_data


class sock_fprog(ctypes.Structure):  # noqa: N801 - the kernel's name
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def program(arch: int, numbers: Sequence[int], answer: int) -> bytes:
    """A BPF program that answers the calls in this way, and allows all others."""

    def instruction(operation: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", operation, if_true, if_false, k)

    n = len(numbers)
    return b"".join(
        [
            instruction(LOAD_WORD, ARCH_AT),
            instruction(JUMP_IF_EQUAL, arch, 0, n + 1),  # another machine's call: allow
            instruction(LOAD_WORD, NR_AT),
            *(instruction(JUMP_IF_EQUAL, nr, n - i) for i, nr in enumerate(numbers)),
            instruction(RETURN, SECCOMP_RET_ALLOW),
            instruction(RETURN, answer),
        ]
    )


def deny(names: Sequence[str], answer: str) -> None:
    """Deny system calls to this process, for the rest of its life.

    answer: an errno's name, or one of `DEADLY`.

    Raises:
        OSError: what prctl says.
        KeyError: no such call, or no such machine.
        AttributeError: no such answer.
    """
    from rawaio import syscalls

    table = syscalls.numbers()._asdict()
    value = DEADLY.get(answer)
    if value is None:
        value = SECCOMP_RET_ERRNO | getattr(errno, answer)
    filters = program(AUDIT_ARCH[platform.machine()], [table[name] for name in names], value)
    buffer = ctypes.create_string_buffer(filters, len(filters))
    fprog = sock_fprog(len(filters) // 8, ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog), 0, 0),
    ):
        if prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")


def command(names: Sequence[str], answer: str, *arguments: str) -> list[str]:
    """The command line that runs `arguments` without these calls; answer as for `deny`."""
    denied = [word for name in names for word in ("--deny", name)]
    return [sys.executable, __file__, *denied, "--answer", answer, "--", *arguments]


@cache
def why_not() -> str | None:
    """Why no filter can be installed here; None when one can. Tries it in a process of its own."""
    done = subprocess.run(
        command(["io_setup"], "ENOSYS", sys.executable, "-c", ""),
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode == 0 else f"no seccomp filter: {done.stderr.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deny", action="append", required=True, metavar="CALL")
    parser.add_argument("--answer", default="EPERM", metavar="NAME")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    deny(arguments.deny, arguments.answer)
    os.execvp(arguments.command[0], arguments.command)


if __name__ == "__main__":
    main()

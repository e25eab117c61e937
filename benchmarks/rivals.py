"""Which of those that rawaio is compared with are here, and in which version."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from importlib import import_module
from typing import TYPE_CHECKING, Final

from benchmarks.fio import fio_missing

if TYPE_CHECKING:
    from collections.abc import Callable

    from caio.asyncio_base import AsyncioContextBase

__all__ = ["CAIO", "PACKAGES", "caio_context", "missing", "versions", "why_not"]

#: The versions that figures and budgets are about; None, whatever there is.
PACKAGES: Final[dict[str, str | None]] = {
    "aiofiles": "25.1.0",
    "caio": "0.12.10",
    "libaio": "0.9.5",
    "uvloop": None,
}
#: By name, caio's modes: the module, and whether what is asked for is deferred.
CAIO: Final = {
    "linux_aio": ("linux_aio", False),
    "linux_aio deferred": ("linux_aio", True),
    "linux_uring": ("linux_uring", False),
    "linux_uring deferred": ("linux_uring", True),
    "thread_aio": ("thread_aio", False),
}
# By program in the figures, the package it comes from, where that has another name.
_FROM: Final = {"python-libaio": "libaio"}


def caio_context(mode: str) -> AsyncioContextBase:
    """A context in one of caio's modes.

    Raises:
        ImportError: caio is not installed.
        OSError: the kernel does not have it.
    """
    module, deferred = CAIO[mode]
    context: type[AsyncioContextBase] = import_module(f"caio.{module}_asyncio").AsyncioContext
    return context(deferred=deferred)


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not(program: str) -> str | None:
    """Why a program cannot be compared with here; None when it can."""
    if program.startswith("fio"):
        return fio_missing()
    if program == "strace":
        return None if shutil.which("strace") else "not installed (Debian package strace)"
    package = _FROM.get(program, program)
    if package not in PACKAGES:
        return None
    wanted, version = PACKAGES[package], _installed(package)
    if version is None:
        return f"not installed (pip install {package}{f'=={wanted}' if wanted else ''})"
    if wanted not in (None, version):
        return f"version {version} instead of {wanted}"
    return None


def missing(*programs: str) -> list[str]:
    """Which of them are not here, each with the reason."""
    reasons = {program: why_not(program) for program in programs}
    return [f"{program}: {reason}" for program, reason in reasons.items() if reason]


def _says(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n", 1)[0]


def versions(run: Callable[..., str] = _says) -> dict[str, str]:
    """By name, what there is; "none" for what there is not."""
    found = {package: _installed(package) or "none" for package in PACKAGES}
    for program in ("fio", "strace"):
        found[program] = run(program, "--version") if shutil.which(program) else "none"
    return found

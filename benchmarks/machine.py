"""Where figures come from."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import rivals

if TYPE_CHECKING:
    from benchmarks.harness import Setting

__all__ = ["cpu_model", "describe", "file_system"]


def cpu_model(cpuinfo: str) -> str:
    """What the processor is called, from /proc/cpuinfo; on some machines it does not say."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return "unknown"


def file_system(folder: Path, mountinfo: str) -> str:
    """The type of the file system that a folder is in, from /proc/self/mountinfo."""
    inside = [folder.resolve(), *folder.resolve().parents]
    found: dict[Path, str] = {}
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        # Spaces in it are written as \040.
        point = mount.split()[4].encode().decode("unicode_escape")
        found[Path(point)] = source.split()[0]  # of several in one place the last counts
    return next((found[path] for path in inside if path in found), "unknown")


def describe(setting: Setting) -> dict[str, str]:
    """The machine and what runs on it, and how it was measured."""
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "processor": cpu_model(Path("/proc/cpuinfo").read_text("utf-8")),
        "processors": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "file system": file_system(setting.folder, Path("/proc/self/mountinfo").read_text("utf-8")),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "GIL": "on" if getattr(sys, "_is_gil_enabled", lambda: True)() else "off",
        **rivals.versions(),
        "loop": setting.loop,
        "runs": setting.pick("quick", "full"),
        "load": f"{os.getloadavg()[0]:.2f}",
    }

"""fio, the Flexible I/O Tester: its commands, and what it says.

Of an engine several ways are run, each of which could be the fastest; the best of them stands for
it. libaio is what rawaio is measured by: the same system calls, from C. io_uring shows where
another interface of the kernel ends.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ENGINES", "fio_missing", "null_command", "null_ways", "read", "timed_command"]

ENGINES: Final = ("libaio", "io_uring")
# Otherwise fio changes what it writes before each write, which nobody else does.
_AS_IT_IS: Final = "--scramble_buffers=0"


def fio_missing() -> str | None:
    """Why there is no fio; None when there is."""
    return None if shutil.which("fio") else "not installed (Debian package fio)"


# -- no work -------------------------------------------------------------------------------------


def null_ways(depth: int) -> dict[str, list[str]]:
    """By name, options for operations that complete at once; the defaults are the first."""
    ways = {
        f"fio libaio/{'ring' if reap else 'io_getevents'}, min {least}{', gtod_reduce' * gtod}": [
            "--ioengine=libaio",
            f"--iodepth_batch_complete_min={least}",
            f"--iodepth_batch_complete_max={depth}",
            *["--userspace_reap"] * reap,
            *["--gtod_reduce=1"] * gtod,
        ]
        for reap in (False, True)
        for least in (1, depth)
        for gtod in (False, True)
    }
    for fixed in (False, True):
        ways[f"fio io_uring/min {depth}, gtod_reduce{', registered' * fixed}"] = [
            "--ioengine=io_uring",
            f"--iodepth_batch_complete_min={depth}",
            f"--iodepth_batch_complete_max={depth}",
            "--gtod_reduce=1",
            *["--fixedbufs", "--registerfiles"] * fixed,
        ]
    return ways


def null_command(
    options: list[str], nbytes: int, depth: int, *, writes: bool, operations: int
) -> list[str]:
    """So many operations on /dev/zero or /dev/null."""
    return [
        "fio",
        "--name=null",
        f"--filename={'/dev/null' if writes else '/dev/zero'}",
        f"--rw={'write' if writes else 'read'}",
        f"--bs={nbytes}",
        f"--iodepth={depth}",
        f"--iodepth_batch_submit={depth}",
        "--thread",
        f"--size={nbytes * operations}",
        f"--number_ios={operations}",
        _AS_IT_IS,
        "--output-format=terse",
        *options,
    ]


# -- for so long ---------------------------------------------------------------------------------


def batches(depth: int) -> list[str]:
    """Options for submitting and reaping as many as there are."""
    return [
        f"--iodepth_batch_submit={depth}",
        "--iodepth_batch_complete_min=1",
        f"--iodepth_batch_complete_max={depth}",
    ]


def timed_command(
    engine: str,
    options: list[str],
    *,
    path: str,
    depth: int,
    seconds: float,
    nbytes: int,
    pattern: str,
    latency: bool = False,
) -> list[str]:
    """Operations on a file, as many as there are in that time, direct; pattern as fio's rw."""
    return [
        "fio",
        "--name=timed",
        f"--ioengine={engine}",
        f"--filename={path}",
        *["--readonly"] * pattern.endswith("read"),
        f"--rw={pattern}",
        "--norandommap",
        "--direct=1",
        f"--bs={nbytes}",
        f"--iodepth={depth}",
        "--thread",
        "--time_based",
        f"--runtime={round(1e3 * seconds)}ms",
        _AS_IT_IS,
        "--output-format=json",
        *(["--lat_percentiles=1"] if latency else ["--gtod_reduce=1"]),
        *options,
    ]


def read(output: str) -> dict[str, float]:
    """What fio says of its one job, by metric.

    Raises:
        ValueError: it is something else, or nothing was done.
    """
    said = json.loads(output[output.index("{") :])
    job, options = said["jobs"][0], said["jobs"][0]["job options"]
    done: Mapping[str, Any] = job["read" if "read" in options["rw"] else "write"]
    if not done["total_ios"]:
        raise ValueError("fio has done nothing in this time")
    percentiles = done["lat_ns"].get("percentile")
    if percentiles and "gtod_reduce" not in options:
        return {
            "p50_us": percentiles["50.000000"] / 1e3,
            "p99_us": percentiles["99.000000"] / 1e3,
        }
    iops = 1e3 * done["total_ios"] / done["runtime"]
    # Of the job's whole time, in percent.
    cpu_us = 1e3 * (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / done["total_ios"]
    nbytes = int(options["bs"])
    rate = {"iops": iops} if nbytes < 1 << 20 else {"mib_s": iops * nbytes / (1 << 20)}
    return {**rate, "cpu_us": cpu_us}

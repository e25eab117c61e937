"""Programs that transfer for so many seconds: what several sections have in common."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from benchmarks import fio, rivals
from benchmarks.harness import by_report, own

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.harness import Cell
    from benchmarks.programs.transfers import Job

__all__ = ["fio_cells", "own_cells"]


def own_cells(group: str, job: Job, ways: Iterable[str], loop: str) -> list[Cell]:
    """Ways of `benchmarks.programs.transfers`."""
    arguments = {**asdict(job), "path": str(job.path)}
    return [
        by_report(group, way, own("transfers", way=way, loop=loop, **arguments)) for way in ways
    ]


def fio_cells(group: str, job: Job) -> list[Cell]:
    """Each engine of fio, as it is by default, and in batches; none where there is no fio."""
    if rivals.why_not("fio"):
        return []
    ways: dict[str, list[str]] = {"default": []}
    if job.depth > 1:
        ways["batches"] = fio.batches(job.depth)
    return [
        by_report(
            group,
            f"fio {engine}/{way}",
            fio.timed_command(
                engine,
                options,
                path=str(job.path),
                depth=job.depth,
                seconds=job.seconds,
                nbytes=job.nbytes,
                pattern=("" if job.sequential else "rand") + ("write" if job.writes else "read"),
                latency=job.latency,
            ),
            fio.read,
        )
        for engine in fio.ENGINES
        for way, options in ways.items()
    ]

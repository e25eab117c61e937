"""Reads of 4 KiB by 32 tasks from so many open files, at random, for so many seconds."""

from __future__ import annotations

import asyncio
import random
import resource
from contextlib import AsyncExitStack
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Final

import rawaio
from benchmarks import files
from benchmarks.programs.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TASKS", "run"]

TASKS: Final = 32
NBYTES: Final = files.BLOCK
_READS: Final = 1 << 14


def run(path: str, n: int, loop: str, seconds: float, *, direct: bool) -> dict[str, float]:
    """Read from the first n files of a folder; what it took, by metric."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    paths = sorted(Path(path).iterdir())[:n]
    if len(paths) != n:
        raise OSError(f"{len(paths)} files in {path} instead of {n}")
    watch = Watch(seconds)

    async def task(reads: Iterator[tuple[rawaio.File, int]]) -> None:
        for file, offset in watch.each(reads):
            if len(await file.pread(NBYTES, offset)) != NBYTES:
                raise OSError(f"a short read at {offset}")

    async def main() -> None:
        async with AsyncExitStack() as stack:
            opened = [
                await stack.enter_async_context(rawaio.open(each, direct=direct, engine="aio"))
                for each in paths
            ]
            offsets = files.random_offsets(min(file.size for file in opened), _READS)
            chosen = random.Random(2).choices(opened, k=_READS)
            reads = cycle(list(zip(chosen, offsets, strict=True)))
            with watch.running():
                await asyncio.gather(*(task(reads) for _ in range(TASKS)))

    files.run_in_loop(main, loop)
    return watch.figures(NBYTES)

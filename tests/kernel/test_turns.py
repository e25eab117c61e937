"""How much one turn of the event loop submits."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest

import rawaio

MIB = 1 << 20
NR = 40  # above max_batch: a full batch is submitted before the turn has ended


def test_a_turn_submits_no_more_than_its_share(ext4: Path) -> None:
    path = ext4 / "file"
    path.write_bytes(bytes(NR * MIB))
    buffers = [rawaio.aligned_buffer(MIB) for _ in range(NR)]

    async def main() -> list[int]:
        async with rawaio.open(path, engine="aio") as file:
            context = file.driver.context
            assert context is not None
            reads = asyncio.gather(
                *(file.preadinto(buffer, MIB * i) for i, buffer in enumerate(buffers))
            )
            submitted = [context.statistics().submitted]
            while not reads.done():
                await asyncio.sleep(0)  # one turn
                submitted.append(context.statistics().submitted)
            assert await reads == [MIB] * NR
            return submitted

    submitted = asyncio.run(main())
    assert submitted[-1] - submitted[0] >= NR
    assert max(later - earlier for earlier, later in pairwise(submitted)) <= 4


@pytest.mark.parametrize(("nbytes", "count"), [(4096, 2000), (1 << 16, 400)])
def test_who_reads_only_what_is_cached_lets_others_run(ext4: Path, nbytes: int, count: int) -> None:
    path = ext4 / "cached"
    path.write_bytes(bytes(nbytes))

    async def main() -> None:
        turns = 0
        reading = True

        async def other() -> None:
            nonlocal turns
            while reading:
                turns += 1
                await asyncio.sleep(0)

        async with rawaio.open(path, direct=False) as file:
            beside = asyncio.create_task(other())
            for _ in range(count):
                await file.pread(nbytes, 0)
            reading = False
            await beside
        assert turns > count * (1 + nbytes // 8192) / 128

    asyncio.run(main())

"""`pread_many` and `pwrite_many` of files come to the same as the single calls, one by one."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rawaio
from tests.driver_support import skip_unless_direct

BLOCK = 512
END = 40 * BLOCK + 100


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, folder: Path) -> bool:
    if request.param:
        skip_unless_direct(folder)
    return bool(request.param)


# Mostly whole blocks, and some of what is not aligned, behind the end, or nothing at all.
OFFSETS = st.one_of(st.integers(0, 45).map(lambda i: i * BLOCK), st.integers(0, END + 2 * BLOCK))
LENGTHS = st.one_of(st.integers(0, 4).map(lambda i: i * BLOCK), st.integers(0, 3 * BLOCK))
SHIFTS = st.sampled_from([0, 0, 0, 1, BLOCK])
SHAPES = st.sampled_from(["equal", "lengths", "buffers"])


def layout(shape: str, memory: memoryview, lengths: list[int]) -> dict[str, Any]:
    if shape == "equal":
        return {"nbytes": lengths[0], "memory": memory}
    if shape == "lengths":
        return {"lengths": lengths, "memory": memory}
    return {"memory": views(memory, lengths)}


def views(memory: memoryview, lengths: list[int]) -> list[memoryview]:
    stops = accumulate(lengths)
    return [memory[stop - n : stop] for stop, n in zip(stops, lengths, strict=True)]


def lengths_of(shape: str, operations: list[tuple[int, int]]) -> list[int]:
    if shape == "equal":
        return [max(operations[0][1], 1)] * len(operations)
    return [length for _, length in operations]


@settings(max_examples=80, deadline=None)
@given(
    shape=SHAPES,
    operations=st.lists(st.tuples(OFFSETS, LENGTHS), min_size=1, max_size=30),
    shift=SHIFTS,
    seed=st.integers(0, 100),
)
def _check_reads(
    folder: Path,
    direct: bool,
    *,
    shape: str,
    operations: list[tuple[int, int]],
    shift: int,
    seed: int,
) -> None:
    path = folder / "read"
    content = random.Random(seed).randbytes(END)
    path.write_bytes(content)
    offsets = [offset for offset, _ in operations]
    lengths = lengths_of(shape, operations)
    many = rawaio.aligned_buffer(sum(lengths) + shift)[shift:]
    single = rawaio.aligned_buffer(sum(lengths) + shift)[shift:]

    async def main() -> None:
        async with rawaio.open(path, direct=direct) as f:
            counts = [
                await f.preadinto(view, offset)
                for view, offset in zip(views(single, lengths), offsets, strict=True)
            ]
            short = {i: n for i, n in enumerate(counts) if n != lengths[i]}
            given = layout(shape, many, lengths)
            memory = given.pop("memory")
            if short:
                with pytest.raises(rawaio.BulkError) as caught:
                    await f.pread_many(offsets, out=memory, **given)
                assert caught.value.counts == short
                assert set(caught.value.errors.values()) == {0}
            else:
                assert await f.pread_many(offsets, out=memory, **given) == sum(lengths)
            # What is behind the end of a short one is of no account.
            for one, other, n in zip(
                views(many, lengths), views(single, lengths), counts, strict=True
            ):
                assert one[:n] == other[:n]
            if not short:
                assert many == single
            assert not f.under_way

    asyncio.run(main())


def test_reads(folder: Path, direct: bool) -> None:
    _check_reads(folder, direct)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    lengths=st.lists(LENGTHS, min_size=1, max_size=20),
    gaps=st.lists(st.one_of(st.just(0), st.integers(0, 2 * BLOCK)), min_size=20, max_size=20),
    shift=SHIFTS,
    chance=st.randoms(use_true_random=False),
)
def _check_writes(
    folder: Path,
    direct: bool,
    *,
    shape: str,
    lengths: list[int],
    gaps: list[int],
    shift: int,
    chance: random.Random,
) -> None:
    lengths = lengths_of(shape, [(0, n) for n in lengths])
    offsets: list[int] = []
    at = 0
    for length, gap in zip(lengths, gaps, strict=False):
        offsets.append(at + gap)
        at += gap + length
    order = list(range(len(lengths)))
    chance.shuffle(order)
    offsets, lengths = [offsets[i] for i in order], [lengths[i] for i in order]
    data = rawaio.aligned_buffer(sum(lengths) + shift)[shift:]
    data[:] = chance.randbytes(len(data))
    before = chance.randbytes(chance.choice([0, 5 * BLOCK, END]))
    paths = [folder / "many", folder / "single"]

    async def main() -> None:
        for path in paths:
            path.write_bytes(before)
        async with (
            rawaio.open(paths[0], "r+", direct=direct) as many,
            rawaio.open(paths[1], "r+", direct=direct) as single,
        ):
            for view, offset in zip(views(data, lengths), offsets, strict=True):
                await single.pwrite(view, offset)
            given = layout(shape, data, lengths)
            assert await many.pwrite_many(offsets, given.pop("memory"), **given) == len(data)
        assert paths[0].read_bytes() == paths[1].read_bytes()

    asyncio.run(main())


def test_writes(folder: Path, direct: bool) -> None:
    _check_writes(folder, direct)

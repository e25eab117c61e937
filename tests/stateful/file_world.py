"""A `rawaio.File` in any order of calls, beside a bytearray and a second, plain descriptor.

Operations that run at the same time touch different bytes, but share blocks. After each step the
whole file is read past rawaio and compared with the model, its size too.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import rawaio
from rawaio import aligned_buffer

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Contents = Callable[[Path, bool], bytes]  # of a file; whether to read it directly
Engine = Literal["auto", "aio", "threads"]

LIMIT = 48 << 10  # a file is not longer: it is compared as a whole after each step
_PAGE = 4096

READS = ("pread", "preadinto", "preadv", "stream", "pread_many")
WRITES = ("pwrite", "pwritev", "pwrite_many")
# Where blocks begin, and next to it.
OFFSETS = st.one_of(
    st.builds(
        lambda unit, n, beside: max(unit * n + beside, 0),
        st.sampled_from((512, 4096)),
        st.integers(0, 10),
        st.integers(-2, 2),
    ),
    st.integers(0, LIMIT - 1),
)


@dataclass(frozen=True)
class Act:
    """One operation, from its offset to that of the next."""

    offset: int
    method: str
    second: bool  # by the other `File` of the two
    misplaced: int  # bytes by which its memory is not aligned
    split: int  # of a vector, or the size of chunks
    flag: bool  # dsync, or zero_fill


ACTS = st.builds(
    Act,
    OFFSETS,
    st.sampled_from((*READS, *WRITES, *WRITES, "nothing")),
    st.booleans(),
    st.sampled_from((0, 0, 0, 512, 1, 4095)),
    st.sampled_from((512, 4096, 1, 700, 5000)),
    st.booleans(),
)


def memory(nbytes: int, misplaced: int) -> memoryview:
    """Writable bytes, so far from an address that is aligned."""
    return aligned_buffer(nbytes + misplaced)[misplaced:]


def pieces(view: memoryview, size: int) -> list[memoryview]:
    """A view in parts of this size; at most 100, the last of which has the rest."""
    starts = [*range(0, len(view), size)][:100]
    return [view[a:b] for a, b in zip(starts, [*starts[1:], len(view)], strict=bool(starts))]


def many(act: Act, nbytes: int) -> tuple[int, int]:
    """So many bytes in operations of one size: that size, and how many. There may be a rest."""
    size = max(min(act.split, nbytes), 1)
    return size, min(nbytes // size, 100)


async def read(file: rawaio.File, act: Act, nbytes: int) -> bytes:
    """What one of the reading methods gives."""
    if act.method == "pread":
        return await file.pread(nbytes, act.offset, zero_fill=act.flag)
    if act.method == "stream":
        size = max(act.split, nbytes // 20)
        chunks = [
            chunk async for chunk in file.stream(act.offset, nbytes, chunk_size=size, depth=3)
        ]
        assert all(len(chunk) == size for chunk in chunks[:-1])
        return b"".join(chunks)
    view = memory(nbytes, act.misplaced)
    if act.method == "pread_many":
        size, count = many(act, nbytes)
        places = [act.offset + size * i for i in range(count)]
        await file.pread_many(places, size, view[: size * count])
        n = size * count
        return bytes(view[:n]) + await file.pread(nbytes - n, act.offset + n)
    if act.method == "preadinto":
        n = await file.preadinto(view, act.offset, zero_fill=act.flag)
    else:
        n = await file.preadv(pieces(view, act.split), act.offset, zero_fill=act.flag)
    return bytes(view[:n])


async def write(file: rawaio.File, act: Act, data: bytes) -> int:
    """How many bytes one of the writing methods says that it wrote."""
    view = memory(len(data), act.misplaced)
    view[:] = data
    if act.method == "pwrite_many":
        size, count = many(act, len(data))
        places = [act.offset + size * i for i in range(count)]
        n = await file.pwrite_many(places, view[: size * count], size)
        return n + await file.pwrite(view[n:], act.offset + n)
    if act.method == "pwritev":
        return await file.pwritev(pieces(view, act.split), act.offset, dsync=act.flag)
    return await file.pwrite(data if act.misplaced == 1 else view, act.offset, dsync=act.flag)


def plain(path: Path, direct: bool) -> bytes:
    """What is in a file, and no less than its size says."""
    # Directly, nothing is left in the page cache, where writes would meet it.
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        size = os.fstat(fd).st_size
        view = aligned_buffer(size // _PAGE * _PAGE + _PAGE)
        assert os.preadv(fd, [view], 0) == size
        return bytes(view[:size])
    finally:
        os.close(fd)


class FileMachine(RuleBasedStateMachine):
    """See above.

    run: runs a coroutine to its end, always in the same loop. contents: what is in the file, past
    rawaio. appends: not where writes are short, which is an error to them.
    """

    def __init__(
        self, run: Run, path: Path, contents: Contents = plain, *, appends: bool = True
    ) -> None:
        super().__init__()
        self.appends = appends
        self.contents = contents
        self.run_ = run
        self.path = path
        self.model = bytearray()
        self.files: list[rawaio.File] = []
        self.written = 0
        self.patch = pytest.MonkeyPatch()

    # -- opening and closing --------------------------------------------------------------------

    @initialize(
        small=st.booleans(),
        direct=st.booleans(),
        other=st.booleans(),
        engine=st.sampled_from(("auto", "aio", "threads")),
    )
    def begin(self, small: bool, direct: bool, other: bool, engine: Engine) -> None:
        if small:  # long transfers are made of many, as those of gigabytes are
            for module in ("reading", "writing"):
                self.patch.setattr(f"rawaio.{module}.PIECE", 8192)
                self.patch.setattr(f"rawaio.{module}.AT_ONCE", 8192)
                self.patch.setattr(f"rawaio.{module}.MOST", 16384)
            self.patch.setattr("rawaio.transfer.MOST", 16384)
        self.path.unlink(missing_ok=True)
        self.open(direct, other, engine, "x")

    def open(self, direct: bool, other: bool, engine: Engine, mode: str = "r+") -> None:
        async def opened(mode: str, direct: bool) -> rawaio.File:
            return await rawaio.open(self.path, mode, direct=direct, engine=engine)

        self.files.append(self.run_(opened(mode + "+" * (mode != "r+"), direct)))
        self.files.append(self.run_(opened("r+", other)))

    def close(self) -> None:
        for file in self.files:
            self.run_(file.close())
            assert file.statistics().under_way == 0
        self.files = []

    @rule(
        direct=st.booleans(),
        other=st.booleans(),
        engine=st.sampled_from(("auto", "aio", "threads")),
    )
    def reopen(self, direct: bool, other: bool, engine: Engine) -> None:
        self.close()
        self.compare(direct=False)
        self.open(direct, other, engine)

    # -- operations -----------------------------------------------------------------------------

    @rule(
        acts=st.lists(ACTS, min_size=2, max_size=12, unique_by=lambda act: act.offset),
        appends=st.lists(st.integers(0, 5000), max_size=3),
        sync=st.sampled_from(("fsync", "fdatasync", None, None, None)),
        look=st.sampled_from((True, True, False)),
    )
    def several(self, acts: list[Act], appends: list[int], sync: str | None, look: bool) -> None:
        acts = sorted(acts, key=lambda act: act.offset)
        size = len(self.model)
        stops = [act.offset for act in acts[1:]]
        grows = any(
            act.method in WRITES and stop > size for act, stop in zip(acts, stops, strict=False)
        )
        if grows or size > LIMIT or not self.appends:
            appends = []  # at a place that would depend on who comes first
        jobs: list[Awaitable[object]] = []
        wanted: list[object] = []
        after = bytearray(self.model)
        for act, end in zip(acts, stops, strict=False):
            file = self.files[act.second]
            if act.method in WRITES:
                data = self.data(end - act.offset)
                jobs.append(write(file, act, data))
                wanted.append(len(data))
                replace(after, act.offset, data)
            elif act.method in READS:
                whole = grows or appends or act.method == "pread_many"
                stop = min(end, size) if whole else end
                if act.offset < stop:
                    jobs.append(read(file, act, stop - act.offset))
                    wanted.append(self.expected(act, stop))
        if sync is not None:
            jobs.append(getattr(self.files[0], sync)())
            wanted.append(None)
        parts = [self.data(n) for n in appends]
        for i, data in enumerate(parts):
            jobs.append(self.files[i % 2].append(data, dsync=i == 2))
        got: list[Any] = self.run_(together(jobs))
        places: list[int] = got[len(wanted) :]
        assert got[: len(wanted)] == wanted
        for offset, data in sorted(
            zip(places, parts, strict=True), key=lambda pair: (pair[0], len(pair[1]))
        ):
            assert offset == len(after)
            after += data
        self.model = after
        self.compare(direct=look and self.files[0].direct)

    @rule(act=ACTS, nbytes=st.one_of(st.integers(0, 600), st.integers(0, LIMIT)))
    def read_one(self, act: Act, nbytes: int) -> None:
        if act.method == "pread_many":  # it takes an end of the file for an error
            nbytes = max(min(nbytes, len(self.model) - act.offset), 0)
        if act.method in READS:
            wanted = self.expected(act, act.offset + nbytes)
            assert self.run_(read(self.files[act.second], act, nbytes)) == wanted

    @rule(nbytes=OFFSETS, second=st.booleans())
    def truncate(self, nbytes: int, second: bool) -> None:
        self.run_(self.files[second].truncate(nbytes))
        del self.model[nbytes:]
        self.model.extend(bytes(nbytes - len(self.model)))
        self.compare(direct=self.files[0].direct)

    @precondition(lambda self: self.can_allocate)
    @rule(offset=OFFSETS, nbytes=st.integers(1, 9000), second=st.booleans())
    def allocate(self, offset: int, nbytes: int, second: bool) -> None:
        self.run_(self.files[second].allocate(offset, nbytes))
        self.model.extend(bytes(max(offset + nbytes - len(self.model), 0)))
        self.compare(direct=self.files[0].direct)

    @property
    def can_allocate(self) -> bool:
        return True

    # -- the truth ------------------------------------------------------------------------------

    def data(self, nbytes: int) -> bytes:
        """Bytes that were not written before."""
        self.written += 1
        return random.Random(self.written).randbytes(nbytes)

    def expected(self, act: Act, stop: int) -> bytes:
        data = bytes(self.model[act.offset : stop])
        if act.flag and act.method in ("pread", "preadinto", "preadv"):
            return data.ljust(stop - act.offset, b"\0")
        return data

    def compare(self, *, direct: bool) -> None:
        assert all(file.size == len(self.model) for file in self.files)
        contents = self.contents(self.path, direct)
        assert len(contents) == len(self.model)
        if contents != bytes(self.model):
            wrong = [i for i, byte in enumerate(contents) if byte != self.model[i]]
            raise AssertionError(
                f"{len(wrong)} of {len(self.model)} bytes are wrong, {wrong[0]} to {wrong[-1]}"
            )

    def teardown(self) -> None:
        try:
            self.close()
        finally:
            self.patch.undo()


def replace(model: bytearray, offset: int, data: bytes) -> None:
    """Write data into the model as into a file."""
    if data:
        model.extend(bytes(max(offset - len(model), 0)))
        model[offset : offset + len(data)] = data


async def together(jobs: Sequence[Awaitable[object]]) -> list[Any]:
    """All of them at once; all have ended when one has failed."""
    got = await asyncio.gather(*jobs, return_exceptions=True)
    for result in got:
        if isinstance(result, BaseException):
            raise result
    return got

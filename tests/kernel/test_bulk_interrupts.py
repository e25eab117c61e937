"""KeyboardInterrupt at every line of a call of many operations: the kernel has nothing of it then.

Each history is run again and again, struck once at the first line, then at the second, and so on
until it runs through; a line that is passed many times, at its first two passes. That nobody has
the memory any more is seen by resizing it.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import rawaio
from rawaio.bulk import BulkLane
from rawaio.many import Lanes
from tests.context_support import ConstantRule, aio_mappings, descriptors
from tests.driver_support import run, turns, until
from tests.fuse_server import FuseServer

_PACKAGE = str(Path(rawaio.__file__).parent)
# More than a turn of the loop starts of one call.
_MORE = 4 * 128 + 16
_STRUCK = {"bulk.py", "bulkcalls.py", "busypoll.py", "many.py", "context.py", "reaping.py"}
CONTENT = bytes(range(256)) * 64
_BLOCKS = len(CONTENT) // 4096


class Striker:
    """Raises KeyboardInterrupt at the n-th line of what does many operations."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.passes: Counter[tuple[object, int]] = Counter()
        self.struck: str | None = None

    def __call__(self, frame: FrameType, event: str, arg: object) -> Striker | None:
        folder, _, name = frame.f_code.co_filename.rpartition("/")
        if folder != _PACKAGE or name not in _STRUCK:
            return None
        place = frame.f_code, frame.f_lineno
        if event == "line" and self.passes[place] < 2:
            self.passes[place] += 1
            self.left -= 1
            if self.left == 0:
                self.struck = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


class World:
    """A context, and the memory that was lent."""

    def __init__(self, ctx: rawaio.IOContext, fd: int) -> None:
        self.ctx = ctx
        self.fd = fd
        self.direct = -1
        self.lent: list[bytearray] = []

    def new(self, nbytes: int) -> bytearray:
        self.lent.append(bytearray(nbytes))
        return self.lent[-1]


def _equal(world: World) -> None:
    world.ctx.pread_many(world.fd, range(5), 3, world.new(15))


def _packed(world: World) -> None:
    world.ctx.pread_many(world.fd, range(9), out=world.new(36), lengths=list(range(9)))


def _scattered(world: World) -> None:
    world.ctx.pwrite_many(world.fd, range(0, 27, 3), [world.new(3) for _ in range(9)])


def _short(world: World) -> None:
    with pytest.raises(rawaio.BulkError):
        world.ctx.pread_many(world.fd, [0, len(CONTENT), 5], 3, world.new(9))


def _refused(world: World) -> None:
    with pytest.raises(rawaio.BulkError):
        world.ctx.pread_many(1 << 20, [0, 1], 3, world.new(6))


def _polled(world: World) -> None:
    """Past the page cache, so that there is something to look for."""
    nbytes = _BLOCKS * 4096
    memory = world.new(nbytes + 4096)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % 4096
    out = memoryview(memory)[start : start + nbytes]
    world.ctx.pread_many(world.direct, range(0, nbytes, 4096), 4096, out)


HISTORIES = [_equal, _packed, _scattered, _short, _refused]


@pytest.fixture
def direct(fd: int) -> Iterator[int]:
    """The same file, past the page cache."""
    try:
        opened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"no O_DIRECT: {error}")
    try:
        os.fsync(fd)
        try:
            os.preadv(opened, [rawaio.aligned_buffer(4096)], 0)
        except OSError as error:
            pytest.skip(f"no O_DIRECT: {error}")
        yield opened
    finally:
        os.close(opened)


@pytest.mark.parametrize(
    ("history", "force_syscalls"),
    [*((history, False) for history in HISTORIES), (_packed, True)],
)
def test_every_line_of_a_context(
    history: Callable[[World], None], fd: int, force_syscalls: bool
) -> None:
    with rawaio.IOContext(4, force_syscalls=force_syscalls) as ctx:
        _strike_everywhere(history, ctx, fd)


@pytest.mark.parametrize("poll_ns", [0, 10_000_000_000])
def test_every_line_of_a_context_that_polls(fd: int, direct: int, poll_ns: int) -> None:
    with rawaio.IOContext(2, max_batch=1, polling=ConstantRule(poll_ns)) as ctx:
        if not ctx.visible:
            pytest.skip(f"nothing is polled: {ctx.why_not_ring or 'no GIL'}")
        _strike_everywhere(_polled, ctx, fd, direct)


def _strike_everywhere(
    history: Callable[[World], None], ctx: rawaio.IOContext, fd: int, direct: int = -1
) -> None:
    previous = sys.gettrace()
    n = 0
    struck = "at first"
    before = ctx.statistics().submitted, aio_mappings(), descriptors()
    while struck:
        n += 1
        world = World(ctx, fd)
        world.direct = direct
        striker = Striker(n)
        sys.settrace(striker)
        try:
            history(world)
        except KeyboardInterrupt as error:
            del error  # and its frames, which hold what they were about
        finally:
            sys.settrace(previous)
        struck = striker.struck or ""
        for memory in world.lent:
            memory.append(0)
        # Another lane, or the same, goes on.
        assert ctx.pread_many(fd, [255, 0], 1) == b"\xff\0" or history is _scattered
    assert n > 60
    assert ctx.statistics().submitted >= before[0]
    ctx._close_lanes()
    gc.collect()
    assert (aio_mappings(), descriptors()) == before[1:]


class _StruckError(BaseException):
    pass


STEPS = [
    (BulkLane, "reset"),
    (BulkLane, "collect"),
    (BulkLane, "submit"),
    (BulkLane, "end"),
    (Lanes, "_after"),
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "step"), STEPS)
def test_each_step_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, step: str, after: bool
) -> None:
    """Struck in the loop: the task is told when the kernel has nothing, and the next call works.

    Where it strikes in the task's own call, the task has it at once, and the kernel nothing.
    """
    method = getattr(owner, step)
    struck: list[bool] = []
    in_loop = False

    def strikes(*arguments: Any, **given: Any) -> Any:
        if struck or not in_loop:
            return method(*arguments, **given)
        struck.append(True)
        if after:
            method(*arguments, **given)
        raise _StruckError

    async def main() -> None:
        nonlocal in_loop
        told: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
        with FuseServer() as fuse:
            fuse.write_file("file", CONTENT * 64)
            async with rawaio.open(fuse.path("file"), engine="aio") as f:
                offsets = range(0, 64 * 4096, 4096)
                f.nowait_flag = 8
                lane = f.driver
                del lane
                out = rawaio.aligned_buffer(64 * 4096)
                assert await f.pread_many(offsets, 4096, out) == len(out)
                monkeypatch.setattr(owner, step, strikes)
                in_loop = True
                try:
                    await f.pread_many(offsets, 4096, out)
                except (rawaio.RawAIOError, _StruckError):
                    pass
                assert struck
                in_loop = False
                assert await f.pread_many(offsets, 4096, out) == len(out)
                assert out == CONTENT[:4096] * 64
                await until(lambda: not f.under_way)
        assert len(told) <= 1

    run(main())


def _on_a_lane(file: rawaio.File) -> bool:
    return file.driver.lanes is not None


def test_every_line_in_the_loop(tmp_path: Path) -> None:
    """Of a buffered file: whatever is struck, task or loop, the memory is nobody's afterwards."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    previous = sys.gettrace()

    async def main() -> int:
        loop = asyncio.get_running_loop()
        told: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, what: told.append(what))
        async with rawaio.open(path, "r+", direct=False) as f:
            await f.pread_many([0], 1)
            assert _on_a_lane(f)
            n = 0
            while True:
                n += 1
                out = bytearray(_MORE)
                striker = Striker(n)
                sys.settrace(striker)
                try:
                    await f.pread_many(range(_MORE), 1, out)
                except (KeyboardInterrupt, rawaio.RawAIOError) as error:
                    del error
                finally:
                    sys.settrace(previous)
                await until(lambda: not f.under_way)
                await until(lambda: not f.driver.busy)
                await turns()  # what woke this task is over
                gc.collect()  # tracebacks refer to frames, and those to tracebacks
                try:
                    out.append(0)
                except BaseException as error:
                    error.add_note(f"struck at line {n}, {striker.struck}")
                    raise
                if striker.struck is None:
                    assert out[:256] == CONTENT[:256]
                    return n

    # What strikes in a callback of the loop comes out of the loop, which is run again.
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(main())
        while not task.done():
            try:
                _run_until(loop, task)
            except KeyboardInterrupt as error:
                del error
            finally:
                sys.settrace(previous)
        assert task.result() > 100
        loop.run_until_complete(rawaio.shutdown())
    finally:
        loop.close()


def _run_until(loop: asyncio.AbstractEventLoop, task: asyncio.Task[int]) -> None:
    task.add_done_callback(lambda _: loop.stop())
    loop.run_forever()

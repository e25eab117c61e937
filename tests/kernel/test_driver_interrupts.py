"""KeyboardInterrupt at every line of the driver, in a loop that is run again afterwards.

Each history is run again and again, struck once at the first line, then at the second, and so on
until it runs through. Afterwards every operation has finished exactly once, and nothing is left
behind.

Left out is the first line of what the loop calls itself: struck there, or a moment before in the
loop's own code, the call is lost, and no callback can help that.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import rawaio
from rawaio import File
from rawaio.driver import Driver
from rawaio.operation import Phase
from rawaio.request import Completion
from rawaio.transfer import BouncedRead, ReadInto, Write
from tests.driver_support import check_at_rest, run, skip_unless_direct

_BLOCK = 4096
_DATA = bytes(range(256)) * 256
_PACKAGE = str(Path(rawaio.__file__).parent)
# What is struck; of files, what the driver calls in operations.
_STRUCK = {os.path.join(_PACKAGE, name) for name in ("driver.py", "transfer.py")}
_CALLED_BY_THE_LOOP = {
    "Driver._flush",
    "Driver._on_readable",
    "Driver._again",
    "Driver._retry",
    "Driver._on_performed",
}
_AT_REST = {"Driver.drained", "Driver.statistics", "Driver.busy", "Driver._is_stale"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(_DATA)
        file.flush()
        os.fsync(file.fileno())
    return path


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        run(loop.shutdown_asyncgens(), loop)
        loop.close()


class Striker:
    """Raises KeyboardInterrupt at the n-th line of the driver that the loop runs."""

    def __init__(self, n: int) -> None:
        self._left = n
        self.struck: str | None = None

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if code.co_filename not in _STRUCK or code.co_qualname in _AT_REST:
            return None
        if event == "call":
            return self if code.co_qualname not in _CALLED_BY_THE_LOOP else _Begun(self)
        return self.line(frame, event)

    def line(self, frame: FrameType, event: str) -> Any:
        if event == "line" and self.struck is None:
            self._left -= 1
            if self._left == 0:
                self.struck = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


class _Begun:
    """For a frame whose beginning, up to the first line inside of its try, is not struck."""

    def __init__(self, striker: Striker) -> None:
        self._striker = striker
        self._beginning = True

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if self._beginning:
            # `if self._is_stale():`, or the only statement; then `try:`.
            first = frame.f_code.co_firstlineno
            source = _lines(frame.f_code.co_filename)[frame.f_lineno - 1].strip()
            if frame.f_lineno <= first or source.startswith(
                ("try:", "if self._is_stale", "return")
            ):
                return self
            if frame.f_code.co_qualname == "Driver._on_readable":
                return self._striker
            self._beginning = False
        self._striker.line(frame, event)
        return self


_sources: dict[str, list[str]] = {}


def _lines(name: str) -> list[str]:
    if name not in _sources:
        _sources[name] = Path(name).read_text().splitlines()
    return _sources[name]


@contextmanager
def _struck(striker: Striker) -> Generator[None, None, None]:
    previous = sys.gettrace()
    sys.settrace(striker)
    try:
        yield
    finally:
        sys.settrace(previous)


class World:
    """A file, its operations, and how often each of them told its result."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.operations: list[tuple[Any, object]] = []
        self.begun: set[Any] = set()

    def begin(self, operation: Any, expected: object) -> None:
        self.operations.append((operation, expected))
        operation.begin()
        self.begun.add(operation)


def _reads(world: World) -> None:
    for i in range(3):
        world.begin(BouncedRead(world.file, _BLOCK, i * _BLOCK), _DATA[i * _BLOCK :][:_BLOCK])


def _unaligned(world: World) -> None:
    for i in range(2):
        world.begin(BouncedRead(world.file, 100, 5 + i), _DATA[5 + i : 105 + i])


def _cancelled_in_front(world: World) -> None:
    """Who has given up stands before others in the queue."""
    for i in range(4):
        operation = BouncedRead(world.file, _BLOCK, 0)
        world.begin(operation, None if i % 2 == 0 else _DATA[:_BLOCK])
        if i % 2 == 0:
            operation.waiter.cancel()


def _more_than_room(world: World) -> None:
    for _ in range(7):  # nr_events are 4
        world.begin(BouncedRead(world.file, _BLOCK, 0), _DATA[:_BLOCK])


def _writes(world: World) -> None:
    for i in range(3):
        view = rawaio.aligned_buffer(_BLOCK)
        view[:] = _DATA[i * _BLOCK :][:_BLOCK]
        world.begin(Write(world.file, view, i * _BLOCK, 0), _BLOCK)


def _into(world: World) -> None:
    for i in range(2):
        view = rawaio.aligned_buffer(_BLOCK)
        request = rawaio.Request.pread(world.file.descriptor, view, i * _BLOCK)
        world.begin(ReadInto(world.file, request, view), _BLOCK)


HISTORIES = [_reads, _unaligned, _cancelled_in_front, _more_than_room, _writes, _into]
WAYS = ("as they are", "short", "refused", "no_event", "threads")


def _answer(driver: Driver, way: str) -> None:
    """Have the kernel answer the first completions differently."""
    arrived, dispatch = driver._arrived, driver._dispatch
    seen: set[int] = set()

    def changed() -> None:
        for i, completion in enumerate(list(arrived)):
            request, res, res2 = completion
            if id(completion) in seen or res < _BLOCK:
                continue
            if way == "short":
                res = 512  # a device's block; the rest is asked for
            elif way == "refused":
                res = -errno.EAGAIN
            arrived[i] = Completion((request, res, res2))
            seen.add(id(arrived[i]))
            kept.append(arrived[i])
        dispatch()

    kept: list[Completion] = []
    driver._dispatch = changed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("history", "way"),
    [
        *((history, "as they are") for history in HISTORIES),
        *((history, way) for history in (_reads, _writes) for way in WAYS[1:]),
    ],
)
def test_every_line(
    path: Path,
    loop: asyncio.AbstractEventLoop,
    history: Callable[[World], None],
    way: str,
) -> None:
    n = 0
    file = run(_opened(path, "threads" if way == "threads" else "auto"), loop)
    driver = file.driver
    while True:
        n += 1
        striker = Striker(n)
        if way in ("short", "refused"):
            _answer(driver, way)
        world = World(file)
        file.read_patience.refused = file.write_patience.refused = 0
        try:
            _run_struck(loop, striker, world, history, way)
            run(_verify(world), loop)
        except BaseException as error:
            error.add_note(f"struck at line {n}, {striker.struck}")
            raise
        finally:
            driver.__dict__.pop("_dispatch", None)
        if striker.struck is None:
            break
    run(file.close(), loop)
    assert n > 20


async def _opened(path: Path, engine: Any) -> File:
    running = asyncio.get_running_loop()
    from rawaio.loops.asyncio import AsyncioDriver, _drivers

    if running not in _drivers:
        _made.append(AsyncioDriver(nr_events=4))
    file = await rawaio.open(path, "r+", engine=engine)
    _made.clear()
    return file


_made: list[Driver] = []


def _run_struck(
    loop: asyncio.AbstractEventLoop,
    striker: Striker,
    world: World,
    history: Callable[[World], None],
    way: str,
) -> None:
    """Begin the operations, and let the loop run until all is done; struck once on the way."""
    context = world.file.driver.context
    if way == "no_event" and context is not None:
        submit, refusals = context._queue._submit, [errno.EAGAIN] * 2

        def refused(first_token: int, batch: Any, outcome: list[int]) -> None:
            if refusals:
                outcome.extend((-1, refusals.pop()))
                context._queue._submit = refused if refusals else submit
            else:
                submit(first_token, batch, outcome)

        context._queue._submit = refused

    async def main() -> None:
        history(world)
        await _finished(world)

    with _struck(striker):
        task = loop.create_task(main())
        try:
            loop.run_until_complete(task)
        except KeyboardInterrupt:
            pass
    if striker.struck is not None and not task.done():
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
    if task.done() and not task.cancelled():
        task.exception()


async def _finished(world: World) -> None:
    waiters = [operation.waiter for operation, _ in world.operations]
    if waiters:
        await asyncio.wait([w for w in waiters if not w.done()] or waiters)


async def _verify(world: World) -> None:
    file = world.file
    for operation, expected in world.operations:
        if operation not in world.begun and operation.phase in (Phase.WAITING, Phase.WITHDRAWN):
            continue  # struck while it was begun
        # Who waited is struck too, and may have cancelled all waiters.
        if expected is not None and not operation.waiter.cancelled():
            assert await operation.waiter == expected
    await check_at_rest(file)
    for operation, _ in world.operations:
        assert operation.phase >= Phase.FINISHED or operation not in world.begun
    assert await file.pread(_BLOCK, 0) == _DATA[:_BLOCK]
    assert await asyncio.gather(*[file.pread(_BLOCK, 0) for _ in range(9)]) == [_DATA[:_BLOCK]] * 9
    await check_at_rest(file)

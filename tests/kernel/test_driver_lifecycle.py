"""Drivers from their making to their end: with the loop, without it, and in forked children."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import File
from rawaio.loops.asyncio import running_driver
from tests.context_support import (
    LIMIT_S,
    Threads,
    aio_mappings,
    descriptors,
    run_program,
    together,
)
from tests.driver_support import (
    check_at_rest,
    gated,
    run,
    skip_unless_direct,
    turns,
    until,
    wait_until,
)
from tests.fuse_server import FuseServer

_BLOCK = 4096
_DATA = bytes(range(256)) * 256


@pytest.fixture
def path(tmp_path: Path) -> Path:
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(_DATA)
    return path


@pytest.fixture(params=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    if request.param == "asyncio":
        return asyncio.new_event_loop
    uvloop = pytest.importorskip("uvloop", reason="no uvloop")
    new: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    new().close()  # what libuv makes once for the process
    return new


async def _use(path: Path, *, direct: bool = True) -> None:
    async with rawaio.open(path, "r+", direct=direct) as file:
        assert await file.pread(_BLOCK, _BLOCK) == _DATA[_BLOCK : 2 * _BLOCK]
        assert await file.pread(100, 5) == _DATA[5:105]
        await file.pwrite(_DATA[:300], 0)
        await file.fsync()
        assert [chunk async for chunk in file.stream(0, 3 * _BLOCK, chunk_size=_BLOCK)] == [
            _DATA[i * _BLOCK :][:_BLOCK] for i in range(3)
        ]


def _calls(file: File) -> list[Callable[[], Coroutine[Any, Any, object]]]:
    return [
        lambda: file.pread(_BLOCK, 0),
        lambda: file.preadinto(bytearray(5), 0),
        lambda: file.preadv([bytearray(5)], 0),
        lambda: file.pwrite(bytes(5), 0),
        lambda: file.pwritev([bytes(5)], 0),
        lambda: file.append(b"x"),
        file.fsync,
        file.fdatasync,
        lambda: file.truncate(5),
        lambda: file.allocate(0, 5),
        lambda: _first_chunk(file),
    ]


async def _first_chunk(file: File) -> bytes:
    return await anext(file.stream())


# -- with the loop -------------------------------------------------------------------------------


def test_one_context_made_when_it_is_needed(
    path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    before = descriptors()
    rings = aio_mappings()

    async def main() -> None:
        assert running_driver() is running_driver()
        assert running_driver().context is None
        threads = await rawaio.open(path, engine="threads")
        assert await threads.pread(10, 0) == _DATA[:10]
        await threads.close()
        assert running_driver().context is None
        files = await asyncio.gather(*[rawaio.open(path)._opened() for _ in range(5)])
        assert len({id(file.driver) for file in files}) == 1
        assert aio_mappings() == rings + 1
        await asyncio.gather(*[file.pread(_BLOCK, 0) for file in files])
        for file in files:
            await file.close()
        await _use(path)
        await _use(path, direct=False)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    assert aio_mappings() == rings
    gc.collect()
    assert descriptors() == before


def test_loops_one_after_another_and_in_threads(
    path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], threads: Threads
) -> None:
    rings = aio_mappings()

    def use() -> None:
        for _ in range(3):
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(_use(path))

    together(threads, *[use] * 4)
    assert aio_mappings() == rings


def test_a_thousand_runs(path: Path, threads: Threads) -> None:
    """Would use up fs.aio-max-nr if any of them left its context behind."""
    gc.collect()
    before = descriptors(), aio_mappings(), _workers()

    async def main() -> None:
        async with rawaio.open(path) as file:
            assert await file.pread(_BLOCK, 0) == _DATA[:_BLOCK]

    def run_them() -> None:
        for _ in range(1000 // 40):
            asyncio.run(main())

    together(threads, *[run_them] * 40)  # io_destroy waits, and not for the processor
    gc.collect()
    wait_until(lambda: (descriptors(), aio_mappings(), _workers()) == before)


def _workers() -> int:
    return sum(thread.name.startswith("rawaio") for thread in threading.enumerate())


# -- without asyncio.run -------------------------------------------------------------------------


def test_plain_close(path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A loop that is closed and nothing else: the context goes with it."""
    gc.collect()
    before = descriptors(), aio_mappings(), _workers()
    loop = new_loop()
    run(_use(path), loop)
    loop.close()
    del loop
    gc.collect()
    wait_until(lambda: (descriptors(), aio_mappings(), _workers()) == before)


@pytest.mark.filterwarnings("ignore:unclosed rawaio.File:ResourceWarning")
def test_closed_with_requests_in_flight(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """The context, and the memory, stay until the kernel is done; then all goes by itself."""
    with FuseServer() as fuse:
        if not fuse.async_dio:
            pytest.skip("the kernel does not offer FUSE_ASYNC_DIO")
        fuse.write_file("file", _DATA)
        rings = aio_mappings()
        loop = new_loop()
        loop.set_exception_handler(lambda *_: None)  # tasks that were destroyed
        driver = loop.run_until_complete(_left_in_flight(fuse))
        loop.close()
        del loop
        gc.collect()
        assert driver() is None
        assert aio_mappings() == rings + 1
        fuse.unhold()
        wait_until(lambda: aio_mappings() == rings)
        wait_until(lambda: not _workers())


async def _left_in_flight(fuse: FuseServer) -> weakref.ref[object]:
    file = await rawaio.open(fuse.path("file"), "r+", engine="aio")
    fuse.hold()
    view = rawaio.aligned_buffer(_BLOCK)
    tasks: set[asyncio.Future[Any]] = set()
    for call in (file.pread(_BLOCK, 0), file.preadinto(view, 0), file.pwrite(view, 2 * _BLOCK)):
        tasks.add(asyncio.ensure_future(call))
    await asyncio.to_thread(fuse.wait_held, 3)
    return weakref.ref(file.driver)


# -- shutdown ------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_shutdown(
    path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], direct: bool
) -> None:
    rings = aio_mappings()

    async def main() -> None:
        await rawaio.shutdown()  # there is nothing
        file = await rawaio.open(path, "r+", direct=direct)
        file._reads_cached = False
        n = 2 * file.driver.nr_events
        reads = [asyncio.create_task(file.pread(_BLOCK, 0)) for _ in range(n)]
        await turns(1)
        await asyncio.gather(rawaio.shutdown(), rawaio.shutdown())
        await rawaio.shutdown()
        assert [read.result() for read in reads] == [_DATA[:_BLOCK]] * n
        assert aio_mappings() == rings
        file._reads_cached = not direct
        for call in _calls(file):
            with pytest.raises(rawaio.ClosedError):
                await call()
        assert file.statistics().under_way == 0
        await _use(path)  # by a new driver
        await file.close()
        assert file.fileno() == -1
        await rawaio.shutdown()

    loop = new_loop()
    try:
        run(main(), loop)
    finally:
        loop.close()  # and nothing is left to be said
    gc.collect()
    assert aio_mappings() == rings


def test_shutdown_while_a_write_waits_for_its_range(path: Path) -> None:
    async def main() -> None:
        file = await rawaio.open(path, "r+")
        hold = file.lock.acquire(0, 1 << 40, exclusive=True)
        task = asyncio.create_task(file.pwrite(rawaio.aligned_buffer(_BLOCK), 0))
        await until(lambda: len(file.lock) == 2)
        await rawaio.shutdown()
        file.lock.release(hold)
        with pytest.raises(rawaio.ClosedError):
            await task
        await file.close()
        assert len(file.lock) == 0

    run(main())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_shutdown_cancelled(path: Path, k: int) -> None:
    """The next one finishes it."""

    async def main() -> None:
        file = await rawaio.open(path)
        driver = file.driver
        with gated(driver) as gate:
            gate.hold()
            read = asyncio.create_task(file.pread(_BLOCK, 0))
            await turns()
            ending = asyncio.create_task(rawaio.shutdown())
            if k > 1:
                gate.release()
                await until(lambda: driver._performing)
            if k > 2:
                gate.hold(threads=False)
            ending.cancel()
            gate.release()
            with pytest.raises(asyncio.CancelledError):
                await ending
        assert await read == _DATA[:_BLOCK]
        await driver.shutdown()
        assert driver.context is not None
        assert driver.context.closed
        await file.close()

    run(main())


# -- where it does not belong --------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_another_loop(
    path: Path, new_loop: Callable[[], asyncio.AbstractEventLoop], direct: bool, threads: Threads
) -> None:
    """In the same thread and in another: a clear error, and the file goes on."""
    first, second = new_loop(), new_loop()

    async def opened() -> File:
        return await rawaio.open(path, "r+", direct=direct)

    async def refused(file: File) -> None:
        # What is cached is answered without looking at the loop, until it is the loop's turn.
        for _ in range(file.driver.credit if not direct else 0):
            assert await file.pread(1, 0)
        for call in [*_calls(file), file.close]:
            with pytest.raises(RuntimeError, match="belongs to the event loop"):
                await call()

    async def goes_on(file: File) -> None:
        await check_at_rest(file)
        assert await file.pread(_BLOCK, 0) == _DATA[:_BLOCK]
        await file.close()

    file = run(opened(), first)
    run(refused(file), second)
    threads.start(lambda: second.run_until_complete(refused(file)))
    threads.join()
    run(goes_on(file), first)
    for loop in (first, second):
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_forked_child(path: Path, direct: bool) -> None:
    """ForkedError of every method; nothing hangs; the parent notices nothing."""

    async def in_child(file: File) -> None:
        for call in _calls(file):
            with pytest.raises(rawaio.ForkedError):
                await call()
        await file.close()
        await _use(path)

    async def main() -> None:
        file = await rawaio.open(path, "r+", direct=direct)
        read = asyncio.create_task(file.pread(_BLOCK, 0))
        await read
        with gated(file.driver) as gate:
            gate.hold()
            view = rawaio.aligned_buffer(_BLOCK)
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(file.pwrite(_DATA[:_BLOCK], 0, dsync=True)),
                asyncio.create_task(file.truncate(len(_DATA))),
                asyncio.create_task(file.preadinto(view, 0)),
            ]
            await turns()
            assert file.statistics().under_way
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    asyncio.events._set_running_loop(None)
                    asyncio.run(in_child(file))
                    code = 0
                finally:
                    os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            gate.release()
            await asyncio.gather(*tasks)
        assert await file.pread(_BLOCK, 0) == _DATA[:_BLOCK]
        await check_at_rest(file)
        await file.close()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # CPython 3.12
        run(main())


# -- the program's end ---------------------------------------------------------------------------

_PROGRAM = """
import asyncio, os, sys, threading
import rawaio

path = {path!r}

async def main():
    file = await rawaio.open(path, "r+", direct={direct})
    await file.pread(4096, 0)
    {body}

{rest}
"""


def _program(path: Path, body: str, rest: str, *, direct: bool = True) -> str:
    return _PROGRAM.format(path=str(path), body=body, rest=rest, direct=direct)


_ENDS = {
    "closed": ("await file.close()", "asyncio.run(main())", 0, []),
    "open": ("pass", "asyncio.run(main())", 0, ["unclosed rawaio.File"]),
    "open and kept": (
        "globals().update(f=file)",
        "asyncio.run(main())",
        0,
        ["unclosed rawaio.File"],
    ),
    "shutdown": (
        "await file.close(); await rawaio.shutdown()",
        "loop = asyncio.new_event_loop(); loop.run_until_complete(main()); loop.close()",
        0,
        [],
    ),
    "plain close": (
        "await file.close()",
        "loop = asyncio.new_event_loop(); loop.run_until_complete(main()); loop.close()",
        0,
        [],
    ),
    "no close": (
        "await file.close()",
        "loop = asyncio.new_event_loop(); loop.run_until_complete(main())",
        0,
        [],  # Python itself says so of the loop
    ),
    "under way": (
        (
            "await file.close(); f = await rawaio.open(path); "
            "[asyncio.ensure_future(f.pread(4096, 0)) for _ in range(300)]; await asyncio.sleep(0)"
        ),
        "asyncio.run(main())",
        0,
        ["unclosed rawaio.File"],
    ),
    "exit": ("sys.exit(3)", "asyncio.run(main())", 3, ["unclosed rawaio.File"]),
    "os._exit": ("os._exit(4)", "asyncio.run(main())", 4, []),
    "in a thread": (
        "await file.close()",
        "t = threading.Thread(target=lambda: asyncio.run(main())); t.start()",
        0,
        [],
    ),
    "raised": ("raise KeyError(5)", "asyncio.run(main())", 1, ["unclosed rawaio.File"]),
}


# The same ends without rawaio; a thread waits there too.
_ALONE = """
import asyncio, os, sys, threading
from queue import SimpleQueue

threading.Thread(target=SimpleQueue().get, daemon=True).start()

async def main():
    {body}

{rest}
"""
_ALONE_BODIES = ("sys.exit(3)", "os._exit(4)", "raise KeyError(5)")

_RAISED = ["Traceback (most recent call last):", "KeyError: 5"]


def _said(stderr: str) -> list[str]:
    """What is said, line by line, without what differs from run to run.

    Lines that belong to another one are indented: source, and where it was called from.
    """
    lines = [re.sub(r"0x[0-9a-f]+|fd=[0-9]+|:[0-9]+:", "_", line) for line in stderr.splitlines()]
    return [
        line
        for line in lines
        if line[:1].strip()
        and "tracemalloc" not in line
        and not line.startswith("Executing <")  # a step that took long, says asyncio
    ]


# Whether a thread can start another while the main thread, at its end, waits for it.
_STARTS_LATE = """
import threading

def late():
    threading.main_thread().join()
    threading.Thread(target=print, args=("started",)).start()

threading.Thread(target=late).start()
"""


def _skip_unless_it_can_end(name: str) -> None:
    if name == "in a thread":
        probe = run_program(_STARTS_LATE, check=False)
        if probe.stdout != "started\n":
            pytest.skip(f"no thread can be started here then: {probe.stderr.splitlines()[-1]}")


@pytest.mark.parametrize("name", _ENDS)
def test_the_programs_end(path: Path, name: str) -> None:
    _skip_unless_it_can_end(name)
    body, rest, status, _ = _ENDS[name]
    done = run_program(_program(path, body, rest), check=False)
    assert done.returncode == status
    assert _said(done.stderr) == (_RAISED if name == "raised" else []), done.stderr


@pytest.mark.parametrize("name", _ENDS)
def test_the_programs_end_in_development_mode(path: Path, name: str) -> None:
    """It says which file was not closed, and else what Python says of such a program itself."""
    _skip_unless_it_can_end(name)
    body, rest, status, expected = _ENDS[name]
    done = run_program(_program(path, body, rest), "-X", "dev", check=False)
    assert done.returncode == status
    without = body if body in _ALONE_BODIES else "pass"
    alone = run_program(_ALONE.format(body=without, rest=rest), "-X", "dev", check=False)
    assert alone.returncode == status
    said, said_alone = Counter(_said(done.stderr)), Counter(_said(alone.stderr))
    assert not said_alone - said, done.stderr
    more = list((said - said_alone).elements())
    assert len(more) == len(expected), done.stderr
    for line, word in zip(more, expected, strict=True):
        assert word in line
    if name == "raised":
        assert all(said[line] == 1 for line in _RAISED)


@pytest.mark.parametrize("how", ["return", "raise", "SIGTERM"])
def test_the_programs_end_with_requests_in_flight(how: str) -> None:
    """It ends when the kernel is done, which has the program's memory."""
    with FuseServer() as fuse:
        if not fuse.async_dio:
            pytest.skip("the kernel does not offer FUSE_ASYNC_DIO")
        fuse.write_file("file", _DATA)
        body = (
            "f = await rawaio.open(path, 'r+', engine='aio'); v = rawaio.aligned_buffer(4096); "
            "print('opened', flush=True); sys.stdin.readline(); "
            "t = [asyncio.ensure_future(c) for c in (f.pread(4096, 0), f.preadinto(v, 0))]; "
            "await asyncio.sleep(0); await asyncio.sleep(0); print('ready', flush=True); "
            + {"return": "pass", "raise": "raise KeyError(5)", "SIGTERM": "await t[1]"}[how]
        )
        source = _program(fuse.path("file"), body, "asyncio.run(main())").replace(
            'file = await rawaio.open(path, "r+", direct=True)\n    await file.pread(4096, 0)', ""
        )
        program = _started(source)
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "opened\n"
            fuse.hold()
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "ready\n"
            fuse.wait_held(2)
            if how == "SIGTERM":
                program.send_signal(signal.SIGTERM)
            fuse.unhold()
            _, said = program.communicate(timeout=LIMIT_S)
        finally:
            program.kill()
            program.communicate()
        assert program.returncode == {"return": 0, "raise": 1, "SIGTERM": -signal.SIGTERM}[how]
        assert _said(said) == (_RAISED if how == "raise" else []), said


def _started(source: str) -> Any:
    import subprocess
    import sys

    from tests.support import ROOT

    return subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

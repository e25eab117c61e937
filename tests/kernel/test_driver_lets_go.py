"""When an awaited call has returned, or raised, the caller's memory is the caller's alone.

A `bytearray` that anything still refers to by way of a view cannot be resized: BufferError. Garbage
collection is off, so that what is only part of a cycle counts too.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest

import rawaio
from rawaio import File
from rawaio.driver import Driver
from tests.context_support import LIMIT_S
from tests.driver_support import gated, run, skip_unless_direct, turns

_BLOCK = 4096
_DATA = bytes(range(256)) * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(_DATA)
    return path


@pytest.fixture(autouse=True)
def _no_collection() -> Generator[None, None, None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Delivered(deque[Any]):
    """Results of a driver's threads, each of which is held when it has delivered one."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._go = threading.Event()
        self.held = 0

    def append(self, work: Any) -> None:
        self.held += 1
        super().append(work)
        self._driver._call_threadsafe(self._driver._on_performed)
        assert self._go.wait(LIMIT_S)

    def release(self) -> None:
        self._go.set()


def _aligned(memory: bytearray, nbytes: int = _BLOCK) -> memoryview:
    """A part of it that direct I/O takes."""
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % _BLOCK
    return memoryview(memory)[start : start + nbytes]


_Call = Callable[[File, bytearray], Awaitable[object]]

_CALLS: dict[str, _Call] = {
    "preadinto": lambda file, memory: file.preadinto(memory, 0),
    "preadinto, aligned": lambda file, memory: file.preadinto(_aligned(memory), 0),
    "preadinto, behind the end": lambda file, memory: file.preadinto(memory, len(_DATA) - 5),
    "preadv": lambda file, memory: file.preadv([memory, memory], 0),
    "preadv, aligned": lambda file, memory: file.preadv([_aligned(memory), _aligned(memory)], 0),
    "pwrite": lambda file, memory: file.pwrite(memory, 5),
    "pwrite, aligned": lambda file, memory: file.pwrite(_aligned(memory), 0),
    "pwrite, behind the end": lambda file, memory: file.pwrite(memory, len(_DATA) + 5),
    "pwritev": lambda file, memory: file.pwritev([memory, memory], 5),
    "pwritev, aligned": lambda file, memory: file.pwritev([_aligned(memory), _aligned(memory)], 0),
    "append": lambda file, memory: file.append(memory),
    "pread_many": lambda file, memory: file.pread_many([0, 512], 512, memoryview(memory)[:1024]),
    "pwrite_many": lambda file, memory: file.pwrite_many([0, 4096], memoryview(memory)[:8192]),
}

# Who does it: the kernel; a thread, the same request; a thread, from the beginning.
_WAYS = ["kernel", "request", "threads", "buffered"]


async def _open(path: Path, way: str) -> File:
    engine: Literal["auto", "threads"] = "threads" if way == "threads" else "auto"
    file = await rawaio.open(path, "r+", direct=way != "buffered", engine=engine)
    file._reads_cached = file._writes_cached = False
    if way == "request":
        file.offloads = True
    return file


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("name", _CALLS)
def test_returned(path: Path, way: str, name: str) -> None:
    """Also by the thread that did it, which may be anywhere behind its last word to the loop."""

    async def main() -> None:
        file = await _open(path, way)
        driver = file.driver
        memory = bytearray(3 * _BLOCK)
        driver._performed = delivered = Delivered(driver)
        try:
            await _CALLS[name](file, memory)
            memory.append(0)
        finally:
            delivered.release()
        assert delivered.held or way == "kernel" or "_many" in name
        await file.close()

    run(main())


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("name", _CALLS)
def test_raised(path: Path, way: str, name: str) -> None:
    """Once the caller has let go of the exception, whose traceback has frames of his own."""

    async def main() -> None:
        file = await _open(path, way)
        driver = file.driver
        memory = bytearray(3 * _BLOCK)
        raised = 0
        driver._performed = delivered = Delivered(driver)
        try:
            with _dead(file.fileno()):
                try:
                    await _CALLS[name](file, memory)
                except OSError as error:
                    raised = error.errno or 0
            await turns(1)  # until then asyncio has the future, and the future has the exception
            memory.append(0)
        finally:
            delivered.release()
        assert raised == errno.EBADF
        await file.close()

    run(main())


@contextmanager
def _dead(fd: int) -> Generator[None, None, None]:
    """A descriptor whose every transfer is EBADF."""
    kept, dead = os.dup(fd), os.open("/", os.O_PATH)
    os.dup2(dead, fd)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)
        os.close(dead)


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("name", _CALLS)
def test_cancelled(path: Path, way: str, name: str, fails: bool) -> None:
    """While the kernel, or a thread, has it; then who is cancelled waits for the end."""

    async def main() -> None:
        file = await _open(path, way)
        memory = bytearray(3 * _BLOCK)
        with gated(file.driver) as gate, _dead(file.fileno()) if fails else nullcontext():
            gate.hold()

            async def call() -> None:
                try:
                    await _CALLS[name](file, memory)
                except (asyncio.CancelledError, OSError):
                    pass
                await turns(1)
                memory.append(0)

            task = asyncio.create_task(call())
            await turns()
            task.cancel()
            await turns()
            gate.release()
            await task
        await file.close()

    run(main())

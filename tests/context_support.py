"""What the tests of `IOContext` share: contexts of every kind, pipes, threads, programs."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rawaio
from rawaio import syscalls
from rawaio.polling import HandlerPolling
from rawaio.ring import Ordering, libatomic_fence
from tests.support import ROOT

LIMIT_S = 20.0  # what takes longer hangs
KINDS = ("ring", "fence", "counted", "io_getevents")


def new_context(kind: str = "ring", **limits: Any) -> rawaio.IOContext:
    """A context that reaps in one of the ways: as here, as on aarch64, or by system call."""
    if kind in ("ring", "io_getevents"):
        return rawaio.IOContext(force_syscalls=kind == "io_getevents", **limits)
    if kind == "fence":
        fence = libatomic_fence()
        if fence is None:
            pytest.skip("no libatomic.so.1")
        chosen: tuple[Ordering, Callable[[], object] | None] = Ordering.FENCE, fence
    else:
        chosen = Ordering.COUNTED, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rawaio.ring.choose_ordering", lambda *_, **__: chosen)
        return rawaio.IOContext(**limits)


class Pipe:
    """A pipe; a poll of its reading end completes when `fire` is called."""

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe()

    def poll(self, callback: Callable[[rawaio.Completion], object] | None = None) -> rawaio.Request:
        request = rawaio.Request.poll(self.readable, select.POLLIN)
        request.callback = callback
        return request

    def fire(self) -> None:
        os.write(self.writable, b"x")

    def quench(self) -> None:
        """Take the byte of a `fire` out again."""
        os.read(self.readable, 1)

    def close(self) -> None:
        for fd in (self.readable, self.writable):
            os.close(fd)


class ConstantRule:
    """A rule that learns nothing."""

    def __init__(self, poll_ns: int) -> None:
        self.poll_ns = poll_ns

    def add(self) -> HandlerPolling:
        return HandlerPolling()

    def remove(self, handler: HandlerPolling) -> None:
        raise AssertionError(handler)

    def adjust(self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int) -> None:
        """Nothing."""


class Threads:
    """Threads that are joined within a limit, and whose exceptions come out of `join`."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._raised: list[BaseException] = []

    def start(self, function: Callable[..., object], *arguments: Any) -> threading.Thread:
        def run() -> None:
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001 - `join` raises it again
                self._raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        hung: list[threading.Thread] = []
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                hung.append(thread)
        self._threads.clear()
        for error in self._raised:
            raise error
        assert not hung, f"{len(hung)} threads hang"


def together(threads: Threads, *functions: Callable[[], object]) -> None:
    """Run the functions, each in a thread of its own, let go at the same time."""
    barrier = threading.Barrier(len(functions), timeout=LIMIT_S)

    def run(function: Callable[[], object]) -> None:
        barrier.wait()
        function()

    for function in functions:
        threads.start(run, function)
    threads.join()


def readable(ctx: rawaio.IOContext) -> bool:
    """Whether an event loop would be told to look."""
    return bool(select.select([ctx], [], [], 0)[0])


def wait_readable(ctx: rawaio.IOContext) -> None:
    """Wait as an event loop does."""
    assert select.select([ctx], [], [], LIMIT_S)[0], "nothing completes"


def sleeper(ctx: rawaio.IOContext, wait: Callable[..., object] | None = None) -> threading.Event:
    """An event that is set when some thread is about to sleep in ctx.

    wait: called in that thread then, before it sleeps.
    """
    asleep = threading.Event()
    sleep = ctx._sleep

    def observed(timeout: float | None) -> None:
        asleep.set()
        if wait is not None:
            wait()
        sleep(timeout)

    ctx._sleep = observed  # type: ignore[method-assign]
    return asleep


@contextmanager
def unraisable() -> Generator[list[tuple[BaseException, str]]]:
    """What goes to sys.unraisablehook: the exception, and whose it is said to be, in which words.

    No fixture, for pytest before 8.4 sets a hook of its own between the fixtures and the test.
    """
    seen: list[tuple[BaseException, str]] = []

    def hook(what: sys.UnraisableHookArgs) -> None:
        assert what.exc_value is not None
        assert what.exc_type is type(what.exc_value)
        # Since CPython 3.14 the words tell, before it the object.
        seen.append((what.exc_value, f"{what.err_msg}: {what.object!r}"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", hook)
        yield seen


def waits_in_io_submit(thread: threading.Thread) -> bool:
    """Whether a thread that submits sleeps in io_submit, or has come back from it.

    For a thread that does nothing else, and when what it submitted is known to have begun.
    """
    number = str(syscalls.numbers().io_submit)
    path = Path(f"/proc/self/task/{thread.native_id}/syscall")
    while thread.is_alive():
        try:
            told = path.read_text().split()[0]  # "running", or of a thread that sleeps: in what
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:
            pytest.skip(f"{path} may not be read")
        if told == number:
            return True
    return False


def results(completions: Sequence[rawaio.Completion]) -> list[int]:
    return [completion.res for completion in completions]


def requests(completions: Sequence[rawaio.Completion]) -> list[rawaio.Request]:
    return [completion.request for completion in completions]


def aio_mappings() -> int:
    """How many rings are mapped into this process."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        return sum("/[aio]" in line for line in maps)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def run_program(
    source: str, *flags: str, command: Sequence[str] = (), check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a program from source in an interpreter of its own.

    check: it has to end with status 0 and say nothing on stderr.
    """
    done = subprocess.run(
        [*command, sys.executable, *flags, "-c", source],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * LIMIT_S,
    )
    if check:
        assert (done.returncode, done.stderr) == (0, "")
    return done

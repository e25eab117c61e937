"""IOContext in a forked child: dead there, and nothing of the parent's is touched."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable

import pytest

import rawaio
from rawaio import Request
from tests.context_support import (
    LIMIT_S,
    Pipe,
    aio_mappings,
    new_context,
    requests,
    results,
    run_program,
    sleeper,
)

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]


def _in_child(function: Callable[[], object]) -> None:
    """Call function in a forked child, which then is gone without any clean-up."""
    with warnings.catch_warnings():
        # Where an earlier test left a thread: the child only does what is safe then.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - a test that fails says so by its status
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "see stderr"


def _write(fd: int) -> Request:
    return Request.pwrite(fd, b"x", 0)


def _head(ctx: rawaio.IOContext) -> int:
    return ctypes.c_uint32.from_address(ctx._kernel.ctx_id + 8).value


@pytest.fixture
def busy(make: _Make, null: int, pipe: Pipe) -> rawaio.IOContext:
    """A context with a completion that nobody has reaped, and a poll and a write under way."""
    ctx = make(nr_events=2)
    ctx.submit(_write(null), pipe.poll(), _write(null))
    return ctx


def _still_whole(ctx: rawaio.IOContext, pipe: Pipe, head: int) -> None:
    assert _head(ctx) == head
    os.fstat(ctx.fileno())
    assert ctx.statistics().in_flight == 2
    ctx._queue._check()
    pipe.fire()
    assert sorted(c.result() for c in ctx.reap(min_nr=3)) == [1, 1, 1]


def test_every_method_but_close_says_so(busy: rawaio.IOContext, null: int, pipe: Pipe) -> None:
    ctx = busy
    request = _write(null)
    calls: list[Callable[[], object]] = [
        lambda: ctx.submit(request),
        ctx.submit,
        ctx.reap,
        lambda: ctx.reap(min_nr=1),
        ctx.process_completions,
        ctx.drain,
        ctx.fileno,
        ctx.plugged,
        lambda: ctx.cancel(request),
        lambda: ctx.retry_in,
        ctx.statistics,
        ctx.__enter__,
    ]

    def child() -> None:
        for call in calls:
            with pytest.raises(rawaio.ForkedError, match="parent process"):
                call()
        assert request.state is rawaio.State.NEW
        assert "parent process" in repr(ctx)
        ctx.close()
        ctx.__exit__(None, None, None)
        os.fstat(ctx._kernel.eventfd)

    head = _head(ctx)
    _in_child(child)
    _still_whole(ctx, pipe, head)


def test_a_dropped_context_leaves_the_parents_alone(null: int, pipe: Pipe, kind: str) -> None:
    holder = [new_context(kind, nr_events=2)]
    holder[0].submit(_write(null), pipe.poll(), _write(null))

    def child() -> None:
        fd = holder[0]._kernel.eventfd
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            holder.clear()
            gc.collect()
        os.fstat(fd)

    head = _head(holder[0])
    _in_child(child)
    _still_whole(holder[0], pipe, head)
    holder[0].close()


def test_a_plugged_section_submits_nothing_in_the_child(ctx: rawaio.IOContext, null: int) -> None:
    def child() -> None:
        section.__exit__(None, None, None)
        with pytest.raises(rawaio.ForkedError):
            ctx.reap()
        assert ctx._queue.io_submit_calls == 0
        assert ctx._queue.in_queue == 1

    request = _write(null)
    section = ctx.plugged()
    with section:
        ctx.submit(request)
        _in_child(child)
        assert ctx.statistics().in_queue == 1
    assert requests(ctx.reap(min_nr=1)) == [request]


def test_a_plugged_section_dropped_in_the_child(ctx: rawaio.IOContext, null: int) -> None:
    sections = [ctx.plugged()]
    sections[0].__enter__()
    request = _write(null)
    ctx.submit(request)

    def child() -> None:
        sections.clear()
        gc.collect()
        assert ctx._queue.io_submit_calls == 0

    _in_child(child)
    sections.clear()
    assert requests(ctx.reap(min_nr=1)) == [request]


def test_a_callback_that_forks(ctx: rawaio.IOContext, null: int, pipe: Pipe) -> None:
    """The reap that is under way in the child ends there, and takes nothing of the parent's."""
    parent = os.getpid()
    pids: list[int] = []

    def fork(_: rawaio.Completion) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pids.append(os.fork())

    poll = pipe.poll()
    first = Request.pwrite(null, b"x", 0, callback=fork)
    ctx.submit(first, poll)

    def wait() -> None:
        if os.getpid() == parent:
            assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
            pipe.fire()

    sleeper(ctx, wait)
    try:
        reaped = ctx.reap(min_nr=2, timeout=LIMIT_S)
    except rawaio.ForkedError:
        os._exit(0 if os.getpid() != parent else 2)
    finally:
        if os.getpid() != parent:
            os._exit(1)
    assert requests(reaped) == [first, poll]


def test_a_new_context_works_in_the_child(
    busy: rawaio.IOContext, kind: str, null: int, pipe: Pipe, pipes: Callable[[int], list[Pipe]]
) -> None:
    def child() -> None:
        with new_context(kind) as own:
            poll = pipes(1)[0].poll()
            own.submit(_write(null), poll, _write(1 << 20))
            assert own.cancel(poll)
            assert sorted(results(own.drain())) == [-errno.ECANCELED, -errno.EBADF, 1]
            assert own.statistics().completed == 3

    head = _head(busy)
    _in_child(child)
    _still_whole(busy, pipe, head)


def test_a_grandchild(busy: rawaio.IOContext, kind: str, null: int, pipe: Pipe) -> None:
    def child() -> None:
        with new_context(kind) as own:
            own.submit(_write(null))
            _in_child(lambda: grandchild(own))
            assert results(own.reap(min_nr=1)) == [1]

    def grandchild(own: rawaio.IOContext) -> None:
        for ctx in (busy, own):
            with pytest.raises(rawaio.ForkedError):
                ctx.reap()
            ctx.close()

    head = _head(busy)
    _in_child(child)
    _still_whole(busy, pipe, head)


def test_a_context_closed_before_is_closed_in_the_child(ctx: rawaio.IOContext) -> None:
    ctx.close()

    def child() -> None:
        with pytest.raises(rawaio.ClosedError):
            ctx.reap()
        ctx.close()

    _in_child(child)


def test_the_parent_may_close_while_the_child_lives(make: _Make, null: int) -> None:
    ctx = make()
    ctx.submit(_write(null))
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(writable)
        os.read(readable, 1)  # until the parent has closed it
        try:
            ctx.submit()
        except rawaio.ForkedError:
            os._exit(0)
        os._exit(1)
    before = aio_mappings()
    ctx.close()
    assert aio_mappings() == before - 1
    os.close(writable)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(readable)


_LOCKED = """
import os, sys, threading, warnings
import rawaio
warnings.simplefilter("ignore", DeprecationWarning)

ctx = rawaio.IOContext()
section = ctx.plugged()
section.__enter__()
held, done = threading.Event(), threading.Event()

def hold():
    with ctx._queue.lock, ctx._queue.turn, ctx._closing:
        held.set()
        done.wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()
pid = os.fork()
if pid == 0:
    # No thread will ever let go of these locks.
    for call in (ctx.submit, ctx.reap, ctx.statistics, ctx.drain, ctx.fileno, ctx.plugged):
        try:
            call()
        except rawaio.ForkedError:
            continue
        os._exit(1)
    section.__exit__(None, None, None)
    ctx.close()
    repr(ctx)
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
done.set()
section.__exit__(None, None, None)
ctx.close()
sys.exit(status)
"""


def test_locks_that_other_threads_held_block_nobody_in_the_child() -> None:
    run_program(_LOCKED, "-W", "error")


_EXITS = """
import multiprocessing, os, sys, threading, warnings
import rawaio
from rawaio import Request

def child(how):
    with rawaio.IOContext() as own:
        own.submit(Request.pwrite(null, b"y", 0))
        assert len(own.reap(min_nr=1)) == 1
    if how == "sys.exit":
        sys.exit(0)

null = os.open("/dev/null", os.O_WRONLY)
readable, writable = os.pipe()
ctx = rawaio.IOContext()
ctx.submit(Request.poll(readable, 1), Request.pwrite(null, b"x", 0))
fd = ctx.fileno()

fork = multiprocessing.get_context("fork")
for how in ("return", "sys.exit"):
    process = fork.Process(target=child, args=(how,))
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode

pid = os.fork()
if pid == 0:
    sys.exit(0)  # through the interpreter's whole clean-up, finalizers and all
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

os.fstat(fd)
os.write(writable, b"x")
assert len(ctx.reap(min_nr=2)) == 2
ctx.close()
for fd in (readable, writable, null):
    os.close(fd)
"""


def test_however_a_child_ends_the_parent_goes_on() -> None:
    run_program(_EXITS, "-W", "error", "-X", "dev")

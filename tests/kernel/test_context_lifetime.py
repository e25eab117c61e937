"""IOContext: what it leaves behind, when it is closed, dropped, or the program ends first."""

from __future__ import annotations

import gc
import io
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import rawaio
from rawaio import Request
from rawaio.context import _forget, _live
from rawaio.kernel import Kernel
from tests.context_support import (
    LIMIT_S,
    Pipe,
    Threads,
    aio_mappings,
    descriptors,
    new_context,
    requests,
    results,
    run_program,
)

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]


def _write(fd: int) -> Request:
    return Request.pwrite(fd, b"x", 0)


# -- closed ----------------------------------------------------------------------------------------


def test_three_hundred_leave_nothing_behind(null: int, threads: Threads) -> None:
    rings, fds, live = aio_mappings(), descriptors(), len(_live)

    def open_and_close() -> None:
        for i in range(50):
            with rawaio.IOContext(nr_events=1, force_syscalls=i % 2 == 1) as ctx:
                if i % 10 == 0:
                    ctx.submit(_write(null))
                    assert rings < aio_mappings() <= rings + nr_threads

    nr_threads = 6  # which all wait for the kernel, and not for the processor
    for _ in range(nr_threads):
        threads.start(open_and_close)
    threads.join()
    assert aio_mappings() == rings
    assert descriptors() == fds
    assert len(_live) == live


def test_many_at_the_same_time(kind: str, null: int) -> None:
    rings, fds = aio_mappings(), descriptors()
    contexts = [new_context(kind, nr_events=1) for _ in range(5)]
    assert aio_mappings() == rings + 5
    for ctx in contexts:
        ctx.submit(_write(null))
    for ctx in contexts:
        assert len(ctx.reap(min_nr=1)) == 1
        ctx.close()
    assert aio_mappings() == rings
    assert descriptors() == fds


def test_a_closed_context_is_collected_without_a_word(kind: str, null: int) -> None:
    ctx = new_context(kind)
    ctx.submit(_write(null))
    ctx.close()
    kernel, gone = weakref.ref(ctx._kernel), weakref.ref(ctx)
    del ctx
    gc.collect()
    assert gone() is None
    assert kernel() is None


def test_a_close_that_fails_half_way_is_finished_by_the_next(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rings = aio_mappings()
    ctx = new_context(kind)
    kernel = type(ctx._kernel)
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "destroy", lambda _: _interrupt())
        with pytest.raises(KeyboardInterrupt):
            ctx.close()
    assert ctx.closed
    with pytest.raises(rawaio.ClosedError):
        ctx.reap()
    assert aio_mappings() == rings + 1
    ctx.close()
    assert aio_mappings() == rings
    ctx.close()


def _interrupt() -> None:
    raise KeyboardInterrupt


# -- in flight -------------------------------------------------------------------------------------


def test_what_was_dropped_in_flight_arrives(ctx: rawaio.IOContext, tmp_path: Path) -> None:
    """Request, buffer and file object: the table of what is in flight owns them."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8192))

    def submit() -> list[weakref.ref[object]]:
        file = path.open("rb")
        request = Request.pread(file, bytearray(8192), 0)
        ctx.submit(request)
        return [weakref.ref(file), weakref.ref(request)]

    references = submit()
    gc.collect()
    assert all(reference() is not None for reference in references)
    completion = ctx.reap(min_nr=1)[0]
    assert completion.result() == 8192
    assert completion.request.buffer == path.read_bytes()
    file = references[0]()
    assert isinstance(file, io.IOBase)
    file.close()
    del completion, file
    gc.collect()
    assert all(reference() is None for reference in references)


def test_a_descriptor_closed_in_flight(ctx: rawaio.IOContext, pipes: _Pipes, null: int) -> None:
    (first, second), other = pipes(2), os.dup(null)
    again = os.dup(second.readable)
    polls = [first.poll(), Request.poll(again, 1)]
    write = _write(other)
    ctx.submit(*polls, write)
    os.close(again)
    os.close(other)
    second.fire()
    first.fire()
    reaped = ctx.reap(min_nr=3)
    assert set(requests(reaped)) == {*polls, write}
    assert all(c.result() == 1 for c in reaped)


def test_a_descriptor_closed_while_pending_fails_with_ebadf(
    ctx: rawaio.IOContext, null: int
) -> None:
    other = os.dup(null)
    with ctx.plugged():
        ctx.submit(_write(other))
        os.close(other)
    assert results(ctx.reap(min_nr=1)) == [-9]


def test_a_lent_bytearray_cannot_be_resized_until_it_is_given_back(
    ctx: rawaio.IOContext, pipe: Pipe, null: int
) -> None:
    lent = bytearray(10)
    request = Request.pwrite(null, lent, 0)
    lent.append(0)  # not lent yet
    ctx.submit(request)
    with pytest.raises(BufferError):
        lent.append(0)
    with ctx.plugged():
        ctx.reap(min_nr=1)
        lent.append(0)
        request.buffer = lent
        ctx.submit(request)
        with pytest.raises(BufferError):
            lent.clear()
        assert ctx.cancel(request)
        with pytest.raises(BufferError):
            lent.clear()
        ctx.reap(min_nr=1)
    lent.clear()


def test_a_lent_bytearray_is_given_back_before_its_callback(
    ctx: rawaio.IOContext, null: int
) -> None:
    lent = bytearray(10)
    ctx.submit(Request.pwrite(null, lent, 0, callback=lambda _: lent.clear()))
    ctx.reap(min_nr=1)
    assert lent == b""


def test_a_lent_bytearray_is_given_back_by_close(kind: str, null: int) -> None:
    lent = bytearray(10)
    with new_context(kind) as ctx:
        ctx.submit(Request.pwrite(null, lent, 0))
    lent.clear()


# -- dropped ---------------------------------------------------------------------------------------


def test_a_dropped_context_says_so_and_is_destroyed(kind: str, null: int, pipe: Pipe) -> None:
    rings, fds, live = aio_mappings(), descriptors(), len(_live)
    holder = [new_context(kind)]
    holder[0].submit(_write(null), pipe.poll())
    expected = "unclosed rawaio.IOContext, [12] requests in flight"
    with pytest.warns(ResourceWarning, match=expected):
        holder.clear()  # with the last reference, and not when the collector comes round
    assert aio_mappings() == rings
    assert descriptors() == fds
    assert len(_live) == live


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_plugged_section_that_outlives_its_context_submits_nothing(null: int) -> None:
    """The context's id may be another context's by then."""
    ctx = rawaio.IOContext()
    section, queue = ctx.plugged(), ctx._queue
    section.__enter__()
    ctx.submit(_write(null))
    del ctx
    with rawaio.IOContext() as other:
        section.__exit__(None, None, None)
        assert queue.io_submit_calls == 0
        assert other.reap() == []


_READS = """
import gc, os, sys, warnings
import rawaio
from rawaio import Request, aligned_buffer

path, end = sys.argv[1:3]
n, size = 64, 1 << 16
data = os.urandom(size)
with open(path, "wb") as file:
    for _ in range(n):
        file.write(data)
    file.flush()
    os.fsync(file.fileno())
try:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    os.preadv(fd, [aligned_buffer(4096)], 0)
except OSError:
    fd = os.open(path, os.O_RDONLY)

def rings():
    with open("/proc/self/maps") as maps:
        return sum("/[aio]" in line for line in maps)

class Context(rawaio.IOContext):
    "Something that refers to itself, as the callbacks' closures of a program do."

def begin():
    ctx = Context(nr_events=n)
    ctx.itself = ctx
    ctx.submit(*[Request.pread(fd, aligned_buffer(size), i * size) for i in range(n)])
    assert rings() == 1
    return ctx
"""

_DROPS = (
    _READS
    + """
for _ in range(3):
    begin()
    gc.collect()
    assert rings() == 0, "io_destroy was not called"
    # What the kernel would write into now, if it were not done.
    fresh = [bytearray(size) for _ in range(n)]
    assert not any(map(any, fresh))
os.close(fd)
"""
)


@pytest.mark.parametrize("filters", ["error", "ignore", "always"])
def test_the_kernel_is_done_before_dropped_memory_is_freed(tmp_path: Path, filters: str) -> None:
    """Whatever becomes of the warning."""
    flags = ("-X", "dev", "-W", f"{filters}::ResourceWarning")
    source = f"import sys; sys.argv[1:] = [{str(tmp_path / 'file')!r}, '']\n{_DROPS}"
    done = run_program(source, *flags, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("unclosed rawaio.IOContext") == (0 if filters == "ignore" else 3)
    assert "Assertion" not in done.stderr


@pytest.mark.parametrize(
    "end",
    [
        "",
        "sys.exit(0)",
        "ctx.close()",
        "del ctx",
        "os._exit(0)",
        "gc.disable(); ctx.submit(*[Request.poll(os.pipe()[0], 1) for _ in range(3)])",
        "import atexit; atexit.register(ctx.close)",
        "import atexit; atexit.register(ctx.reap, 64)",
        "sys.modules['kept'] = ctx; sys.modules['rawaio.context'].kept = ctx",
    ],
)
def test_a_program_ends_with_requests_in_flight(tmp_path: Path, end: str) -> None:
    source = f"import sys; sys.argv[1:] = [{str(tmp_path / 'file')!r}, '']\n{_READS}"
    done = run_program(f"{source}\nctx = begin()\n{end}\n", "-X", "dev", check=False)
    said = [line for line in done.stderr.splitlines() if "ResourceWarning" not in line]
    said = [line for line in said if not line.startswith("  ")]  # the line that warns
    assert (done.returncode, said) == (0, [])


@pytest.mark.parametrize("filters", ["error", "default"])
def test_a_program_that_fails_with_requests_in_flight(tmp_path: Path, filters: str) -> None:
    source = f"import sys; sys.argv[1:] = [{str(tmp_path / 'file')!r}, '']\n{_READS}"
    done = run_program(f"{source}\nctx = begin()\n1 / 0\n", "-W", filters, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


_GOES_ON = """
import atexit, threading
threads, refused = [], []

@atexit.register  # before the first context, and so run behind what gives the last one back
def finish():
    for thread in threads:
        thread.join(LIMIT_S)
    print(len(refused))

import rawaio
from tests.context_support import LIMIT_S, new_context
ctx, going = new_context(sys.argv[1]), threading.Event()

def look():
    try:
        while True:
            eval(sys.argv[2])
            going.set()
    except rawaio.ClosedError:
        refused.append(True)

for _ in range(2):
    threads.append(threading.Thread(target=look, daemon=True))
    threads[-1].start()
assert going.wait(LIMIT_S)
"""


@pytest.mark.parametrize("look", ["ctx.reap()", "ctx.process_completions()", "ctx.drain()"])
def test_daemon_threads_look_on_while_the_program_ends(kind: str, look: str) -> None:
    """The ring is unmapped then."""
    done = run_program(f"import sys; sys.argv[1:] = {[kind, look]!r}\n{_GOES_ON}")
    assert done.stdout == "2\n"


def test_the_last_resort_closes_the_eventfd_when_nobody_is_reading_it(
    kind: str, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = new_context(kind)
    reading, closed = threading.Event(), threading.Event()
    read, close, destroy = os.eventfd_read, os.close, Kernel.destroy

    def slow_read(fd: int) -> int:
        reading.set()
        closed.wait(0.2)  # whoever closes it may have to wait for this read
        return read(fd)

    def observed_close(fd: int) -> None:
        close(fd)
        closed.set()

    def destroy_beside_reset(kernel: Kernel) -> None:
        destroy(kernel)
        threads.start(kernel.reset)
        assert reading.wait(LIMIT_S)

    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd_read", slow_read)
        patch.setattr(os, "close", observed_close)
        patch.setattr(Kernel, "destroy", destroy_beside_reset)
        with pytest.warns(ResourceWarning):
            ctx._finalizer()
        threads.join()
    assert closed.is_set()


def test_close_behind_the_last_resort_does_nothing(kind: str) -> None:
    """An exit handler that is older than the context runs behind what gives it back."""
    source = f"""
import atexit
held = []
atexit.register(lambda: held[0].close())
from tests.context_support import new_context
held.append(new_context({kind!r}))
"""
    run_program(source)


def test_a_context_in_the_place_of_an_old_one_is_not_forgotten_with_it() -> None:
    """The collector tells of the old one late: its id is another's by then."""
    with rawaio.IOContext(1) as ctx:
        old = weakref.ref(threading.Event())
        _forget(id(ctx), old)
        child = os.fork()
        if child == 0:
            try:
                ctx.submit()
            except rawaio.ForkedError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

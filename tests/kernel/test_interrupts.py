"""KeyboardInterrupt at every line, and wherever the interpreter delivers it, in submit and reap.

Each history is run again and again, struck once at the first place, then at the second, and so on
until it runs through. After each strike the context must still be whole: what was taken completes
exactly once, with its callback run once, and what was not taken can be submitted.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import rawaio

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import FrameType

_PACKAGE = str(Path(rawaio.__file__).parent)


@dataclass
class World:
    """A context, requests, and what has been seen of them.

    What is seen is recorded by C functions, so that no strike comes between a completion's being
    handed over and its being recorded.
    """

    ctx: rawaio.IOContext
    null: int
    ready: int
    gate: tuple[int, int]
    earlier: int = 0
    requests: list[rawaio.Request] = field(default_factory=list[rawaio.Request])
    reaped: list[rawaio.Completion] = field(default_factory=list[rawaio.Completion])
    called: list[rawaio.Completion] = field(default_factory=list[rawaio.Completion])
    struck_in: str | None = None
    #: How often one request is submitted.
    most: int = 2

    def begin(self) -> None:
        """Forget the requests, not the context."""
        self.earlier += len(self.reaped)
        self.requests.clear()
        self.reaped.clear()
        self.called.clear()
        self.struck_in = None
        self.most = 2
        os.read(self.gate[0], 1 << 16)

    def new(
        self,
        *,
        fd: int | None = None,
        callback: bool = False,
        again: bool = False,
        fixed: bool = False,
    ) -> rawaio.Request:
        data = b"x" if fixed else bytearray(b"x")
        request = rawaio.Request.pwrite(self.null if fd is None else fd, data, 0)
        if callback:
            request.callback = self.resubmit if again else self.called.append
        self.requests.append(request)
        return request

    def poll(self, *, late: bool = False) -> rawaio.Request:
        """Of what is ready; late: it completes when the gate is opened."""
        self.requests.append(rawaio.Request.poll(self.gate[0] if late else self.ready, 1))
        return self.requests[-1]

    def open_gate(self) -> None:
        os.write(self.gate[1], b"x")

    def resubmit(self, completion: rawaio.Completion) -> None:
        self.called.append(completion)
        if len(self.called) == 1:
            self.ctx.submit(completion.request)

    def count(self, completions: list[rawaio.Completion]) -> Counter[rawaio.Request]:
        return Counter([completion.request for completion in completions])

    def run(self, history: Callable[[World], None]) -> None:
        try:
            history(self)
        except KeyboardInterrupt as error:
            traceback = error.__traceback__
            while traceback is not None:
                self.struck_in = traceback.tb_frame.f_code.co_qualname
                traceback = traceback.tb_next


def _batch(world: World) -> None:
    world.ctx.submit(*[world.new() for _ in range(3)])
    world.reaped.extend(world.ctx.reap(min_nr=3))


def _batch_again(world: World) -> None:
    requests = [world.new(fixed=True) for _ in range(3)]
    for _ in range(2):
        world.ctx.submit(*requests)
        world.reaped.extend(world.ctx.reap(min_nr=3))


def _batches_of_other_sizes(world: World) -> None:
    requests = [world.poll(), world.new(fixed=True), world.poll(), world.new(fixed=True)]
    world.most = 5
    for n in (4, 4, 1, 4, 2):
        world.ctx.submit(*requests[:n])
        world.reaped.extend(world.ctx.reap(min_nr=n))


def _batch_in_pieces(world: World) -> None:
    world.ctx.submit(*[world.new(fixed=True) for _ in range(4)])
    world.reaped.extend(world.ctx.reap(min_nr=2, max_nr=2))
    world.reaped.extend(world.ctx.reap(min_nr=2))


def _batch_out_of_order(world: World) -> None:
    world.ctx.submit(world.poll(late=True), world.new(), world.new())
    world.reaped.extend(world.ctx.reap(min_nr=2))
    world.open_gate()
    world.reaped.extend(world.ctx.reap(min_nr=1))


def _batch_beside_another(world: World) -> None:
    world.ctx.submit(world.new(fixed=True), world.poll(late=True))
    world.ctx.submit(world.new(fixed=True), world.new(fixed=True))
    world.reaped.extend(world.ctx.reap(min_nr=3))
    world.open_gate()
    world.reaped.extend(world.ctx.reap(min_nr=1))


def _again(world: World) -> None:
    request = world.new()
    world.ctx.submit(request)
    world.reaped.extend(world.ctx.reap(min_nr=1))
    world.ctx.submit(request)
    world.reaped.extend(world.ctx.reap(min_nr=1))


def _refused(world: World) -> None:
    world.ctx.submit(world.new(), world.new(fd=1 << 20), world.new())
    world.reaped.extend(world.ctx.reap(min_nr=3))


def _no_room(world: World) -> None:
    world.ctx.submit(*[world.new() for _ in range(5)])
    world.reaped.extend(world.ctx.reap(min_nr=5))


def _plugged(world: World) -> None:
    with world.ctx.plugged():
        world.ctx.submit(world.new())
        with world.ctx.plugged():
            world.ctx.submit(world.new(), world.poll())
    world.reaped.extend(world.ctx.reap(min_nr=3))


def _callbacks(world: World) -> None:
    world.ctx.submit(world.new(), world.new(callback=True), world.new(), world.new(callback=True))
    world.reaped.extend(world.ctx.reap(min_nr=4))


def _callbacks_submit(world: World) -> None:
    world.ctx.submit(world.new(callback=True, again=True), world.new())
    world.reaped.extend(world.ctx.reap(min_nr=3))


def _one_by_one(world: World) -> None:
    world.ctx.submit(*[world.new(callback=i == 1) for i in range(3)])
    for _ in range(3):
        world.reaped.extend(world.ctx.reap(min_nr=1, max_nr=1))


def _waits(world: World) -> None:
    request = world.poll()
    world.ctx.submit(request)
    world.reaped.extend(world.ctx.reap(min_nr=2, timeout=5))
    world.reaped.extend(world.ctx.reap(min_nr=1, timeout=0.001))


def _waits_for_one(world: World) -> None:
    """What it waits for completes when it begins to sleep."""
    world.ctx.submit(world.poll(late=True))
    sleep = world.ctx._sleep

    def opened(timeout: float | None) -> None:
        world.open_gate()
        sleep(timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.ctx, "_sleep", opened)
        world.reaped.extend(world.ctx.reap(min_nr=1))


def _cancels(world: World) -> None:
    with world.ctx.plugged():
        request = world.new()
        world.ctx.submit(request, world.new())
        world.ctx.cancel(request)
    world.reaped.extend(world.ctx.drain())


HISTORIES = [
    _batch,
    _batch_again,
    _batches_of_other_sizes,
    _batch_in_pieces,
    _batch_out_of_order,
    _batch_beside_another,
    _again,
    _refused,
    _no_room,
    _plugged,
    _callbacks,
    _callbacks_submit,
    _one_by_one,
    _waits,
    _waits_for_one,
    _cancels,
]


@pytest.fixture(params=[False, True], ids=["ring", "io_getevents"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    null = os.open("/dev/null", os.O_WRONLY)
    readable, writable = os.pipe()
    os.write(writable, b"x")
    gate = os.pipe2(os.O_NONBLOCK)
    os.write(gate[1], b"x")
    try:
        with rawaio.IOContext(nr_events=4, max_batch=2, force_syscalls=request.param) as ctx:
            yield World(ctx, null, readable, gate)
    finally:
        for fd in (null, readable, writable, *gate):
            os.close(fd)


def _verify(world: World) -> None:
    """The context is whole: everything is given back once, and it goes on working."""
    ctx = world.ctx
    world.open_gate()
    world.reaped.extend(ctx.drain(timeout=10))
    ctx._queue._check()
    assert ctx._queue.plugged == 0
    seen, called = world.count(world.reaped), world.count(world.called)
    for request in world.requests:
        if request.callback is not None:
            # A callback that is struck before its first instruction has begun all the same.
            missed = world.struck_in == World.resubmit.__qualname__
            assert seen[request] - missed <= called[request] <= seen[request], request
        assert seen[request] <= world.most, request
        if request.state is rawaio.State.NEW:
            assert seen[request] == 0
        else:
            assert request.state is rawaio.State.COMPLETED
            assert seen[request] >= 1
    for request in world.requests:
        request.callback = None
    before = len(world.reaped)
    ctx.submit(*world.requests)
    world.reaped.extend(ctx.drain(timeout=10))
    assert len(world.reaped) == before + len(world.requests)
    statistics = ctx.statistics()
    assert statistics.submitted == statistics.completed == len(world.reaped) + world.earlier
    assert (statistics.in_queue, statistics.in_flight) == (0, 0)


class Striker:
    """Raises KeyboardInterrupt at the n-th traced event of frames of the package."""

    def __init__(self, n: int, *, opcodes: bool = False) -> None:
        self.left = n
        self.opcodes = opcodes
        self.struck: str | None = None

    def __call__(self, frame: FrameType, event: str, arg: object) -> Striker | None:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        frame.f_trace_opcodes = self.opcodes
        frame.f_trace_lines = not self.opcodes
        if event == ("opcode" if self.opcodes else "line"):
            self.left -= 1
            if self.left == 0:
                self.struck = f"{frame.f_code.co_qualname}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


@contextmanager
def _drops() -> Generator[None]:
    """What strikes in a `__del__` the interpreter itself reports and drops, whoever wrote it.

    No fixture, for pytest before 8.4 sets a hook of its own between the fixtures and the test.
    """
    hook = sys.unraisablehook

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt):
            hook(unraisable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", report)
        yield


@pytest.mark.parametrize("history", HISTORIES)
@_drops()
def test_every_line(history: Callable[[World], None], world: World) -> None:
    n = 0
    previous = sys.gettrace()  # that of a coverage measurement
    while True:
        n += 1
        world.begin()
        striker = Striker(n)
        sys.settrace(striker)
        try:
            world.run(history)
        finally:
            sys.settrace(previous)
        try:
            _verify(world)
        except BaseException as error:
            error.add_note(f"struck at event {n}, {striker.struck}")
            raise
        if striker.struck is None:
            break
    assert n > 20


_TRIPPER = """
/* At the n-th traced instruction of the package, what the C signal handler does. */
extern void PyErr_SetInterrupt(void);
extern int PyObject_SetAttrString(void *, const char *, void *);
extern void *PyObject_GetAttrString(void *, const char *);
extern const char *PyUnicode_AsUTF8(void *);
extern void Py_DecRef(void *);
extern char _Py_TrueStruct;
extern int strncmp(const char *, const char *, unsigned long);
extern unsigned long strlen(const char *);

long left;
const char *package;

int trace(void *self, void *frame, int what, void *arg) {
    if (what == 0) { /* PyTrace_CALL */
        void *code = PyObject_GetAttrString(frame, "f_code");
        void *name = PyObject_GetAttrString(code, "co_filename");
        if (!strncmp(PyUnicode_AsUTF8(name), package, strlen(package)))
            PyObject_SetAttrString(frame, "f_trace_opcodes", &_Py_TrueStruct);
        Py_DecRef(name);
        Py_DecRef(code);
    } else if (what == 7) { /* PyTrace_OPCODE */
        if (--left == 0)
            PyErr_SetInterrupt();
    }
    return 0;
}
"""


@pytest.fixture(scope="session")
def tripper(tmp_path_factory: pytest.TempPathFactory) -> ctypes.PyDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("tripper")
    source, library = folder / "tripper.c", folder / "tripper.so"
    source.write_text(_TRIPPER)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    try:
        return ctypes.PyDLL(str(library))
    except OSError as error:
        pytest.skip(f"this interpreter does not load the tracer: {error}")


def _ask_for_instructions() -> None:
    """CPython 3.12 has events of instructions only once some frame has asked for them."""
    sys._getframe().f_trace_opcodes = True


@pytest.mark.parametrize("history", HISTORIES)
@_drops()
def test_wherever_the_interpreter_delivers_it(
    history: Callable[[World], None], world: World, tripper: ctypes.PyDLL
) -> None:
    """SIGINT pending from every instruction on; the interpreter raises at the next it allows."""
    left = ctypes.c_long.in_dll(tripper, "left")
    package = ctypes.c_char_p(_PACKAGE.encode())
    ctypes.c_void_p.in_dll(tripper, "package").value = ctypes.cast(package, ctypes.c_void_p).value
    set_trace = ctypes.pythonapi.PyEval_SetTrace
    _ask_for_instructions()
    previous = sys.gettrace()
    struck, n = 0, 0
    while True:
        n += 1
        world.begin()
        left.value = n
        try:
            set_trace(tripper.trace, None)
            world.run(history)
        finally:
            set_trace(None, None)
            sys.settrace(previous)
        struck += world.struck_in is not None
        try:
            _verify(world)
        except BaseException as error:
            error.add_note(f"pending from instruction {n} on, struck in {world.struck_in}")
            raise
        if left.value > 0:
            break
    assert struck > 20

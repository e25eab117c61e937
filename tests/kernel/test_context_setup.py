"""IOContext where it cannot be made: what the error says, and that nothing is left behind."""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path

import pytest

import rawaio
from rawaio import syscalls
from tests import seccomp
from tests.context_support import aio_mappings, descriptors, run_program


@pytest.fixture
def leaves_nothing() -> object:
    rings, fds = aio_mappings(), descriptors()
    yield
    assert aio_mappings() == rings
    assert descriptors() == fds


def _number(name: str) -> int:
    return int(Path(f"/proc/sys/fs/{name}").read_text(encoding="ascii"))


@pytest.mark.usefixtures("leaves_nothing")
def test_too_many_events_are_eagain_with_advice() -> None:
    limit = _number("aio-max-nr")
    with pytest.raises(BlockingIOError, match="io_setup") as caught:
        rawaio.IOContext(limit + 1)
    assert caught.value.errno == errno.EAGAIN
    advice = "\n".join(caught.value.__notes__)
    assert f"nr_events={limit + 1}" in advice
    assert "fs.aio-nr=" in advice
    assert f"fs.aio-max-nr={limit}" in advice
    assert "sysctl -w fs.aio-max-nr=" in advice
    assert int(advice.rpartition("=")[2]) >= 2 * (limit + 1)  # others may have some, too
    rawaio.IOContext(1).close()


@pytest.mark.usefixtures("leaves_nothing")
def test_the_advice_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = _number("aio-max-nr")

    def refuse(*_: object, **__: object) -> object:
        raise OSError(errno.ENOENT, "no /proc")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        with pytest.raises(BlockingIOError) as caught:
            rawaio.IOContext(limit + 1)
    advice = "\n".join(caught.value.__notes__)
    assert f"nr_events={limit + 1}" in advice
    assert "sysctl -w fs.aio-max-nr=" in advice


@pytest.mark.usefixtures("leaves_nothing")
def test_far_too_many_events_are_einval() -> None:
    with pytest.raises(OSError, match="io_setup|nr_events") as caught:
        rawaio.IOContext((1 << 32) - 1)
    assert caught.value.errno in (errno.EINVAL, errno.EAGAIN)
    assert "nr_events=4294967295" in "\n".join(caught.value.__notes__)


@pytest.mark.usefixtures("leaves_nothing")
def test_what_io_setup_says_otherwise_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real = syscalls.numbers()
    monkeypatch.setattr(syscalls, "numbers", lambda: real._replace(io_setup=real.io_destroy))
    with pytest.raises(OSError, match="io_setup") as caught:
        rawaio.IOContext()
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EINVAL, errno.EFAULT])
def test_only_what_there_is_advice_for_gets_some(code: int) -> None:
    from rawaio.kernel import advice as _advice

    assert bool(_advice(code, 1)) is (code == errno.EINVAL)


@pytest.mark.usefixtures("leaves_nothing")
def test_no_descriptor_left(null: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in descriptors())
    filler = [os.dup(null) for _ in range(highest)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as caught:
            rawaio.IOContext()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filler:
            os.close(fd)
    assert caught.value.errno == errno.EMFILE
    rawaio.IOContext().close()


def _fail(*_: object, **__: object) -> object:
    raise MemoryError


@pytest.mark.parametrize(
    "part",
    [
        "context.IocbSlab",
        "context.SubmissionQueue",
        "reaping.SyscallEvents",
        "reaping.CompletionRing",
    ],
)
@pytest.mark.usefixtures("leaves_nothing")
def test_whatever_fails_after_io_setup_gives_it_back(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(f"rawaio.{part}", _fail)
    with pytest.warns(ResourceWarning, match="unclosed"), pytest.raises(MemoryError):
        rawaio.IOContext()


def test_another_machine_is_refused_before_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> object:
        raise rawaio.UnsupportedError("this machine is not in the table")

    monkeypatch.setattr(syscalls, "numbers", refuse)
    fds = descriptors()
    with pytest.raises(rawaio.UnsupportedError):
        rawaio.IOContext()
    assert descriptors() == fds


_DENIED = """
import os, sys
import rawaio
before = os.listdir("/proc/self/fd")
try:
    rawaio.IOContext()
except OSError as error:
    print(error.errno)
    print(*error.__notes__)
assert os.listdir("/proc/self/fd") == before
"""


@pytest.mark.parametrize(
    ("code", "says"), [("ENOSYS", "no Linux AIO"), ("EPERM", "seccomp"), ("ENOMEM", "")]
)
def test_a_kernel_or_a_sandbox_without_aio(code: str, says: str) -> None:
    if why_not := seccomp.why_not():
        pytest.skip(why_not)
    command = seccomp.command(["io_setup"], code)
    source = _DENIED.replace("error.__notes__", "getattr(error, '__notes__', ())")
    done = run_program(source, "-W", "error", command=command)
    number, _, advice = done.stdout.partition("\n")
    assert int(number) == getattr(errno, code)
    assert says in advice
    assert sys.platform == "linux"


def test_the_ring_works_where_io_getevents_is_denied() -> None:
    if why_not := seccomp.why_not():
        pytest.skip(why_not)
    source = """
import os, rawaio
null = os.open("/dev/null", os.O_WRONLY)
with rawaio.IOContext() as ctx:
    ctx.submit(*[rawaio.Request.pwrite(null, b"x", 0) for _ in range(1000)])
    assert len(ctx.reap(min_nr=1000)) == 1000
    print(ctx.statistics().mechanism)
ctx = rawaio.IOContext(force_syscalls=True)
ctx.submit(rawaio.Request.pwrite(null, b"x", 0))
try:
    ctx.reap(min_nr=1)
except PermissionError:
    print("denied", flush=True)
os._exit(0)  # to close it, one would have to reap
"""
    with rawaio.IOContext() as ctx:
        if ctx.statistics().mechanism != "ring":
            pytest.skip(f"the ring is not used here: {ctx.why_not_ring}")
    done = run_program(source, command=seccomp.command(["io_getevents"], "EPERM"))
    assert done.stdout == "ring\ndenied\n"

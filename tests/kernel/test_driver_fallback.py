"""Files where io_setup is denied, by a real filter, or where the system has no more to give."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Literal

import pytest

import rawaio
from rawaio.loops.asyncio import AsyncioDriver
from tests import seccomp
from tests.context_support import run_program
from tests.driver_support import run, skip_unless_direct

_PROGRAM = """
import asyncio, errno, sys, warnings
import rawaio

path, engine = {path!r}, {engine!r}
rest = bytes(range(256)) * 16

async def use(direct):
    async with rawaio.open(path, "r+", direct=direct, engine=engine) as f:
        print(f.engine)
        assert await f.pread(4096, 0) == rest, direct
        assert await f.pwrite(b"xyz", 5) == 3
        assert await f.pread(10, 0) == rest[:5] + b"xyz" + rest[8:10]
        assert await f.pwrite(rest[5:8], 5) == 3
        view = rawaio.aligned_buffer(8192)
        assert await f.preadinto(view, 0) == 4096
        assert await f.append(b"abc") == 4096
        await f.fsync()
        await f.fdatasync()
        await f.truncate(4096)
        await f.allocate(0, 4096)
        assert [c async for c in f.stream(chunk_size=1000)] == [
            rest[i:i + 1000] for i in range(0, 4096, 1000)
        ]
        many = await asyncio.gather(*[f.pread(100, i) for i in range(500)])
        assert many == [rest[i:i + 100] for i in range(500)]
        task = asyncio.create_task(f.preadinto(view, 0))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

for _ in range(3):
    for direct in (True, False):
        asyncio.run(use(direct))
print("done")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    why_not = seccomp.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def _command(answer: str) -> list[str]:
    return seccomp.command(["io_setup"], answer)


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_auto(path: Path, answer: str) -> None:
    """Threads, one warning for the whole process, and everything works."""
    source = _PROGRAM.format(path=str(path), engine="auto")
    done = run_program(source, command=_command(answer), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["threads"] * 6 + ["done"]
    said = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert len(said) == 1, done.stderr
    assert "RuntimeWarning: no native AIO here, threads are used instead" in said[0]
    assert {"EPERM": "seccomp", "ENOSYS": "CONFIG_AIO"}[answer] in said[0]
    assert said[0].startswith("<string>:"), "the caller's line"


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_auto_with_the_warning_as_an_error(path: Path, answer: str) -> None:
    """It is raised once, and the next open works."""
    source = f"""
import asyncio, rawaio
async def main():
    try:
        await rawaio.open({str(path)!r})
    except RuntimeWarning as warning:
        print("warned")
    async with rawaio.open({str(path)!r}) as file:
        print(file.engine, len(await file.pread(10, 0)))
asyncio.run(main())
"""
    done = run_program(source, "-W", "error", command=_command(answer))
    assert done.stdout.split() == ["warned", "threads", "10"]


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_aio(path: Path, answer: str) -> None:
    """The kernel's error, with advice, each time; the other engines go on."""
    source = f"""
import asyncio, errno, warnings, rawaio
warnings.simplefilter("ignore", RuntimeWarning)
async def main():
    for _ in range(3):
        try:
            await rawaio.open({str(path)!r}, engine="aio")
        except OSError as error:
            print(errno.errorcode[error.errno], "io_setup" in str(error), len(error.__notes__))
    for engine in ("auto", "threads"):
        async with rawaio.open({str(path)!r}, engine=engine) as file:
            print(file.engine, len(await file.pread(10, 0)))
asyncio.run(main())
"""
    done = run_program(source, command=_command(answer))
    assert done.stdout.splitlines() == [f"{answer} True 1"] * 3 + ["threads 10"] * 2


def test_threads(path: Path) -> None:
    """io_setup is never called: it would kill."""
    source = _PROGRAM.format(path=str(path), engine="threads")
    done = run_program(source, command=_command("KILL_PROCESS"))
    assert done.stdout.split() == ["threads"] * 6 + ["done"]
    killed = run_program(
        _PROGRAM.format(path=str(path), engine="auto"),
        command=_command("KILL_PROCESS"),
        check=False,
    )
    assert killed.returncode < 0, "the filter does not kill"


@pytest.mark.parametrize("engine", ["auto", "aio"])
def test_no_more_events(tmp_path: Path, engine: Literal["auto", "aio"]) -> None:
    """EAGAIN is no reason for threads: it says what is short, and passes."""
    skip_unless_direct(tmp_path)
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    limit = int(Path("/proc/sys/fs/aio-max-nr").read_text())

    async def main() -> None:
        driver = AsyncioDriver(nr_events=limit + 1)
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                await rawaio.open(path, engine=engine)
            assert caught.value.errno == errno.EAGAIN
            assert "aio-max-nr" in " ".join(caught.value.__notes__)
        driver.nr_events = 32
        async with rawaio.open(path, engine=engine) as file:
            assert file.driver is driver
            assert file.engine == "aio"
            assert await file.pread(10, 0) == b"0123456789"

    run(main())


def test_the_filter_is_the_programs_own(path: Path) -> None:
    """What the other tests deny, this process has."""
    done = run_program(_PROGRAM.format(path=str(path), engine="aio"))
    assert done.stdout.split() == ["aio"] * 6 + ["done"]

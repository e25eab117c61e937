"""That the benchmarks' programs do their work on this kernel."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rawaio
from benchmarks import (
    asyncio_reads,
    direct_reads,
    files,
    harness,
    heartbeat,
    null_requests,
    system_calls,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def native_aio() -> None:
    try:
        context = rawaio.IOContext(1)
    except (rawaio.UnsupportedError, OSError) as error:
        pytest.skip(f"no native AIO: {error}")
    context.close()


@pytest.mark.parametrize("way", null_requests.RAWAIO)
@pytest.mark.parametrize("mechanism", null_requests.MECHANISMS)
def test_our_programs_read_what_they_should(way: str, mechanism: str) -> None:
    with rawaio.IOContext(1) as context:
        if mechanism == "ring" and (reason := context.why_not_ring):
            pytest.skip(reason)
    null_requests.work(f"rawaio/{way}/{mechanism}", 96)


@pytest.mark.parametrize("way", null_requests.LIBAIO)
def test_the_rival_reads_what_it_should(way: str) -> None:
    pytest.importorskip("libaio")
    null_requests.work(f"python-libaio/{way}", 96)


def test_a_short_read_is_an_error() -> None:
    with pytest.raises(OSError, match="res is 0, not 512"):
        null_requests.check(0)


def test_a_program_runs_on_its_own(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "null_requests.py"
    command = [sys.executable, "-W", "error", str(script)]
    subprocess.run(
        [*command, "--work", "rawaio/batch/io_getevents", "64"], cwd=tmp_path, check=True
    )


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[Path]:
    """A file of blocks that say where they are, where there is O_DIRECT."""
    with files.temporary_file(tmp_path, 1 << 20) as path:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            pytest.skip(f"no O_DIRECT in {tmp_path}: {error}")
        yield path


def skip_without(name: str) -> None:
    """Skip when what a program needs beside rawaio is not there."""
    program = name.split("/")[1]
    if program in asyncio_reads.VERSIONS:
        pytest.importorskip(program)
    if "uring" in name:
        linux_uring = pytest.importorskip("caio.linux_uring")
        try:
            linux_uring.Context()
        except OSError as error:
            pytest.skip(f"no io_uring: {error}")


@pytest.mark.parametrize("name", asyncio_reads.WAYS)
@pytest.mark.parametrize("loop", files.LOOPS)
def test_asyncio_programs_read_what_they_should(
    monkeypatch: pytest.MonkeyPatch, blocks: Path, name: str, loop: str
) -> None:
    skip_without(name)
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    offsets: list[int] = []

    def check(data: bytes | memoryview, nbytes: int, offset: int) -> None:
        assert nbytes == asyncio_reads.NBYTES
        assert data[:8] == files.expected(offset)
        offsets.append(offset)

    monkeypatch.setattr(asyncio_reads, "check", check)
    asyncio_reads.work(name, blocks, 96, loop)
    if "many" in name:  # the last of each call is looked at
        assert len(offsets) == (3 if name.endswith("32") else 1)
        return
    assert len(offsets) == 96
    assert len(set(offsets)) > 32


def test_an_asyncio_program_runs_on_its_own(blocks: Path) -> None:
    command = asyncio_reads.command("direct/rawaio/pread", blocks, "asyncio", 64)
    subprocess.run([command[0], "-W", "error", *command[1:]], cwd=blocks.parent, check=True)


def test_a_short_asyncio_read_is_an_error() -> None:
    with pytest.raises(OSError, match="1 of 1 bytes at 8192"):
        asyncio_reads.check(b"x", 1, 8192)


@pytest.mark.parametrize("name", [name for name in heartbeat.WAYS if not name.endswith("/caio")])
@pytest.mark.parametrize("loop", files.LOOPS)
def test_the_heart_beats_beside_each_program(
    monkeypatch: pytest.MonkeyPatch, blocks: Path, name: str, loop: str
) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    monkeypatch.setattr(heartbeat, "QUEUED", 1)
    size = heartbeat.Size(read=1 << 20, written=2 << 20, seconds=0.01)
    path = blocks if not name.startswith("extend/") else blocks.with_name("written")
    late_s = heartbeat.work(name, path, size, loop)
    assert late_s
    assert min(late_s) > -heartbeat.PERIOD_S
    if name.startswith("extend/"):
        assert path.stat().st_size == 2 << 20
        path.unlink()


def test_the_heart_beats_beside_the_rival(blocks: Path) -> None:
    pytest.importorskip("caio.linux_aio")
    size = heartbeat.Size(read=1 << 20, written=1 << 20, seconds=0.01)
    assert heartbeat.work("cold/caio", blocks, size, "asyncio")


def test_a_short_piece_is_an_error() -> None:
    with pytest.raises(OSError, match="1 bytes instead of 1048576"):
        heartbeat.check(1)


@pytest.mark.parametrize("name", direct_reads.WAYS)
@pytest.mark.parametrize("depth", [1, 8])
def test_direct_programs_read_and_count(blocks: Path, name: str, depth: int) -> None:
    run = direct_reads.work(name, blocks, depth, 0.01, "asyncio")
    assert run.operations >= 1
    assert run.wall_s >= 0.01
    assert run.cpu_s > 0


def test_a_direct_program_runs_on_its_own(blocks: Path) -> None:
    command = direct_reads.own_command("rawaio/File.pread", blocks, 8, 0.01, "asyncio")
    run = direct_reads.own_run(harness.output_of([command[0], "-W", "error", *command[1:]]))
    assert run.operations >= 1


@pytest.mark.parametrize("name", direct_reads.FIO)
def test_fio_reads_and_counts(blocks: Path, name: str) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    run = direct_reads.fio_run(harness.output_of(direct_reads.fio_command(name, blocks, 8, 0.05)))
    assert run.operations >= 1
    assert run.wall_s > 0


def test_a_short_direct_read_is_an_error() -> None:
    with pytest.raises(OSError, match="1 bytes instead of 4096"):
        direct_reads.check(1)


@pytest.mark.parametrize("name", system_calls.NAMES)
def test_what_is_counted_reads_what_it_should(
    monkeypatch: pytest.MonkeyPatch, blocks: Path, name: str
) -> None:
    if "/caio/" in name:
        pytest.importorskip("caio.linux_aio")
    found: list[bytes] = []
    monkeypatch.setattr(system_calls, "check", found.append)
    system_calls.work(name, blocks, 130)
    assert [len(data) for data in found] == [system_calls.NBYTES] * 130
    offsets = files.random_offsets(1 << 20)[:130]
    assert [data[:8] for data in found] == [files.expected(offset) for offset in offsets]


def test_system_calls_are_counted(blocks: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    try:
        few, many = (system_calls.count(system_calls.NAMES[0], blocks, n) for n in (10, 74))
    except harness.ProgramError as error:
        pytest.skip(f"strace cannot trace here: {error}")
    # Not all calls together: threads without a lock yield to each other as often as they like.
    assert many["io_submit"] - few["io_submit"] == 64
    with pytest.raises(OSError, match="1 bytes instead of 4096"):
        system_calls.check(b"x")

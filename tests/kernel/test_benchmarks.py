"""That the benchmarks' programs do their work on this kernel."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import rawaio
from benchmarks import files, fio, harness, rivals
from benchmarks.figures import program_of
from benchmarks.programs import (
    asyncio_reads,
    heartbeat,
    many_files,
    memory,
    null,
    system_calls,
    task_writes,
    transfers,
)
from benchmarks.sections import growth, startup
from benchmarks.sections import heartbeat as heartbeat_section
from benchmarks.sections import system_calls as system_calls_section
from benchmarks.sections import writes as writes_section
from benchmarks.sections.timed import fio_cells, own_cells

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def native_aio() -> None:
    try:
        context = rawaio.IOContext(1)
    except (rawaio.UnsupportedError, OSError) as error:
        pytest.skip(f"no native AIO: {error}")
    context.close()


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


@pytest.fixture(params=files.LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "uvloop":
        pytest.importorskip("uvloop")
    return name


def skip_without(name: str) -> None:
    """Skip when what a program needs beside rawaio is not there."""
    program = program_of(name)
    if program in ("caio", "aiofiles"):
        pytest.importorskip(program)
    if program.startswith("fio") and (reason := rivals.why_not("fio")):
        pytest.skip(f"fio: {reason}")
    if "uring" in name and program == "caio":
        linux_uring = pytest.importorskip("caio.linux_uring")
        try:
            linux_uring.Context()
        except OSError as error:
            pytest.skip(f"no io_uring: {error}")


def written_blocks(path: Path) -> int:
    """How many blocks no longer say where they are."""
    data = path.read_bytes()
    return sum(
        data[offset : offset + 8] != files.expected(offset)
        for offset in range(0, len(data), files.BLOCK)
    )


# -- null ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", null.RAWAIO)
@pytest.mark.parametrize("mechanism", null.MECHANISMS)
@pytest.mark.parametrize("writes", [False, True])
def test_our_null_programs_do_what_they_should(way: str, mechanism: str, *, writes: bool) -> None:
    with rawaio.IOContext(1) as context:
        if mechanism == "ring" and (reason := context.why_not_ring):
            pytest.skip(reason)
    assert null.run(f"rawaio/{way}/{mechanism}", 512, writes=writes, operations=96) == {}


@pytest.mark.parametrize("way", null.LIBAIO)
@pytest.mark.parametrize("writes", [False, True])
def test_the_rival_does_what_it_should(way: str, *, writes: bool) -> None:
    pytest.importorskip("libaio")
    assert null.run(f"python-libaio/{way}", 1, writes=writes, operations=96) == {}


@pytest.mark.parametrize("way", [way for way in null.RAWAIO if not way.startswith("bulk")])
def test_a_short_null_read_is_an_error(way: str, tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    with (
        rawaio.IOContext(null.DEPTH) as context,
        pytest.raises(OSError, match="res is 0, not 512"),
    ):
        null.RAWAIO[way](context, null.Null(fd, 512, writes=False, operations=96))
    os.close(fd)


@pytest.mark.parametrize("name", [next(iter(fio.null_ways(32))), list(fio.null_ways(32))[-1]])
@pytest.mark.parametrize("writes", [False, True])
def test_fio_does_null_operations(name: str, *, writes: bool) -> None:
    skip_without("fio")
    options = fio.null_ways(null.DEPTH)[name]
    words = fio.null_command(options, 512, null.DEPTH, writes=writes, operations=320)
    try:
        said = harness.output_of(words).splitlines()[-1].split(";")
    except harness.ProgramError as error:
        if "io_uring" not in name:
            raise
        pytest.skip(f"no io_uring: {harness.reason_of(error)}")
    # KiB that were read, and written.
    assert (said[5], said[46]) == (("0", "160") if writes else ("160", "0"))


def test_a_program_runs_on_its_own(tmp_path: Path) -> None:
    words = harness.own(
        "null", name="rawaio/batch/io_getevents", nbytes=512, writes=False, operations=64
    )
    done = subprocess.run(
        [words[0], "-W", "error", *words[1:]],
        cwd=tmp_path,
        env=harness.environment(),
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == {}


def test_the_command_runs_in_a_clone() -> None:
    words = [sys.executable, "-W", "error", "-m", "benchmarks", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python3 -m benchmarks")


# -- asyncio -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group, names in asyncio_reads.WAYS.items()
        for name in names
        if (group, name) != ("direct", "caio/linux_aio")  # its memory is not aligned
    ],
)
def test_asyncio_programs_read_what_they_should(
    monkeypatch: pytest.MonkeyPatch, blocks: Path, group: str, name: str, loop: str
) -> None:
    skip_without(name)
    offsets: list[int] = []

    def check(data: bytes | memoryview, nbytes: int, offset: int) -> None:
        assert nbytes == asyncio_reads.NBYTES
        assert data[:8] == files.expected(offset)
        offsets.append(offset)

    monkeypatch.setattr(asyncio_reads, "check", check)
    asyncio_reads.run(group, name, str(blocks), loop, 96)
    if "many" in name:  # the last of each call is looked at
        assert len(offsets) == (3 if name.endswith("32") else 1)
        return
    assert len(offsets) == 96
    assert len(set(offsets)) > 32


def test_a_short_read_is_an_error() -> None:
    with pytest.raises(OSError, match="1 of 1 bytes at 8192"):
        asyncio_reads.check(b"x", 1, 8192)
    with pytest.raises(OSError, match="1 bytes instead of 4096"):
        transfers.check(1, 4096)
    with pytest.raises(OSError, match="1 bytes instead of 4096"):
        task_writes.check(1)
    with pytest.raises(OSError, match="1 bytes instead of 4096"):
        system_calls.check(b"x")
    with pytest.raises(OSError, match="1 bytes instead of 1048576"):
        heartbeat.check(1)


# -- for so long ---------------------------------------------------------------------------------

WRITES = [name for name in transfers.WAYS if "pwrite" in name]
BOTH = ["rawaio/IOContext", "rawaio/IOContext, bulk"]


@pytest.mark.parametrize("name", [name for name in transfers.WAYS if name not in WRITES])
@pytest.mark.parametrize("depth", [1, 8])
def test_transfers_read_and_count(blocks: Path, name: str, depth: int) -> None:
    found = transfers.run(name, str(blocks), "asyncio", depth=depth, seconds=0.01)
    assert found.keys() == {"iops", "cpu_us"}
    assert min(found.values()) > 0
    assert written_blocks(blocks) == 0


@pytest.mark.parametrize("name", [*BOTH, *WRITES])
def test_transfers_write(blocks: Path, name: str) -> None:
    before = written_blocks(blocks)
    transfers.run(name, str(blocks), "asyncio", depth=8, seconds=0.01, writes=True)
    assert written_blocks(blocks) > before == 0
    assert blocks.stat().st_size == 1 << 20


@pytest.mark.parametrize("name", ["rawaio/IOContext", "rawaio/File.pread", "threads/os.preadv"])
def test_transfers_are_timed(blocks: Path, name: str) -> None:
    found = transfers.run(name, str(blocks), "asyncio", depth=8, seconds=0.01, latency=True)
    assert 0 < found["p50_us"] <= found["p99_us"]


@pytest.mark.parametrize("name", ["rawaio/File.stream", *BOTH])
def test_a_file_is_read_in_order(blocks: Path, name: str) -> None:
    found = transfers.run(
        name, str(blocks), "asyncio", depth=2, seconds=0.01, nbytes=1 << 20, sequential=True
    )
    assert found["mib_s"] > 0
    job = transfers.Job(blocks, 2, 0.01, nbytes=1 << 19, sequential=True)
    assert job.places().tolist() == [0, 1 << 19]


@pytest.mark.parametrize("name", BOTH)
def test_nothing_is_read_of_a_device(name: str) -> None:
    found = transfers.run(
        name, "/dev/zero", "asyncio", depth=64, seconds=0.01, nbytes=512, direct=False, per_call=64
    )
    assert found["iops"] > 0


@pytest.mark.parametrize("latency", [False, True])
def test_fio_and_ours_do_the_same_job(blocks: Path, *, latency: bool) -> None:
    skip_without("fio")
    job = transfers.Job(blocks, 8, 0.05, writes=True, latency=latency)
    cells = [*own_cells("g", job, ["rawaio/File.pwrite"], "asyncio"), *fio_cells("g", job)]
    outcome = harness.measure(cells, 1)
    metrics = {"p50_us", "p99_us"} if latency else {"iops", "cpu_us"}
    assert outcome.figures["g"].keys() >= {"rawaio/File.pwrite", "fio libaio/batches"}
    assert all(columns.keys() == metrics for columns in outcome.figures["g"].values())
    assert all("io_uring" in reason for reason in outcome.missing)
    assert written_blocks(blocks) > 0


def test_fio_writes_and_syncs(blocks: Path) -> None:
    skip_without("fio")
    (cell,) = writes_section.synced_by_fio(blocks, 0.05)
    assert cell.turn()["iops"] > 0
    assert written_blocks(blocks) > 0


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group, names in task_writes.WAYS.items() for name in names],
)
def test_tasks_write(blocks: Path, group: str, name: str) -> None:
    skip_without(name)
    found = task_writes.run(group, name, str(blocks), "asyncio", 0.01)
    assert found["iops"] > 0
    assert written_blocks(blocks) > 0
    assert blocks.stat().st_size == 1 << 20


# -- growth --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_many_files_are_read(blocks: Path, loop: str, *, direct: bool) -> None:
    folder = blocks.parent
    for name in ("other", "unused"):
        shutil.copy(blocks, folder / name)
    assert many_files.run(str(folder), 2, loop, 0.01, direct=direct)["iops"] > 0
    with pytest.raises(OSError, match="3 files in .* instead of 4"):
        many_files.run(str(folder), 4, loop, 0.01, direct=direct)
    for name in ("other", "unused"):
        (folder / name).unlink()


@pytest.mark.parametrize("name", memory.KINDS)
def test_operations_are_held_and_weighed(
    monkeypatch: pytest.MonkeyPatch, blocks: Path, name: str
) -> None:
    hold, _ = memory.KINDS[name]
    monkeypatch.setitem(memory.KINDS, name, (hold, 64))
    cells = growth.of_memory(blocks, harness.Setting(blocks.parent))
    (cell,) = (cell for cell in cells if cell.name == name)
    found = cell.turn()
    assert found.keys() == {"python_bytes", "resident_bytes"}
    assert found["python_bytes"] > 0


# -- starting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", startup.PROGRAMS)
def test_what_begins_runs(blocks: Path, name: str) -> None:
    found = startup.start(startup.command(startup.PROGRAMS[name], str(blocks)))
    assert min(found.values()) > 0


def test_asyncio_is_not_imported() -> None:
    assert startup.count_modules() == {"modules": 0}


# -- heartbeat -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (group, name)
        for group, names in heartbeat.WAYS.items()
        for name in names
        if program_of(name) != "caio" or group == "cold"  # else its memory is not aligned
    ],
)
def test_the_heart_beats_beside_each_program(
    monkeypatch: pytest.MonkeyPatch, blocks: Path, group: str, name: str, loop: str
) -> None:
    skip_without(name)
    monkeypatch.setattr(heartbeat, "QUEUED", 1)
    size = heartbeat.Size(read=1 << 20, written=2 << 20, seconds=0.01)
    path = blocks if group != "extend" else blocks.with_name("written")
    late_s = heartbeat.beats(group, name, path, size, loop)
    assert late_s
    assert min(late_s) > -heartbeat.PERIOD_S
    if group == "extend":
        assert path.stat().st_size == 2 << 20
        path.unlink()


def test_what_was_written_beside_a_heart_is_removed(blocks: Path) -> None:
    size = heartbeat.Size(read=1 << 20, written=1 << 20, seconds=0.01)
    cell = heartbeat_section.cell("extend", "rawaio/File", blocks, size, "asyncio")
    assert cell.turn().keys() >= {"late_p50_ms", "late_p999_ms"}
    assert list(blocks.parent.iterdir()) == [blocks]


# -- system calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", system_calls.PACES)
@pytest.mark.parametrize(
    ("program", "kind"), [("rawaio", "direct"), ("rawaio", "cached"), ("caio", "cached")]
)
def test_what_is_counted_reads_what_it_should(
    monkeypatch: pytest.MonkeyPatch, blocks: Path, program: str, kind: str, pace: str
) -> None:
    skip_without(program)
    found: list[bytes] = []
    monkeypatch.setattr(system_calls, "check", found.append)
    system_calls.run(program, kind, pace, str(blocks), 130)
    assert [len(data) for data in found] == [files.BLOCK] * 130
    offsets = files.random_offsets(1 << 20)[:130]
    assert [data[:8] for data in found] == [files.expected(offset) for offset in offsets]


def test_system_calls_are_counted(blocks: Path) -> None:
    if reason := rivals.why_not("strace"):
        pytest.skip(f"strace: {reason}")

    def words(operations: int) -> Sequence[str]:
        return harness.own(
            "system_calls",
            program="rawaio",
            kind="direct",
            pace="one by one",
            path=str(blocks),
            operations=operations,
        )

    try:
        few, many = (system_calls_section.count(words(n)) for n in (10, 74))
    except harness.ProgramError as error:
        pytest.skip(f"strace cannot trace here: {error}")
    assert many["io_submit"] - few["io_submit"] == 64

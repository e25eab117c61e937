"""The arithmetic of the benchmarks, with programs that are no programs."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import (
    asyncio_reads,
    direct_reads,
    files,
    harness,
    heartbeat,
    null_requests,
    system_calls,
)
from benchmarks.harness import Program, ProgramError, Ratio

# -- the harness ---------------------------------------------------------------------------------


def words(name: str, operations: int) -> list[str]:
    return [name, str(operations)]


def programs(*names: str) -> list[Program]:
    return [Program(name, partial(words, name), 800) for name in names]


def test_starting_does_not_count() -> None:
    def measure(command: Sequence[str]) -> float:
        name, operations = command
        return {"a": 5.0, "b": 0.25}[name] + 0.5 * int(operations)

    assert harness.run(programs("a", "b"), 2, measure) == {"a": [0.5, 0.5], "b": [0.5, 0.5]}


def test_each_round_begins_with_another_program() -> None:
    commands: list[tuple[str, ...]] = []
    said: list[str] = []

    def measure(command: Sequence[str]) -> float:
        commands.append(tuple(command))
        return float(command[1])

    harness.run(programs("a", "b", "c"), 2, measure, said.append)
    assert [name for name, _ in commands] == list("aabbccbbccaa")
    assert [operations for _, operations in commands] == ["100", "800"] * 6
    assert said[0] == "round 1 of 2: a"
    assert said[-1] == "round 2 of 2: a"


def test_no_programs_give_no_figures() -> None:
    assert harness.run([], 3) == {}


def test_noise_in_a_short_run_makes_no_figure_lower() -> None:
    assert harness.per_operation([1.0, 3.0], [5.0, 6.0], 4) == [1.0, 1.25]


def test_too_few_operations_to_measure() -> None:
    with pytest.raises(ProgramError, match="measure more"):
        harness.per_operation([1.0], [1.0], 10)


def test_ratios_are_taken_round_by_round() -> None:
    one, other = [1.0, 4.0, 9.0], [2.0, 2.0, 3.0]
    assert harness.compare(one, other) == Ratio(0.5, 2.0, 3.0, of_lowest=0.5)


positive = st.floats(0.001, 1000)


@given(st.lists(st.tuples(positive, positive), min_size=1))
def test_ratios_are_in_order(pairs: list[tuple[float, float]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    ratio = harness.compare(one, other)
    assert ratio.lowest <= ratio.median <= ratio.highest
    inverse = harness.compare(other, one)
    assert inverse.lowest == pytest.approx(1 / ratio.highest)
    assert inverse.of_lowest == pytest.approx(1 / ratio.of_lowest)


def test_rounds_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        harness.compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no rounds"):
        harness.compare([], [])


def test_the_best_has_the_lowest_figure() -> None:
    seconds = {"a": [3.0, 3.0], "b": [2.0, 9.0], "c": [1.0]}
    assert harness.best(seconds, ["a", "b"]) == "b"


def test_time_is_that_of_the_program() -> None:
    assert harness.cpu_seconds([sys.executable, "-S", "-c", "pass"]) > 0


def test_a_program_that_fails_is_told_with_its_words() -> None:
    command = [sys.executable, "-S", "-c", "import sys; sys.exit('cannot')"]
    with pytest.raises(ProgramError, match="status 1\ncannot"):
        harness.cpu_seconds(command)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        harness.cpu_seconds(["/nonexistent/program"])


def test_the_machine_is_described() -> None:
    assert {"machine", "cpus", "kernel", "python"} <= harness.machine().keys()


def test_what_a_program_prints() -> None:
    assert harness.output_of([sys.executable, "-S", "-c", "print(1)"]) == "1\n"
    command = [sys.executable, "-S", "-c", "import sys; sys.exit('cannot')"]
    with pytest.raises(ProgramError, match="status 1\ncannot"):
        harness.output_of(command)


def test_programs_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    harness.environment.cache_clear()
    program = "import sys; print(sys.dont_write_bytecode, sys.pycache_prefix)"
    one, other = (harness.output_of([sys.executable, "-S", "-c", program]) for _ in range(2))
    assert one == other
    assert one.split() == ["False", harness.environment()["PYTHONPYCACHEPREFIX"]]


def test_versions_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    assert harness.version_of("x", "1.0") is None
    assert harness.version_of("x", "1.1") == "version 1.0 instead of 1.1"


def test_a_rival_without_a_budget_is_not_judged() -> None:
    rival = harness.Rival("b", "b/2", None, None, {"a": Ratio(1.0, 2.0, 3.0, of_lowest=1.5)})
    assert harness.render_rival(rival, 4)[1:] == [
        "times b/2",
        "       lowest   median  highest  of lowest",
        "a        1.00     2.00     3.00     1.50",
    ]


# -- files ---------------------------------------------------------------------------------------


def test_every_block_says_where_it_is(tmp_path: Path) -> None:
    nbytes = (1 << 20) + 2 * files.BLOCK
    with files.temporary_file(tmp_path, nbytes) as path:
        data = path.read_bytes()
        files.warm(path, direct=False)
        files.drop_cache(path)
    assert len(data) == nbytes
    for offset in range(0, nbytes, files.BLOCK):
        assert data[offset : offset + 8] == files.expected(offset)
    assert list(tmp_path.iterdir()) == []


def test_work_is_shared_out() -> None:
    offsets = files.random_offsets(64 * files.BLOCK, 100)
    assert all(offset % files.BLOCK == 0 and 0 <= offset < 64 * files.BLOCK for offset in offsets)
    shares = [list(part) for part in files.share(offsets, 600, 4)]
    assert [len(part) for part in shares] == [150] * 4
    assert shares[0] == offsets + offsets[:50]
    assert shares[1][:75] == offsets[25:]


# -- null_requests -------------------------------------------------------------------------------

TRIAL = {
    "fio/a": [2e-6, 2e-6],
    "fio/b": [1e-6, 3e-6],
    "python-libaio/batch": [4e-6, 4e-6],
}
SECONDS = {
    "rawaio/batch/ring": [2e-6, 1e-6],
    "rawaio/window/ring": [9e-6, 9e-6],
    "fio/b": [1e-6, 1e-6],
    "python-libaio/batch": [4e-6, 5e-6],
}


def test_rivals_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", no_version)
    found, missing = null_requests.find_programs()
    assert {p.name.partition("/")[0] for p in found} == {"rawaio"}
    assert missing[0] == "fio: not installed"
    assert "pip install libaio==0.9.5" in missing[1]


def test_another_version_of_a_rival_is_no_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/fio")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.4")
    found, missing = null_requests.find_programs()
    assert {p.name.partition("/")[0] for p in found} == {"rawaio", "fio"}
    assert missing == ["python-libaio: version 0.9.4 instead of 0.9.5"]


def test_every_program_is_run_by_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/fio")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.5")
    found, missing = null_requests.find_programs()
    assert missing == []
    assert len({p.name for p in found}) == len(found) == 20
    for program in found:
        command = list(program.command(640))
        if program.name.startswith("fio/"):
            assert command[0] == "fio"
            assert "--number_ios=640" in command
            assert ("--userspace_reap" in command) is ("/ring" in program.name)
            assert ("--gtod_reduce=1" in command) is ("gtod_reduce" in program.name)
        else:
            assert command[-3:] == ["--work", program.name, "640"]
        # A whole number of full batches, so that all do the same.
        for operations in (program.operations, program.shorter):
            assert operations % null_requests.DEPTH == 0


def test_each_rival_is_represented_by_its_best() -> None:
    chosen = null_requests.choose(TRIAL)
    assert chosen == {"fio": "fio/b", "python-libaio": "python-libaio/batch"}
    report = null_requests.make_report([], chosen, TRIAL, SECONDS)
    fio, libaio = report.rivals
    assert fio.ratios == {
        "rawaio/batch/ring": Ratio(1.0, 1.5, 2.0, of_lowest=1.0),
        "rawaio/window/ring": Ratio(9.0, 9.0, 9.0, of_lowest=9.0),
    }
    assert libaio.ratios["rawaio/batch/ring"].median == pytest.approx(0.35)


def test_the_report_is_shown() -> None:
    chosen = null_requests.choose(TRIAL)
    lines = null_requests.render(
        null_requests.make_report(["x: not there"], chosen, TRIAL, SECONDS)
    ).splitlines()
    assert "times fio/b (at most 2.5, aim 2.0)" in lines
    assert "rawaio/batch/ring       1.00     1.50     2.00     1.00    aim" in lines
    assert "rawaio/window/ring      9.00     9.00     9.00     9.00    OVER" in lines
    assert "rawaio/batch/ring       0.20     0.35     0.50     0.25    within" in lines
    assert lines[-1] == "missing: x: not there"


def test_without_rivals_there_is_still_a_report() -> None:
    own = {"rawaio/batch/ring": [1e-6]}
    report = null_requests.make_report(["fio: not installed"], {}, {}, own)
    assert report.rivals == []
    assert "missing: fio" in null_requests.render(report)


def test_main_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(found: Sequence[Program], rounds: int, *, say: object) -> dict[str, list[float]]:
        return {program.name: [1e-6] * rounds for program in found}

    monkeypatch.setattr(harness, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/fio")
    file = tmp_path / "report.json"
    assert null_requests.main(["--quick", "--json", str(file)]) == 0
    report = json.loads(file.read_text("utf-8"))
    assert report["benchmark"] == "null_requests"
    assert report["rivals"][0]["ratios"]["rawaio/batch/ring"]["median"] == 1.0
    assert len(report["seconds_per_operation"]["rawaio/batch/ring"]) == 5
    assert "rawaio/batch/ring" in capsys.readouterr().out


def test_main_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object, **kwargs: object) -> None:
        raise ProgramError("fio: status 1")

    monkeypatch.setattr(harness, "run", run)
    assert null_requests.main([]) == 1
    assert capsys.readouterr().err == "null_requests: fio: status 1\n"


# -- asyncio_reads -------------------------------------------------------------------------------

PATHS = {"cached": Path("hot"), "direct": Path("cold")}


def test_asyncio_programs_that_cannot_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def output_of(command: Sequence[str]) -> str:
        if "linux_uring" in command[3]:
            raise ProgramError("status 1\nTraceback\nOSError: not permitted")
        return ""

    def version(name: str) -> str:
        if name == "aiofiles":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.12.10"

    monkeypatch.setattr(harness, "output_of", output_of)
    monkeypatch.setattr(importlib.metadata, "version", version)
    found, missing = asyncio_reads.find_programs(PATHS, "uvloop")
    assert missing == [
        "aiofiles: not installed (pip install aiofiles==25.1.0)",
        "cached/caio/linux_uring: OSError: not permitted",
        "cached/caio/linux_uring deferred: OSError: not permitted",
    ]
    assert len(found) == len(asyncio_reads.WAYS) - 3
    for program in found:
        path = "hot" if program.name.startswith("cached/") else "cold"
        assert list(program.command(640))[-5:] == ["--work", program.name, path, "uvloop", "640"]
        for operations in (program.operations, program.shorter):
            assert operations % asyncio_reads.TASKS == 0


def test_asyncio_reads_are_compared_with_the_best_mode_of_their_kind() -> None:
    seconds = {
        "cached/rawaio/pread": [1e-6, 1e-6],
        "cached/caio/linux_aio": [2e-6, 4e-6],
        "cached/caio/linux_aio deferred": [1e-6, 7e-6],
        "direct/rawaio/pread": [2e-6, 2e-6],
        "direct/executor/os.preadv": [10e-6, 20e-6],
    }
    report = asyncio_reads.make_report(seconds, ["x: not there"], "asyncio")
    caio, executor = report.rivals
    assert caio.stands_for_it == "cached/caio/linux_aio"
    assert caio.ratios == {"cached/rawaio/pread": Ratio(0.25, 0.375, 0.5, of_lowest=0.5)}
    assert executor.ratios["direct/rawaio/pread"].median == pytest.approx(0.15)
    lines = asyncio_reads.render(report).splitlines()
    assert "times cached/caio/linux_aio (at most 0.4, aim 0.25)" in lines
    assert lines[-1] == "missing: x: not there"
    assert sum(line.endswith("within") for line in lines) == 1
    assert sum(line.endswith("aim") for line in lines) == 1


@pytest.mark.parametrize("loop", files.LOOPS)
def test_asyncio_reads_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    def run(found: Sequence[Program], rounds: int, *, say: object) -> dict[str, list[float]]:
        return {program.name: [1e-6] * rounds for program in found}

    monkeypatch.setattr(harness, "run", run)
    monkeypatch.setattr(harness, "output_of", lambda command: "")
    monkeypatch.setattr(asyncio_reads, "QUICK_FILE_NBYTES", 1 << 20)
    monkeypatch.setattr(files, "warm", lambda path, *, direct: None)
    file = tmp_path / "report.json"
    options = ["--quick", "--folder", str(tmp_path), "--json", str(file)]
    assert asyncio_reads.main(options + ["--uvloop"] * (loop == "uvloop")) == 0
    report = json.loads(file.read_text("utf-8"))
    assert (report["benchmark"], report["loop"]) == ("asyncio_reads", loop)
    assert len(report["seconds_per_operation"]["cached/rawaio/pread"]) == 3
    assert "cached/rawaio/pread" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


def test_asyncio_reads_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def find_programs(*arguments: object) -> None:
        raise ProgramError("rawaio: status 1")

    monkeypatch.setattr(asyncio_reads, "find_programs", find_programs)
    monkeypatch.setattr(asyncio_reads, "QUICK_FILE_NBYTES", 1 << 20)
    monkeypatch.setattr(files, "warm", lambda path, *, direct: None)
    assert asyncio_reads.main(["--quick", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "asyncio_reads: rawaio: status 1\n"


# -- heartbeat -----------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(i) for i in range(1, 1001)]
    assert heartbeat.percentile(values[::-1], 0.5) == 500.0
    assert heartbeat.percentile(values, 0.999) == 999.0
    assert heartbeat.percentile([7.0], 0.999) == 7.0
    assert heartbeat.percentile([7.0, 8.0], 0.0) == 7.0
    with pytest.raises(ValueError, match="no values"):
        heartbeat.percentile([], 0.5)


def test_the_median_of_the_rounds_decides() -> None:
    quiet, loud = [0.001] * 100, [0.001] * 98 + [0.5, 0.5]
    ahead = heartbeat.summarize([quiet, loud, quiet])
    assert (ahead.beats, ahead.p50, ahead.highest) == (300, 0.001, 0.5)
    assert ahead.p999_of_rounds == [0.001, 0.5, 0.001]
    assert ahead.verdict == "ahead"
    assert heartbeat.summarize([quiet, loud, loud]).verdict == "BEHIND"


def test_heartbeats_are_measured_in_turn_and_what_fails_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []

    def output_of(command: Sequence[str]) -> str:
        name, path = command[3:5]
        names.append(name)
        assert path.endswith("written" if name.startswith("extend") else "file")
        if name == "extend/caio":
            raise ProgramError("status 1\nTraceback\nSystemError: Invalid argument")
        return "[0.001, 0.002]"

    monkeypatch.setattr(harness, "output_of", output_of)
    monkeypatch.setattr(harness, "version_of", lambda package, version: None)
    monkeypatch.setattr(files, "warm", lambda path, *, direct: None)
    size = heartbeat.Size(read=1 << 20, written=1 << 20, seconds=0.01)
    figures, missing = heartbeat.measure(tmp_path, size, 2, "asyncio")
    assert missing == ["extend/caio: SystemError: Invalid argument"]
    assert set(figures) == set(heartbeat.WAYS) - {"extend/caio"}
    assert {each.beats for each in figures.values()} == {4}
    assert len(names) == 2 * len(heartbeat.WAYS) - 1

    def fail(command: Sequence[str]) -> str:
        raise ProgramError("status 1")

    monkeypatch.setattr(harness, "output_of", fail)
    with pytest.raises(ProgramError):
        heartbeat.measure(tmp_path, size, 2, "asyncio")


def test_heartbeat_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*arguments: object) -> tuple[dict[str, heartbeat.Figures], list[str]]:
        figures = {
            "cold/rawaio": heartbeat.summarize([[0.001, 0.002]]),
            "cold/caio": heartbeat.summarize([[0.1, 0.2]]),
        }
        return figures, ["queued/caio: no"]

    monkeypatch.setattr(heartbeat, "measure", measure)
    file = tmp_path / "report.json"
    assert heartbeat.main(["--quick", "--json", str(file)]) == 0
    report = json.loads(file.read_text("utf-8"))
    assert report["verdicts"] == {"cold/rawaio": "ahead", "cold/caio": "BEHIND"}
    assert report["figures"]["cold/caio"]["highest"] == 0.2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "missing: queued/caio: no"
    assert (
        "cold/rawaio      2     1.00     2.00     2.00     2.00   2.00, 2.00, 2.00   ahead" in lines
    )


def test_heartbeat_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*arguments: object) -> None:
        raise ProgramError("cold/rawaio: status 1")

    monkeypatch.setattr(heartbeat, "measure", measure)
    assert heartbeat.main([]) == 1
    assert capsys.readouterr().err == "heartbeat: cold/rawaio: status 1\n"


# -- direct_reads --------------------------------------------------------------------------------


def test_fio_is_understood() -> None:
    job = {
        "job_runtime": 2000,
        "usr_cpu": 10.0,
        "sys_cpu": 15.0,
        "read": {"runtime": 1000, "total_ios": 50_000},
    }
    run = direct_reads.fio_run("fio: a warning\n" + json.dumps({"jobs": [job]}))
    assert run == direct_reads.Run(50_000, 1.0, 0.5)
    assert (run.iops, run.cpu_us) == (50_000, 10.0)


def test_direct_programs_are_run_by_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/fio")
    found, missing = direct_reads.find_cells(Path("blocks"), 0.3, "asyncio")
    assert missing == []
    assert len({(cell.name, cell.depth) for cell in found}) == len(found)
    for cell in found:
        command = list(cell.command)
        if cell.name.startswith("fio/"):
            assert {"--readonly", "--filename=blocks", "--runtime=300ms"} <= set(command)
            assert f"--iodepth={cell.depth}" in command
        else:
            depth = str(cell.depth)
            assert command[-6:] == ["--work", cell.name, "blocks", depth, "0.3", "asyncio"]
    assert {cell.depth for cell in found if cell.name == "rawaio/File.pread_many"} == {128}
    assert {cell.depth for cell in found if cell.name == "fio/batches"} == {8, 32, 128}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found, missing = direct_reads.find_cells(Path("blocks"), 0.3, "asyncio")
    assert missing == ["fio: not installed"]
    assert not any(cell.name.startswith("fio/") for cell in found)


def test_direct_reads_are_compared_with_the_way_of_fio_that_reads_most() -> None:
    def runs(*iops: int) -> list[direct_reads.Run]:
        return [direct_reads.Run(n, 1.0, 1.0) for n in iops]

    by_name = {
        "rawaio/File.pread": runs(900, 1000),
        "fio/default": runs(10, 5000),
        "fio/batches": runs(3000, 4000),
        "threads/os.preadv": runs(500, 500),
    }
    fio, threads = direct_reads.compare({1: {}, 32: by_name})
    assert (fio.depth, fio.name, fio.rival) == (32, "rawaio/File.pread", "fio/batches")
    assert fio.iops.median == pytest.approx(0.275)
    assert fio.cpu.median == pytest.approx((3000 / 900 + 4) / 2)
    assert (fio.verdict, threads.verdict) == ("BELOW", "")
    assert [direct_reads.judge(ratio, 32) for ratio in (0.9, 0.95, 1.0)] == [
        "BELOW",
        "within",
        "aim",
    ]


def test_what_has_read_nothing_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = direct_reads.Cell("x", 1, ["x"], direct_reads.own_run)
    run = direct_reads.Run(1, 1.0, 0.5)
    output = json.dumps({"operations": 1, "wall_s": 1.0, "cpu_s": 0.5})
    monkeypatch.setattr(harness, "output_of", lambda command: output)
    assert direct_reads.measure([cell], 2)[1] == {"x": [run, run]}
    output = json.dumps({"operations": 0, "wall_s": 1.0, "cpu_s": 0.5})
    with pytest.raises(ProgramError, match="x at depth 1 has read nothing"):
        direct_reads.measure([cell], 2)


@pytest.mark.parametrize("loop", files.LOOPS)
def test_direct_reads_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], loop: str
) -> None:
    def measure(
        cells: Sequence[direct_reads.Cell], rounds: int
    ) -> dict[int, dict[str, list[direct_reads.Run]]]:
        run = direct_reads.Run(1000, 0.5, 0.01)
        return {1: {cell.name: [run] * rounds for cell in cells}, 8: {}}

    monkeypatch.setattr(direct_reads, "measure", measure)
    monkeypatch.setattr(direct_reads, "QUICK_FILE_NBYTES", 1 << 20)
    monkeypatch.setattr(files, "warm", lambda path, *, direct: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/fio")
    file = tmp_path / "report.json"
    options = ["--quick", "--folder", str(tmp_path), "--json", str(file)]
    assert direct_reads.main(options + ["--uvloop"] * (loop == "uvloop")) == 0
    report = json.loads(file.read_text("utf-8"))
    assert (report["benchmark"], report["loop"]) == ("direct_reads", loop)
    assert report["runs"]["1"]["rawaio/File.pread"][0]["operations"] == 1000
    lines = capsys.readouterr().out.splitlines()
    assert (
        "rawaio/File.pread has 1.00 times the IOPS of fio/default at 1.00 times the processor time"
        "   aim"
    ) in lines
    assert list(tmp_path.iterdir()) == [file]


def test_direct_reads_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*arguments: object) -> None:
        raise ProgramError("fio: status 1")

    monkeypatch.setattr(direct_reads, "measure", measure)
    monkeypatch.setattr(direct_reads, "QUICK_FILE_NBYTES", 1 << 20)
    monkeypatch.setattr(files, "warm", lambda path, *, direct: None)
    assert direct_reads.main(["--quick", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "direct_reads: fio: status 1\n"


# -- system_calls --------------------------------------------------------------------------------

SUMMARY = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 61.51    0.001234           1      1000           preadv2
 38.49    0.000772           3       257         2 epoll_wait
------ ----------- ----------- --------- --------- ----------------
100.00    0.002006           1      1257         2 total
"""


def test_a_summary_of_strace_is_understood() -> None:
    assert system_calls.parse(SUMMARY) == {"preadv2": 1000, "epoll_wait": 257}
    with pytest.raises(ValueError, match="not a summary"):
        system_calls.parse("strace: Process 1 attached")


def test_system_calls_of_starting_do_not_count() -> None:
    few = Counter({"read": 500, "preadv2": 100, "mmap": 90})
    many = Counter({"read": 500, "preadv2": 1100, "mmap": 90, "epoll_wait": 2000, "brk": 0})
    assert system_calls.per_operation(few, many, 1000) == {"epoll_wait": 2.0, "preadv2": 1.0}
    assert list(system_calls.per_operation(few, many, 1000)) == ["epoll_wait", "preadv2"]


def test_system_calls_writes_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def count(name: str, path: Path, operations: int) -> Counter[str]:
        assert "/caio/" not in name
        return Counter({"io_submit": operations})

    monkeypatch.setattr(system_calls, "count", count)
    monkeypatch.setattr(system_calls, "FILE_NBYTES", 1 << 20)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/strace")
    monkeypatch.setattr(harness, "version_of", lambda package, version: "not installed")
    file = tmp_path / "report.json"
    assert system_calls.main(["--folder", str(tmp_path), "--json", str(file)]) == 0
    report = json.loads(file.read_text("utf-8"))
    assert report["calls"]["direct/rawaio/gather"] == {"io_submit": 1.0}
    lines = capsys.readouterr().out.splitlines()
    assert "direct/rawaio/gather        1.00   io_submit 1" in lines
    assert lines[-1] == "missing: caio: not installed"


def test_system_calls_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert system_calls.main([]) == 1
    assert capsys.readouterr().err == "system_calls: strace is not installed\n"

    def measure(path: Path) -> None:
        raise ProgramError("strace: status 1")

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/strace")
    monkeypatch.setattr(system_calls, "measure", measure)
    monkeypatch.setattr(system_calls, "FILE_NBYTES", 1 << 20)
    assert system_calls.main(["--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "system_calls: strace: status 1\n"

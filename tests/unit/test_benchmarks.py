"""The arithmetic of the benchmarks, with programs that are no programs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import (
    __main__ as command,
)
from benchmarks import (
    budgets,
    charts,
    comparison,
    figures,
    files,
    fio,
    harness,
    machine,
    render,
    report,
    rivals,
)
from benchmarks.figures import Figures, Spread
from benchmarks.harness import Cell, Outcome, ProgramError, Setting, Usage
from benchmarks.programs import asyncio_reads, heartbeat, null, watch
from benchmarks.sections import null as null_section
from benchmarks.sections import startup, system_calls
from benchmarks.sections import writes as writes_section

# -- the harness ---------------------------------------------------------------------------------


def difference(
    name: str, usage: Callable[[Sequence[str]], Usage], operations: int = 800, group: str = "g"
) -> Cell:
    return harness.by_difference(group, name, lambda n: [name, str(n)], operations, usage)


def test_starting_does_not_count() -> None:
    def usage(words: Sequence[str]) -> Usage:
        name, operations = words
        return Usage({"x/a": 5.0, "x/b": 0.25}[name] + 0.5 * int(operations), 2.0 * int(operations))

    outcome = harness.measure([difference("x/a", usage), difference("x/b", usage)], 2)
    each = {"wall_us": [0.5e6, 0.5e6], "cpu_us": [2e6, 2e6]}
    assert outcome == Outcome({"g": {"x/a": each, "x/b": each}})


def test_each_round_begins_with_another_program() -> None:
    runs: list[tuple[str, ...]] = []
    said: list[str] = []

    def usage(words: Sequence[str]) -> Usage:
        runs.append(tuple(words))
        return Usage(float(words[1]), float(words[1]))

    harness.measure([difference(name, usage) for name in "abc"], 2, said.append)
    assert [name for name, _ in runs] == list("aabbccbbccaa")
    assert [operations for _, operations in runs] == ["100", "800"] * 6
    assert said[0] == "g, round 1 of 2: a"
    assert said[-1] == "g, round 2 of 2: a"


def test_no_programs_give_no_figures() -> None:
    assert harness.measure([], 3) == Outcome()


def test_noise_in_a_short_run_makes_no_figure_lower() -> None:
    assert harness.per_operation([1.0, 3.0], [5.0, 6.0], 4) == [1e6, 1.25e6]


def test_too_few_operations_to_measure() -> None:
    outcome = harness.measure([difference("rawaio/a", lambda words: Usage(1.0, 1.0))], 2)
    assert outcome.missing == [
        "g, rawaio/a: 700 more operations took no more than 1.000 s; measure more"
    ]
    assert (outcome.figures, outcome.failed) == ({}, True)


def test_what_fails_is_left_out_with_its_reason() -> None:
    turns: list[str] = []

    def output(words: Sequence[str]) -> str:
        turns.append(words[0])
        if words[0] == "bad":
            raise ProgramError("status 1\nTraceback\nOSError: not permitted")
        return '{"iops": 5}'

    cells = [harness.by_report("g", f"x/{word}", [word], output=output) for word in ("good", "bad")]
    outcome = harness.measure(cells, 3)
    assert outcome.figures == {"g": {"x/good": {"iops": [5, 5, 5]}}}
    assert (outcome.missing, outcome.failed) == (["g, x/bad: OSError: not permitted"], False)
    assert Counter(turns) == {"good": 3, "bad": 1}
    assert harness.reason_of(ValueError()) == "ValueError"


def test_outcomes_are_added() -> None:
    outcome = Outcome({"g": {"a": {"ms": [1.0]}}}, ["x"])
    outcome.add(Outcome({"g": {"b": {"ms": [2.0]}}, "h": {}}, ["y"], failed=True))
    assert outcome.figures == {"g": {"a": {"ms": [1.0]}, "b": {"ms": [2.0]}}, "h": {}}
    assert (outcome.missing, outcome.failed) == (["x", "y"], True)


def test_time_is_that_of_the_program() -> None:
    usage = harness.usage_of([sys.executable, "-S", "-c", "sum(range(10**5))"])
    assert usage.wall_s > 0
    assert usage.cpu_s > 0


def test_a_program_that_fails_is_told_with_its_words() -> None:
    words = [sys.executable, "-S", "-c", "import sys; sys.exit('cannot')"]
    with pytest.raises(ProgramError, match="status 1\ncannot"):
        harness.usage_of(words)
    with pytest.raises(ProgramError, match="status 1\ncannot"):
        harness.output_of(words)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        harness.usage_of(["/nonexistent/program"])


def test_programs_find_this_checkout_and_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    harness.environment.cache_clear()
    program = "import sys; print(sys.dont_write_bytecode, sys.pycache_prefix, *sys.path[1:3])"
    one, other = (harness.output_of([sys.executable, "-S", "-c", program]) for _ in range(2))
    assert one == other
    prefix = harness.environment()["PYTHONPYCACHEPREFIX"]
    assert one.split() == ["False", prefix, str(harness.ROOT), "/elsewhere"]
    harness.environment.cache_clear()


def test_quick_or_full() -> None:
    assert Setting(Path(), quick=True).pick(1, 2) == 1
    assert Setting(Path()).pick(1, 2) == 2


# -- figures -------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    one, other = [1.0, 4.0, 9.0], [2.0, 2.0, 3.0]
    assert figures.compare(one, other) == Spread(0.5, 2.0, 3.0, of_best=0.5)
    assert figures.compare(one, other, higher_is_better=True).of_best == 3.0
    assert figures.compare(one, other, difference=True) == Spread(-1.0, 2.0, 6.0, of_best=-1.0)


positive = st.floats(0.001, 1000)


@given(st.lists(st.tuples(positive, positive), min_size=1))
def test_ratios_are_in_order(pairs: list[tuple[float, float]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    ratio = figures.compare(one, other)
    assert ratio.lowest <= ratio.median <= ratio.highest
    inverse = figures.compare(other, one)
    assert inverse.lowest == pytest.approx(1 / ratio.highest)
    assert inverse.of_best == pytest.approx(1 / ratio.of_best)


def test_rounds_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        figures.compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no rounds"):
        figures.compare([], [])


GROUP = {
    "rawaio/a": {"cpu_us": [1.0, 2.0, 9.0], "iops": [1.0, 1.0, 1.0]},
    "rawaio/b": {"cpu_us": [3.0, 3.0, 1.0], "iops": [5.0, 5.0, 5.0]},
    "fio libaio/x": {"cpu_us": [4.0, 4.0, 4.0]},
    "fio libaio/y": {"cpu_us": [2.0, 2.0, 3.0]},
    "fio io_uring/x": {"p99_us": [2.0, 2.0, 2.0]},
}


def test_the_best_has_the_best_median() -> None:
    assert figures.best(GROUP, ["rawaio/a", "rawaio/b"], "cpu_us") == "rawaio/a"
    assert figures.best(GROUP, ["rawaio/a", "rawaio/b"], "iops") == "rawaio/b"
    assert figures.best(GROUP, ["fio libaio/x"], "iops") is None


def test_each_rival_is_represented_by_its_best() -> None:
    assert figures.rivals_in(GROUP, "cpu_us") == {"fio libaio": "fio libaio/y"}
    assert figures.rivals_in(GROUP, "p99_us") == {"fio io_uring": "fio io_uring/x"}


def test_a_metric_that_is_not_known_is_a_system_call() -> None:
    assert figures.metric("io_submit").title == "io_submit for each"


# -- inside of programs --------------------------------------------------------------------------


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(i) for i in range(1, 1001)]
    assert watch.percentile(values[::-1], 0.5) == 500.0
    assert watch.percentile(values, 0.999) == 999.0
    assert watch.percentile([7.0, 8.0], 0.0) == 7.0
    with pytest.raises(ValueError, match="no values"):
        watch.percentile([], 0.5)


@pytest.mark.parametrize("latency", [False, True])
def test_each_worker_does_its_least(*, latency: bool) -> None:
    timer = watch.Watch(0.0, latency=latency, least=3)
    with timer.running():
        assert [list(timer.each("abcdef")) for _ in range(2)] == [["a", "b", "c"]] * 2
    assert timer.operations == 6
    assert len(timer.latencies_s) == 6 * latency
    assert set(timer.figures(4096)) == ({"p50_us", "p99_us"} if latency else {"iops", "cpu_us"})


def test_what_is_large_is_counted_in_mebibytes() -> None:
    timer = watch.Watch(0.0)
    timer.operations, timer.wall_s, timer.cpu_s = 10, 2.0, 0.001
    assert timer.figures(2 << 20) == {"mib_s": 10.0, "cpu_us": 100.0}
    timer.operations = 0
    with pytest.raises(OSError, match="nothing was done"):
        timer.figures(4096)


def test_how_late_a_heart_beats() -> None:
    late = heartbeat.late_figures([0.001] * 998 + [0.1, 0.2])
    assert late == {
        "late_p50_ms": 1.0,
        "late_p99_ms": 1.0,
        "late_p999_ms": 100.0,
        "late_max_ms": 200.0,
    }


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


# -- rivals and the machine ----------------------------------------------------------------------


def test_rivals_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "libaio":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1"

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert rivals.missing("fio libaio", "strace", "python-libaio", "caio", "threads", "uvloop") == [
        "fio libaio: not installed (Debian package fio)",
        "strace: not installed (Debian package strace)",
        "python-libaio: not installed (pip install libaio==0.9.5)",
        "caio: version 0.1 instead of 0.12.10",
    ]
    assert rivals.versions() == {
        "aiofiles": "0.1",
        "caio": "0.1",
        "libaio": "none",
        "uvloop": "0.1",
        "fio": "none",
        "strace": "none",
    }


def test_versions_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    found = rivals.versions(lambda *words: " ".join(words))
    assert found["fio"] == "fio --version"


def test_the_machine_is_described(tmp_path: Path) -> None:
    where = machine.describe(Setting(tmp_path, quick=True, loop="uvloop"))
    assert {"machine", "processor", "kernel", "file system", "python", "caio"} <= where.keys()
    assert (where["runs"], where["loop"]) == ("quick", "uvloop")
    assert machine.cpu_model("processor : 0\nmodel name\t: Some CPU: x\n") == "Some CPU: x"
    assert machine.cpu_model("processor : 0\n") == "unknown"


def test_the_innermost_mount_counts(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    point = str(folder).replace(" ", "\\040")
    mounts = [
        "1 0 8:1 / / rw - ext4 /dev/sda rw",
        f"2 1 0:5 / {point} rw,relatime shared:1 - tmpfs tmpfs rw",
    ]
    assert machine.file_system(folder / "deeper", "\n".join(mounts)) == "tmpfs"
    assert machine.file_system(tmp_path, "\n".join(mounts)) == "ext4"
    assert machine.file_system(tmp_path, "") == "unknown"


# -- fio -----------------------------------------------------------------------------------------


def fio_says(total_ios: int = 50_000, **options: str) -> str:
    done = {
        "runtime": 1000,
        "total_ios": total_ios,
        "lat_ns": {"percentile": {"50.000000": 5000, "99.000000": 70_000}},
    }
    job = {
        "job options": options,
        "job_runtime": 2000,
        "usr_cpu": 10.0,
        "sys_cpu": 15.0,
        "read" if "read" in options["rw"] else "write": done,
    }
    return "fio: a warning\n" + json.dumps({"jobs": [job]})


def test_fio_is_understood() -> None:
    said = fio.read(fio_says(rw="randread", bs="4096", gtod_reduce="1"))
    assert said == {"iops": 50_000, "cpu_us": pytest.approx(10.0)}
    said = fio.read(fio_says(total_ios=10, rw="write", bs=str(2 << 20), gtod_reduce="1"))
    assert said == {"mib_s": 20.0, "cpu_us": pytest.approx(50_000)}
    assert fio.read(fio_says(rw="read", bs="4096")) == {"p50_us": 5.0, "p99_us": 70.0}
    with pytest.raises(ValueError, match="has done nothing"):
        fio.read(fio_says(total_ios=0, rw="read", bs="4096"))
    with pytest.raises(ValueError, match="substring not found"):
        fio.read("fio: no")


def test_fio_is_asked_for_what_is_meant() -> None:
    ways = fio.null_ways(32)
    assert sum(name.startswith("fio libaio/") for name in ways) == 8
    for name, options in ways.items():
        words = fio.null_command(options, 512, 32, writes=False, operations=640)
        assert {"--number_ios=640", "--size=327680", "--rw=read"} <= set(words)
        assert f"--ioengine={name.split()[1].split('/')[0]}" in words
        assert ("--userspace_reap" in words) is ("/ring" in name)
        assert ("--gtod_reduce=1" in words) is ("gtod_reduce" in name)


# -- sections ------------------------------------------------------------------------------------

METRICS = ("cpu_us", "wall_us", "iops", "mib_s", "ms", "modules", "late_p999_ms", "p99_us")


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, list[Cell]]:
    """All cells of all sections, by section, when every rival is here."""

    @contextmanager
    def temporary_file(folder: Path, nbytes: int) -> Generator[Path]:
        path = folder / "file"
        path.write_bytes(bytes(files.BLOCK))
        yield path

    monkeypatch.setattr(rivals, "why_not", lambda program: None)
    monkeypatch.setattr(files, "temporary_file", temporary_file)
    monkeypatch.setattr(files, "make_file", lambda path, nbytes, *, sync: None)
    monkeypatch.setattr(files, "warm", lambda path, *, direct: None)
    found: dict[str, list[Cell]] = {}
    for section, name in command.SECTIONS.items():
        module = import_module(f"benchmarks.sections.{name}")
        cells = found.setdefault(section, [])

        def measure(
            given: Sequence[Cell], rounds: int, say: object, cells: list[Cell] = cells
        ) -> Outcome:
            assert rounds >= 1
            cells += given
            each = {metric: [1.0] for metric in METRICS}
            outcome = Outcome()
            for cell in given:
                outcome.figures.setdefault(cell.group, {})[cell.name] = each
            return outcome

        monkeypatch.setattr(module, "measure", measure)
        assert module.section(Setting(tmp_path)).missing == []
    return found


def figures_of(cells: Sequence[Cell]) -> Figures:
    found: Figures = {}
    for cell in cells:
        columns = {metric: [1.0] for metric in METRICS}
        if cell.group.startswith("latency"):
            columns = {"p99_us": [1.0]}
        found.setdefault(cell.group, {})[cell.name] = columns
    return found


def test_every_budget_is_measured(asked_for: dict[str, list[Cell]]) -> None:
    for budget in budgets.BUDGETS:
        found = figures_of(asked_for[budget.section])
        ours = found[budget.ours.group]
        for pattern in (*budget.ours.names, *budget.beside):
            assert figures.matching(ours, [pattern])
        if budget.theirs is not None:
            assert figures.matching(found[budget.theirs.group], budget.theirs.names)
    outcomes = {name: Outcome(figures_of(cells)) for name, cells in asked_for.items()}
    rows = budgets.rows(outcomes)
    assert all(row.reached is not None for row in rows)
    assert {row.verdict for row in rows if row.unit == "x" and row.at_least} == {"aim"}


def test_no_program_is_asked_for_twice(asked_for: dict[str, list[Cell]]) -> None:
    for section, cells in asked_for.items():
        names = [(cell.group, cell.name) for cell in cells]
        if section == "startup":
            names = names[len(startup.PROGRAMS) :]  # once more, for what has to be compiled
        assert len(names) == len(set(names))


def test_every_line_of_a_chart_is_measured(asked_for: dict[str, list[Cell]]) -> None:
    direct, growth = (figures_of(asked_for[name]) for name in ("direct", "growth"))
    for prefix, metric, numbers in (("depth", "iops", 4), ("latency, depth", "p99_us", 4)):
        lines = charts.by_number(direct, prefix, metric, charts.DEPTH_LINES)
        assert len(lines["rawaio/IOContext"]) == len(lines["fio libaio, best way"]) == numbers
    for what, numbers in (("depth", 5), ("files", 4), ("tasks", 5)):
        _, names = charts.GROWTH_LINES[what]
        lines = charts.by_number(growth, what, "cpu_us", names)
        assert [len(each) for each in lines.values()] == [numbers, numbers]


def test_all_do_the_same_number_of_whole_batches() -> None:
    for quick in (False, True):
        for name in ("fio libaio/x", "python-libaio/batch", *null_section.OURS["read 512"]):
            operations = null_section.operations(name, Setting(Path(), quick=quick))
            batch = null.BULK if name.startswith("rawaio/bulk") else null.DEPTH
            assert operations % (8 * batch) == 0


def test_tasks_of_asyncio_programs_share_alike(asked_for: dict[str, list[Cell]]) -> None:
    section = import_module("benchmarks.sections.asyncio_reads")
    assert {cell.name for cell in asked_for["asyncio"] if cell.group == "cached"} == set(
        asyncio_reads.WAYS["cached"]
    )
    for name, operations in section._OPERATIONS.items():
        batch = 1024 if name.endswith("rawaio") else asyncio_reads.TASKS
        assert operations % (2 * 8 * batch) == 0  # halved, and an eighth of it


def test_without_rivals_rawaio_is_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def measure(cells: Sequence[Cell], rounds: int, say: object) -> Outcome:
        asked.extend(cell.name for cell in cells)
        return Outcome()

    monkeypatch.setattr(rivals, "why_not", lambda program: "not installed")
    monkeypatch.setattr(null_section, "measure", measure)
    outcome = null_section.section(Setting(tmp_path))
    assert outcome.missing == ["fio: not installed", "python-libaio: not installed"]
    assert {figures.program_of(name) for name in asked} == {"rawaio"}
    assert writes_section.synced_by_fio(tmp_path, 0.1) == []
    assert system_calls.section(Setting(tmp_path)).missing == [
        "strace: not installed",
        "caio: not installed",
    ]


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
    each = system_calls.per_operation(few, many, 1000)
    assert each == {"calls": 3.0, "epoll_wait": 2.0, "preadv2": 1.0}
    assert list(each) == ["calls", "epoll_wait", "preadv2"]


# -- budgets -------------------------------------------------------------------------------------


def budget(**changes: object) -> budgets.Budget:
    what: dict[str, object] = {
        "row": "what",
        "section": "s",
        "metric": "cpu_us",
        "ours": budgets.Side("g", ("rawaio/*",)),
        "theirs": budgets.Side("g", ("fio libaio/*",)),
        "budget": 0.95,
        "aim": 0.5,
        **changes,
    }
    return budgets.Budget(**what)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_what_is_shown_is_judged() -> None:
    assert [budgets.judge(budget(), x) for x in (0.5, 0.504, 0.51, 0.954, 0.96, 1.9)] == [
        "aim",
        "aim",
        "within",
        "within",
        "BEHIND by 1 %",
        "BEHIND by 100 %",
    ]
    more = budget(metric="iops", aim=1.0)
    assert [budgets.judge(more, x) for x in (1.1, 0.96, 0.76)] == [
        "aim",
        "within",
        "BEHIND by 20 %",
    ]
    late = budget(unit="ms", budget=20.0, aim=None)
    assert [budgets.judge(late, x) for x in (20.0, 21.5)] == ["within", "BEHIND by 1.50 ms"]


def test_the_best_way_counts_and_others_stand_beside_it() -> None:
    outcomes = {"s": Outcome({"g": GROUP})}
    row = budgets.row_of(budget(beside=("rawaio/*",)), outcomes)
    assert (row.ours, row.theirs, row.verdict) == ("rawaio/a", "fio libaio/y", "BEHIND by 5 %")
    assert row.reached == Spread(0.5, 1.0, 3.0, of_best=0.5)
    assert row.beside == [
        budgets.Beside("rawaio/b", Spread(1 / 3, 1.5, 1.5, of_best=0.5)),
    ]
    more = budgets.row_of(budget(unit="ms", budget=3.0), outcomes)
    assert more.reached == Spread(-1.0, 0.0, 6.0, of_best=-1.0)
    alone = budgets.row_of(budget(theirs=None, unit="ms", budget=3.0), outcomes)
    assert alone.reached == Spread(1.0, 2.0, 9.0, of_best=1.0)


def test_what_could_not_be_measured_says_so() -> None:
    assert budgets.row_of(budget(), {}).verdict == "not measured: the section s was not run"
    ours = {"g": {"rawaio/a": {"cpu_us": [1.0]}}}
    outcome = Outcome(ours, ["fio: not installed", "caio: not installed"])
    assert budgets.row_of(budget(), {"s": outcome}).verdict == "not measured: fio: not installed"
    row = budgets.row_of(budget(), {"s": Outcome(missing=["g, rawaio/a: no ring"])})
    assert (row.verdict, row.reached) == ("not measured: g, rawaio/a: no ring", None)
    assert budgets.row_of(budget(), {"s": Outcome(ours)}).verdict == (
        "not measured: no figures of fio libaio, g"
    )


# -- what is shown and written -------------------------------------------------------------------


def test_figures_are_shown_with_their_rounds_and_beside_rivals() -> None:
    group = {
        "rawaio/a": {"iops": [10.0, 20.0, 60.0]},
        "fio libaio/y": {"iops": [20.0, 20.0, 20.0]},
    }
    lines = render.render_section("direct", "What.", {"g": group}).splitlines()
    assert lines[1:4] == ["== direct: What.", "", "-- g"]
    assert [line.split() for line in lines[4:]] == [
        ["operations", "a", "second"],
        ["rawaio/a", "20", "(10..60)"],
        ["fio", "libaio/y", "20", "(20..20)"],
        [],
        ["operations", "a", "second,", "times", "fio", "libaio/y"],
        ["rawaio/a", "1.00", "(0.50..3.00)"],
    ]
    assert render.table([["a", "b"], ["aa", "bb"]]) == ["a    b", "aa  bb"]


def test_groups_of_rawaio_alone_are_one_table() -> None:
    grown: Figures = {f"depth {n}": {"rawaio/a": {"cpu_us": [float(n)]}} for n in (1, 8)}
    lines = render.render_section("growth", "What.", grown).splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == ["1.000", "8.000"]
    assert sum("processor time" in line for line in lines) == 1


def test_budgets_are_shown() -> None:
    outcomes = {"s": Outcome({"g": GROUP})}
    rows = [
        budgets.row_of(budget(beside=("rawaio/b",)), outcomes),
        budgets.row_of(budget(section="t", metric="iops", aim=None), outcomes),
    ]
    lines = render.render_budgets(rows).splitlines()
    assert lines[1].split() == [
        *("what", "1.00", "(0.50..3.00)", "x", "0.50", "<=", "0.95", "0.5"),
        *("BEHIND", "by", "5", "%"),
    ]
    assert lines[2] == "    rawaio/a to fio libaio/y"
    assert lines[3].split() == ["rawaio/b", "1.50", "(0.33..1.50)", "x", "0.50"]
    assert lines[4].startswith("what ")
    assert lines[4].endswith(">= 0.95       not measured: the section t was not run")


def test_a_report_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    outcomes = {"s": Outcome({"g": GROUP}, ["x"], failed=True)}
    report.save(path, {"kernel": "6"}, outcomes, [budgets.row_of(budget(), {})], {"s": 1.5})
    assert report.load(path) == report.Earlier({"kernel": "6"}, outcomes)
    assert json.loads(path.read_text())["budgets"][0]["verdict"].startswith("not measured")
    path.write_text('{"sections": {}}')
    with pytest.raises(ValueError, match="not a report of the benchmarks"):
        report.load(path)


def test_figures_stand_beside_earlier_ones() -> None:
    then = report.Earlier(
        {"kernel": "5", "load": "1"},
        {"s": Outcome({"g": {"rawaio/a": {"cpu_us": [2.0]}, "gone/x": {"cpu_us": [1.0]}}})},
    )
    now = {"s": Outcome({"g": {"rawaio/a": {"cpu_us": [3.0, 5.0]}}}), "t": Outcome()}
    where = {"kernel": "6", "load": "2", "caio": "1"}
    lines = comparison.render_comparison(where, now, then).splitlines()
    assert lines[2:4] == [
        "differs: kernel was 5, is 6",
        "differs: caio was not told, is 1",
    ]
    words = [line.split() for line in lines]
    title = figures.metric("cpu_us").title.split()
    assert ["rawaio/a:", *title, "2.000", "4.000", "2.00"] in words
    assert ["gone/x:", *title, "1.000"] in words
    assert "the earlier report has nothing of t" in lines


# -- charts --------------------------------------------------------------------------------------


def test_points_have_their_rounds_beside_them() -> None:
    assert charts.points([[1.0, 5.0, 2.0]]) == charts.Points([2.0], [1.0], [3.0])
    assert charts.range_of([[1.0], [4.0]]) == (0.8, 5.0)


def test_ticks_are_round() -> None:
    assert charts.ticks(0.4, 21) == ([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    assert charts.ticks(900, 2100) == ([1000, 2000], ["1,000", "2,000"])


def test_charts_are_drawn_of_what_there_is(
    asked_for: dict[str, list[Cell]], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert charts.draw({}, tmp_path / "none") == []
    sections = {name: figures_of(cells) for name, cells in asked_for.items()}
    for names in sections["heartbeat"].values():
        for columns in names.values():
            columns.update({"late_p50_ms": [0.1, 0.2], "late_p99_ms": [1.0, 2.0]})
            columns["late_p999_ms"] = [2.0, 30.0]
    drawn = charts.draw(sections, tmp_path / "charts")
    assert [path.name for path in drawn] == list(charts.CHARTS)
    for path in drawn:
        assert "</svg>" in path.read_text("utf-8")


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def one_section(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """There is the section null only; how it was called."""
    called: list[Setting] = []

    def section(setting: Setting) -> Outcome:
        called.append(setting)
        setting.say("measuring")
        return Outcome({"read 512": GROUP}, ["x: not there"])

    monkeypatch.setattr(command, "SECTIONS", {"null": "null"})
    monkeypatch.setattr(null_section, "section", section)
    return called


def test_the_command_shows_and_writes_everything(
    one_section: list[Setting], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    options = ["--quick", "--folder", str(tmp_path), "--json", str(file)]
    assert command.main(options) == 0
    assert (one_section[0].quick, one_section[0].folder) == (True, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"load {report.load(file).where['load']}")
    assert "== null: What an operation costs when there is no work behind it, beside fio" in (
        "\n".join(lines)
    )
    assert lines[-1] == "missing: null, x: not there"
    assert report.load(file).outcomes["null"].figures == {"read 512": GROUP}
    assert command.main([*options, "--compare", str(file)]) == 0
    assert "-- null, read 512" in capsys.readouterr().out


def test_a_section_that_fails_does_not_end_the_others(
    one_section: list[Setting],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def section(setting: Setting) -> Outcome:
        raise OSError("no space left")

    monkeypatch.setattr(command, "SECTIONS", {"startup": "startup", "null": "null"})
    monkeypatch.setattr(startup, "section", section)
    assert command.main([]) == 1
    assert len(one_section) == 1
    assert "missing: startup, all of it: no space left" in capsys.readouterr().out


def test_what_would_be_found_too_late_is_found_first(
    one_section: list[Setting],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    monkeypatch.setattr(rivals, "why_not", lambda program: "not installed")
    for options, said in (
        (["--charts", str(tmp_path)], "--charts: matplotlib is not installed"),
        (["--loop", "uvloop"], "--loop uvloop: not installed"),
        (["--compare", str(tmp_path / "none")], "--compare: "),
        (["--json", str(tmp_path / "none" / "file")], "no such folder"),
        (["--folder", str(tmp_path / "none")], "no such folder"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
    ):
        with pytest.raises(SystemExit):
            command.main(options)
        assert said in capsys.readouterr().err
    assert one_section == []


def test_progress_is_told_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command.Progress().say("not on a terminal")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = command.Progress()
    progress.section = "null"
    progress.say("round 1")
    progress.clear()
    assert capsys.readouterr().err == "\r\x1b[Knull: round 1\r\x1b[K"

"""That the benchmark of threads does its work on this kernel, and what it makes of figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import rawaio
from benchmarks import harness, threads
from benchmarks.threads import Figure, Program, Span

_SCRIPT = Path(threads.__file__)


@pytest.fixture(autouse=True)
def native_aio() -> None:
    try:
        context = rawaio.IOContext(1)
    except (rawaio.UnsupportedError, OSError) as error:
        pytest.skip(f"no native AIO: {error}")
    context.close()


@pytest.mark.parametrize("way", threads.WAYS)
@pytest.mark.parametrize("kind", threads.KINDS)
def test_a_program_does_its_work(kind: str, way: str) -> None:
    command = [sys.executable, "-W", "error", str(_SCRIPT), "--work", kind, way, "3", "8192"]
    spans = [Span(*span) for span in json.loads(harness.output_of(command))]
    assert len(spans) == 3
    for span in spans:
        assert 0 < span.begun < span.ended
        assert span.cpu > 0


def test_every_read_is_looked_at() -> None:
    with pytest.raises(OSError, match="res is 0, not 512"):
        threads.check(0)


def test_a_thread_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(context: rawaio.IOContext, fd: int, operations: int) -> None:
        raise ValueError

    monkeypatch.setitem(threads.WAYS, "requests", fails)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(RuntimeError, match="2 of 2 threads failed"):
        threads.in_threads("requests", 2, 32)


def test_a_process_that_fails_is_told() -> None:
    command = [sys.executable, str(_SCRIPT), "--work", "processes", "no such way", "2", "32"]
    with pytest.raises(harness.ProgramError, match="2 of 2 processes failed"):
        harness.output_of(command)


def test_figures() -> None:
    """The clock runs from the first begun to the last ended, and processors add up."""
    figure = threads.figure([Span(1.0, 3.0, 1.5), Span(1.5, 5.0, 2.5)], 100)
    assert figure == Figure(4.0 / 200, 4.0 / 200)


def test_programs_and_their_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    programs = threads.find_programs()
    assert [program.name for program in programs if program.way == "many"] == [
        "many/threads 1",
        "many/threads 2",
        "many/processes 2",
        "many/threads 4",
        "many/processes 4",
    ]
    figures = {p.name: [Figure(1e-6 / p.n, 2e-6), Figure(2e-6 / p.n, 2e-6)] for p in programs}
    report = threads.make_report(programs, figures)
    assert set(report.throughput) == {program.name for program in programs if program.n > 1}
    for program in programs:
        if program.n > 1:
            assert report.throughput[program.name].median == pytest.approx(program.n)
            assert report.cost[program.name].median == pytest.approx(1)
    text = threads.render(report)
    assert "times one thread: throughput" in text
    assert ("the GIL is on" in text) == threads.has_gil()


def test_one_cpu_has_two_threads_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert {program.n for program in threads.find_programs()} == {1, 2}


def test_the_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads, "OPERATIONS", {"requests": 64, "many": threads.MANY})
    monkeypatch.setattr(threads, "QUICK_ROUNDS", 1)
    assert threads.main(["--quick", "--json", str(tmp_path / "json")]) == 0
    report = json.loads((tmp_path / "json").read_text("utf-8"))
    assert report["benchmark"] == "threads"
    assert all(figure > 0 for rounds in report["wall"].values() for figure in rounds)
    assert "us by the clock" in capsys.readouterr().out


def test_a_program_that_fails_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threads, "find_programs", lambda: [Program("threads", "nothing", 1)])
    monkeypatch.setattr(threads, "OPERATIONS", {"nothing": 1})
    assert threads.main(["--quick"]) == 1
    assert "threads: " in capsys.readouterr().err

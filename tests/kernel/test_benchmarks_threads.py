"""That the benchmark of threads does its work on this kernel, and what it makes of figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rawaio
from benchmarks import harness
from benchmarks.programs import threads
from benchmarks.programs.threads import Span
from benchmarks.sections import threads as section


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
    command = harness.own("threads", kind=kind, way=way, n=3, operations=8192)
    figures = json.loads(harness.output_of([command[0], "-W", "error", *command[1:]]))
    assert figures["iops"] == pytest.approx(1e6 / figures["wall_us"])
    assert figures["cpu_us"] > 0


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
    command = harness.own("threads", kind="processes", way="no such way", n=2, operations=32)
    with pytest.raises(harness.ProgramError, match="2 of 2 processes failed"):
        harness.output_of(command)


def test_figures() -> None:
    """The clock runs from the first begun to the last ended, and processors add up."""
    assert threads.figures([Span(1.0, 3.0, 1.5), Span(1.5, 5.0, 2.5)], 100) == {
        "iops": 50.0,
        "wall_us": 20_000.0,
        "cpu_us": 20_000.0,
    }


def test_what_is_measured() -> None:
    cells = section.cells(harness.Setting(Path(), quick=True), 4)
    assert [cell.name for cell in cells if cell.group == "many"] == [
        "rawaio/threads 1",
        "rawaio/threads 2",
        "rawaio/processes 2",
        "rawaio/threads 4",
        "rawaio/processes 4",
    ]

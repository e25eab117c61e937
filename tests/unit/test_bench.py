"""What the bench command does with numbers, without reading anything."""

from __future__ import annotations

import argparse
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rawaio
from rawaio.cli import (
    _bench_engines,
    _bench_figures,
    _bench_settings,
    _bench_target,
    _progress,
    bench,
)
from rawaio.cli._bench_engines import Slice
from rawaio.cli._bench_figures import Cell, Report
from rawaio.cli._bench_settings import Settings

# -- arguments -----------------------------------------------------------------------------------


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", exit_on_error=False)
    _bench_settings.add_arguments(parser)
    return parser.parse_args(words)


def test_without_arguments_a_temporary_file_is_read() -> None:
    arguments = parsed()
    assert arguments.path is None
    assert arguments.seconds == 1.0
    assert arguments.depths == (1, 8, 32, 128)
    assert arguments.block_size == 4096
    assert arguments.size == 256 << 20
    assert arguments.json is False


def test_arguments_are_parsed() -> None:
    words = ["x", "--seconds=.5", "--depths=4,2", "--block-size=512", "--size=1G", "--seed=7"]
    arguments = parsed(*words, "--json")
    assert vars(arguments) == {
        "path": "x",
        "seconds": 0.5,
        "depths": (4, 2),
        "block_size": 512,
        "size": 1 << 30,
        "seed": 7,
        "json": True,
    }


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("12b", 12),
        ("4096", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("3MB", 3 << 20),
        ("256M", 256 << 20),
        ("1g", 1 << 30),
        ("2T", 2 << 40),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert _bench_settings.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "0k", "k", "-1", "1.5M", "1kk", "4p", "\u0664", "1 k"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        _bench_settings.parse_size(text)


def test_depths_are_kept_in_order_and_once() -> None:
    assert _bench_settings.parse_depths("8, 1,8,32") == (8, 1, 32)


@pytest.mark.parametrize("text", ["", "0", "1,", "1,0", "-1", "1;2", "a"])
def test_wrong_depths(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="commas"):
        _bench_settings.parse_depths(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "1s"])
def test_wrong_seconds(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="seconds"):
        _bench_settings.parse_seconds(text)


def test_what_is_wrong_is_said_by_argparse() -> None:
    with pytest.raises(argparse.ArgumentError, match=r"--size: a number above 0 .* not 'x'"):
        parsed("--size=x")


SETTINGS = Settings(path=None, seconds=1.0, depths=(1, 4), block_size=4096, size=1 << 20, seed=1)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.01, 4), (1, 4), (4, 4), (4.5, 5), (60, 60)])
def test_no_turn_is_longer_than_a_second(seconds: float, rounds: int) -> None:
    settings = replace(SETTINGS, seconds=seconds)
    assert settings.rounds == rounds
    assert seconds / settings.rounds <= 1


# -- figures -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 40)))
def test_latencies_are_counted_within_one_percent(latencies: list[int]) -> None:
    counts = _bench_engines.count_latencies(latencies)
    assert counts.total() == len(latencies)
    for exact, kept in zip(sorted(latencies), sorted(counts.elements()), strict=True):
        assert kept <= exact <= kept * (1 + 1 / 128)
        assert kept.bit_length() == exact.bit_length()


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1), st.integers(0, 100))
def test_percentiles(values: list[int], percent: int) -> None:
    found = _bench_figures.percentile(Counter(values), percent / 100)
    assert found in values
    below = sum(value < found for value in values)
    not_above = sum(value <= found for value in values)
    assert below <= percent / 100 * len(values) <= not_above or not below


def test_percentiles_of_a_hundred_values() -> None:
    counts = Counter(range(1, 101))
    assert _bench_figures.percentile(counts, 0.5) == 50
    assert _bench_figures.percentile(counts, 0.99) == 99
    assert _bench_figures.percentile(counts, 1.0) == 100


def test_nothing_has_no_percentile() -> None:
    with pytest.raises(ValueError, match="no values"):
        _bench_figures.percentile(Counter(), 0.5)


@settings(deadline=None)
@given(st.integers(1, 100_000), st.sampled_from([512, 4096]), st.integers())
def test_offsets_are_blocks_of_the_file(nr_blocks: int, block_size: int, seed: int) -> None:
    offsets = _bench_target.choose_offsets(nr_blocks, block_size, seed)
    assert offsets
    assert all(0 <= o < nr_blocks * block_size and o % block_size == 0 for o in offsets)
    assert offsets == _bench_target.choose_offsets(nr_blocks, block_size, seed)


def test_offsets_differ_by_seed() -> None:
    assert _bench_target.choose_offsets(1000, 512, 1) != _bench_target.choose_offsets(1000, 512, 2)


@dataclass(eq=False)
class FakeEngine:
    """Reads nothing, and says when it had its turn."""

    name: str
    depth: int
    turns: list[tuple[str, int]]
    slices: list[Slice]

    @property
    def label(self) -> str:
        return self.name.upper()

    def run(self, offsets: Sequence[int], seconds: float) -> Slice:
        assert offsets == [0, 4096]
        assert seconds == 0.25
        self.turns.append((self.name, self.depth))
        return self.slices.pop(0)


def aio_slice(operations: int = 100, sleeps: int = 0) -> Slice:
    return Slice(
        operations=operations,
        wall_ns=1_000_000,
        cpu_ns=500_000,
        latencies_ns=Counter({10_000: operations - 1, 90_000: 1}),
        submit_ns=250_000,
        submit_looks=100,
        submit_sleeps=sleeps,
        ring_reaps=operations,
        waits=3,
    )


def test_engines_take_turns_and_each_is_first_for_once() -> None:
    turns: list[tuple[str, int]] = []
    engines = [
        [FakeEngine(name, depth, turns, [aio_slice()] * 4) for name in "abc"] for depth in (1, 8)
    ]
    cells = bench.measure(engines, [0, 4096], SETTINGS, _progress.Progress(StringIO()))
    expected = ["abc", "abc", "bca", "bca", "cab", "cab", "abc", "abc"]
    assert "".join(name for name, _ in turns) == "".join(expected)
    assert [depth for _, depth in turns] == [1, 1, 1, 8, 8, 8] * 4
    assert [(cell.engine, cell.depth) for cell in cells] == [
        (name, depth) for depth in (1, 8) for name in "abc"
    ]


def test_a_cell_is_the_sum_of_its_turns() -> None:
    engine = FakeEngine("a", 8, [], [])
    cell = _bench_figures.summarize(engine, [aio_slice(100), aio_slice(300)])
    assert cell == Cell(
        engine="a",
        label="A",
        depth=8,
        operations=400,
        seconds=0.002,
        iops=200_000,
        iops_of_rounds=(100_000, 300_000),
        cpu_us_per_operation=2.5,
        latency_us_p50=10,
        latency_us_p99=10,
        reaped="ring",
        ring_reaps=400,
        syscall_reaps=0,
        waits=6,
        submit_share=0.25,
        submit_sleep_share=0,
        submit_blocked=False,
    )
    assert cell.spread == 0.5


@pytest.mark.parametrize(("sleeps", "blocked"), [(0, False), (5, False), (6, True), (100, True)])
def test_submit_blocks_when_more_than_one_in_twenty_sleeps(sleeps: int, blocked: bool) -> None:
    cell = _bench_figures.summarize(FakeEngine("a", 8, [], []), [aio_slice(sleeps=sleeps)])
    assert cell.submit_sleep_share == sleeps / 100
    assert cell.submit_blocked is blocked


PREADV = _bench_figures.summarize(
    FakeEngine("os.preadv", 1, [], []), [Slice(10, 1_000, 900, Counter({99: 10}))]
)


def test_what_does_not_submit_has_no_share_of_it() -> None:
    assert (PREADV.submit_share, PREADV.submit_sleep_share, PREADV.submit_blocked) == (None,) * 3
    assert PREADV.reaped == ""


@pytest.mark.parametrize(
    ("ring", "syscall", "text"),
    [
        (0, 0, ""),
        (5, 0, "ring"),
        (0, 5, "io_getevents"),
        (999, 1, "ring 99.9%, else io_getevents"),
    ],
)
def test_how_completions_were_reaped(ring: int, syscall: int, text: str) -> None:
    assert _bench_figures.describe_reaps(ring, syscall) == text


# -- showing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (4096, "4 KiB"),
        (10**6, "976.6 KiB"),
        (256 << 20, "256 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_sizes_are_shown(nbytes: int, text: str) -> None:
    assert _bench_settings.format_size(nbytes) == text


@pytest.mark.parametrize(
    ("us", "text"),
    [
        (0.123, "0.12"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.94, "99.9"),
        (99.96, "100"),
        (12345.6, "12,346"),
    ],
)
def test_microseconds_are_shown(us: float, text: str) -> None:
    assert _bench_figures.format_us(us) == text


REPORT = Report(
    rawaio="1.2.3",
    machine="x86_64",
    cpus=2,
    kernel="6.1.0",
    python="CPython 3.11.2",
    path="/data",
    kind="temporary file",
    file_system="ext4",
    direct=True,
    span=1 << 20,
    block_size=4096,
    seconds=1.0,
    rounds=4,
    seed=1,
    why_not_ring=None,
    warnings=(),
    cells=(
        _bench_figures.summarize(FakeEngine("a", 1, [], []), [aio_slice()]),
        PREADV,
        _bench_figures.summarize(FakeEngine("b", 8, [], []), [aio_slice(300, sleeps=50)]),
    ),
)


def test_the_table() -> None:
    head, table, meaning, *rest = _bench_figures.render_text(REPORT).split("\n\n", 4)
    assert head == (
        "rawaio 1.2.3, CPython 3.11.2, Linux 6.1.0 x86_64, 2 CPUs\n"
        "Random direct reads of 4 KiB from 1 MiB of a temporary file in /data (ext4),\n"
        "1 s for each row, in 4 rounds, seed 1."
    )
    assert table.splitlines() == [
        "depth  engine           IOPS  spread  CPU us  p50 us  p99 us  reaped from  submit blocks",
        "    1  A             100,000      0%    5.00    10.0    10.0  ring         no (25%)",
        "    1  OS.PREADV  10,000,000      0%    0.09    0.10    0.10  -            -",
    ]
    assert meaning.splitlines() == [
        "    8  B             300,000      0%    1.67    10.0    10.0  ring         yes (25%)",
    ]
    explanation = "\n\n".join(rest)
    assert "more than 5%" in explanation
    assert "Disks are noisy" in explanation
    assert all(len(line) <= 100 for line in _bench_figures.render_text(REPORT).splitlines())


def test_what_is_special_is_said() -> None:
    report = replace(
        REPORT,
        kind="file",
        file_system="",
        direct=False,
        why_not_ring="no magic",
        warnings=("one", "two"),
    )
    lines = _bench_figures.render_text(report).splitlines()
    assert "Random buffered reads of 4 KiB from 1 MiB of /data," in lines
    assert lines[-3:] == ["rawaio read no ring: no magic", "Warning: one", "Warning: two"]


def test_the_table_of_nothing() -> None:
    assert "depth  engine" in _bench_figures.render_text(replace(REPORT, cells=()))


def test_json_has_everything() -> None:
    shown = json.loads(_bench_figures.render_json(REPORT))
    assert shown["kernel"] == "6.1.0"
    assert shown["machine"] == "x86_64"
    assert shown["file_system"] == "ext4"
    assert [cell["engine"] for cell in shown["cells"]] == ["a", "os.preadv", "b"]
    assert [cell["submit_blocked"] for cell in shown["cells"]] == [False, None, True]
    assert shown["cells"][0]["iops_of_rounds"] == [100_000]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_line_on_a_terminal() -> None:
    terminal = Terminal()
    progress = _progress.Progress(terminal)
    progress.clear()
    assert terminal.getvalue() == ""
    progress.show("writing", 0.5)
    progress.show("writing", 0.501)  # looks the same, and is not shown again
    progress.clear()
    assert terminal.getvalue() == "\r\x1b[K 50% writing\r\x1b[K"


def test_no_progress_elsewhere() -> None:
    stream = StringIO()
    progress = _progress.Progress(stream)
    progress.show("writing", 0.5)
    progress.clear()
    assert stream.getvalue() == ""


# -- the command ---------------------------------------------------------------------------------


def test_a_machine_without_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise rawaio.UnsupportedError("no system call numbers for riscv64")

    monkeypatch.setattr(rawaio, "IOContext", refuse)
    assert bench.run(parsed()) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "rawaio bench: no system call numbers for riscv64\n"


def test_advice_of_an_error_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        error = OSError(1, "io_setup: Operation not permitted")
        error.add_note("A seccomp filter denies io_setup.")
        raise error

    monkeypatch.setattr(rawaio, "IOContext", refuse)
    assert bench.run(parsed()) == 1
    assert capsys.readouterr().err == (
        "rawaio bench: [Errno 1] io_setup: Operation not permitted\n"
        "A seccomp filter denies io_setup.\n"
    )


def test_a_read_that_falls_short_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(6000))
    with (tmp_path / "file").open("rb") as file:
        target = _bench_target.Target(file.fileno(), "file", "file", "", False, 1, 2, ())
        with pytest.raises(_bench_settings.BenchError, match="gave 6000 bytes instead of 8192"):
            _bench_target.warm(target, SETTINGS, _progress.Progress(StringIO()))


def test_latencies_may_come_in_an_array() -> None:
    assert _bench_engines.count_latencies(array("Q", [1, 1, 2])) == {1: 2, 2: 1}

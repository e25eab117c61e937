"""The bench command on real files, with little to read and little time."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest

import rawaio
from rawaio.cli import _bench_engines, _bench_figures, _bench_settings, _bench_target, bench
from tests import seccomp
from tests.loopdevice import loop_device

ROOT = Path(__file__).parents[2]
QUICK = ["--seconds=0.004", "--size=64k", "--depths=1,4"]
ENGINES = ["rawaio-ring", "rawaio-io_getevents", "os.preadv"]


@pytest.fixture(autouse=True)
def native_aio() -> None:
    try:
        rawaio.IOContext(1).close()
    except (rawaio.UnsupportedError, OSError) as error:
        pytest.skip(f"no native AIO: {error}")


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch) -> Generator[Path, None, None]:
    """An empty directory on the disk that the checkout is on, and the current one."""
    place = ROOT if os.access(ROOT, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix=".test-bench-") as name:
        monkeypatch.chdir(name)
        yield Path(name)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    _bench_settings.add_arguments(parser)
    return bench.run(parser.parse_args([*QUICK, *words]))


def report_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run("--json", *words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report: dict[str, Any] = json.loads(captured.out)
    return report


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(*words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("rawaio bench: ")
    return captured.err


def check_cells(report: dict[str, Any]) -> None:
    with rawaio.IOContext(1) as context:
        # Then io_getevents brings what is in the ring and not yet counted.
        counted = context._counted
    cells = report["cells"]
    assert [(c["depth"], c["engine"]) for c in cells] == [
        *((1, name) for name in ENGINES),
        *((4, name) for name in (*ENGINES[:2], "os.preadv-threads")),
    ]
    for cell in cells:
        assert cell["operations"] >= cell["depth"] * report["rounds"]
        assert cell["iops"] > 0
        assert cell["cpu_us_per_operation"] > 0
        assert 0 < cell["latency_us_p50"] <= cell["latency_us_p99"]
        assert len(cell["iops_of_rounds"]) == report["rounds"]
        is_aio = cell["engine"].startswith("rawaio")
        assert cell["ring_reaps"] + cell["syscall_reaps"] == is_aio * cell["operations"]
        assert (cell["submit_blocked"] is None) is not is_aio
        if is_aio:
            assert 0 < cell["submit_share"] < 1
        if cell["engine"] == "rawaio-io_getevents":
            assert cell["reaped"] == "io_getevents"
        if cell["engine"] == "rawaio-ring" and report["why_not_ring"] is None:
            assert counted or cell["reaped"] == "ring"


# -- the temporary file --------------------------------------------------------------------------


def test_a_temporary_file(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys)
    check_cells(report)
    assert report["kind"] == "temporary file"
    assert report["path"] == str(directory)
    assert report["span"] == 64 << 10
    assert os.listdir(directory) == []


def test_the_table_is_printed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert f"a temporary file in {directory}" in out
    assert out.count("\n    1  ") == out.count("\n    4  ") == 3


def test_a_size_that_is_no_number_of_blocks_is_rounded_down(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_of(capsys, "--size=20001")["span"] == 16384


def test_larger_than_a_chunk(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(capsys, "--size=2500k", "--block-size=1536k")
    assert report["span"] == 1536 << 10


def test_a_file_in_memory_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    monkeypatch.chdir("/dev/shm")
    report = report_of(capsys)
    if report["file_system"] != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs")
    check_cells(report)
    (warning,) = report["warnings"]
    # Linux 6.6 and later pretend that there is direct I/O.
    assert ("no disk" in warning) if report["direct"] else ("no direct I/O on tmpfs" in warning)


def refuse_direct(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As a file system does that has no direct I/O."""

    def find_geometry(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_bench_target, "find_geometry", find_geometry)


def test_without_direct_io_it_goes_on_buffered(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch, errno.EINVAL)
    report = report_of(capsys)
    check_cells(report)
    assert report["direct"] is False
    assert "buffered reads" in report["warnings"][0]
    assert run() == 0
    assert "Random buffered reads" in capsys.readouterr().out


def test_other_errors_of_the_file_are_told(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch, errno.EIO)
    assert os.strerror(errno.EIO) in refusal(capsys)


def test_submits_that_sleep_are_seen(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench_engines, "_sleeps", count().__next__)
    cells = report_of(capsys)["cells"]
    assert [c["submit_blocked"] for c in cells] == [True, True, None] * 2
    assert [c["submit_sleep_share"] for c in cells] == [1, 1, None] * 2


def test_without_proc_the_file_system_is_not_known(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bench_target, "mount_of", lambda fd: None)
    assert report_of(capsys)["file_system"] == ""


def test_too_little_space(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "--size=1000000T")
    assert "does not fit" in text
    assert "--size" in text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_becomes_full(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    class Full:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def write(self, data: bytes) -> int:
            if code == errno.ENOSPC:
                return len(data) - 1
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full())
    text = refusal(capsys)
    assert ("does not fit" in text) is (code != errno.EIO)


def test_a_directory_that_cannot_be_written(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/proc/self")
    refusal(capsys)


# -- PATH ----------------------------------------------------------------------------------------


def fingerprint(path: Path) -> tuple[bytes, int, int, int]:
    status = path.stat()
    return path.read_bytes(), status.st_mtime_ns, status.st_ctime_ns, status.st_size


def test_a_file_is_read_and_never_written(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "file"
    path.write_bytes(os.urandom(40_000))
    path.chmod(0o444)
    before = fingerprint(path)
    modes: list[int] = []
    opened: dict[int, Path] = {}
    open_, measure = os.open, bench.measure

    def recording_open(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = open_(name, flags, *args, **kwargs)
        opened[fd] = Path(name)
        return fd

    def recording_measure(*args: Any) -> list[_bench_figures.Cell]:
        # Whatever way it was opened, this is what the kernel lets a descriptor do.
        for fd, name in opened.items():
            if name == path:
                modes.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
        return measure(*args)

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(bench, "measure", recording_measure)
    report = report_of(capsys, str(path))
    check_cells(report)
    assert modes == [os.O_RDONLY]
    assert fingerprint(path) == before
    assert report["kind"] == "file"
    assert report["span"] == 36864
    assert os.listdir(directory) == ["file"]


def test_of_a_long_file_the_beginning_is_read(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_bytes(bytes(1 << 20))
    assert report_of(capsys, "file")["span"] == 64 << 10


def test_a_block_device(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with loop_device(directory, size=1 << 20, sector_size=4096) as node:
        before = (directory / "image").read_bytes()
        report = report_of(capsys, node)
        check_cells(report)
        assert report["kind"] == "block device"
        assert "direct reads" in refusal(capsys, node, "--block-size=512")
        assert (directory / "image").read_bytes() == before


def test_blocks_that_cannot_be_read_directly(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not report_of(capsys)["direct"]:
        pytest.skip("no direct I/O here")
    text = refusal(capsys, "--block-size=1000")
    assert "are of multiples of" in text
    assert "--block-size 1000" in text


def test_a_path_that_is_not_there(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file or directory: 'nowhere'" in refusal(capsys, "nowhere")


def test_a_path_that_is_neither_file_nor_block_device(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("fifo")  # to open it would wait for ever
    for path in ("fifo", "/dev/null", "."):
        assert "neither a regular file nor a block device" in refusal(capsys, path)


def test_a_file_that_is_too_short(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_bytes(b"short")
    assert "less than one block" in refusal(capsys, "file")


def shrink(name: str, when: str) -> Callable[..., Any]:
    """The function of this name, before which the file becomes empty."""
    original = getattr(bench, name)

    def replacement(*args: Any) -> Any:
        os.truncate(when, 0)
        return original(*args)

    return replacement


@pytest.mark.parametrize("first", range(3))
def test_a_file_that_shrinks(
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    first: int,
) -> None:
    Path("file").write_bytes(bytes(65536))
    make_engines = _bench_engines.make_engines

    def one_engine(*args: Any) -> list[list[_bench_engines.Engine]]:
        return [[group[first]] for group in make_engines(*args)]

    monkeypatch.setattr(bench, "make_engines", one_engine)
    monkeypatch.setattr(bench, "measure", shrink("measure", "file"))
    assert "is the file being changed?" in refusal(capsys, "file", "--seconds=10")


def test_an_error_of_a_read_is_told(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_bytes(bytes(65536))
    # A misaligned offset, which a direct read does not take.
    monkeypatch.setattr(bench, "choose_offsets", lambda *args: [1])
    if not report_is_direct():
        pytest.skip("no direct I/O here")
    assert "pread: Invalid argument" in refusal(capsys, "file")


def report_is_direct() -> bool:
    try:
        os.close(os.open("file", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


# -- the limits of the machine -------------------------------------------------------------------


def test_more_than_the_system_allows(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "--depths=1,4000000000")
    assert "nr_events=4000000000" in text
    assert os.listdir(directory) == []


def test_threads_do_not_wait_for_ever_when_one_cannot_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, left = threading.Thread.start, iter([True] * 2)

    def failing_start(self: threading.Thread) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing_start)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert os.listdir(directory) == []


# -- as a program --------------------------------------------------------------------------------


def command(*words: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "rawaio", "bench", *QUICK, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_program(directory: Path) -> None:
    done = subprocess.run(
        command("--json"), env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    check_cells(json.loads(done.stdout))


@pytest.mark.parametrize(("code", "said"), [("EPERM", "seccomp"), ("ENOSYS", "no Linux AIO")])
def test_aio_is_denied(directory: Path, code: str, said: str) -> None:
    if reason := seccomp.why_not():
        pytest.skip(reason)
    done = subprocess.run(
        seccomp.command(["io_setup"], code, *command()),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_leaves_nothing(directory: Path) -> None:
    # On a terminal it says what it is doing, and so when it is in the midst of it.
    master, slave = os.openpty()
    try:
        with subprocess.Popen(
            command("--seconds=100"),
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=slave,
            # A shell's background job, and what it starts, ignores it.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        ) as process:
            os.close(slave)
            said = b""
            while b"depth 4, os.preadv" not in said:
                said += os.read(master, 4096)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate()
    finally:
        os.close(master)
    assert out == b""
    assert process.returncode in (130, -signal.SIGINT)
    assert os.listdir(directory) == []

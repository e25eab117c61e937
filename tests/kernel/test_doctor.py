"""`python -m rawaio doctor`, on the live kernel, in places of several kinds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rawaio import cli, syscalls
from rawaio.cli import _facts, _path
from rawaio.cli._path import Behaviour, examine
from rawaio.geometry import find_geometry
from tests import seccomp
from tests.loopdevice import loop_device

ROOT = Path(__file__).parents[2]
SHM = Path("/dev/shm")
NEEDED = ("io_setup", "io_submit", "eventfd2")


def doctor(
    *arguments: str | Path, deny: Sequence[str] = (), error: str = "EPERM", personality: str = ""
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "rawaio", "doctor", *map(str, arguments)]
    if deny:
        command = seccomp.command(deny, error, *command)
    if personality:
        command = ["setarch", personality, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["status"] == done.returncode
    return report


@pytest.fixture(scope="module", autouse=True)
def aio() -> None:
    done = doctor("--json")
    if done.returncode == 1:
        pytest.skip(f"no AIO here: {json.loads(done.stdout)['findings'][0]['text']}")


@pytest.fixture
def shm() -> Path:
    if not os.access(SHM, os.W_OK):
        pytest.skip(f"cannot write to {SHM}")
    return SHM


@pytest.fixture
def filters() -> None:
    reason = seccomp.why_not()
    if reason is not None:
        pytest.skip(reason)


def has_direct_io(directory: Path) -> bool:
    path = directory / "probe"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY)
    try:
        return find_geometry(fd).source != "assumed"
    except OSError:
        return False
    finally:
        os.close(fd)


# ---- places


def test_without_a_path() -> None:
    report = told(doctor("--json"))
    assert report["status"] in (0, 2)
    assert report["place"] is None
    assert all(call["works"] for call in report["calls"] if call["name"] in NEEDED)
    assert report["trial"]["error"] is None
    header = report["ring"]["header"]
    if report["ring"]["why_not"] is None:
        assert header["magic"] == syscalls.AIO_RING_MAGIC
        assert header["nr"] >= 128
        assert report["trial"]["mechanism"] == "ring"


def test_a_directory_is_left_as_it_was(tmp_path: Path) -> None:
    assert told(doctor(tmp_path, "--json"))["place"]["kind"] == "directory"
    assert list(tmp_path.iterdir()) == []


def test_a_disk(tmp_path: Path) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip(f"no direct I/O in {tmp_path}")
    done = doctor(tmp_path)
    assert done.returncode in (0, 2)
    assert "\n  O_DIRECT        works\n" in done.stdout
    assert "\nio_submit, medians per call\n" in done.stdout
    report = told(doctor(tmp_path, "--json"))
    direct, buffered = report["place"]["timings"]
    assert (direct["mode"], buffered["mode"]) == ("direct", "buffered")
    for timing in (direct, buffered):
        assert 0 < timing["inside_us"] <= timing["total_us"]


def test_a_file_system_in_memory(shm: Path) -> None:
    report = told(doctor(shm, "--json"))
    if report["place"]["mount"]["file_system"] != "tmpfs":
        pytest.skip(f"{shm} is no tmpfs")
    assert report["status"] == 2
    assert len(report["findings"]) == 1  # in memory, or without O_DIRECT before Linux 6.6
    assert report["place"]["timings"][-1]["behaviour"] == "immediate"
    assert doctor(shm).stdout.count("\n  - ") == 1


def test_a_loop_device(tmp_path: Path) -> None:
    with loop_device(tmp_path, 16 << 20) as node:
        before = Path(node).read_bytes()
        report = told(doctor(node, "--json"))
        assert Path(node).read_bytes() == before
    place = report["place"]
    assert (place["kind"], place["size"], place["mount"]) == ("block device", 16 << 20, None)
    assert place["direct_error"] is None
    assert place["geometry"]["offset_alignment"] == 512
    assert report["status"] in (0, 2)


def test_a_file_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(1 << 20)
    path.write_bytes(content)
    path.chmod(0o400)
    before = path.stat()
    report = told(doctor(path, "--json"))
    assert report["place"]["kind"] == "file"
    assert report["place"]["size"] == 1 << 20
    after = path.stat()
    assert path.read_bytes() == content
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 70_000])
def test_files_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    place = examine(str(path))
    assert place.size == size
    assert (place.timing("buffered") is None) == (size == 0)
    if place.direct_error is None:
        assert (place.timing("direct") is None) == (size == 0)


def test_a_file_without_direct_io(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "/proc/self/maps"]) == 2
    output = capsys.readouterr().out
    assert "O_DIRECT        no: EINVAL, the file system does not open this file" in output
    assert "  - /proc/self/maps is empty: no read could be timed" in output


def test_a_block_device_in_process(tmp_path: Path) -> None:
    with loop_device(tmp_path) as node:
        place = examine(node)
    assert place.kind == "block device"
    assert place.mount is None
    assert place.timing("direct") is not None


def test_reads_of_the_page_cache_are_told_from_reads_of_the_disk(tmp_path: Path) -> None:
    place = examine(str(tmp_path))
    if place.in_memory or place.direct_error is not None:
        pytest.skip(f"no disk in {tmp_path}")
    hot = _facts.try_reads().timing
    assert hot is not None
    assert hot.behaviour is Behaviour.IMMEDIATE


# ---- wrong paths


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nonexistent/file", "No such file or directory"),
        ("/dev/null", "neither a file nor a directory nor a block device"),
        ("pyproject.toml/x", "Not a directory"),
    ],
)
def test_a_wrong_path(path: str, message: str) -> None:
    for json_too in ([], ["--json"]):
        done = doctor(path, *json_too)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr == f"rawaio doctor: {path}: {message}\n"


def test_a_fifo_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert cli.main(["doctor", str(path)]) == 1
    assert "neither a file" in capsys.readouterr().err


def test_no_room_for_the_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["doctor", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"rawaio doctor: {tmp_path}: temporary file: No space left on device\n"
    )
    assert list(tmp_path.iterdir()) == []


# ---- denied calls


@pytest.mark.usefixtures("filters")
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize("name", NEEDED)
def test_a_needed_call_is_denied(name: str, error: str) -> None:
    done = doctor(".", deny=[name], error=error)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"\n  {name:<15} {error}: " in done.stdout
    assert f"\nUnusable:\n  - {name} says {error}: " in done.stdout
    assert "In a sandbox, allow" in " ".join(done.stdout.split())
    report = told(doctor(".", "--json", deny=[name], error=error))
    assert report["status"] == 1
    assert report["system"]["seccomp"] == "filter"
    assert [call["name"] for call in report["calls"] if not call["works"]] == [name]


@pytest.mark.usefixtures("filters")
@pytest.mark.parametrize("name", ["io_cancel", "io_destroy", "io_pgetevents", "statx"])
def test_a_call_is_denied_that_can_be_done_without(name: str) -> None:
    before = told(doctor("--json"))
    report = told(doctor("--json", deny=[name]))
    assert [call["name"] for call in report["calls"] if not call["works"]] == [name]
    more = len(report["findings"]) - len(before["findings"])
    assert more == (name in ("io_cancel", "io_destroy"))
    assert report["status"] in (0, 2)


@pytest.mark.usefixtures("filters")
@pytest.mark.parametrize("answer", seccomp.DEADLY)
@pytest.mark.parametrize("name", sorted({*syscalls.SyscallNumbers._fields} - {"fallocate"}))
def test_a_call_ends_the_process(name: str, answer: str) -> None:
    """It is told all the same. fallocate is not tried: nothing but `File.allocate` needs it."""
    done = doctor(".", deny=[name], error=answer)
    assert done.stderr == ""
    assert f"\n  {name:<15} SIGSYS: the process is killed (seccomp)" in done.stdout
    report = told(doctor(".", "--json", deny=[name], error=answer))
    assert report["system"]["seccomp"] == "filter"
    needed = {*NEEDED, "io_destroy"}
    if report["ring"]["why_not"] is not None or report["ring"]["ordering"] == "COUNTED":
        needed.add("io_getevents")
    assert done.returncode in ((1,) if name in needed else (0, 2))
    fatal = [call["name"] for call in report["calls"] if call["fatal"]]
    assert fatal == [name] if name != "io_uring_setup" else fatal == []
    looked_at = report["place"] is not None
    assert looked_at == (done.returncode != 1 and name != "statx")


@pytest.mark.usefixtures("filters")
def test_every_call_ends_the_process() -> None:
    done = doctor(".", deny=syscalls.SyscallNumbers._fields, error="KILL_PROCESS")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("SIGSYS: the process is killed") == 2 * 9 - 2  # two are no findings


@pytest.mark.usefixtures("filters")
def test_the_alignment_without_statx(tmp_path: Path) -> None:
    if not has_direct_io(tmp_path):
        pytest.skip(f"no direct I/O in {tmp_path}")
    report = told(doctor(tmp_path, "--json", deny=["statx"]))
    assert report["place"]["geometry"]["source"] == "probed"


@pytest.mark.usefixtures("filters")
def test_io_uring_is_denied() -> None:
    report = told(doctor("--json", deny=["io_uring_setup"]))
    assert (report["io_uring"]["works"], report["io_uring"]["error"]) == (False, "EPERM")
    assert report["findings"] == told(doctor("--json"))["findings"]


# ---- another machine


def test_another_machine_makes_no_aio_call(tmp_path: Path) -> None:
    """The kernel itself says i686 there; the numbers would be those of something else."""
    if shutil.which("setarch") is None or os.uname().machine != "x86_64":
        pytest.skip("no setarch, or no x86_64")
    done = doctor(".", personality="i686")
    assert (done.returncode, done.stderr) == (1, "")
    assert "64-bit processes on linux i686" in " ".join(done.stdout.split())
    if shutil.which("strace") is None:
        pytest.skip("the rest needs strace")
    trace = tmp_path / "trace"
    names = "io_setup,io_submit,io_getevents,io_cancel,io_destroy,io_pgetevents,io_uring_setup"
    command = ["strace", "-f", "-e", f"trace={names}", "-o", str(trace)]
    command += ["setarch", "i686", sys.executable, "-m", "rawaio", "doctor", "."]
    traced = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if traced.returncode != 1:
        pytest.skip(f"strace does not work: {traced.stderr.strip()}")
    assert "io_" not in trace.read_text()


# ---- in this process


def test_gather_leaves_nothing_behind(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    facts = _facts.gather(str(tmp_path))
    assert os.listdir("/proc/self/fd") == before
    assert facts.unsupported is None
    assert facts.place is not None
    assert facts.place.mount is not None
    assert tmp_path.resolve().is_relative_to(facts.place.mount.mount_point)


def test_a_mounted_block_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with loop_device(tmp_path) as node:
        numbers = os.stat(node).st_rdev
        line = f"9 1 {os.major(numbers)}:{os.minor(numbers)} / /mnt rw - ext4 {node} rw\n"
        table = tmp_path / "mountinfo"
        table.write_text(line)
        monkeypatch.setattr(
            _path, "open", lambda path, **kwargs: table.open(**kwargs), raising=False
        )
        fd = os.open(node, os.O_RDONLY)
        try:
            assert _path.mount_of(fd) == _path.Mount("ext4", "/mnt", node)
        finally:
            os.close(fd)


def test_both_forms_in_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text_status = cli.main(["doctor", str(tmp_path)])
    assert "Completion ring" in capsys.readouterr().out
    json_status = cli.main(["doctor", "--json", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["status"] == json_status
    assert {text_status, json_status} <= {0, 2}


def test_a_trial_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nr_events: int) -> None:
        error = OSError(errno.EAGAIN, "io_setup: Resource temporarily unavailable")
        error.add_note("raise the limit")
        raise error

    monkeypatch.setattr(_facts, "IOContext", refuse)
    trial = _facts.try_reads()
    assert trial.error is not None
    assert trial.advice == ("raise the limit",)


def test_main_module() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "rawaio", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("rawaio ")

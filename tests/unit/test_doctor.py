"""Doctor's judgement and what it shows, on facts made up; and the command line around it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

import rawaio
from rawaio import cli, syscalls
from rawaio.cli import _facts, _path, doctor
from rawaio.cli._facts import Call, Facts, IOUring, Limits, Ring, System, Trial
from rawaio.cli._path import Behaviour, Mount, Place, Timing, find_mount
from rawaio.cli.doctor import Finding, Verdict, judge, render_json, render_text, verdict
from rawaio.geometry import Geometry

ROOT = Path(__file__).parents[2]

DIRECT = Timing("direct", 65536, 4, 16, 80.0, 250.0, 0, 1)
BUFFERED = Timing("buffered", 65536, 4, 16, 900.0, 910.0, 16, 16)
MEMORY = Timing("memory", 65536, 4, 16, 30.0, 40.0, 0, 16)
PLACE = Place(
    "/data",
    "directory",
    1 << 24,
    Mount("ext4", "/", "/dev/vda"),
    Geometry(512, 512, 512, "statx"),
    None,
    (DIRECT, BUFFERED),
)
HEADER: dict[str, int] = dict(
    zip(
        ("id", "nr", "head", "tail", "magic", "compat_features", "incompat_features", "x"),
        (0, 383, 0, 0, 0xA10A10A1, 1, 0, 32),
        strict=True,
    )
)
NAMES = (
    "io_setup",
    "io_submit",
    "io_getevents",
    "io_cancel",
    "io_destroy",
    "io_pgetevents",
    "eventfd2",
    "statx",
)
FINE = Facts(
    System("Linux 6.1", "x86_64", 64, 4096, "glibc 2.36", "CPython 3.11.2", True, "none"),
    None,
    Limits(0, 65536),
    tuple(Call(name, True, None, "works") for name in NAMES),
    IOUring(True, "EFAULT", "works", 0),
    Ring(HEADER, None, "TSO", "x86_64 keeps loads in order"),
    Trial(None, mechanism="ring", timing=MEMORY),
    PLACE,
)


def failing(name: str, error: str, **changes: Any) -> Facts:
    calls = tuple(
        Call(name, False, error, "said so") if call.name == name else call for call in FINE.calls
    )
    return replace(FINE, calls=calls, **changes)


def placed(**changes: Any) -> Facts:
    return replace(FINE, place=replace(PLACE, **changes))


# ---- judging


def test_nothing_is_wrong() -> None:
    assert judge(FINE) == []
    assert judge(replace(FINE, place=None)) == []


def test_the_worst_finding_decides() -> None:
    unusable = Finding(Verdict.UNUSABLE, "a", "b")
    reservation = Finding(Verdict.RESERVATIONS, "a", "b")
    assert verdict([]) == 0
    assert verdict([reservation, unusable]) == 1
    assert verdict([reservation, reservation]) == 2


def test_an_unsupported_process_is_all_there_is_to_say() -> None:
    facts = Facts(FINE.system, "no numbers for 32-bit", Limits(0, 1))
    (finding,) = judge(facts)
    assert finding.verdict is Verdict.UNUSABLE
    assert finding.text == "no numbers for 32-bit"


@pytest.mark.parametrize("name", ["io_setup", "io_submit", "eventfd2"])
@pytest.mark.parametrize("error", ["EPERM", "EACCES", "ENOSYS"])
def test_a_needed_call_is_denied(name: str, error: str) -> None:
    trial = Trial("it failed", ("What the kernel means.",))
    (finding,) = judge(failing(name, error, trial=trial, place=None))
    assert finding.verdict is Verdict.UNUSABLE
    assert finding.text == f"{name} says {error}: said so"
    assert finding.advice.startswith("What the kernel means. In a sandbox, allow io_setup")


def test_the_limit_is_reached() -> None:
    trial = Trial("EAGAIN", ("sysctl -w fs.aio-max-nr=131072",))
    limits = Limits(65536, 65536)
    facts = failing("io_setup", "EAGAIN", trial=trial, place=None, limits=limits)
    first, second = judge(facts)
    assert (first.verdict, first.advice) == (Verdict.UNUSABLE, "sysctl -w fs.aio-max-nr=131072")
    assert second.verdict is Verdict.RESERVATIONS


@pytest.mark.parametrize("name", ["io_getevents", "io_cancel", "io_destroy"])
def test_a_call_that_can_be_done_without(name: str) -> None:
    (finding,) = judge(failing(name, "ENOSYS"))
    assert finding.verdict is Verdict.RESERVATIONS
    assert finding.text.startswith(f"{name} says ENOSYS: said so; ")


@pytest.mark.parametrize("name", ["io_pgetevents", "statx"])
def test_a_call_that_is_not_missed(name: str) -> None:
    assert judge(failing(name, "EPERM")) == []


def test_neither_ring_nor_io_getevents() -> None:
    ring = Ring(HEADER, "magic is 0x0", "TSO", "")
    first, second = judge(failing("io_getevents", "EPERM", ring=ring, trial=None))
    assert (first.verdict, second.verdict) == (Verdict.UNUSABLE, Verdict.RESERVATIONS)
    assert first.text.startswith("io_getevents")
    assert first.advice.startswith("In a sandbox, allow io_setup")


def test_the_ring_is_not_usable() -> None:
    ring = Ring(None, "nothing readable is mapped at 0x1000", "TSO", "")
    (finding,) = judge(replace(FINE, ring=ring))
    assert finding.verdict is Verdict.RESERVATIONS
    assert "nothing readable is mapped" in finding.text
    assert "io_getevents is used instead" in finding.advice


@pytest.mark.parametrize("advice", [(), ("Do this.", "Do that.")])
def test_all_works_but_not_together(advice: tuple[str, ...]) -> None:
    (finding,) = judge(replace(FINE, trial=Trial("no luck", advice), place=None))
    assert finding.verdict is Verdict.UNUSABLE
    assert finding.text.endswith("no luck")
    assert finding.advice == (" ".join(advice) or finding.advice)


@pytest.mark.parametrize(("used", "left"), [(65536 - 8 * 128, 8), (0, 512)])
def test_enough_contexts_are_left(used: int, left: int) -> None:
    facts = replace(FINE, limits=Limits(used, 65536))
    assert facts.limits.contexts_left == left
    assert judge(facts) == []


@pytest.mark.parametrize("used", [65536 - 8 * 128 + 1, 65536, 70000])
def test_few_contexts_are_left(used: int) -> None:
    (finding,) = judge(replace(FINE, limits=Limits(used, 65536)))
    assert finding.verdict is Verdict.RESERVATIONS
    assert finding.advice.endswith("sysctl -w fs.aio-max-nr=131072")


@pytest.mark.parametrize("limits", [Limits(None, 65536), Limits(0, None)])
def test_limits_that_are_not_told(limits: Limits) -> None:
    assert limits.contexts_left is None
    facts = replace(FINE, limits=limits)
    assert judge(facts) == []
    assert "fs.aio-nr       not told" in render_text(facts, [])


def test_no_direct_io() -> None:
    (finding,) = judge(
        placed(geometry=None, direct_error="EINVAL, Invalid argument", timings=(BUFFERED,))
    )
    assert finding.verdict is Verdict.RESERVATIONS
    assert finding.text == "no direct I/O on /data: EINVAL, Invalid argument"


def test_a_place_in_memory_is_one_reservation() -> None:
    immediate = replace(DIRECT, done_on_return=16)
    assumed = Geometry(4096, 4096, 4096, "assumed")
    mount = Mount("tmpfs", "/dev/shm", "tmpfs")
    (finding,) = judge(placed(mount=mount, geometry=assumed, timings=(immediate, MEMORY)))
    assert finding.verdict is Verdict.RESERVATIONS
    assert "in memory" in finding.text


def test_an_assumed_alignment() -> None:
    (finding,) = judge(placed(geometry=Geometry(4096, 4096, 4096, "assumed")))
    assert "4096 is assumed" in finding.text


def test_an_empty_file() -> None:
    (finding,) = judge(placed(kind="file", size=0, timings=()))
    assert finding.text == "/data is empty: no read could be timed"


def test_io_submit_blocks() -> None:
    (finding,) = judge(placed(timings=(replace(DIRECT, slept=12, done_on_return=16),)))
    assert finding.verdict is Verdict.RESERVATIONS
    assert "slept inside in 12 of 16 calls" in finding.text


def test_nothing_to_wait_for() -> None:
    (finding,) = judge(placed(timings=(replace(DIRECT, done_on_return=12),)))
    assert finding.verdict is Verdict.RESERVATIONS
    assert "not seen whether io_submit blocks" in finding.text


@pytest.mark.parametrize(
    ("slept", "done", "expected"),
    [
        (0, 0, Behaviour.ASYNCHRONOUS),
        (8, 8, Behaviour.ASYNCHRONOUS),
        (8, 9, Behaviour.IMMEDIATE),
        (9, 0, Behaviour.BLOCKING),
        (16, 16, Behaviour.BLOCKING),
    ],
)
def test_what_most_calls_did(slept: int, done: int, expected: Behaviour) -> None:
    assert replace(DIRECT, slept=slept, done_on_return=done).behaviour is expected


# ---- showing


def test_the_text_says_everything() -> None:
    text = render_text(FINE, [])
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "kernel          Linux 6.1\n",
        "machine         x86_64, pages of 4096 bytes\n",
        "process         64-bit, seccomp none\n",
        "CPython 3.11.2, with the GIL\n",
        "0 of fs.aio-max-nr 65536: 512 contexts of 128 still fit\n",
        "io_pgetevents   works\n",
        "io_uring_setup  works, io_uring_disabled=0 (for comparison",
        "usable          yes\n",
        "magic 0xa10a10a1, ",
        "trial           works, reaped by ring\n",
        "/data (directory; ",
        "ext4, mounted at / from /dev/vda\n",
        "addresses 512, offsets and lengths 512 (says statx)\n",
        "  direct             4 x 64 KiB         80 us       250 us  in 0 of 16 calls\n",
        "With direct reads io_submit returns before the I/O is done.\n",
        "With uncached buffered reads io_submit blocks until the I/O is done.\n",
        "Fine: native AIO works here.",
    ):
        assert part in text


def test_the_text_of_what_is_wrong() -> None:
    ring = Ring(None, "there is no context", "NONE", "no means found")
    trial = Trial("EPERM", ())
    uring = IOUring(False, "EPERM", "switched off", None)
    facts = failing("io_setup", "EPERM", ring=ring, trial=trial, place=None, io_uring=uring)
    facts = replace(facts, system=replace(FINE.system, gil=False))
    text = render_text(facts, judge(facts))
    assert "without a GIL" in text
    assert "io_setup        EPERM: said so\n" in text
    assert "io_uring_setup  EPERM: switched off (for" in text
    assert "usable          no: there is no context\n" in text
    assert "trial           failed: EPERM\n" in text
    assert "\nUnusable:\n  - io_setup says EPERM: said so\n    In a sandbox" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_text_of_an_unsupported_process() -> None:
    facts = Facts(FINE.system, "no numbers", Limits(0, 65536))
    text = render_text(facts, judge(facts))
    assert "System calls" not in text
    assert "Unusable:\n  - no numbers\n" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "file"}, "/data (file of 16777216 bytes)\n"),
        ({"mount": None}, "file system     not told\n"),
        ({"mount": None, "kind": "block device"}, "file system     not mounted\n"),
        ({"direct_error": "EINVAL, no"}, "O_DIRECT        no: EINVAL, no\n"),
        ({"size": 0, "timings": ()}, "O_DIRECT        can be opened; nothing to read\n"),
        ({"mount": Mount("ramfs", "/r", "r")}, "O_DIRECT        taken, without effect"),
        ({"geometry": Geometry(4, 4096, 512, "probed")}, "4096, of reads 512 (found by trying"),
        ({"timings": (replace(DIRECT, nbytes=100),)}, "  direct             4 x 100 B "),
    ],
)
def test_the_text_of_a_place(changes: dict[str, Any], expected: str) -> None:
    assert expected in render_text(placed(**changes), [])


def test_a_place_without_a_yardstick() -> None:
    text = render_text(replace(FINE, trial=None, ring=None, io_uring=None), [])
    assert "in memory " not in text
    ring_only = render_text(replace(FINE, trial=None), [])
    assert "trial" not in ring_only


def test_json_is_one_object_with_everything() -> None:
    told = json.loads(render_json(FINE, []))
    assert told["rawaio"] == rawaio.__version__
    assert (told["status"], told["verdict"], told["findings"]) == (0, "fine", [])
    assert told["limits"] == {"aio_nr": 0, "aio_max_nr": 65536, "contexts_left": 512}
    assert told["ring"]["header"] == HEADER
    assert told["place"]["geometry"]["source"] == "statx"
    assert [t["behaviour"] for t in told["place"]["timings"]] == ["asynchronous", "blocking"]
    assert set(told) == {
        "rawaio",
        "status",
        "verdict",
        "findings",
        *(name for name in Facts.__dataclass_fields__),
    }


def test_json_of_findings() -> None:
    facts = failing("io_cancel", "ENOSYS", place=None)
    told = json.loads(render_json(facts, judge(facts)))
    assert (told["status"], told["verdict"]) == (2, "reservations")
    assert told["findings"][0]["verdict"] == "reservations"
    assert told["place"] is None


# ---- asking


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
25 24 0:23 / /with\\040blank rw shared:1 master:2 - tmpfs a\\134b rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
"""


def test_mounts_are_found_by_id_or_by_device() -> None:
    assert find_mount(MOUNTS, mount_id="25") == Mount("tmpfs", "/with blank", "a\\b")
    assert find_mount(MOUNTS, device="254:0") == Mount("ext4", "/", "/dev/vda")
    assert find_mount(MOUNTS, mount_id="2") is None
    assert find_mount("", mount_id="2") is None


def test_mounts_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **kwargs: Any) -> NoReturn:
        raise FileNotFoundError(path)

    monkeypatch.setattr(_path, "open", refuse, raising=False)
    assert _path.mount_of(0) is None


@pytest.mark.parametrize(
    ("size", "block", "nbytes", "reads"),
    [
        (0, 512, 512, 0),
        (0, 1, 1, 0),
        (1, 1, 1, 1),
        (100, 512, 512, 1),
        (1000, 512, 512, 1),
        (100, 1, 100, 1),
        (65536 * 3 + 1, 4096, 65536, 3),
        (1 << 40, 512, 65536, 64),
        (1 << 24, 1 << 17, 1 << 17, 64),
    ],
)
def test_reads_are_within_the_file(size: int, block: int, nbytes: int, reads: int) -> None:
    offsets, length = _path._choose_reads(size, block)
    assert length == nbytes
    assert len(offsets) == len(set(offsets)) == reads
    assert all(offset % length == 0 and offset < size for offset in offsets)
    assert reads <= 1 or all(offset + length <= size for offset in offsets)


def test_measuring_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_path, "_LONGEST_NS", -1)
    with _facts._memory() as fd:
        timing = _path.time_reads(FakeContext(), fd, "memory", [0] * 64, 4096)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert (timing.calls, timing.reads_per_call) == (1, 4)


class FakeContext:
    """Completes one request in each reap, but none in the first."""

    def __init__(self) -> None:
        self.pending: list[rawaio.Request] = []
        self.reaps = 0

    def submit(self, *requests: rawaio.Request) -> int:
        self.pending += requests
        return len(requests)

    def reap(self, min_nr: int = 0) -> list[rawaio.Completion]:
        assert min_nr <= len(self.pending)
        self.reaps += 1
        if self.reaps == 1:
            return []
        request = self.pending.pop()
        return [rawaio.Completion((request, request.nbytes, 0))]


def refusal(code: int) -> Callable[..., NoReturn]:
    def refuse(*arguments: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (errno.EPERM, "denied by a sandbox (seccomp)"),
        (errno.ENOSYS, "not in this kernel, or hidden by a sandbox"),
        (errno.EAGAIN, "over the system-wide limit fs.aio-max-nr"),
        (errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ],
)
def test_a_call_that_fails(monkeypatch: pytest.MonkeyPatch, code: int, meaning: str) -> None:
    monkeypatch.setattr(syscalls, "io_setup", refusal(code))
    calls, ring = _facts.try_calls({})
    assert [call.name for call in calls] == list(NAMES)
    assert calls[0] == Call("io_setup", False, errno.errorcode[code], meaning)
    assert ring.header is None
    assert ring.why_not == "there is no context: io_setup failed"


def test_an_errno_without_a_name() -> None:
    call = _facts._try({}, "io_setup", refusal(4095))
    assert (call.works, call.error) == (False, "4095")


def never(*arguments: object, **keywords: object) -> NoReturn:
    raise AssertionError("a call was made")


def test_what_kills_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "raw_syscall", never)
    for name in ("io_setup", "io_destroy", "io_submit", "io_getevents", "io_cancel", "statx"):
        monkeypatch.setattr(syscalls, name, never)
    monkeypatch.setattr(os, "eventfd", never)
    fatal: dict[str, str] = dict.fromkeys(NAMES, "SIGSYS")
    calls, _ = _facts.try_calls(fatal)
    assert calls == tuple(
        Call(name, False, "SIGSYS", "the process is killed (seccomp)", fatal=True) for name in NAMES
    )
    uring = _facts.ask_io_uring({"io_uring_setup": "SIGSYS"})
    assert (uring.works, uring.error, uring.meaning) == (False, "SIGSYS", calls[0].meaning)


@pytest.mark.parametrize(
    ("ordering", "why_not", "deadly"),
    [("TSO", None, False), ("FENCE", None, False), ("COUNTED", None, True), ("NONE", "no", True)],
)
def test_the_trial_is_left_out_where_it_might_end_the_process(
    monkeypatch: pytest.MonkeyPatch, ordering: str, why_not: str | None, deadly: bool
) -> None:
    ring = Ring(HEADER, why_not, ordering, "said so")
    system = replace(_facts.ask_system(), seccomp="filter")
    monkeypatch.setattr(_facts, "ask_system", lambda: system)
    monkeypatch.setattr(_facts, "find_fatal", lambda: {"io_getevents": "SIGSYS"})
    monkeypatch.setattr(_facts, "try_calls", lambda fatal: ((), ring))
    monkeypatch.setattr(_facts, "try_reads", lambda: Trial(None))
    error = "not tried, because of io_getevents" if deadly else None
    assert _facts.gather().trial == Trial(error)


def test_no_child_to_try_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", refusal(errno.EAGAIN))
    assert _facts.find_fatal() == {}


@pytest.mark.parametrize("seccomp", ["none", "filter", "unknown"])
def test_a_child_is_made_only_where_there_may_be_a_filter(
    monkeypatch: pytest.MonkeyPatch, seccomp: str
) -> None:
    tried: list[int] = []

    def fork() -> NoReturn:
        tried.append(1)
        raise OSError(errno.EAGAIN, "no processes left")

    system = replace(_facts.ask_system(), seccomp=seccomp)
    monkeypatch.setattr(_facts, "ask_system", lambda: system)
    monkeypatch.setattr(_facts, "try_reads", lambda: Trial(None))
    monkeypatch.setattr(os, "fork", fork)
    _facts.gather()
    assert bool(tried) == (seccomp != "none")


@pytest.mark.parametrize(
    ("name", "ordering", "expected"),
    [
        *((name, "TSO", Verdict.UNUSABLE) for name in ("io_setup", "io_submit", "eventfd2")),
        ("io_destroy", "TSO", Verdict.UNUSABLE),
        ("io_getevents", "NONE", Verdict.UNUSABLE),
        ("io_getevents", "COUNTED", Verdict.UNUSABLE),
        ("io_getevents", "FENCE", Verdict.RESERVATIONS),
        ("io_cancel", "TSO", Verdict.RESERVATIONS),
        ("statx", "TSO", Verdict.RESERVATIONS),
    ],
)
def test_a_call_that_kills(name: str, ordering: str, expected: Verdict) -> None:
    calls = tuple(
        replace(call, works=False, error="SIGSYS", meaning="dead", fatal=True)
        if call.name == name
        else call
        for call in FINE.calls
    )
    ring = Ring(HEADER, "said so" if ordering == "NONE" else None, ordering, "said so")
    found = judge(replace(FINE, calls=calls, ring=ring))
    assert found[0].verdict is expected
    assert found[0].text.startswith(f"{name} ends in SIGSYS: dead")
    assert f"allow {'io_setup' if expected is Verdict.UNUSABLE else name}" in found[0].advice


def test_a_call_that_kills_and_that_nobody_needs() -> None:
    calls = (*FINE.calls[:5], Call("io_pgetevents", False, "SIGSYS", "dead", fatal=True))
    assert judge(replace(FINE, calls=calls)) == []


@pytest.mark.parametrize("disabled", [None, 0, 1, 2])
def test_io_uring_is_switched_off(monkeypatch: pytest.MonkeyPatch, disabled: int | None) -> None:
    monkeypatch.setattr(_facts, "_raw", lambda *arguments: refusal(errno.EPERM))
    monkeypatch.setattr(_facts, "_number", lambda path: disabled)
    found = _facts.ask_io_uring({})
    assert (found.works, found.error, found.disabled) == (False, "EPERM", disabled)
    assert ("kernel.io_uring_disabled" in found.meaning) == bool(disabled)


def test_the_header_is_read_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _facts._header(0) is None
    assert _facts._header(4096) is None  # nothing is ever mapped there
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: b"")
    assert _facts._header(4096) is None


def test_files_that_are_not_there() -> None:
    assert _facts._number("/nonexistent") is None
    assert _facts._fields("/nonexistent") == {}


@pytest.mark.parametrize(
    ("confstr", "libc_ver", "maps", "expected"),
    [
        ("glibc 2.36", ("", ""), "", "glibc 2.36"),
        (None, ("musl", "1.2.5"), "", "musl 1.2.5"),
        (None, ("", ""), "7f /lib/ld-musl-x86_64.so.1", "musl"),
        (None, ("", ""), "", "unknown"),
        ("", ("libc", ""), None, "libc"),
    ],
)
def test_which_libc(
    monkeypatch: pytest.MonkeyPatch,
    confstr: str | None,
    libc_ver: tuple[str, str],
    maps: str | None,
    expected: str,
) -> None:
    def ask(name: str) -> str:
        if confstr is None:
            raise ValueError("unrecognized configuration name")
        return confstr

    monkeypatch.setattr(os, "confstr", ask)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc_ver)
    monkeypatch.setattr(_facts, "_text", lambda path: maps)
    assert _facts._libc() == expected


@pytest.mark.parametrize("gil", [None, True, False])
def test_the_interpreter(monkeypatch: pytest.MonkeyPatch, gil: bool | None) -> None:
    if gil is None:
        monkeypatch.delattr(sys, "_is_gil_enabled", raising=False)
    else:
        monkeypatch.setattr(sys, "_is_gil_enabled", lambda: gil, raising=False)
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: gil is not None)
    found = _facts.ask_system()
    assert found.gil is (gil is not False)
    assert found.python.endswith("free-threaded build") == (gil is not None)


# ---- the command line


def test_an_unsupported_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(syscalls, "machine", lambda: "riscv64")
    monkeypatch.setattr(_facts, "try_calls", never)
    monkeypatch.setattr(syscalls, "raw_syscall", never)
    assert cli.main(["doctor", str(ROOT)]) == 1
    assert "riscv64" in capsys.readouterr().out


def test_a_command_that_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: argparse.Namespace) -> NoReturn:
        raise rawaio.UnsupportedError("not here")

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr() == ("", "rawaio: not here\n")


def test_a_command_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: argparse.Namespace) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", run)
    assert cli.main(["doctor"]) == 130


def test_only_the_command_that_is_named_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[tuple[str, str]] = []

    def import_module(name: str, package: str) -> ModuleType:
        imported.append((name, package))
        return doctor

    monkeypatch.setattr(cli, "import_module", import_module)
    monkeypatch.setattr(sys, "argv", ["rawaio", "doctor"])
    monkeypatch.setattr(doctor, "run", lambda arguments: 7)
    assert cli.main() == 7
    assert imported == [(".doctor", "rawaio.cli")]


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_wrong_arguments_are_no_reservation(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 1
    assert "error: " in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"rawaio {rawaio.__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "exit status:\n  0  fine\n" in capsys.readouterr().out


def test_the_module_is_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rawaio", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("rawaio", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("rawaio ")


def test_the_package_alone_runs_nothing() -> None:
    runpy.run_module("rawaio", run_name="rawaio.__main__")


def test_whoever_reads_may_go() -> None:
    """The pipe is closed before anything is written to it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as output:
        done = subprocess.run(
            [sys.executable, "-m", "rawaio", "doctor"],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "")

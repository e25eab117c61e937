"""`python -m rawaio doctor [PATH]`: does native AIO work here, how well, and what to do about it.

Facts are gathered, then judged, then shown; judging and showing are pure.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from enum import IntEnum
from textwrap import wrap
from typing import TYPE_CHECKING, Final

import rawaio
from rawaio.cli._facts import CONTEXT_SIZE, OF_A_CONTEXT, Facts, gather
from rawaio.cli._path import Behaviour

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from rawaio.cli._facts import Trial
    from rawaio.cli._path import Place, Timing
    from rawaio.geometry import Geometry

__all__ = [
    "Finding",
    "Verdict",
    "add_arguments",
    "judge",
    "render_json",
    "render_text",
    "run",
    "verdict",
]

# One context per process is usual; with fewer left, the next few programs are refused.
_FEW_CONTEXTS: Final = 8
_WIDTH: Final = 96  # columns of running text
# Without these there is no context, or nothing to be done with one.
_NEEDED: Final = frozenset({"io_setup", "io_submit", "eventfd2"})
_WITHOUT: Final = {
    "io_getevents": "only the ring can be reaped, and force_syscalls cannot be used",
    "io_cancel": "polls cannot be cancelled, and so delay close",
    "io_destroy": "what a context takes is given back only when the process ends",
}
# The same where the process is killed for them.
_KILLED: Final = {
    "io_getevents": _WITHOUT["io_getevents"],
    "io_cancel": "no poll can be cancelled, and no context closed that has one",
    "statx": "the alignment of direct I/O cannot be asked for, and no place is looked at",
}
_ALLOW: Final = (
    "In a sandbox, allow io_setup, io_submit, io_getevents, io_cancel, io_destroy and eventfd2 in "
    "its seccomp profile; otherwise use ordinary reads in threads."
)
_DENY: Final = "In a sandbox, allow {} in its seccomp profile, or have it fail with ENOSYS."
_SOURCES: Final = {
    "statx": "says statx",
    "probed": "found by trying reads",
    "assumed": "assumed, for it could not be found out",
}
_MODES: Final = {"direct": "direct", "buffered": "uncached buffered", "memory": "in memory"}
_SANDBOXED: Final = frozenset({"EPERM", "EACCES", "ENOSYS"})


class Verdict(IntEnum):
    """What it comes to: the exit status."""

    FINE = 0
    UNUSABLE = 1
    RESERVATIONS = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    verdict: Verdict
    text: str
    advice: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Say whether Linux native AIO works here, how well, and what to do about it."
    )
    parser.epilog = (
        "exit status:\n"
        "  0  fine\n"
        "  1  unusable, or PATH is\n"
        "  2  usable, with the reservations that are listed"
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="also look at this place: a file or block device, which is only read, or a "
        "directory, in which a temporary file of 16 MiB is made",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(arguments: argparse.Namespace) -> int:
    """Find out, print, and return the exit status. Can block: about two seconds with a path."""
    path: str | None = arguments.path
    try:
        facts = gather(path)
    except OSError as error:
        about = error.strerror or str(error)
        print(f"rawaio doctor: {error.filename or path}: {about}", file=sys.stderr)
        return Verdict.UNUSABLE
    findings = judge(facts)
    print((render_json if arguments.json else render_text)(facts, findings))
    return verdict(findings)


# -- judging ------------------------------------------------------------------------------------


def verdict(findings: Iterable[Finding]) -> Verdict:
    """The worst of the findings; FINE when there are none. Pure."""
    found = {finding.verdict for finding in findings}
    if Verdict.UNUSABLE in found:
        return Verdict.UNUSABLE
    return Verdict.RESERVATIONS if found else Verdict.FINE


def judge(facts: Facts) -> list[Finding]:
    """What is wrong, the worst first. Pure."""
    if facts.unsupported is not None:
        return [
            Finding(
                Verdict.UNUSABLE,
                facts.unsupported,
                "Use a 64-bit Python on one of these machines. No AIO system call was tried.",
            )
        ]
    findings = [*_judge_calls(facts), *_judge_system(facts)]
    if facts.place is not None:
        findings += _judge_place(facts.place)
    return sorted(findings, key=lambda finding: finding.verdict)


def _judge_calls(facts: Facts) -> Iterator[Finding]:
    by_ring = facts.ring is not None and facts.ring.suffices
    broken = False
    for call in facts.calls:
        if call.works:
            continue
        needed, lacking, says = _NEEDED, _WITHOUT, "says"
        if call.fatal:
            needed, lacking, says = frozenset(OF_A_CONTEXT), _KILLED, "ends in"
        text = f"{call.name} {says} {call.error}: {call.meaning}"
        if call.name in needed or (call.name == "io_getevents" and not by_ring):
            broken = True
            yield Finding(Verdict.UNUSABLE, text, _advice(facts, call.error))
        elif call.name in lacking:
            advice = _DENY.format(call.name) if call.fatal else _ALLOW
            yield Finding(Verdict.RESERVATIONS, f"{text}; {lacking[call.name]}", advice)
    if not broken and facts.trial is not None and facts.trial.error is not None:
        yield Finding(
            Verdict.UNUSABLE,
            f"each call works, but a read of memory through IOContext does not: "
            f"{facts.trial.error}",
            " ".join(facts.trial.advice) or "Please report this, with the output of --json.",
        )


def _advice(facts: Facts, error: str | None) -> str:
    told = facts.trial.advice if facts.trial is not None else ()
    return " ".join([*told, _ALLOW] if error in _SANDBOXED or not told else told)


def _judge_system(facts: Facts) -> Iterator[Finding]:
    ring, left = facts.ring, facts.limits.contexts_left
    made = any(call.name == "io_setup" and call.works for call in facts.calls)
    if made and ring is not None and ring.why_not is not None:
        yield Finding(
            Verdict.RESERVATIONS,
            f"the completion ring is not usable: {ring.why_not}",
            "Nothing to be done: io_getevents is used instead, one system call more per batch.",
        )
    if left is not None and left < _FEW_CONTEXTS:
        yield Finding(
            Verdict.RESERVATIONS,
            f"fs.aio-nr is {facts.limits.aio_nr} of fs.aio-max-nr {facts.limits.aio_max_nr}: "
            f"only {left} more contexts of {CONTEXT_SIZE} requests fit, system-wide",
            f"Raise the limit: sysctl -w fs.aio-max-nr={2 * (facts.limits.aio_max_nr or 65536)}",
        )


def _judge_place(place: Place) -> Iterator[Finding]:
    direct, geometry = place.timing("direct"), place.geometry
    if place.direct_error is not None:
        yield Finding(
            Verdict.RESERVATIONS,
            f"no direct I/O on {place.path}: {place.direct_error}",
            "Use a disk with a file system that has O_DIRECT; through the page cache, io_submit "
            "does the whole read or write itself.",
        )
    elif place.in_memory:
        yield Finding(
            Verdict.RESERVATIONS,
            f"{place.path} is in memory: O_DIRECT is taken, but there is nothing to go around",
            "Use a path on a disk; here ordinary reads and writes are as good.",
        )
    elif place.size and geometry is not None and geometry.source == "assumed":
        yield Finding(
            Verdict.RESERVATIONS,
            f"the alignment of direct I/O could not be found out; {geometry.offset_alignment} "
            f"is assumed",
            "Nothing to be done: it suits every usual disk. But a file system that does not say "
            "may go through the page cache with what does not suit it, in spite of O_DIRECT.",
        )
    if not place.size:
        yield Finding(
            Verdict.RESERVATIONS,
            f"{place.path} is empty: no read could be timed",
            "Name a file with some megabytes in it, or a directory.",
        )
    if direct is not None and not place.in_memory:
        yield from _judge_direct_reads(direct)


def _judge_direct_reads(timing: Timing) -> Iterator[Finding]:
    if timing.behaviour is Behaviour.BLOCKING:
        yield Finding(
            Verdict.RESERVATIONS,
            f"io_submit blocks here even for direct reads: the thread slept inside in "
            f"{timing.slept} of {timing.calls} calls",
            "Submit from a thread that may wait, or use another file system.",
        )
    elif timing.behaviour is Behaviour.IMMEDIATE:
        yield Finding(
            Verdict.RESERVATIONS,
            "direct reads were done before io_submit returned, without waiting: they came from "
            "memory or a very fast disk, so it was not seen whether io_submit blocks",
            "Name a large file with data on the disk: not in memory, and no holes.",
        )


# -- showing ------------------------------------------------------------------------------------


def render_json(facts: Facts, findings: Sequence[Finding]) -> str:
    """One JSON object with everything. Pure."""
    told = asdict(facts)
    told["limits"]["contexts_left"] = facts.limits.contexts_left
    if facts.place is not None:
        for timing, shown in zip(facts.place.timings, told["place"]["timings"], strict=True):
            shown["behaviour"] = timing.behaviour.name.lower()
    worst = verdict(findings)
    return json.dumps(
        {
            "rawaio": rawaio.__version__,
            "status": int(worst),
            "verdict": worst.name.lower(),
            "findings": [
                {**asdict(finding), "verdict": finding.verdict.name.lower()} for finding in findings
            ],
            **told,
        },
        indent=2,
    )


def render_text(facts: Facts, findings: Sequence[Finding]) -> str:
    """The same for people. Pure."""
    sections = [("System", _system_rows(facts))]
    if facts.calls:
        sections.append(("System calls", _call_rows(facts)))
    if facts.ring is not None:
        sections.append(("Completion ring", _ring_rows(facts)))
    if facts.place is not None:
        sections.append((_title(facts.place), _place_rows(facts.place)))
    lines: list[str] = []
    for title, rows in sections:
        lines += [title, *(f"  {name:<15} {text}".rstrip() for name, text in rows), ""]
    if facts.place is not None and facts.place.timings:
        lines += [*_timing_lines(facts.place, facts.trial), ""]
    return "\n".join([*lines, *_verdict_lines(findings)])


def _system_rows(facts: Facts) -> list[tuple[str, str]]:
    system, limits = facts.system, facts.limits
    gil = "with the GIL" if system.gil else "without a GIL"
    rows = [
        ("kernel", system.kernel),
        ("machine", f"{system.machine}, pages of {system.page_size} bytes"),
        ("process", f"{system.pointer_bits}-bit, seccomp {system.seccomp}"),
        ("C library", system.libc),
        ("Python", f"{system.python}, {gil}"),
    ]
    used = "not told"
    if limits.contexts_left is not None:
        used = (
            f"{limits.aio_nr} of fs.aio-max-nr {limits.aio_max_nr}: "
            f"{limits.contexts_left} contexts of {CONTEXT_SIZE} still fit"
        )
    rows.append(("fs.aio-nr", used))
    return rows


def _call_rows(facts: Facts) -> list[tuple[str, str]]:
    rows = [
        (call.name, call.meaning if call.works else f"{call.error}: {call.meaning}")
        for call in facts.calls
    ]
    uring = facts.io_uring
    if uring is not None:
        text = "works" if uring.works else f"{uring.error}: {uring.meaning}"
        sysctl = "" if uring.disabled is None else f", io_uring_disabled={uring.disabled}"
        rows.append(("io_uring_setup", f"{text}{sysctl} (for comparison; rawaio does not use it)"))
    return rows


def _ring_rows(facts: Facts) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    ring, trial = facts.ring, facts.trial
    if ring is not None:
        rows.append(("usable", "yes" if ring.why_not is None else f"no: {ring.why_not}"))
        if ring.header is not None:
            words = [
                f"{name} {value:#x}" if name == "magic" else f"{name} {value}"
                for name, value in ring.header.items()
            ]
            rows.append(("header", ", ".join(words[:4])))
            rows.append(("", ", ".join(words[4:])))
        rows.append(("ordering", f"{ring.ordering}: {ring.ordering_means}"))
    if trial is not None:
        works = f"works, reaped by {trial.mechanism}"
        rows.append(("trial", works if trial.error is None else f"failed: {trial.error}"))
    return rows


def _title(place: Place) -> str:
    if place.kind == "directory":
        return f"{place.path} (directory; what follows is about a temporary file in it)"
    return f"{place.path} ({place.kind} of {place.size} bytes)"


def _place_rows(place: Place) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    mount, geometry = place.mount, place.geometry
    if mount is not None:
        text = f"{mount.file_system}, mounted at {mount.mount_point} from {mount.source}"
        rows.append(("file system", text))
    else:
        rows.append(("file system", "not mounted" if place.kind == "block device" else "not told"))
    if place.direct_error is not None:
        rows.append(("O_DIRECT", f"no: {place.direct_error}"))
    elif place.in_memory:
        rows.append(("O_DIRECT", "taken, without effect: the file system is in memory"))
    else:
        rows.append(("O_DIRECT", "works" if place.size else "can be opened; nothing to read"))
    if geometry is not None:
        rows.append(("alignment", f"{_alignment(geometry)} ({_SOURCES[geometry.source]})"))
    return rows


def _alignment(geometry: Geometry) -> str:
    reads = geometry.read_offset_alignment
    finer = f", of reads {reads}" if reads != geometry.offset_alignment else ""
    return (
        f"addresses {geometry.memory_alignment}, offsets and lengths "
        f"{geometry.offset_alignment}{finer}"
    )


def _timing_lines(place: Place, trial: Trial | None) -> list[str]:
    """A table, and what it means."""
    timings = [*place.timings]
    if trial is not None and trial.timing is not None:
        timings.append(trial.timing)
    lines = [
        "io_submit, medians per call",
        f"  {'reads':<18} {'per call':<13} {'inside':>10} {'until done':>12}  slept inside",
    ]
    for timing in timings:
        amount = f"{timing.reads_per_call} x {_size(timing.nbytes)}"
        lines.append(
            f"  {_MODES[timing.mode]:<18} {amount:<13} {timing.inside_us:>7.0f} us "
            f"{timing.total_us:>9.0f} us  in {timing.slept} of {timing.calls} calls"
        )
    lines += [
        f"  With {_MODES[timing.mode]} reads io_submit {timing.behaviour.value}."
        for timing in place.timings
    ]
    return lines


def _size(nbytes: int) -> str:
    return f"{nbytes} B" if nbytes % 1024 else f"{nbytes >> 10} KiB"


def _verdict_lines(findings: Sequence[Finding]) -> list[str]:
    worst = verdict(findings)
    if worst is Verdict.FINE:
        return ["Fine: native AIO works here."]
    heads = {Verdict.UNUSABLE: "Unusable", Verdict.RESERVATIONS: "Usable, with reservations"}
    lines = [f"{heads[worst]}:"]
    for finding in findings:
        lines += wrap(finding.text, _WIDTH, initial_indent="  - ", subsequent_indent="    ")
        lines += wrap(finding.advice, _WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines

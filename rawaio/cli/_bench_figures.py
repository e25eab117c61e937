"""What `rawaio bench` has found, in figures, and how they are shown."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import rawaio

from ._bench_settings import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ._bench_engines import Engine, Slice
    from ._bench_settings import Settings
    from ._bench_target import Target

__all__ = [
    "Cell",
    "Report",
    "describe_reaps",
    "format_us",
    "make_report",
    "percentile",
    "render_json",
    "render_text",
    "summarize",
]

# Above this share of the calls looked at, "submit blocks" is "yes". One in a hundred may fall
# asleep for reasons of its own: a page fault, a lock of the file.
_BLOCKED_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Cell:
    """One engine at one depth."""

    engine: str
    label: str
    depth: int
    operations: int
    seconds: float
    iops: float
    iops_of_rounds: tuple[float, ...]
    cpu_us_per_operation: float
    latency_us_p50: float
    latency_us_p99: float
    reaped: str  # "ring", "io_getevents", shares of both, or "" where nothing is reaped
    ring_reaps: int
    syscall_reaps: int
    waits: int
    submit_share: float | None  # of the time, inside submit; None where nothing is submitted
    submit_sleep_share: float | None  # of the submits looked at, those that slept
    submit_blocked: bool | None

    @property
    def spread(self) -> float:
        """How far the round that is furthest from the IOPS is from them, as a share of them."""
        return max(abs(iops - self.iops) for iops in self.iops_of_rounds) / self.iops


def percentile(counts: Counter[int], share: float) -> int:
    """The smallest value that this share of all the values, 0 to 1, do not exceed.

    Raises:
        ValueError: there are no values.
    """
    rank = share * counts.total()
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= rank:
            return value
    raise ValueError("no values")


def summarize(engine: Engine, slices: Sequence[Slice]) -> Cell:
    """What an engine did in all its turns. Every engine has read something in each turn."""
    operations = sum(s.operations for s in slices)
    wall_ns = sum(s.wall_ns for s in slices)
    latencies: Counter[int] = Counter()
    for s in slices:
        latencies.update(s.latencies_ns)
    ring_reaps = sum(s.ring_reaps for s in slices)
    syscall_reaps = sum(s.syscall_reaps for s in slices)
    submit_share = sleep_share = blocked = None
    if looks := sum(s.submit_looks for s in slices):
        submit_share = sum(s.submit_ns for s in slices) / wall_ns
        sleep_share = sum(s.submit_sleeps for s in slices) / looks
        blocked = sleep_share > _BLOCKED_SHARE
    return Cell(
        engine=engine.name,
        label=engine.label,
        depth=engine.depth,
        operations=operations,
        seconds=wall_ns / 1e9,
        iops=operations / wall_ns * 1e9,
        iops_of_rounds=tuple(s.operations / s.wall_ns * 1e9 for s in slices),
        cpu_us_per_operation=sum(s.cpu_ns for s in slices) / operations / 1e3,
        latency_us_p50=percentile(latencies, 0.50) / 1e3,
        latency_us_p99=percentile(latencies, 0.99) / 1e3,
        reaped=describe_reaps(ring_reaps, syscall_reaps),
        ring_reaps=ring_reaps,
        syscall_reaps=syscall_reaps,
        waits=sum(s.waits for s in slices),
        submit_share=submit_share,
        submit_sleep_share=sleep_share,
        submit_blocked=blocked,
    )


def describe_reaps(ring_reaps: int, syscall_reaps: int) -> str:
    """Where completions were read: "ring", "io_getevents", shares of both, or nowhere."""
    if ring_reaps and syscall_reaps:
        return f"ring {ring_reaps / (ring_reaps + syscall_reaps):.1%}, else io_getevents"
    return "ring" if ring_reaps else "io_getevents" if syscall_reaps else ""


@dataclass(frozen=True, slots=True)
class Report:
    """All that is shown."""

    rawaio: str  # its version
    machine: str
    cpus: int
    kernel: str
    python: str
    path: str
    kind: str
    file_system: str
    direct: bool
    span: int  # bytes of the file that the reads are spread over
    block_size: int
    seconds: float
    rounds: int
    seed: int
    why_not_ring: str | None  # why rawaio read no ring here; None: it did
    warnings: tuple[str, ...]
    cells: tuple[Cell, ...]


def make_report(
    target: Target, settings: Settings, why_not_ring: str | None, cells: Iterable[Cell]
) -> Report:
    """Put the cells together with where and how they were measured."""
    return Report(
        rawaio=rawaio.__version__,
        machine=platform.machine(),
        cpus=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        path=target.path,
        kind=target.kind,
        file_system=target.file_system,
        direct=target.direct,
        span=target.nr_blocks * settings.block_size,
        block_size=settings.block_size,
        seconds=settings.seconds,
        rounds=settings.rounds,
        seed=settings.seed,
        why_not_ring=why_not_ring,
        warnings=target.warnings,
        cells=tuple(cells),
    )


# -- showing -------------------------------------------------------------------------------------


def format_us(microseconds: float) -> str:
    """Three digits, and no fewer than there are before the point."""
    digits = 2 if microseconds < 9.995 else 1 if microseconds < 99.95 else 0
    return f"{microseconds:,.{digits}f}"


_HEADINGS: Final = (
    "depth",
    "engine",
    "IOPS",
    "spread",
    "CPU us",
    "p50 us",
    "p99 us",
    "reaped from",
    "submit blocks",
)
_LEFT: Final = frozenset({"engine", "reaped from", "submit blocks"})
_EXPLANATION: Final = f"""\
IOPS: reads a second. spread: how far the round furthest from that was from it.
CPU us: processor time of this process for each read, user and system; measuring is part of it.
p50, p99 us: in that time half, and 99 of 100, of the reads were done, counted from the moment
their place in the queue was free.
reaped from: where completions were read; to read the ring takes no system call.
submit blocks: "yes" when more than {_BLOCKED_SHARE:.0%} of the calls put the thread to sleep, which
asynchronous I/O is meant to avoid. In brackets: the share of the time spent inside submit.

Disks are noisy: most are shared, cached by their host, or held to a rate, so figures of another
run, disk or hour cannot be compared with these. Compare rows of the same depth, and take no
difference for real that is smaller than the spread.
"""


def _row(cell: Cell) -> tuple[str, ...]:
    blocked = ""
    if cell.submit_share is not None:
        blocked = f"{'yes' if cell.submit_blocked else 'no'} ({cell.submit_share:.0%})"
    return (
        str(cell.depth),
        cell.label,
        f"{cell.iops:,.0f}",
        f"{cell.spread:.0%}",
        format_us(cell.cpu_us_per_operation),
        format_us(cell.latency_us_p50),
        format_us(cell.latency_us_p99),
        cell.reaped or "-",
        blocked or "-",
    )


def render_text(report: Report) -> str:
    """What a terminal shows."""
    how = "direct" if report.direct else "buffered"
    where = report.path
    if report.kind == "temporary file":
        where = f"a temporary file in {where}"
    if report.file_system:
        where += f" ({report.file_system})"
    block_size, span = format_size(report.block_size), format_size(report.span)
    system = f"Linux {report.kernel} {report.machine}, {report.cpus} CPUs"
    lines = [
        f"rawaio {report.rawaio}, {report.python}, {system}",
        f"Random {how} reads of {block_size} from {span} of {where},",
        f"{report.seconds:g} s for each row, in {report.rounds} rounds, seed {report.seed}.",
        "",
    ]
    rows = [_HEADINGS, *map(_row, report.cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    depth = report.cells[0].depth if report.cells else 0
    for i, row in enumerate(rows):
        if i and report.cells[i - 1].depth != depth:
            depth = report.cells[i - 1].depth
            lines.append("")
        texts = (
            text.ljust(width) if heading in _LEFT else text.rjust(width)
            for text, width, heading in zip(row, widths, _HEADINGS, strict=True)
        )
        lines.append("  ".join(texts).rstrip())
    lines += ["", _EXPLANATION.rstrip("\n")]
    if report.why_not_ring:
        lines += ["", f"rawaio read no ring: {report.why_not_ring}"]
    lines += [f"Warning: {warning}" for warning in report.warnings]
    return "\n".join(lines)


def render_json(report: Report) -> str:
    """One object: the fields of `Report`, with an object for each cell."""
    return json.dumps(asdict(report), indent=2)

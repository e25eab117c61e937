"""How long a program goes on, how much it did, and in what time."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence
    from typing import TypeVar

    _T = TypeVar("_T")

__all__ = ["Watch", "percentile"]

_MIB: Final = 1 << 20


def percentile(values: Sequence[float], part: float) -> float:
    """The lowest value that part of all values do not exceed (nearest rank).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(math.ceil(part * len(values)), 1) - 1]


class Watch:
    """Counts operations for so many seconds; asked for latency, it times each instead."""

    def __init__(self, seconds: float, *, latency: bool = False, least: int = 1) -> None:
        """least: how many operations each worker does, even when the time is over."""
        self.seconds = seconds
        self.latency = latency
        self.least = least
        self.operations = 0
        self.latencies_s: list[float] = []
        self.end = 0.0
        self.wall_s = self.cpu_s = 0.0
        self._done: list[int] = []

    @contextmanager
    def running(self) -> Generator[None]:
        """The time that counts."""
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        self.end = wall_s + self.seconds
        yield
        self.wall_s = time.perf_counter() - wall_s
        self.cpu_s = time.process_time() - cpu_s
        self.operations += sum(self._done)

    def is_over(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() >= self.end

    def each(self, source: Iterable[_T]) -> Generator[_T]:
        """Things until the time is over, for a worker that has one under way at a time."""
        return self._timed(source) if self.latency else self._counted(source)

    def _counted(self, source: Iterable[_T]) -> Generator[_T]:
        clock, least = time.perf_counter, self.least
        for operations, thing in enumerate(source):
            if operations >= least and clock() >= self.end:
                # Several threads come here; a list takes from each what it gives.
                self._done.append(operations)
                return
            yield thing

    def _timed(self, source: Iterable[_T]) -> Generator[_T]:
        clock = time.perf_counter
        latencies_s: list[float] = []
        for thing in source:
            began = clock()
            yield thing
            now = clock()
            latencies_s.append(now - began)
            if now >= self.end and len(latencies_s) >= self.least:
                break
        self._done.append(len(latencies_s))
        self.latencies_s.extend(latencies_s)

    def figures(self, nbytes: int) -> dict[str, float]:
        """What was found, of operations of so many bytes.

        Raises:
            OSError: nothing was done.
        """
        if not self.operations:
            raise OSError("nothing was done in this time")
        if self.latency:
            return {
                "p50_us": 1e6 * percentile(self.latencies_s, 0.5),
                "p99_us": 1e6 * percentile(self.latencies_s, 0.99),
            }
        iops = self.operations / self.wall_s
        rate = {"iops": iops} if nbytes < _MIB else {"mib_s": iops * nbytes / _MIB}
        return {**rate, "cpu_us": 1e6 * self.cpu_s / self.operations}

"""L3: asyncio event loops that look for completions before they sleep.

    with asyncio.Runner(loop_factory=rawaio.loops.polling.polling_loop) as runner:
        runner.run(main())

A direct read that takes less time than a sleep and a wake-up is answered sooner, and the CPU is
busy for as long as the rule says; `polling.py` has the arithmetic. Other descriptors and callbacks
from other threads wait for at most `PollingParameters.max_ns` more. Where no ring can be looked
at, and on a build without the GIL, it sleeps as any loop does.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING

from ..busypoll import BusyPoll
from ..polling import PollingRule, WeightedRule

if TYPE_CHECKING:
    from ..protocols import PolledRing

__all__ = ["PollingEventLoop", "polling_loop"]


class _PollingSelector(selectors.EpollSelector):
    """Looks at rings before it sleeps."""

    def __init__(self, rule: PollingRule) -> None:
        super().__init__()
        self._busy = BusyPoll(rule)
        self._watched: tuple[PolledRing, ...] = ()

    def watch(self, ring: PolledRing) -> None:
        """Look at this one, until it is closed."""
        self._watched = (*(r for r in self._watched if r is not ring and not r.closed), ring)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As of `selectors.EpollSelector`."""
        if (timeout is not None and timeout <= 0) or not self._something_under_way():
            return super().select(timeout)
        found: list[tuple[selectors.SelectorKey, int]] = []

        def sleep(seconds: float | None) -> None:
            found.extend(super(_PollingSelector, self).select(seconds))

        self._busy.wait(self._ready, timeout, sleep)
        # What was found by polling has made its eventfd readable, or does so now.
        return found or super().select(0)

    def _ready(self) -> bool:
        return any(not ring.empty for ring in self._watched)

    def _something_under_way(self) -> bool:
        return any(ring.visible and ring.outstanding for ring in self._watched)


class PollingEventLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop on epoll, which looks at the rings of its drivers before it sleeps."""

    def __init__(self, rule: PollingRule | None = None) -> None:
        """rule: of this loop's own; `WeightedRule()`, when left out."""
        self._polling = _PollingSelector(WeightedRule() if rule is None else rule)
        super().__init__(self._polling)

    def watch_ring(self, ring: PolledRing) -> None:
        """Look at this one, until it is closed. Called by the loop's driver."""
        self._polling.watch(ring)


def polling_loop(rule: PollingRule | None = None) -> PollingEventLoop:
    """A new loop that polls by rule: a loop factory, for `asyncio.Runner`."""
    return PollingEventLoop(rule)

"""L2: look for completions for a while before sleeping, as long as a rule of `polling` says."""

from __future__ import annotations

import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .polling import PollingRule

__all__ = ["BusyPoll"]


class BusyPoll:
    """One rule, and one who is looked for: a context, or all contexts of an event loop.

    Usable from several threads; who waits longest is what the rule learns from.
    """

    __slots__ = ("_handler", "_lessons", "_lock", "rule")

    def __init__(self, rule: PollingRule) -> None:
        self.rule = rule
        self._handler = rule.add()
        self._lock = threading.Lock()
        # What waits took, whether something was found, and when they were over.
        self._lessons: list[tuple[int, bool, int]] = []

    def wait(
        self,
        ready: Callable[[], bool],
        timeout: float | None,
        sleep: Callable[[float | None], object],
    ) -> None:
        """Wait until ready() says so, or sleep(timeout) has come back; timeout in seconds.

        ready is called again and again, and so should not enter the kernel.
        """
        clock = time.monotonic_ns
        began = now = clock()
        self.learn()
        limit = self.rule.poll_ns
        if timeout is not None:
            limit = min(limit, int(timeout * 1e9))
        found = False
        while now - began < limit:
            if ready():
                found = True
                break
            now = clock()
        if not found:
            if timeout is not None:
                timeout = max(timeout - (now - began) / 1e9, 0)
            sleep(timeout)
            found = ready()
        with self._lock:
            now = clock()
            self._lessons.append((now - began, found, now))

    def learn(self) -> None:
        """Tell the rule of the waits that are over.

        The next wait does: there is time then, and what was waited for is dealt with.
        """
        if self._lessons:
            with self._lock:
                while self._lessons:
                    block_ns, found, now = self._lessons.pop(0)
                    self.rule.adjust(block_ns, (self._handler,) if found else (), now)

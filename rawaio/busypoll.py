"""L2: look for completions for a while before sleeping, as long as a rule of `polling` says."""

from __future__ import annotations

import threading
import time

from ._light import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from .polling import PollingRule

__all__ = ["BusyPoll"]

# As many waits as may be over at once before one tells the rule; of more, the last ones.
_MAX_LESSONS: Final = 64


class BusyPoll:
    """One rule, and one who is looked for: a context, or all contexts of an event loop.

    Usable from several threads; who waits longest is what the rule learns from.
    """

    __slots__ = ("_handler", "_lessons", "_lock", "rule")

    def __init__(self, rule: PollingRule) -> None:
        self.rule = rule
        self._handler = rule.add()
        self._lock = threading.Lock()
        # What waits took, and whether something was found.
        self._lessons: deque[tuple[int, bool]] = deque(maxlen=_MAX_LESSONS)

    def wait(
        self,
        ready: Callable[[], bool],
        timeout: float | None,
        sleep: Callable[[float | None], object],
        then: Callable[[], object] | None = None,
    ) -> None:
        """Wait until ready() says so, or sleep(timeout) has come back; timeout in seconds.

        ready is called again and again, and so should not enter the kernel. then: what is urgent as
        soon as it has said so, before anything else; not called behind a sleep.
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
        if found:
            now = clock()
            if then is not None:
                then()
        else:
            if timeout is not None:
                timeout = max(timeout - (now - began) / 1e9, 0)
            sleep(timeout)
            found = ready()
            now = clock()
        self._lessons.append((now - began, found))

    def learn(self) -> None:
        """Tell the rule of the waits that are over.

        The next wait does: there is time then, and what was waited for is dealt with.
        """
        # Nobody waits for the lock. Should an exception from outside leave it held, no more is
        # learnt, and everything else goes on.
        if self._lessons and self._lock.acquire(blocking=False):
            try:
                self._tell()
            finally:
                self._lock.release()

    def _tell(self) -> None:
        # A function of its own: CPython 3.13 does not look for the handler of a try around a loop
        # when an exception from outside strikes at the jump back.
        while self._lessons:
            block_ns, found = self._lessons.popleft()
            self.rule.adjust(block_ns, (self._handler,) if found else (), time.monotonic_ns())

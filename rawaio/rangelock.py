"""L2: holds on ranges of a file, shared and exclusive. Pure: whoever waits is called back.

Laws:

- Two holds that overlap are granted at the same time only when both are shared.
- First come, first served: a hold is never granted before an earlier one that it conflicts with,
  so nobody starves. Holds that conflict with nothing earlier are granted at once.
- `granted` is called exactly once for each hold that had to wait and was not released before.

Finding the conflicts of a hold takes time in proportion to the holds that there are; a shared one,
while nothing is exclusive, takes none.
"""

from __future__ import annotations

from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Hold", "RangeLock"]


class Hold:
    """A place in the order of those who want a range; made by `RangeLock.acquire`."""

    __slots__ = ("_behind", "_blockers", "_granted", "_released", "exclusive", "start", "stop")

    def __init__(
        self, start: int, stop: int, exclusive: bool, granted: Callable[[], object] | None
    ) -> None:
        self.start = start
        self.stop = stop
        self.exclusive = exclusive
        self._granted = granted
        self._released = False
        # The earlier holds that it waits for, and the later ones that wait for it.
        self._blockers: set[Hold] = set()
        self._behind: deque[Hold] = deque()

    @property
    def granted(self) -> bool:
        """Whether the range is held."""
        return not self._blockers and not self._released

    def _conflicts(self, other: Hold) -> bool:
        # An empty range has no byte that another could want, wherever it lies.
        return (self.exclusive or other.exclusive) and (
            max(self.start, other.start) < min(self.stop, other.stop)
        )

    def __repr__(self) -> str:
        kind = "exclusive" if self.exclusive else "shared"
        state = "released" if self._released else "granted" if self.granted else "waiting"
        return f"<rawaio.rangelock.Hold {kind} {self.start}..{self.stop}, {state}>"


class RangeLock:
    """Who holds which bytes, and who waits for them. Not for use from several threads at once."""

    __slots__ = ("_exclusive", "_holds")

    def __init__(self) -> None:
        # In the order in which they came; a dict, because a set has no order.
        self._holds: dict[Hold, None] = {}
        self._exclusive: set[Hold] = set()

    def __len__(self) -> int:
        """How many holds are granted or waiting."""
        return len(self._holds)

    def acquire(
        self,
        start: int,
        stop: int,
        *,
        exclusive: bool = False,
        granted: Callable[[], object] | None = None,
    ) -> Hold:
        """Ask for the bytes from start up to stop.

        Returns at once. When `Hold.granted` is false, granted is called once it is true; it may
        acquire and release.

        Raises:
            ValueError: start is negative, or stop before it.
        """
        if not 0 <= start <= stop:
            raise ValueError(f"a range from {start} to {stop}")
        hold = Hold(start, stop, exclusive, granted)
        if exclusive or self._exclusive:
            for other in self._holds:
                if hold._conflicts(other):
                    other._behind.append(hold)
                    hold._blockers.add(other)
        if exclusive:
            self._exclusive.add(hold)
        self._holds[hold] = None
        return hold

    def release(self, hold: Hold) -> None:
        """Give the range back, or give up waiting for it; then call those who waited for it.

        Releasing it again does nothing; after an exception from outside, what was left to do.
        """
        hold._released = True
        self._holds.pop(hold, None)
        self._exclusive.discard(hold)
        behind = hold._behind
        for other in list(behind):
            other._blockers.discard(hold)
        while behind:
            other = behind[0]
            if other.granted and other._granted is not None:
                granted, other._granted = other._granted, None
                granted()
            behind.popleft()

    def _check(self) -> None:
        """Assert the laws, for tests."""
        holds = list(self._holds)
        assert self._exclusive == {hold for hold in holds if hold.exclusive}
        for i, hold in enumerate(holds):
            assert not hold._released
            earlier = [other for other in holds[:i] if hold._conflicts(other)]
            assert hold._blockers == set(earlier)
            assert hold.granted == (not earlier)

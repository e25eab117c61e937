"""How long a loop looks for completions before it sleeps: adaptive polling.

Sleeping in the kernel and being woken costs microseconds, about as much as a fast disk takes
to answer; looking at the ring costs nanoseconds, but burns the CPU while nothing comes. So a
loop looks for `poll_ns` first and then sleeps, and a rule learns `poll_ns` from how long past
turns had to wait. This module is that arithmetic: it looks at no clock and at no ring.

The loop gives a rule, once per turn, the *block time*: from entry into the loop (before it
polls or sleeps) to just before the first handler is dispatched. The time that handlers take is
no part of it: charged to waiting, a slow callback would pass for a slow disk and turn polling
off.

Laws:

1.  `0 <= poll_ns <= max_ns`, always. With `max_ns == 0` nothing is ever polled.
2.  `poll_ns` is 0 while no handler is on the poll list. A handler joins when it is active and
    leaves when it has been idle for `idle_ns`.
3.  A constant block of at most `max_ns`, the same handlers active in every turn, comes to be
    covered: `poll_ns >= block`, to within the rounding of the average (less than
    `1 << weight_shift`). `GrowthRule` needs `grow != 1` for it, and `WeightedRule` needs
    `grow <= 2` or `shrink <= 2`: with more of both it can swing.
4.  A constant block above `max_ns`, by no less than `1 << weight_shift`, brings `poll_ns` to 0,
    unless `shrink` is 1.
5.  A call that is refused changes nothing.

Every time is a whole number of nanoseconds. A rule belongs to one loop and is not locked.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["GrowthRule", "HandlerPolling", "PollingParameters", "PollingRule", "WeightedRule"]


def _check_int(name: str, value: object, least: int) -> None:
    """Refuse what is not an int of at least `least`."""
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True, slots=True)
class PollingParameters:
    """What a rule may do and how fast. The defaults are QEMU's, `start_ns` and all.

    Raises:
        TypeError: a value is not an int.
        ValueError: a value is negative, or `start_ns` is 0.
    """

    max_ns: int = 32_768
    """Never poll longer, and take a longer wait for one not worth polling for; 0: never poll."""
    grow: int = 2
    """Factor of a step up; 0 means 2."""
    shrink: int = 2
    """Divisor of a step down; 1 never steps down, 0 goes straight to 0."""
    weight_shift: int = 3
    """A new block weighs `1 / (1 << weight_shift)` in a handler's average (WeightedRule)."""
    start_ns: int = 4_000
    """First step up from 0, the order of one sleep and wake-up; at least 1 (GrowthRule)."""
    idle_ns: int = 7_000_000_000
    """Idle this long, a handler leaves the poll list: looking at it costs its neighbours."""

    def __post_init__(self) -> None:
        for name in ("max_ns", "grow", "shrink", "weight_shift", "idle_ns"):
            _check_int(name, getattr(self, name), 0)
        _check_int("start_ns", self.start_ns, 1)

    def grown(self, ns: int) -> int:
        """`ns` one step up, not yet held to `max_ns`."""
        return ns * (self.grow or 2)

    def shrunk(self, ns: int) -> int:
        """`ns` one step down."""
        return ns // self.shrink if self.shrink else 0


_DEFAULTS = PollingParameters()


@dataclass(slots=True, eq=False)
class HandlerPolling:
    """What a rule remembers of one handler; made by `add`, changed by the rule alone."""

    ns: int = 0
    """How long it tends to wait; 0: not known, or too long to poll for (WeightedRule)."""
    last_active_ns: int = 0
    """The `now_ns` of its last active turn."""
    polled: bool = False
    """Whether it is on the poll list, so that the loop should look at it while polling."""


class PollingRule(Protocol):
    """What a loop needs of a rule."""

    @property
    @abstractmethod
    def poll_ns(self) -> int:
        """How long to poll in the next turn before sleeping; 0: do not poll."""

    @abstractmethod
    def add(self) -> HandlerPolling:
        """Register one more handler. It is polled from its first active turn on."""

    @abstractmethod
    def remove(self, handler: HandlerPolling) -> None:
        """Forget a handler.

        Raises:
            ValueError: it is not registered here.
        """

    @abstractmethod
    def adjust(self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int) -> None:
        """Learn from one turn of the loop; called once per turn.

        `block_ns` is the time from entry into the loop to just before dispatch, polling and
        sleeping alike and the time in handlers excluded. `active` are the handlers that had
        something to do in this turn. `now_ns` is the loop's monotonic clock.

        Raises:
            TypeError: a time is not an int.
            ValueError: `block_ns` is negative, `now_ns` is earlier than in the turn before, or
                a handler is not registered here.
        """


class _PollList:
    """The handlers of a rule, and which of them are polled."""

    __slots__ = ("_handlers", "_now_ns", "_ns", "parameters")

    def __init__(self, parameters: PollingParameters = _DEFAULTS) -> None:
        self.parameters = parameters
        self._handlers: set[HandlerPolling] = set()
        self._now_ns = 0
        # What the rule has learnt. It outlives an empty poll list, poll_ns does not.
        self._ns = 0

    @property
    def poll_ns(self) -> int:
        """How long to poll in the next turn before sleeping; 0: do not poll."""
        return self._ns if any(handler.polled for handler in self._handlers) else 0

    def add(self) -> HandlerPolling:
        """Register one more handler. It is polled from its first active turn on."""
        handler = HandlerPolling()
        self._handlers.add(handler)
        return handler

    def remove(self, handler: HandlerPolling) -> None:
        """Forget a handler. `PollingRule.remove` says what is refused."""
        if handler not in self._handlers:
            raise ValueError(f"not a handler of this rule: {handler!r}")
        self._handlers.remove(handler)
        handler.polled = False

    def _turn(
        self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int
    ) -> frozenset[HandlerPolling]:
        """Check what `adjust` was given, let handlers join and leave, return the active ones."""
        _check_int("block_ns", block_ns, 0)
        _check_int("now_ns", now_ns, self._now_ns)
        active = frozenset(active)
        if not active <= self._handlers:
            raise ValueError(f"not handlers of this rule: {list(active - self._handlers)}")

        self._now_ns = now_ns
        for handler in self._handlers:
            if handler in active:
                handler.polled = True
                handler.last_active_ns = now_ns
            elif now_ns - handler.last_active_ns >= self.parameters.idle_ns:
                # Its average is as old as its activity: it comes back without one.
                handler.polled = False
                handler.ns = 0
        return active

    def _check(self) -> None:
        """Assert what holds between any two calls."""
        assert 0 <= self.poll_ns <= self._ns <= self.parameters.max_ns
        for handler in self._handlers:
            assert 0 <= handler.ns <= self.parameters.max_ns
            assert handler.polled or handler.ns == 0
            assert handler.last_active_ns <= self._now_ns


class WeightedRule(_PollList):
    """Follow the slowest handler worth waiting for; QEMU's rule of 2026 and the default.

    Each handler on the poll list has a moving average of the blocks that ended with it active;
    in turns without it the time adds up, and above `max_ns` it counts for nothing. The largest
    is what polling should cover: below it `poll_ns` grows, above twice of it `poll_ns` shrinks,
    and in a turn where nobody was active it stays.
    """

    __slots__ = ()

    def adjust(self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int) -> None:
        """Learn from one turn of the loop. `PollingRule.adjust` says what block time is."""
        active = self._turn(block_ns, active, now_ns)
        p = self.parameters
        longest_ns = 0
        for handler in self._handlers:
            if handler not in active:
                ns = handler.ns + block_ns if handler.ns else 0
            elif handler.ns:
                ns = handler.ns - (handler.ns >> p.weight_shift) + (block_ns >> p.weight_shift)
            else:
                ns = block_ns
            handler.ns = ns if ns <= p.max_ns else 0
            longest_ns = max(longest_ns, handler.ns)

        if not active:
            return
        if longest_ns > self._ns:
            self._ns = min(max(longest_ns, p.grown(self._ns)), p.max_ns)
        # Doubled on the left, not halved on the right: 1 has to fall to 0 too.
        elif 2 * longest_ns < self._ns:
            self._ns = p.shrunk(self._ns)


class GrowthRule(_PollList):
    """Grow until the block is covered, shrink when it cannot be; QEMU's rule of 2022.

    It looks at the block alone, whoever was active, and never comes down for short blocks:
    covered is good enough.
    """

    __slots__ = ()

    def adjust(self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int) -> None:
        """Learn from one turn of the loop. `PollingRule.adjust` says what block time is."""
        self._turn(block_ns, active, now_ns)
        p = self.parameters
        if block_ns <= self._ns:
            return
        if block_ns > p.max_ns:
            self._ns = p.shrunk(self._ns)
        else:
            self._ns = min(p.grown(self._ns) or p.start_ns, p.max_ns)

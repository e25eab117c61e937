"""RangeLock in any order of calls, beside a list of who came when."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rawaio.rangelock import Hold, RangeLock

_EDGES = st.integers(0, 12)


@dataclass(eq=False)
class Wish:
    """What the model knows of a hold."""

    start: int
    stop: int
    exclusive: bool
    had_to_wait: bool
    does: str  # when it is granted
    hold: Hold = field(init=False)
    calls: int = 0

    def conflicts(self, other: Wish) -> bool:
        overlap = any(other.start <= byte < other.stop for byte in range(self.start, self.stop))
        return overlap and (self.exclusive or other.exclusive)


class RangeLockMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lock = RangeLock()
        self.wishes: list[Wish] = []  # in the order in which they came
        self.calls: list[Wish] = []  # since the last release from outside
        self.depth = 0

    def may_have(self, wish: Wish) -> bool:
        """Whether nobody who came earlier, and has not gone, is in its way."""
        earlier = self.wishes[: self.wishes.index(wish)] if wish in self.wishes else self.wishes
        return not any(wish.conflicts(other) for other in earlier)

    def ask(self, start: int, length: int, exclusive: bool, does: str) -> None:
        wish = Wish(start, start + length, exclusive, False, does)
        wish.had_to_wait = not self.may_have(wish)
        wish.hold = self.lock.acquire(
            wish.start, wish.stop, exclusive=exclusive, granted=lambda: self.granted(wish)
        )
        self.wishes.append(wish)

    def granted(self, wish: Wish) -> None:
        assert wish in self.wishes, "it was given up"
        assert wish.had_to_wait, "it was granted at once"
        assert wish.hold.granted
        assert self.may_have(wish)
        wish.calls += 1
        assert wish.calls == 1
        self.calls.append(wish)
        if self.depth > 3:
            return
        if wish.does == "release":
            self.give_back(wish)
        elif wish.does == "ask":
            self.ask(wish.start, 3, True, "nothing")

    def give_back(self, wish: Wish) -> None:
        self.depth += 1
        self.wishes.remove(wish)
        self.lock.release(wish.hold)
        self.depth -= 1

    @rule(
        start=_EDGES,
        length=st.integers(0, 6),
        exclusive=st.booleans(),
        does=st.sampled_from(("nothing", "nothing", "release", "ask")),
    )
    def acquire(self, start: int, length: int, exclusive: bool, does: str) -> None:
        self.ask(start, length, exclusive, does)

    @precondition(lambda self: self.wishes)
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        self.calls = []
        self.give_back(self.wishes[which % len(self.wishes)])

    @precondition(lambda self: self.wishes)
    @rule(which=st.integers(0, 100))
    def release_again(self, which: int) -> None:
        wish = self.wishes[which % len(self.wishes)]
        self.calls = []
        self.give_back(wish)
        before = [other.calls for other in self.wishes]
        self.lock.release(wish.hold)
        assert [other.calls for other in self.wishes] == before

    @invariant()
    def as_the_model(self) -> None:
        self.lock._check()
        assert len(self.lock) == len(self.wishes)
        for wish in self.wishes:
            assert wish.hold.granted == self.may_have(wish)
            # Nobody who may go on still sleeps.
            assert wish.calls == (wish.had_to_wait and wish.hold.granted)

    def teardown(self) -> None:
        while self.wishes:
            self.give_back(self.wishes[0])
        assert len(self.lock) == 0


TestRangeLock = RangeLockMachine.TestCase
TestRangeLock.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

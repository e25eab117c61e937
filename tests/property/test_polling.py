"""The laws of adaptive polling, for all inputs, and a model that was written apart from it."""

from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rawaio.polling import GrowthRule, HandlerPolling, PollingParameters, WeightedRule

RuleType = type[WeightedRule] | type[GrowthRule]

# Small maxima make the edges (0, 1, half, max, max + 1) frequent; large ones are the real case.
LIMITS = st.one_of(st.integers(0, 40), st.integers(0, 40_000), st.just(32_768))
# Someone is active in most turns; without that the weighted rule stands still.
ACTIVE = st.one_of(
    st.frozensets(st.integers(0, 2), min_size=1), st.just(frozenset({0})), st.just(frozenset[int]())
)
RULES: st.SearchStrategy[RuleType] = st.sampled_from([WeightedRule, GrowthRule])

NO_DEADLINE = settings(deadline=None)  # an emulated machine is slow, not wrong


@st.composite
def parameters(draw: st.DrawFn) -> PollingParameters:
    return PollingParameters(
        max_ns=draw(LIMITS),
        grow=draw(st.integers(0, 5)),
        shrink=draw(st.integers(0, 5)),
        weight_shift=draw(st.integers(0, 4)),
        start_ns=draw(st.one_of(st.integers(1, 9), st.just(4000))),
        idle_ns=draw(st.integers(0, 12)),
    )


@dataclass(frozen=True)
class Turn:
    """One turn of a loop with three handlers."""

    block_ns: int
    active: frozenset[int]
    elapsed_ns: int


@st.composite
def turns(draw: st.DrawFn, max_ns: int) -> list[Turn]:
    block = st.one_of(
        st.integers(0, 9),
        st.integers(0, 2 * max_ns + 2),
        st.integers(max(max_ns - 1, 0), max_ns + 1),
    )
    turn = st.builds(
        Turn,
        block_ns=block,
        active=ACTIVE,
        elapsed_ns=st.integers(0, 6),
    )
    return draw(st.lists(turn, min_size=draw(st.sampled_from([0, 12])), max_size=24))


class Model:
    """The rules over again: whole history in, one number out, nothing kept in between."""

    def __init__(self, p: PollingParameters, past: list[Turn]) -> None:
        self.p = p
        self.past = past
        self.nows = [sum(t.elapsed_ns for t in past[: i + 1]) for i in range(len(past))]

    def on_list(self, handler: int, upto: int) -> bool:
        """Whether it was on the list after turn `upto`; an inactive turn asks for its age."""
        listed, since = False, 0
        for now, turn in zip(self.nows[: upto + 1], self.past, strict=False):
            if handler in turn.active:
                listed, since = True, now
            elif now >= since + self.p.idle_ns:
                listed = False
        return listed

    def average(self, handler: int, upto: int) -> int:
        value = 0
        for i in range(upto + 1):
            turn = self.past[i]
            divisor = 2**self.p.weight_shift
            if not self.on_list(handler, i):
                value = 0
            elif handler not in turn.active:
                value = value + turn.block_ns if value > 0 else 0
            elif value == 0:
                value = turn.block_ns
            else:
                value += turn.block_ns // divisor - value // divisor
            if value > self.p.max_ns:
                value = 0
        return value

    def smaller(self, ns: int) -> int:
        return 0 if self.p.shrink == 0 else ns // self.p.shrink

    def larger(self, ns: int) -> int:
        return ns * (2 if self.p.grow == 0 else self.p.grow)

    def weighted(self) -> int:
        ns = 0
        for i, turn in enumerate(self.past):
            if turn.active:
                want = max(self.average(h, i) for h in range(3))
                if want > ns:
                    ns = min(max(want, self.larger(ns)), self.p.max_ns)
                elif want < ns / 2:
                    ns = self.smaller(ns)
        return ns

    def growth(self) -> int:
        ns = 0
        for turn in self.past:
            if ns < turn.block_ns <= self.p.max_ns:
                ns = min(self.larger(ns) or self.p.start_ns, self.p.max_ns)
            elif turn.block_ns > max(ns, self.p.max_ns):
                ns = self.smaller(ns)
        return ns

    def poll_ns(self, rule_type: RuleType) -> int:
        if not any(self.on_list(h, len(self.past) - 1) for h in range(3)):
            return 0
        return self.weighted() if rule_type is WeightedRule else self.growth()


@pytest.mark.parametrize("rule_type", [WeightedRule, GrowthRule])
@NO_DEADLINE
@given(data=st.data(), p=parameters())
def test_rule_agrees_with_the_model(
    rule_type: RuleType, data: st.DataObject, p: PollingParameters
) -> None:
    past = data.draw(turns(p.max_ns))
    rule = rule_type(p)
    handlers = [rule.add() for _ in range(3)]
    now_ns = 0
    for turn in past:
        now_ns += turn.elapsed_ns
        rule.adjust(turn.block_ns, [handlers[h] for h in turn.active], now_ns)
        rule._check()
        assert 0 <= rule.poll_ns <= p.max_ns
    model, last = Model(p, past), len(past) - 1
    assert rule.poll_ns == model.poll_ns(rule_type)
    assert [h.polled for h in handlers] == [model.on_list(h, last) for h in range(3)]
    if rule_type is WeightedRule:
        assert [h.ns for h in handlers] == [model.average(h, last) for h in range(3)]
    else:
        assert [h.ns for h in handlers] == [0] * 3


def primed(rule: WeightedRule | GrowthRule, past: list[Turn]) -> tuple[list[HandlerPolling], int]:
    """A rule with this past: its handlers and the time it is now."""
    handlers = [rule.add() for _ in range(3)]
    now_ns = 0
    for turn in past:
        now_ns += turn.elapsed_ns
        rule.adjust(turn.block_ns, [handlers[h] for h in turn.active], now_ns)
    return handlers, now_ns


# Enough for the slowest of these averages to arrive from anywhere, once the others have left the
# list: with 4 bits of weight it needs about 16 * ln(40_000 / 16) turns, and halving 40_000 away
# another 16.
LONG = 200


@NO_DEADLINE
@given(data=st.data(), rule_type=RULES, p=parameters())
def test_constant_block_below_the_maximum_is_covered(
    data: st.DataObject, rule_type: RuleType, p: PollingParameters
) -> None:
    if rule_type is WeightedRule:
        assume(p.grow <= 2 or p.shrink <= 2)
        slack_ns = (1 << p.weight_shift) - 1
    else:
        assume(p.grow != 1)
        slack_ns = 0
    block_ns = data.draw(st.integers(0, p.max_ns))
    rule = rule_type(p)
    handlers, now_ns = primed(rule, data.draw(turns(p.max_ns)))
    active = data.draw(st.lists(st.sampled_from(handlers), min_size=1))
    now_ns += p.idle_ns
    for _ in range(LONG):
        rule.adjust(block_ns, active, now_ns)
    settled_ns = rule.poll_ns
    assert block_ns - slack_ns <= settled_ns <= p.max_ns
    rule.adjust(block_ns, active, now_ns)
    assert rule.poll_ns == settled_ns


@NO_DEADLINE
@given(block_ns=st.integers(1, 32_768), rule_type=RULES)
@example(block_ns=32_768, rule_type=WeightedRule)
@example(block_ns=32_768, rule_type=GrowthRule)
def test_fresh_rule_covers_a_constant_block_within_a_few_turns(
    block_ns: int, rule_type: RuleType
) -> None:
    rule = rule_type()
    handler = rule.add()
    for _ in range(1 if rule_type is WeightedRule else 5):
        rule.adjust(block_ns, [handler], 0)
    assert rule.poll_ns >= block_ns
    if rule_type is WeightedRule:
        assert rule.poll_ns == block_ns


@NO_DEADLINE
@given(data=st.data(), rule_type=RULES, p=parameters())
def test_constant_block_above_the_maximum_turns_polling_off(
    data: st.DataObject, rule_type: RuleType, p: PollingParameters
) -> None:
    assume(p.shrink != 1)
    above = data.draw(st.integers(1 << p.weight_shift, 10**10))
    rule = rule_type(p)
    handlers, now_ns = primed(rule, data.draw(turns(p.max_ns)))
    active = data.draw(st.lists(st.sampled_from(handlers), min_size=1))
    for _ in range(LONG):
        rule.adjust(p.max_ns + above, active, now_ns)
    assert rule.poll_ns == 0


@NO_DEADLINE
@given(data=st.data(), rule_type=RULES, p=parameters())
def test_refused_input_changes_nothing(
    data: st.DataObject, rule_type: RuleType, p: PollingParameters
) -> None:
    past = data.draw(turns(p.max_ns))
    rule, twin = rule_type(p), rule_type(p)
    handlers, now_ns = primed(rule, past)
    twins, _ = primed(twin, past)
    gone = rule.add()
    rule.remove(gone)
    stranger = data.draw(st.sampled_from([gone, twins[0], HandlerPolling()]))
    good = data.draw(st.lists(st.sampled_from(handlers)))
    block_ns = data.draw(st.integers(0, 2 * p.max_ns))
    later_ns = now_ns + data.draw(st.integers(0, 10**10))
    bad = cast("Any", rule)
    for arguments in (
        (-1 - block_ns, good, later_ns),
        (float(block_ns), good, later_ns),
        (block_ns, good, now_ns - 1 - block_ns),
        (block_ns, good, None),
        (block_ns, [*good, stranger], later_ns),
        (block_ns, [*good, []], later_ns),
    ):
        with pytest.raises((TypeError, ValueError)):
            bad.adjust(*arguments)
    with pytest.raises(ValueError, match="not a handler"):
        rule.remove(stranger)

    def state(which: list[HandlerPolling]) -> list[tuple[int, int, bool]]:
        return [(h.ns, h.last_active_ns, h.polled) for h in which]

    assert state(handlers) == state(twins)
    assert rule.poll_ns == twin.poll_ns
    # And they go on alike, so nothing has changed that does not show.
    rule.adjust(block_ns, handlers, now_ns)
    twin.adjust(block_ns, twins, now_ns)
    assert state(handlers) == state(twins)
    assert rule.poll_ns == twin.poll_ns

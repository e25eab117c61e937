"""Each branch of the adaptive polling rules, against histories worked out by hand."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from rawaio.polling import (
    GrowthRule,
    HandlerPolling,
    PollingParameters,
    PollingRule,
    WeightedRule,
)

RULES = [WeightedRule, GrowthRule]
RuleType = type[WeightedRule] | type[GrowthRule]


def history(
    rule: PollingRule, blocks: Sequence[int], active: Sequence[HandlerPolling]
) -> list[int]:
    """`poll_ns` after each of these blocks, at one and the same time."""
    out = []
    for block_ns in blocks:
        rule.adjust(block_ns, active, 0)
        out.append(rule.poll_ns)
    return out


# ---- parameters


def test_defaults_are_those_of_qemu() -> None:
    assert dataclasses.asdict(PollingParameters()) == {
        "max_ns": 32768,
        "grow": 2,
        "shrink": 2,
        "weight_shift": 3,
        "start_ns": 4000,
        "idle_ns": 7_000_000_000,
    }
    assert WeightedRule().parameters == GrowthRule().parameters == PollingParameters()


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast("Any", PollingParameters()).grow = 3


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PollingParameters)])
def test_parameters_refuse_what_they_cannot_mean(name: str) -> None:
    make = cast("Callable[..., PollingParameters]", PollingParameters)
    with pytest.raises(ValueError, match=rf"^{name} must be at least [01], not -1$"):
        make(**{name: -1})
    with pytest.raises(TypeError, match=rf"^{name} must be an int, not float$"):
        make(**{name: 1.0})
    assert getattr(make(**{name: 1}), name) == 1


def test_only_the_start_may_not_be_zero() -> None:
    PollingParameters(max_ns=0, grow=0, shrink=0, weight_shift=0, idle_ns=0)
    with pytest.raises(ValueError, match=r"^start_ns must be at least 1, not 0$"):
        PollingParameters(start_ns=0)


@pytest.mark.parametrize(("grow", "expected"), [(0, 200), (1, 100), (2, 200), (3, 300)])
def test_step_up(grow: int, expected: int) -> None:
    assert PollingParameters(grow=grow).grown(100) == expected


@pytest.mark.parametrize(("shrink", "expected"), [(0, 0), (1, 101), (2, 50), (3, 33)])
def test_step_down(shrink: int, expected: int) -> None:
    assert PollingParameters(shrink=shrink).shrunk(101) == expected


# ---- the weighted rule


def test_weighted_first_block_is_taken_as_it_is() -> None:
    rule = WeightedRule()
    handler = rule.add()
    assert history(rule, [1000], [handler]) == [1000]
    assert handler.ns == 1000


def test_weighted_average_moves_by_an_eighth() -> None:
    rule = WeightedRule()
    handler = rule.add()
    seen = []
    for block_ns in (800, 1600, 1607, 0):
        rule.adjust(block_ns, [handler], 0)
        seen.append(handler.ns)
    # 800 - 100 + 200, 900 - 112 + 200 (1607 >> 3 is 200), 988 - 123 + 0
    assert seen == [800, 900, 988, 865]


def test_weighted_grows_by_the_factor_or_to_what_is_needed() -> None:
    rule = WeightedRule()
    first, second = rule.add(), rule.add()
    assert history(rule, [1000], [first]) == [1000]
    # 1000 - 125 + 1125 = 2000: twice 1000 is as much as is needed.
    # 2000 - 250 + 251 = 2001: above 2000, and doubled.
    assert history(rule, [9000, 2008], [first]) == [2000, 4000]
    # A handler that is new to it is at 30000 at once, far above the double.
    assert history(rule, [30000], [first, second]) == [30000]
    assert (first.ns, second.ns) == (5501, 30000)


def test_weighted_growth_is_held_to_the_maximum() -> None:
    rule = WeightedRule(PollingParameters(max_ns=1500, weight_shift=0))
    assert history(rule, [1000, 1001], [rule.add()]) == [1000, 1500]


def test_weighted_keeps_between_the_block_and_twice_the_block() -> None:
    rule = WeightedRule(PollingParameters(weight_shift=0))
    # 1000 covers 1000 down to 500; 499 is less than half.
    assert history(rule, [1000, 1000, 500, 499], [rule.add()]) == [1000, 1000, 1000, 500]


def test_weighted_shrinks_to_nothing_for_blocks_too_long() -> None:
    rule = WeightedRule(PollingParameters(max_ns=20))
    handler = rule.add()
    assert history(rule, [20], [handler]) == [20]
    # 20 - 2 + 12 = 30 is too long; from then on each block alone is.
    assert history(rule, [96] * 6, [handler]) == [10, 5, 2, 1, 0, 0]
    assert handler.ns == 0


def test_weighted_the_maximum_itself_is_worth_polling_for() -> None:
    rule = WeightedRule(PollingParameters(max_ns=100))
    assert history(rule, [100], [rule.add()]) == [100]
    rule = WeightedRule(PollingParameters(max_ns=100))
    assert history(rule, [101], [rule.add()]) == [0]


def test_weighted_inactive_handler_waits_on_until_it_is_too_long() -> None:
    rule = WeightedRule(PollingParameters(max_ns=1000))
    busy, quiet = rule.add(), rule.add()
    rule.adjust(400, [busy, quiet], 0)
    seen = []
    for _ in range(4):
        rule.adjust(300, [busy], 0)
        seen.append((quiet.ns, rule.poll_ns))
    # 700 and 1000 are above 400 and 800, and double them; 1300 is too long, and then nothing
    # is added to nothing. The busy one is then at 400 - 50 + 37 and so on: 387, 376, 366, 358,
    # below half of 1000 and no longer below half of 500.
    assert seen == [(700, 800), (1000, 1000), (0, 500), (0, 500)]
    assert busy.ns == 358


def test_weighted_idle_turn_moves_handlers_but_not_the_rule() -> None:
    rule = WeightedRule(PollingParameters(max_ns=1000))
    handler = rule.add()
    assert history(rule, [400], [handler]) == [400]
    assert history(rule, [600], []) == [400]
    assert handler.ns == 1000
    assert history(rule, [1], []) == [400]
    assert handler.ns == 0


def test_weighted_longest_handler_counts() -> None:
    for longest in (0, 1):
        rule = WeightedRule()
        handlers = [rule.add(), rule.add()]
        rule.adjust(500 if longest else 4000, [handlers[0]], 0)
        rule.adjust(4000 if longest else 500, [handlers[1]], 0)
        assert [h.ns for h in handlers] == ([4500, 4000] if longest else [4500, 500])
        assert rule.poll_ns == (4500 if longest else 8000)


# ---- the growth rule


def test_growth_starts_doubles_and_stops_when_the_block_is_covered() -> None:
    rule = GrowthRule()
    blocks = [1, 4000, 4001, 8000, 8001, 1, 0]
    assert history(rule, blocks, [rule.add()]) == [4000, 4000, 8000, 8000, 16000, 16000, 16000]


def test_growth_is_held_to_the_maximum() -> None:
    rule = GrowthRule(PollingParameters(max_ns=10000))
    assert history(rule, [9000] * 3, [rule.add()]) == [4000, 8000, 10000]
    rule = GrowthRule(PollingParameters(max_ns=3000))
    assert history(rule, [1], [rule.add()]) == [3000]


def test_growth_shrinks_when_the_block_cannot_be_covered() -> None:
    rule = GrowthRule(PollingParameters(max_ns=10000, start_ns=6))
    handler = rule.add()
    # 10000 can still be covered, 10001 cannot.
    assert history(rule, [10000, 10000, *[10001] * 5], [handler]) == [6, 12, 6, 3, 1, 0, 0]


def test_growth_shrinks_to_zero_at_once() -> None:
    rule = GrowthRule(PollingParameters(shrink=0))
    assert history(rule, [4001, 4001, 32769], [rule.add()]) == [4000, 8000, 0]


def test_growth_ignores_who_was_active() -> None:
    rule = GrowthRule()
    first, second = rule.add(), rule.add()
    assert history(rule, [1], [first]) == [4000]
    assert history(rule, [5000], []) == [8000]
    assert (first.ns, second.ns) == (0, 0)


# ---- the poll list, of both


@pytest.mark.parametrize("rule_type", RULES)
def test_zero_maximum_never_polls(rule_type: RuleType) -> None:
    rule = rule_type(PollingParameters(max_ns=0))
    assert history(rule, [0, 1, 0, 10**9], [rule.add()]) == [0] * 4


@pytest.mark.parametrize("rule_type", RULES)
def test_handler_is_polled_from_its_first_activity_on(rule_type: RuleType) -> None:
    rule = rule_type()
    handler = rule.add()
    assert handler != HandlerPolling()  # equal by identity alone: it is a key
    rule.adjust(1000, [], 5)
    assert (handler.polled, handler.last_active_ns, handler.ns, rule.poll_ns) == (False, 0, 0, 0)
    rule.adjust(1000, iter([handler, handler]), 6)
    assert (handler.polled, handler.last_active_ns) == (True, 6)
    assert rule.poll_ns > 0


@pytest.mark.parametrize("rule_type", RULES)
def test_idle_handler_leaves_and_comes_back(rule_type: RuleType) -> None:
    rule = rule_type()
    busy, quiet = rule.add(), rule.add()
    rule.adjust(8, [busy, quiet], 1_000)
    rule.adjust(8, [busy], 7_000_000_999)
    assert (busy.polled, quiet.polled) == (True, True)
    rule.adjust(8, [busy], 7_000_001_000)
    assert (busy.polled, quiet.polled) == (True, False)
    assert quiet.ns == 0
    rule.adjust(8, [quiet], 7_000_001_001)
    assert (quiet.polled, quiet.last_active_ns) == (True, 7_000_001_001)
    assert quiet.ns == (8 if rule_type is WeightedRule else 0)


@pytest.mark.parametrize("rule_type", RULES)
def test_nothing_is_polled_while_the_list_is_empty(rule_type: RuleType) -> None:
    rule = rule_type(PollingParameters(start_ns=1000))
    handler = rule.add()
    assert history(rule, [1000], [handler]) == [1000]
    rule.adjust(1000, [], 7_000_000_000)
    assert rule.poll_ns == 0
    # What was learnt is still there when a handler comes back.
    rule.adjust(1000, [handler], 7_000_000_000)
    assert rule.poll_ns == 1000
    rule.remove(handler)
    assert rule.poll_ns == 0
    assert not handler.polled


def test_handler_that_leaves_no_longer_counts() -> None:
    rule = WeightedRule(PollingParameters(idle_ns=10))
    busy, quiet = rule.add(), rule.add()
    rule.adjust(20000, [quiet], 0)
    rule.adjust(100, [busy], 9)
    assert (quiet.ns, rule.poll_ns) == (20100, 32768)
    rule.adjust(100, [busy], 10)
    assert (quiet.ns, rule.poll_ns) == (0, 16384)


# ---- what is refused


@pytest.mark.parametrize("rule_type", RULES)
def test_bad_turns_are_refused(rule_type: RuleType) -> None:
    rule, other = rule_type(), rule_type()
    handler, gone, foreign = rule.add(), rule.add(), other.add()
    rule.adjust(1000, [handler], 50)
    rule.remove(gone)
    bad = cast("Any", rule)
    with pytest.raises(ValueError, match=r"^block_ns must be at least 0, not -1$"):
        rule.adjust(-1, [handler], 50)
    with pytest.raises(TypeError, match=r"^block_ns must be an int, not float$"):
        bad.adjust(1.0, [handler], 50)
    with pytest.raises(ValueError, match=r"^now_ns must be at least 50, not 49$"):
        rule.adjust(0, [handler], 49)
    with pytest.raises(TypeError, match=r"^now_ns must be an int, not float$"):
        bad.adjust(0, [handler], 51.0)
    for stranger in (gone, foreign, HandlerPolling()):
        with pytest.raises(ValueError, match=r"^not handlers of this rule: "):
            rule.adjust(0, [handler, stranger], 51)
        with pytest.raises(ValueError, match=r"^not a handler of this rule: "):
            rule.remove(stranger)
    with pytest.raises(TypeError):
        bad.adjust(0, [handler, []], 51)
    assert handler.last_active_ns == 50
    assert rule.poll_ns in (1000, 4000)
    rule.adjust(0, [handler], 50)


@pytest.mark.parametrize("rule_type", RULES)
def test_check_notices_damage(rule_type: RuleType) -> None:
    rule = rule_type(PollingParameters(max_ns=100))
    handler = rule.add()
    rule.adjust(50, [handler], 5)
    rule._check()
    for name, value in (("ns", 101), ("ns", -1), ("last_active_ns", 6)):
        good = getattr(handler, name)
        setattr(handler, name, value)
        with pytest.raises(AssertionError):
            rule._check()
        setattr(handler, name, good)
    rule._ns = 101
    with pytest.raises(AssertionError):
        rule._check()

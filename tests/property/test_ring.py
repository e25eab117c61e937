"""The ring beside a model, whatever its shape and whatever is done with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rawaio.ring import CompletionRing, Ordering
from tests.support import HEAD, NR, TAIL, Event, FakeRing

NO_DEADLINE = settings(deadline=None)  # an emulated machine is slow, not wrong

UNSIGNED = st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1))
SIGNED = st.one_of(st.integers(-9, 9), st.integers(-(2**63), 2**63 - 1))
EVENTS = st.tuples(UNSIGNED, UNSIGNED, SIGNED, SIGNED)

STEPS = st.one_of(
    st.tuples(st.just("produce"), st.lists(EVENTS, min_size=1, max_size=5)),
    st.tuples(
        st.sampled_from(["peek", "take", "advance", "getevents", "credit"]), st.integers(0, 9)
    ),
)


def signed(word: int) -> int:
    return word - (word >> 63 << 64)


def fence() -> None:
    pass


@st.composite
def rings(draw: st.DrawFn) -> FakeRing:
    nr = draw(st.one_of(st.integers(2, 6), st.integers(2, 600)))
    at = draw(st.integers(0, nr - 1))
    return FakeRing(
        nr,
        head=at + nr * draw(st.sampled_from([0, 0, 1, 4])),
        tail=at,
        header_length=draw(st.sampled_from([32, 40, 128])),
        offset=8 * draw(st.integers(0, 20)),
    )


@NO_DEADLINE
@given(
    rings(),
    st.sampled_from([Ordering.TSO, Ordering.FENCE, Ordering.COUNTED]),
    st.lists(STEPS, max_size=40),
)
def test_every_history(
    fake: FakeRing, ordering: Ordering, steps: list[tuple[str, list[Event] | int]]
) -> None:
    ring = CompletionRing(
        fake.address, ordering=(ordering, fence if ordering is Ordering.FENCE else None)
    )
    assert ring.usable
    counted = ordering is Ordering.COUNTED
    if counted:
        fake.words[HEAD] %= fake.nr  # hidden takes it as it is
    model: deque[Event] = deque()
    credit = produced = reaped = reported = 0
    run = 0  # what the last peek has found, and is not committed

    def expected_run() -> int:
        head, tail = fake.words[HEAD] % fake.nr, fake.words[TAIL]
        there = min(len(model), fake.nr - head)
        assert len(model) == (tail - head) % fake.nr
        return min(there, max(credit, 0)) if counted else there

    for step, value in steps:
        if not isinstance(value, int):
            for event in value[: fake.nr - 1 - len(model)]:
                fake.produce(event)
                model.append(event)
                produced += 1
        elif step == "credit":
            more = min(value, produced - reported)  # never more than there has been
            ring.credit(more)
            credit += more
            reported += more
        elif step == "getevents":
            # The kernel moves head, and the owner tells the ring.
            n = min(value, len(model))
            for _ in range(n):
                model.popleft()
            fake.words[HEAD] = (fake.words[HEAD] + n) % fake.nr
            ring.credit(-n)
            credit -= n
            reaped += n
            run = ring.peek()
            assert run == expected_run()
        elif step == "peek":
            run = ring.peek()
            assert run == expected_run()
        else:
            n = min(value, run)
            first = list(model)[:n]
            assert ring.decode(n) == first
            data, res, res2 = ring.columns(n)
            assert data == [signed(e[0]) for e in first]
            assert (res, res2) == ([e[2] for e in first], [e[3] for e in first])
            head = fake.words[HEAD]
            calls: list[Callable[[int], object]] = [ring.commit, ring.decode, ring.columns]
            for call in calls:
                with pytest.raises(ValueError, match=f"{run + 1} events of a run of {run}"):
                    call(run + 1)
            assert fake.words[HEAD] == head
            for _ in range(n):
                model.popleft()
            credit -= n
            reaped += n
            run -= n
            if step == "take":
                ring.commit(n)
            else:
                run = ring.advance_and_peek(n)
                assert run == expected_run()
            assert fake.words[HEAD] == (head + n) % fake.nr
        assert ring.hidden is (counted and credit <= 0 and bool(model))
        assert not counted or reaped <= reported or credit < 0
        assert fake.words[NR] == ring.nr == fake.nr
        assert len(fake) == len(model)

"""The completion ring in memory that no kernel made, and io_getevents with a fake kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest

from rawaio import ring as ring_module
from rawaio import syscalls
from rawaio.errors import ClosedError, RawAIOError
from rawaio.protocols import CompletionSource
from rawaio.ring import (
    CompletionRing,
    Ordering,
    SyscallEvents,
    choose_ordering,
    libatomic_fence,
)
from tests.support import (
    EVENT_SIZE,
    HEAD,
    NR,
    PROT_NONE,
    PROT_READ,
    TAIL,
    Event,
    FakeRing,
    interrupted_at,
    passed,
)

TSO = (Ordering.TSO, None)
COUNTED = (Ordering.COUNTED, None)
Columns = tuple[list[int], list[int], list[int]]


def event(i: int) -> Event:
    """Different in each field, for different i."""
    return 1000 + i, 0xFFFF_8000_0000_0000 + i, -i, (i << 40) - 7


# Asked by functions: mypy takes it that a property says twice the same.


def is_usable(ring: CompletionRing) -> bool:
    return ring.usable


def is_hidden(ring: CompletionRing) -> bool:
    return ring.hidden


def is_buffered(source: SyscallEvents) -> bool:
    return source.buffered


def columns_of(events: Sequence[Event]) -> Columns:
    return [e[0] for e in events], [e[2] for e in events], [e[3] for e in events]


def opened(fake: FakeRing) -> CompletionRing:
    ring = CompletionRing(fake.address, ordering=TSO)
    assert is_usable(ring), ring.why_not
    return ring


def full(nr: int, header_length: int = 32) -> FakeRing:
    """A ring with an event in each of its slots, and something else behind the last."""
    fake = FakeRing(nr, header_length=header_length)
    for slot in range(nr + 1):
        fake.write(slot, event(slot))
    return fake


# -- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("header_length", [32, 40, 64])
@pytest.mark.parametrize("nr", range(2, 13))
def test_every_shape_is_read_as_the_model_says(nr: int, header_length: int) -> None:
    fake = full(nr, header_length)
    ring = opened(fake)
    assert ring.nr == nr
    for head in range(nr):
        for tail in range(nr):
            fake.words[HEAD], fake.words[TAIL] = head, tail
            assert ring.empty is (head == tail)
            there = [event((head + i) % nr) for i in range((tail - head) % nr)]
            run = there[: nr - head]
            for n in range(len(run) + 1):
                fake.words[HEAD], fake.words[TAIL] = head, tail
                assert ring.peek() == ring.peek() == len(run)
                before = bytes(fake.memory)
                assert ring.decode(n) == run[:n]
                assert ring.columns(n) == columns_of(run[:n])
                assert bytes(fake.memory) == before
                ring.commit(n)
                assert fake.words[HEAD] == (head + n) % nr
                fake.words[HEAD] = head
                assert bytes(fake.memory) == before  # head, and nothing else, was written
                fake.words[HEAD] = (head + n) % nr
                rest = run[n:] or there[len(run) :]  # what has wrapped is a run of its own
                assert ring.peek() == len(rest)
                assert ring.decode(len(rest)) == rest


def next_run(
    source: CompletionRing | SyscallEvents, most: int | None = None
) -> tuple[list[int], list[int], list[int], bool] | None:
    """The run, with the data as a list, which may be a view."""
    run = source.next_run(most)
    return run and (list(run[0]), *run[1:])


@pytest.mark.parametrize("most", [None, 1, 2, 5])
@pytest.mark.parametrize("laps", [0, 3])
@pytest.mark.parametrize("header_length", [32, 40])
@pytest.mark.parametrize("nr", range(2, 9))
def test_the_next_run_is_what_peek_and_columns_give(
    nr: int, header_length: int, laps: int, most: int | None
) -> None:
    fake = full(nr, header_length)
    ring = opened(fake)
    for head in range(nr):
        for tail in range(nr):
            fake.words[HEAD], fake.words[TAIL] = head + laps * nr, tail
            there = [event((head + i) % nr) for i in range((tail - head) % nr)]
            run = there[: nr - head][:most]
            before = bytes(fake.memory)
            for _ in range(2):  # until it is committed it is the same
                got = next_run(ring, most)
                assert bytes(fake.memory) == before
                if not run:
                    assert got is None
                else:
                    assert got == (*columns_of(run), len(run) < len(there))
            if run:
                ring.commit_run()
                assert fake.words[HEAD] == (head + len(run)) % nr
                with pytest.raises(ValueError, match="of a run of 0"):
                    ring.commit(1)
            after = bytes(fake.memory)
            ring.commit_run()  # of nothing
            assert bytes(fake.memory) == after


def test_the_next_events_are_where_it_says() -> None:
    fake = full(8)
    ring = opened(fake)
    fake.words[HEAD], fake.words[TAIL] = 6, 3
    found: list[tuple[bytes, int, bool]] = []
    while (run := ring.next_events()) is not None:
        start, n, more = run
        words = ring.events[8 * start : 8 * (start + n)]
        found.append((words.cast("B").tobytes(), n, more))
        ring.commit_run()
    assert found == [
        (b"".join(struct.pack("=QQqq", *event(i)) for i in (6, 7)), 2, True),
        (b"".join(struct.pack("=QQqq", *event(i)) for i in range(3)), 3, False),
    ]
    ring.close()
    with pytest.raises(ClosedError):
        _ = ring.events


def test_a_run_that_was_committed_in_part_is_not_committed_again() -> None:
    fake = full(9)
    ring = opened(fake)
    fake.words[HEAD], fake.words[TAIL] = 1, 5
    assert ring.next_run() is not None
    ring.commit(2)
    assert fake.words[HEAD] == 3
    assert next_run(ring, 1) == (*columns_of([event(3)]), True)
    ring.commit_run()
    assert fake.words[HEAD] == 4


def test_the_next_run_is_fenced_as_the_others_are() -> None:
    fake = full(9)
    order: list[tuple[int, int]] = []
    ring = CompletionRing(
        fake.address,
        ordering=(Ordering.FENCE, lambda: order.append((fake.words[HEAD], fake.words[TAIL]))),
    )
    fake.words[HEAD], fake.words[TAIL] = 2, 2
    assert ring.next_run() is None
    assert order == []
    fake.words[TAIL] = 4
    assert ring.next_run() is not None
    assert order == [(2, 4)]  # R1
    ring.commit_run()
    assert order == [(2, 4), (2, 4)]  # R2: before head moves
    assert fake.words[HEAD] == 4


def test_the_next_run_is_no_longer_than_what_was_counted() -> None:
    fake = full(9)
    fake.words[TAIL] = 6
    ring = CompletionRing(fake.address, counted=True, ordering=COUNTED)
    assert ring.next_run() is None
    ring.credit(2)
    assert next_run(ring) == (*columns_of([event(0), event(1)]), False)
    assert next_run(ring, 1) == (*columns_of([event(0)]), True)
    ring.commit_run()
    assert next_run(ring) == (*columns_of([event(1)]), False)
    ring.commit_run()
    assert ring.next_run() is None
    assert is_hidden(ring)
    ring.credit(9)
    assert next_run(ring) == (*columns_of([event(i) for i in range(2, 6)]), False)


@pytest.mark.parametrize("header_length", [32, 40])
@pytest.mark.parametrize("nr", range(2, 9))
def test_expected_events_are_taken_and_no_others(nr: int, header_length: int) -> None:
    fake = full(nr, header_length)
    ring = opened(fake)
    for head in range(nr):
        for tail in range(nr):
            there = (tail - head) % nr
            events = [struct.pack("=QQqq", *event((head + i) % nr)) for i in range(nr)]
            before = b"\xff" * 64
            expected = bytearray(before + b"".join(events))
            for n in range(1, nr + 2):
                fake.words[HEAD], fake.words[TAIL] = head, tail
                memory = bytes(fake.memory)
                assert not ring.take_expected(expected, 0, n)
                assert not ring.take_expected(expected[: 64 + 32 * n - 1], 64, n)
                for byte in range(64, 64 + 32 * min(n, nr), 7):
                    wrong = bytearray(expected)
                    wrong[byte] ^= 1
                    assert not ring.take_expected(wrong, 64, n)
                assert bytes(fake.memory) == memory
                assert ring.take_expected(expected[: 64 + 32 * n], 64, n) is (n == there)
                assert fake.words[HEAD] == (tail if n == there else head)
                assert fake.words[TAIL] == tail
                fake.words[HEAD] = head
                assert ring.take_expected(bytes(expected), 64, n, commit=False) is (n == there)
                assert bytes(fake.memory) == memory
                ring.commit_run()
                assert fake.words[HEAD] == (tail if n == there else head)


def test_given_events_are_what_is_expected_from_then_on() -> None:
    fake = full(8)
    ring = opened(fake)
    for head, tail, most, n in (
        (0, 0, None, 0),
        (1, 4, None, 3),
        (9, 4, None, 3),
        (6, 2, None, 2),
        (2, 7, 4, 4),
    ):
        fake.words[HEAD], fake.words[TAIL] = head, tail
        assert (ring.next_events(most) or (0, 0))[1] == n
        slots = range(head % 8, head % 8 + n)
        assert ring.given_events() == b"".join(struct.pack("=QQqq", *event(i)) for i in slots)


def test_expected_events_behind_a_head_that_is_too_large_are_left_to_others() -> None:
    fake = full(4)
    ring = opened(fake)
    expected = bytearray(b"".join(struct.pack("=QQqq", *event(i % 4)) for i in range(8)))
    for head, tail in ((5, 3), (5, 7), (4, 2), (4, 0), (9, 1)):
        fake.words[HEAD], fake.words[TAIL] = head, tail
        for n in range(1, 9):
            assert not ring.take_expected(expected, 0, n)
        assert fake.words[HEAD] == head


def test_expected_events_are_taken_behind_what_was_found() -> None:
    """What `next_events` gave is not committed once more."""
    fake = full(8)
    ring = opened(fake)
    fake.words[TAIL] = 3
    assert ring.next_events(1) is not None
    expected = bytearray(b"".join(struct.pack("=QQqq", *event(i)) for i in range(3)))
    assert ring.take_expected(expected, 0, 3)
    fake.words[TAIL] = 6
    ring.commit_run()
    assert fake.words[HEAD] == 3


@pytest.mark.parametrize(("head", "tail"), [(2, 5), (7, 2)])
def test_expected_events_are_fenced_as_the_others_are(head: int, tail: int) -> None:
    fake = full(9)
    order: list[tuple[int, int]] = []
    ring = CompletionRing(
        fake.address,
        ordering=(Ordering.FENCE, lambda: order.append((fake.words[HEAD], fake.words[TAIL]))),
    )
    n = (tail - head) % 9
    slots = [(head + i) % 9 for i in range(n)]
    expected = bytearray(b"".join(struct.pack("=QQqq", *event(i)) for i in slots))
    fake.words[HEAD], fake.words[TAIL] = head, head
    assert not ring.take_expected(expected, 0, n)
    assert order == []
    fake.words[TAIL] = tail
    assert ring.take_expected(expected, 0, n)
    assert order == [(head, tail)] * 2  # R1, and R2 before head moves
    assert fake.words[HEAD] == tail


@pytest.mark.parametrize("ordering", [Ordering.TSO, Ordering.FENCE])
@pytest.mark.parametrize("head", [2, 6])
@pytest.mark.parametrize("commit", [True, False])
def test_expected_events_are_loaded_between_tail_and_head(
    ordering: Ordering, head: int, commit: bool
) -> None:
    fake = full(8)
    fake.words[HEAD], fake.words[TAIL] = head, (head + 4) % 8
    ring, log = recorded(fake, ordering)
    expected = bytearray(b"".join(struct.pack("=QQqq", *event((head + i) % 8)) for i in range(4)))
    assert ring.take_expected(expected, 0, 4, commit=commit)
    if not commit:
        ring.commit_run()
    fence = [("fence",)] if ordering is Ordering.FENCE else []
    loads = [("load", "octets")] * (2 if head == 6 else 1)
    assert log == [
        ("load", "words", HEAD),
        ("load", "words", TAIL),
        *fence,
        *loads,
        *fence,
        ("store", "words", HEAD, (head + 4) % 8),
    ]


@pytest.mark.parametrize(("head", "tail"), [(0, 3), (7, 1)])
def test_what_has_to_be_counted_is_not_expected(head: int, tail: int) -> None:
    fake = full(9)
    fake.words[HEAD], fake.words[TAIL] = head, tail
    ring = CompletionRing(fake.address, counted=True, ordering=COUNTED)
    ring.credit(9)
    slots = [(head + i) % 9 for i in range(3)]
    expected = bytearray(b"".join(struct.pack("=QQqq", *event(i)) for i in slots))
    assert not ring.take_expected(expected, 0, 3)
    assert fake.words[HEAD] == head


@pytest.mark.parametrize("nr", [2, 3, 7])
def test_advance_and_peek_is_commit_and_then_peek(nr: int) -> None:
    fake = full(nr)
    ring = opened(fake)
    for head in range(nr):
        for tail in range(nr):
            fake.words[HEAD], fake.words[TAIL] = head, tail
            run = ring.peek()
            for n in range(run + 1):
                fake.words[HEAD] = head
                assert ring.peek() == run
                left = ring.advance_and_peek(n)
                assert fake.words[HEAD] == (head + n) % nr
                assert left == ring.peek()


@pytest.mark.parametrize("laps", [1, 2, 5])
def test_a_head_above_nr_is_taken_modulo_nr_as_the_kernel_does(laps: int) -> None:
    nr = 5
    fake = full(nr)
    ring = opened(fake)
    for head in range(nr):
        for tail in range(nr):
            fake.words[HEAD], fake.words[TAIL] = head + laps * nr, tail
            run = [event(i) for i in range(head, tail if tail >= head else nr)]
            assert ring.peek() == len(run)
            assert ring.decode(len(run)) == run
            assert ring.columns(len(run)) == columns_of(run)
            ring.commit(len(run))
            assert fake.words[HEAD] == (head + len(run)) % nr


def test_a_ring_of_two_slots_goes_round() -> None:
    fake = FakeRing(2)
    ring = opened(fake)
    for i in range(7):
        assert ring.peek() == 0
        fake.produce(event(i))
        assert ring.peek() == 1
        assert ring.decode(1) == [event(i)]
        assert ring.advance_and_peek(1) == 0


def test_columns_are_signed_and_decode_is_as_the_kernel_declares_it() -> None:
    fake = FakeRing(4)
    fake.produce((2**64 - 1, 2**64 - 2, -(2**63), 2**63 - 1))
    ring = opened(fake)
    ring.peek()
    assert ring.decode(1) == [(2**64 - 1, 2**64 - 2, -(2**63), 2**63 - 1)]
    assert ring.columns(1) == ([-1], [-(2**63)], [2**63 - 1])


def test_nr_is_read_once() -> None:
    fake = full(4)
    ring = opened(fake)
    fake.words[NR] = 2
    fake.words[HEAD], fake.words[TAIL] = 1, 3
    assert ring.nr == 4
    assert ring.peek() == 2
    ring.commit(2)
    assert fake.words[HEAD] == 3


# -- the rules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", [-1, 3, 4, 2**40])
def test_more_than_the_run_is_refused_and_nothing_changes(beyond: int) -> None:
    fake = full(8)
    fake.words[HEAD], fake.words[TAIL] = 3, 5
    ring = opened(fake)
    assert ring.peek() == 2
    before = bytes(fake.memory)
    calls: list[Callable[[int], object]] = [
        ring.commit,
        ring.decode,
        ring.columns,
        ring.advance_and_peek,
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"{beyond} events of a run of 2"):
            call(beyond)
    assert bytes(fake.memory) == before
    ring.commit(2)
    assert fake.words[HEAD] == 5


def test_what_no_peek_has_found_cannot_be_committed() -> None:
    fake = full(8)
    fake.words[TAIL] = 5
    ring = opened(fake)
    with pytest.raises(ValueError, match="1 events of a run of 0"):
        ring.commit(1)
    assert ring.peek() == 5
    ring.commit(2)
    with pytest.raises(ValueError, match="4 events of a run of 3"):
        ring.commit(4)
    ring.commit(3)
    with pytest.raises(ValueError, match="1 events of a run of 0"):
        ring.decode(1)
    assert fake.words[HEAD] == 5
    assert ring.peek() == 0
    fake.words[TAIL] = 6
    with pytest.raises(ValueError, match="1 events of a run of 0"):
        ring.columns(1)


def test_an_empty_ring_has_no_run_that_was_found_before() -> None:
    fake = full(8)
    fake.words[TAIL] = 3
    ring = opened(fake)
    assert ring.peek() == 3
    fake.words[HEAD] = 3  # the kernel, in io_getevents
    assert ring.peek() == 0
    with pytest.raises(ValueError, match="1 events of a run of 0"):
        ring.commit(1)
    assert fake.words[HEAD] == 3


def test_closed_and_unusable_rings_say_so_and_touch_nothing() -> None:
    fake = full(8)
    fake.words[TAIL] = 3
    ring = opened(fake)
    assert ring.peek() == 3
    ring.close()
    ring.close()
    refuses_everything(ring)
    assert not is_usable(ring)
    assert ring.why_not == "closed"
    assert ring.nr == 8
    fake.words[HEAD_OF_MAGIC] = 0
    unusable = CompletionRing(fake.address, ordering=TSO)
    refuses_everything(unusable)
    reason = unusable.why_not
    unusable.close()
    assert unusable.why_not == reason != "closed"
    assert fake.words[HEAD] == 0


HEAD_OF_MAGIC = 4


def refuses_everything(ring: CompletionRing) -> None:
    calls: list[Callable[[], object]] = [
        ring.peek,
        lambda: ring.empty,
        lambda: ring.commit(0),
        lambda: ring.decode(0),
        lambda: ring.columns(0),
        lambda: ring.advance_and_peek(0),
        lambda: ring.take_expected(bytearray(32), 0, 1),
    ]
    for call in calls:
        with pytest.raises(ClosedError, match=r"^the completion ring is closed or not usable$"):
            call()


def test_closed_says_so_also_to_who_has_peeked_before() -> None:
    fake = full(8)
    fake.words[TAIL] = 3
    ring = opened(fake)
    assert ring.peek() == 3
    ring.close()
    calls: list[Callable[[int], object]] = [
        ring.commit,
        ring.decode,
        ring.columns,
        ring.advance_and_peek,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed or not usable"):
            call(1)
    assert fake.words[HEAD] == 0


def test_a_closed_ring_has_no_view_of_the_memory() -> None:
    fake = FakeRing(4)
    ring = opened(fake)
    inside = cast("Any", ring)
    views = ("_words", "_events", "_octets")
    assert [type(getattr(inside, name)) for name in views] == [memoryview] * 3
    ring.close()
    assert memoryview not in [type(getattr(inside, name)) for name in views]
    with pytest.raises(ClosedError):
        inside._words[HEAD] = 1


def test_both_are_completion_sources() -> None:
    sources: list[type[CompletionSource]] = [CompletionRing, SyscallEvents]
    assert len(sources) == 2


# -- which rings are usable --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"nr": 4, "magic": 0}, "magic is 0x0, not 0xa10a10a1"),
        ({"nr": 4, "magic": 0xA10A10A0}, "magic is 0xa10a10a0"),
        ({"nr": 4, "incompat": 1}, "incompat_features is 0x1"),
        ({"nr": 4, "incompat": 1 << 31}, "incompat_features is 0x80000000"),
        ({"nr": 4, "header_length": 0}, "header_length is 0"),
        ({"nr": 4, "header_length": 24}, "header_length is 24"),
        ({"nr": 4, "header_length": 31}, "header_length is 31"),
        ({"nr": 4, "header_length": 33}, "header_length is 33"),
        ({"nr": 4, "header_length": 36}, "header_length is 36"),
        ({"nr": 4, "header_length": 44}, "header_length is 44"),
        ({"nr": 0}, "nr is 0"),
        ({"nr": 1}, "nr is 1"),
        ({"nr": 4, "tail": 4}, "tail is 4, not below nr, 4"),
        ({"nr": 4, "tail": 2**32 - 1}, "tail is 4294967295"),
    ],
)
def test_a_wrong_header_is_not_usable(fields: dict[str, int], why: str) -> None:
    fake = FakeRing(**fields)
    ring = CompletionRing(fake.address, ordering=TSO)
    assert not is_usable(ring)
    assert why in str(ring.why_not)
    assert ring.nr == fields["nr"]
    with pytest.raises(ClosedError):
        ring.peek()


@pytest.mark.parametrize(
    "fields",
    [
        {"nr": 2},
        {"nr": 4, "tail": 3},
        {"nr": 4, "header_length": 32},
        {"nr": 4, "header_length": 40},
        {"nr": 4, "head": 9},
    ],
)
def test_a_right_header_is_usable(fields: dict[str, int]) -> None:
    fake = FakeRing(**fields)
    ring = CompletionRing(fake.address, ordering=TSO)
    assert ring.usable
    assert ring.why_not is None


def test_events_of_any_other_layout_are_not_read() -> None:
    # compat_features and id are nobody's business.
    fake = FakeRing(4)
    fake.words[0], fake.words[5] = 77, 0xFFFF_FFFF
    assert CompletionRing(fake.address, ordering=TSO).usable


@pytest.mark.parametrize("pages", [1, 3])
@pytest.mark.parametrize("header_length", [32, 64])
@pytest.mark.parametrize("offset", [0, 2048])
def test_all_of_the_ring_must_be_mapped(pages: int, header_length: int, offset: int) -> None:
    room = pages * mmap.PAGESIZE - offset
    fits = (room - header_length) // EVENT_SIZE
    for nr, usable in [(fits, True), (fits + 1, False), (2**32 - 1, False)]:
        fake = FakeRing(nr, header_length=header_length, offset=offset, room=room)
        ring = CompletionRing(fake.address, ordering=TSO)
        assert ring.usable is usable
        if not usable:
            assert ring.why_not == f"nr is {nr}, more than the {room} mapped bytes hold"
            refuses_everything(ring)


def test_gvisor_s_zero_page_is_not_usable() -> None:
    fake = FakeRing(0, magic=0, header_length=0, room=mmap.PAGESIZE)
    fake.protect(PROT_READ)
    ring = CompletionRing(fake.address)
    assert not is_usable(ring)
    assert ring.why_not == "magic is 0x0, not 0xa10a10a1"
    assert ring.nr == 0
    refuses_everything(ring)


def test_a_ring_that_cannot_be_written_is_not_usable() -> None:
    fake = FakeRing(4)
    fake.protect(PROT_READ)
    ring = CompletionRing(fake.address, ordering=TSO)
    assert ring.why_not == "the mapping is read-only, so head cannot be published"
    refuses_everything(ring)


def test_a_ring_that_cannot_be_read_is_not_usable() -> None:
    fake = FakeRing(4)
    fake.protect(PROT_NONE)
    ring = CompletionRing(fake.address, ordering=TSO)
    assert ring.why_not == f"nothing readable is mapped at {fake.address:#x}"
    assert ring.nr == 0
    refuses_everything(ring)


@pytest.mark.parametrize("address", [0, 32, 1 << 63, (1 << 64) - 4096])
def test_an_address_that_is_not_mapped_is_not_usable(address: int) -> None:
    ring = CompletionRing(address)
    assert ring.why_not == f"nothing readable is mapped at {address:#x}"
    assert ring.nr == 0
    refuses_everything(ring)


@pytest.mark.parametrize("access", [PROT_NONE, PROT_READ])
def test_the_mapping_in_front_of_the_ring_is_another_one(access: int) -> None:
    fake = FakeRing(4, offset=mmap.PAGESIZE)
    fake.protect(access, mmap.PAGESIZE)
    ring = CompletionRing(fake.address, ordering=TSO)
    assert ring.usable, ring.why_not


@pytest.mark.parametrize("left", [16, 28, 32])
def test_a_header_must_be_mapped_whole(left: int) -> None:
    fake = FakeRing(0, room=mmap.PAGESIZE)
    end = fake.address + mmap.PAGESIZE
    ring = CompletionRing(end - left, ordering=TSO)
    if left < 32:
        assert ring.why_not == f"nothing readable is mapped at {end - left:#x}"
    else:
        assert str(ring.why_not).startswith("magic is 0x0")


def test_mappings_of_files_with_strange_names_are_no_obstacle() -> None:
    """Names are any bytes, and /proc/self/maps has them as they are, in front of the ring too."""
    strange = [mapped_file(b"\xff\xfe \xc3\xa9 rw-p")]
    fake = FakeRing(4)
    strange.append(mapped_file(b"\xff and spaces"))
    ring = CompletionRing(fake.address, ordering=TSO)
    assert ring.usable, ring.why_not
    assert len(strange) == 2


def mapped_file(name: bytes) -> mmap.mmap:
    fd = os.memfd_create(os.fsdecode(name))
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        return mmap.mmap(fd, mmap.PAGESIZE)
    finally:
        os.close(fd)


def test_without_proc_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*_args: object, **_kwargs: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    monkeypatch.setattr(ring_module, "open", no_proc, raising=False)
    fake = FakeRing(4)
    ring = CompletionRing(fake.address, ordering=TSO)
    assert ring.why_not == f"nothing readable is mapped at {fake.address:#x}"


# -- ordering ----------------------------------------------------------------------------------


def a_fence() -> None:
    pass


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("fence", [None, a_fence])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64", "ppc64le", "i686", ""])
def test_choice_of_ordering(
    machine: str, fence: Callable[[], object] | None, counted: bool
) -> None:
    looked_for: list[object] = []

    def load_fence() -> Callable[[], object] | None:
        looked_for.append(fence)
        return fence

    got = choose_ordering(machine, counted=counted, load_fence=load_fence)
    if machine == "x86_64":
        assert got == (Ordering.TSO, None)
    elif machine == "aarch64" and fence is not None:
        assert got == (Ordering.FENCE, fence)
    elif machine == "aarch64" and counted:
        assert got == (Ordering.COUNTED, None)
    else:
        assert got == (Ordering.NONE, None)
    assert len(looked_for) == (machine == "aarch64")


def test_an_ordering_says_what_it_is() -> None:
    assert repr(Ordering.COUNTED) == (
        "<Ordering.COUNTED: 'no more events than the eventfd has counted'>"
    )
    for ordering in (Ordering.TSO, Ordering.FENCE, Ordering.COUNTED, Ordering.NONE):
        assert getattr(Ordering, ordering.name) is ordering


@pytest.mark.parametrize(
    ("machine", "fence", "counted", "expected"),
    [
        ("x86_64", None, False, Ordering.TSO),
        ("aarch64", a_fence, False, Ordering.FENCE),
        ("aarch64", None, True, Ordering.COUNTED),
        ("aarch64", None, False, Ordering.NONE),
        ("riscv64", a_fence, True, Ordering.NONE),
    ],
)
def test_the_ring_chooses_for_its_machine(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    fence: Callable[[], object] | None,
    counted: bool,
    expected: Ordering,
) -> None:
    monkeypatch.setattr(syscalls, "machine", lambda: machine)
    monkeypatch.setattr(ring_module, "libatomic_fence", lambda: fence)
    fake = FakeRing(4)
    ring = CompletionRing(fake.address, counted=counted)
    assert ring.ordering is expected
    assert ring.usable is (expected is not Ordering.NONE)
    if expected is Ordering.NONE:
        assert f"no ordering of loads is known for {machine} " in str(ring.why_not)
        refuses_everything(ring)


def test_nothing_is_vouched_for_without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "machine", lambda: "aarch64")
    monkeypatch.setattr(ring_module, "libatomic_fence", lambda: None)
    assert CompletionRing(FakeRing(4).address).ordering is Ordering.NONE


def test_libatomic_s_fence_can_be_called() -> None:
    fence = libatomic_fence()
    if fence is None:
        pytest.skip("no libatomic.so.1")
    assert fence() is None


def test_libatomic_s_fence_is_a_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Function:
        restype: object = ctypes.c_int

        def __call__(self, order: ctypes.c_int) -> None:
            assert self.restype is None
            asked.append((type(order), order.value))

    class Library:
        def __init__(self, name: str) -> None:
            asked.append(name)
            self.atomic_thread_fence = Function()

    monkeypatch.setattr(ctypes, "PyDLL", Library)
    fence = libatomic_fence()
    assert fence is not None
    fence()
    assert asked == ["libatomic.so.1", (ctypes.c_int, 5)]


@pytest.mark.parametrize("error", [OSError("no such library"), AttributeError("no such function")])
def test_no_libatomic_is_no_fence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def library(name: str) -> object:
        raise error

    monkeypatch.setattr(ctypes, "PyDLL", library)
    assert libatomic_fence() is None


class Recorder:
    """In place of a view of the ring: every access is recorded."""

    def __init__(self, name: str, view: memoryview, log: list[tuple[object, ...]]) -> None:
        self.name, self.view, self.log = name, view, log

    def __getitem__(self, key: Any) -> Any:
        self.log.append(("load", self.name, *([] if isinstance(key, slice) else [key])))
        return self.view[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.log.append(("store", self.name, key, value))
        self.view[key] = value


def recorded(fake: FakeRing, ordering: Ordering) -> tuple[CompletionRing, list[tuple[object, ...]]]:
    log: list[tuple[object, ...]] = []
    fence = (lambda: log.append(("fence",))) if ordering is Ordering.FENCE else None
    ring = CompletionRing(fake.address, ordering=(ordering, fence))
    inside = cast("Any", ring)
    inside._words = Recorder("words", inside._words, log)
    inside._events = Recorder("events", inside._events, log)
    inside._octets = Recorder("octets", inside._octets, log)
    return ring, log


FENCED = [Ordering.TSO, Ordering.FENCE]


@pytest.mark.parametrize("ordering", FENCED)
def test_peek_loads_head_and_tail_once_and_fences_behind_tail(ordering: Ordering) -> None:
    fake = full(8)
    fake.words[HEAD], fake.words[TAIL] = 6, 2
    ring, log = recorded(fake, ordering)
    fence = [("fence",)] if ordering is Ordering.FENCE else []
    assert ring.peek() == 2
    assert log == [("load", "words", HEAD), ("load", "words", TAIL), *fence]


@pytest.mark.parametrize("ordering", FENCED)
def test_an_empty_ring_needs_no_fence(ordering: Ordering) -> None:
    fake = full(8)
    fake.words[HEAD], fake.words[TAIL] = 6, 6
    ring, log = recorded(fake, ordering)
    assert ring.peek() == 0
    assert log == [("load", "words", HEAD), ("load", "words", TAIL)]


@pytest.mark.parametrize("ordering", FENCED)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_commit_fences_and_then_stores_head_once(ordering: Ordering, n: int) -> None:
    fake = full(8)
    fake.words[HEAD], fake.words[TAIL] = 6, 2
    ring, log = recorded(fake, ordering)
    ring.peek()
    ring.decode(n)
    ring.columns(n)
    assert all(entry[0] == "load" for entry in log if entry != ("fence",))
    log.clear()
    ring.commit(n)
    fence = [("fence",)] if ordering is Ordering.FENCE else []
    stores = [*fence, ("store", "words", HEAD, (6 + n) % 8)]
    assert log[-len(stores) :] == stores
    assert log[: -len(stores)] == [("load", "words", HEAD)]


@pytest.mark.parametrize("ordering", FENCED)
def test_events_are_loaded_behind_the_first_fence_and_before_the_second(
    ordering: Ordering,
) -> None:
    fake = full(8)
    fake.words[TAIL] = 5
    ring, log = recorded(fake, ordering)
    ring.peek()
    peeked = len(log)
    ring.columns(3)
    ring.decode(3)
    decoded = len(log)
    ring.commit(3)
    assert ("load", "events") in log[peeked:decoded]
    assert ("load", "events") not in log[:peeked] + log[decoded:]
    assert ("load", "words", TAIL) not in log[peeked:]
    assert log.count(("fence",)) == (2 if ordering is Ordering.FENCE else 0)


# -- counted -----------------------------------------------------------------------------------


def test_counted_reads_what_the_eventfd_has_vouched_for_and_no_more() -> None:
    fake = FakeRing(8)
    ring = CompletionRing(fake.address, counted=True, ordering=COUNTED)
    assert not is_hidden(ring)
    assert ring.peek() == 0
    for i in range(5):
        fake.produce(event(i))
    assert ring.peek() == 0
    assert is_hidden(ring)
    ring.credit(2)
    assert not is_hidden(ring)
    assert ring.peek() == 2
    assert ring.decode(2) == [event(0), event(1)]
    with pytest.raises(ValueError, match="3 events of a run of 2"):
        ring.commit(3)
    assert ring.advance_and_peek(1) == 1
    assert not is_hidden(ring)
    assert ring.advance_and_peek(1) == 0
    assert is_hidden(ring)
    ring.credit(-1)  # one of the next was reaped in another way
    ring.credit(3)
    assert ring.peek() == 2
    ring.credit(90)  # a stale count
    assert ring.peek() == 3
    assert ring.advance_and_peek(3) == 0
    assert not is_hidden(ring)


def test_counted_stops_at_the_wrap_too() -> None:
    fake = full(8)
    fake.words[HEAD], fake.words[TAIL] = 5, 3
    ring = CompletionRing(fake.address, counted=True, ordering=COUNTED)
    ring.credit(5)
    assert ring.peek() == 3
    assert ring.advance_and_peek(3) == 2
    assert ring.decode(2) == [event(0), event(1)]
    assert ring.advance_and_peek(2) == 0
    assert is_hidden(ring)
    ring.credit(1)
    assert ring.peek() == 1


def test_a_debt_is_no_credit() -> None:
    fake = FakeRing(8)
    fake.produce(event(1))
    ring = CompletionRing(fake.address, counted=True, ordering=COUNTED)
    ring.credit(-2)
    assert ring.peek() == 0
    assert is_hidden(ring)
    ring.credit(2)
    assert ring.peek() == 0
    ring.credit(1)
    assert ring.peek() == 1


@pytest.mark.parametrize("ordering", FENCED)
def test_only_counted_hides_events(ordering: Ordering) -> None:
    fake = FakeRing(8)
    fake.produce(event(1))
    ring = CompletionRing(fake.address, counted=True, ordering=(ordering, a_fence))
    assert not is_hidden(ring)
    assert ring.peek() == 1


# -- io_getevents ------------------------------------------------------------------------------


class FakeGetevents:
    """The kernel behind io_getevents, which asserts on what it is asked."""

    def __init__(self) -> None:
        self.ready: list[Event] = []
        self.failures: list[int] = []
        self.calls = 0

    def __call__(self, *arguments: Any) -> int:
        number, ctx_id, min_nr, nr, address, timeout = arguments
        # None of them a bare int, of which 32 bits would be passed.
        assert not any(isinstance(argument, int) for argument in arguments)
        assert passed(number) == syscalls.numbers().io_getevents
        assert passed(ctx_id) == CONTEXT
        assert passed(min_nr) == 0
        room = passed(nr)
        assert (timeout._obj.tv_sec, timeout._obj.tv_nsec) == (0, 0)
        self.calls += 1
        if self.failures:
            ctypes.set_errno(self.failures.pop(0))
            return -1
        ctypes.set_errno(errno.EINVAL)  # stale, and to be ignored
        taken = self.ready[:room]
        del self.ready[:room]
        space = (syscalls.io_event * room).from_address(passed(address))
        for i, (data, obj, res, res2) in enumerate(taken):
            space[i] = syscalls.io_event(data, obj, res, res2)
        return len(taken)


CONTEXT = 0x7FFF_1234_5000


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeGetevents:
    fake = FakeGetevents()
    monkeypatch.setattr(syscalls, "raw_syscall", lambda: fake)
    return fake


def test_events_come_in_order_and_are_kept_until_committed(kernel: FakeGetevents) -> None:
    source = SyscallEvents(CONTEXT, 4)
    assert source.peek() == 0
    assert not is_buffered(source)
    kernel.ready = [event(i) for i in range(3)]
    assert source.peek() == source.peek() == 3
    assert kernel.calls == 2
    assert is_buffered(source)
    assert source.decode(3) == source.decode(3) == [event(0), event(1), event(2)]
    assert source.columns(2) == columns_of([event(0), event(1)])
    source.commit(1)
    assert source.peek() == 2
    assert source.decode(1) == [event(1)]
    assert source.columns(2) == columns_of([event(1), event(2)])
    assert source.decode(0) == []
    assert source.columns(0) == ([], [], [])
    assert source.advance_and_peek(1) == 1
    assert source.decode(1) == [event(2)]
    assert is_buffered(source)
    assert kernel.calls == 2
    assert source.advance_and_peek(1) == 0
    assert source.peek() == 0
    assert not is_buffered(source)


def test_more_than_one_call_brings(kernel: FakeGetevents) -> None:
    """As a ring that wraps: when a run is over, the next one is found by the next peek."""
    source = SyscallEvents(CONTEXT, 4)
    kernel.ready = [event(i) for i in range(11)]
    got: list[Event] = []
    n = source.peek()
    while n:
        assert n <= 4
        got += source.decode(n)
        n = source.advance_and_peek(n)
    assert got == [event(i) for i in range(11)]
    assert not is_buffered(source)


def test_what_completes_behind_leftovers_is_found(kernel: FakeGetevents) -> None:
    source = SyscallEvents(CONTEXT, 8)
    kernel.ready = [event(0), event(1)]
    assert source.peek() == 2
    source.commit(1)
    kernel.ready = [event(2)]
    assert source.peek() == 1
    assert source.advance_and_peek(1) == 1
    assert source.decode(1) == [event(2)]


def test_the_next_run_by_system_call(kernel: FakeGetevents) -> None:
    """One call, and no second one to hear that there is nothing more."""
    source = SyscallEvents(CONTEXT, 4)
    assert source.next_run() is None
    kernel.ready = [event(i) for i in range(3)]
    assert next_run(source) == (*columns_of([event(i) for i in range(3)]), False)
    source.commit_run()
    assert kernel.calls == 2
    assert not is_buffered(source)
    kernel.ready = [event(i) for i in range(5)]
    assert next_run(source, 3) == (*columns_of([event(i) for i in range(3)]), True)
    source.commit_run()
    source.commit_run()  # of nothing
    # What was fetched earlier: there may be more behind it by now.
    assert next_run(source, 3) == (*columns_of([event(3)]), True)
    source.commit_run()
    assert next_run(source) == (*columns_of([event(4)]), False)
    source.commit_run()
    kernel.ready = [event(i) for i in range(4)]
    assert next_run(source) == (*columns_of([event(i) for i in range(4)]), True)  # as much as fits
    kernel.ready = []
    assert next_run(source) == (*columns_of([event(i) for i in range(4)]), True)
    source.commit_run()
    assert source.next_run() is None


def test_the_usual_capacity_is_256(kernel: FakeGetevents) -> None:
    source = SyscallEvents(CONTEXT)
    kernel.ready = [event(i) for i in range(300)]
    assert source.peek() == 256
    assert source.decode(256) == [event(i) for i in range(256)]


@pytest.mark.parametrize("beyond", [-1, 3, 4])
def test_more_than_was_fetched_is_refused_and_nothing_changes(
    kernel: FakeGetevents, beyond: int
) -> None:
    source = SyscallEvents(CONTEXT, 4)
    calls: list[Callable[[int], object]] = [source.commit, source.decode, source.columns]
    for call in calls:
        with pytest.raises(ValueError, match="cannot take 1 events of 0"):
            call(1)
    kernel.ready = [event(i) for i in range(3)]
    assert source.peek() == 3
    source.commit(1)
    for call in [*calls, source.advance_and_peek]:
        with pytest.raises(ValueError, match=f"cannot take {beyond} events of 2"):
            call(beyond)
    assert source.peek() == 2
    assert source.decode(2) == [event(1), event(2)]


@pytest.mark.parametrize("failure", [errno.EINVAL, errno.EFAULT, errno.ENOSYS, errno.EPERM])
def test_a_failure_keeps_its_errno_and_is_not_repeated(kernel: FakeGetevents, failure: int) -> None:
    source = SyscallEvents(CONTEXT)
    kernel.failures = [failure]
    kernel.ready = [event(0)]
    with pytest.raises(OSError, match="io_getevents") as caught:
        source.peek()
    assert caught.value.errno == failure
    assert caught.value.strerror == f"io_getevents: {os.strerror(failure)}"
    assert not isinstance(caught.value, RawAIOError)
    assert not is_buffered(source)
    assert source.peek() == 1
    assert source.decode(1) == [event(0)]


def test_interrupted_is_nothing_yet(kernel: FakeGetevents) -> None:
    source = SyscallEvents(CONTEXT)
    kernel.failures = [errno.EINTR]
    kernel.ready = [event(0)]
    assert source.peek() == 0
    assert not is_buffered(source)
    assert source.peek() == 1


def test_no_call_after_close(kernel: FakeGetevents) -> None:
    source = SyscallEvents(CONTEXT)
    kernel.ready = [event(0)]
    source.close()
    source.close()
    with pytest.raises(ClosedError, match="closed"):
        source.peek()
    with pytest.raises(ClosedError, match="closed"):
        source.advance_and_peek(0)
    assert kernel.calls == 0


def test_an_exception_from_outside_loses_no_event(kernel: FakeGetevents) -> None:
    events = [event(i) for i in range(5)]
    step = 0
    interrupted = True
    while interrupted:
        source = SyscallEvents(CONTEXT, 2)
        kernel.ready = events[:]
        seen: list[Event] = []

        def drain(source: SyscallEvents = source, seen: list[Event] = seen) -> None:
            n = source.peek()
            while n:
                seen += source.decode(n)
                n = source.advance_and_peek(n)

        interrupted = interrupted_at(step, ring_module.__file__, drain)
        for _ in events:
            drain()
        # One that is read twice is harmless: its token is not known any more.
        assert list(dict.fromkeys(seen)) == events
        assert interrupted or seen == events
        assert not is_buffered(source)
        step += 1
    assert step > 20


def test_an_exception_from_outside_reads_an_event_twice_at_worst() -> None:
    """And in no case does head pass an event that the caller has not committed."""
    step = 0
    interrupted = True
    while interrupted:
        fake = FakeRing(8)
        ring = CompletionRing(fake.address, counted=True, ordering=COUNTED)
        for i in range(4):
            fake.produce(event(i))
        ring.credit(3)
        assert ring.peek() == 3
        interrupted = interrupted_at(step, ring_module.__file__, partial(ring.commit, 2))
        assert fake.words[HEAD] in ((0, 2) if interrupted else (2,))
        assert ring.peek() + fake.words[HEAD] <= 3  # never more than was counted
        ring.credit(4)
        assert ring.decode(ring.peek())[-1] == event(3)
        step += 1
    assert step > 10


def test_this_machine_s_ring_has_an_ordering() -> None:
    if platform.machine() not in {"x86_64", "aarch64"}:
        pytest.skip("no ordering is known for this machine")
    fake = FakeRing(4)
    ring = CompletionRing(fake.address, counted=True)
    assert ring.usable
    assert ring.ordering is not Ordering.NONE


def test_a_context_that_is_no_ring_does_not_crash() -> None:
    # Whatever is there: readable memory of this process that is not a ring.
    tried = 0
    with (
        open("/proc/self/maps", encoding="ascii", errors="replace") as maps,
        open("/proc/self/mem", "rb", buffering=0) as memory,
    ):
        for address in [int(line.partition("-")[0], 16) for line in maps]:
            try:
                # vvar, vsyscall and guard pages of stacks cannot be read, whatever maps says.
                os.pread(memory.fileno(), 1, address)
            except (OSError, OverflowError):
                continue
            assert not CompletionRing(address, ordering=TSO).usable
            tried += 1
    assert tried

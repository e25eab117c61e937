"""Batches that end as those before them did, which are taken in one piece, and those that do not.

What such a batch completes with is known beforehand, byte for byte, as long as it has the tokens of
the one before. So what could go wrong is told by tokens: whose events those in the ring are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import rawaio
from rawaio import Request, reaping
from rawaio.request import SERIES
from rawaio.ring import Ordering
from tests.context_support import LIMIT_S, Pipe, Threads, new_context, requests, results, together

_Make = Callable[..., rawaio.IOContext]
_Pipes = Callable[[int], list[Pipe]]


def tokens_of(ctx: rawaio.IOContext, patch: pytest.MonkeyPatch) -> list[int]:
    """The first token of each io_submit from now on."""
    seen: list[int] = []
    submit = ctx._queue._submit

    def observed(first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        seen.append(first_token)
        submit(first_token, batch, outcome)

    patch.setattr(ctx._queue, "_submit", observed)
    return seen


def whole(ctx: rawaio.IOContext, patch: pytest.MonkeyPatch) -> list[bool]:
    """Of each batch that is looked at as a whole, whether it was taken so."""
    seen: list[bool] = []
    move = ctx._move_whole

    def observed(target: list[rawaio.Completion], max_nr: int | None) -> tuple[Request, ...] | None:
        moved = move(target, max_nr)
        seen.append(bool(moved))
        return moved

    patch.setattr(ctx, "_move_whole", observed)
    return seen


@pytest.fixture
def ring() -> rawaio.IOContext:
    """A context whose batches are compared: by a ring that is not counted."""
    ctx = new_context(nr_events=8)
    if not ctx._direct:
        ctx.close()
        pytest.skip("the ring is not read as it is here")
    return ctx


@pytest.mark.parametrize("kind", ["ring", "fence"])
def test_batches_that_end_alike_have_the_same_tokens(
    make: _Make, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = make(nr_events=8)
    if ctx.why_not_ring:
        pytest.skip(f"the ring is not read: {ctx.why_not_ring}")
    submitted = [Request.pwrite(null, b"x" * i, 0) for i in range(1, 9)]
    tokens, taken = tokens_of(ctx, monkeypatch), whole(ctx, monkeypatch)
    before = ctx._ring_reaps
    for _ in range(40):  # over the end of the ring again and again
        ctx.submit(*submitted)
        reaped = ctx.reap(min_nr=8)
        assert requests(reaped) == submitted
        assert [c.res for c in reaped] == list(range(1, 9))
        assert all(r.state is rawaio.State.COMPLETED for r in submitted)
    # Where the ring ends inside a batch it is not yet known: that one is taken in two pieces.
    assert taken.count(False) <= 2
    assert set(tokens[3:]) == {tokens[3]}
    assert ctx._ring_reaps - before == 320
    assert (ctx.statistics().completed, ctx.statistics().in_flight) == (320, 0)


def test_other_results_are_seen(ctx: rawaio.IOContext, tmp_path: Path) -> None:
    """Each word of each event counts, also that of one operation out of many."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDONLY)
    try:
        reads = [Request.pread(fd, bytearray(4), 0) for _ in range(6)]
        fixed = [Request.pread(fd, rawaio.aligned_buffer(4), 0) for _ in range(6)]
        for batch in (reads, fixed):
            for changed in range(6):
                for offset, wanted in ((0, 4), (8, 2), (9, 1), (10, 0), (0, 4)):
                    batch[changed].offset = offset
                    ctx.submit(*batch)
                    reaped = ctx.reap(min_nr=6)
                    assert requests(reaped) == batch
                    assert results(reaped) == [wanted if i == changed else 4 for i in range(6)]
    finally:
        os.close(fd)


def test_a_smaller_batch_is_the_beginning_of_a_larger_one(
    ring: rawaio.IOContext, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ring as ctx:
        writes = [Request.pwrite(null, b"x" * i, 0) for i in range(1, 9)]
        ctx.submit(*writes)
        assert requests(ctx.reap(min_nr=8)) == writes
        taken = whole(ctx, monkeypatch)
        for n in (8, 3, 2, 5):
            ctx.submit(*writes[:n])
            reaped = ctx.reap(min_nr=n)
            assert requests(reaped) == writes[:n]
            assert results(reaped) == list(range(1, n + 1))
        assert taken == [True] * 4
        # And a larger one is more than a smaller one was.
        ctx.submit(*writes[3:5])
        assert results(ctx.reap(min_nr=2)) == [4, 5]
        ctx.submit(*writes)
        assert results(ctx.reap(min_nr=8)) == list(range(1, 9))
        assert taken[4:] == [False, False]


def test_batches_of_all_sizes_in_turn(ctx: rawaio.IOContext, null: int) -> None:
    """One alone is submitted in another way, and a few are numbered in another."""
    writes = [Request.pwrite(null, b"x" * i, 0) for i in range(1, 9)]
    for n in (8, 8, 1, 8, 8, 2, 8, 4, 4, 1, 4, 3, 3, 3, 1, 1, 2, 2, 5, 5, 1, 5):
        for batch in (writes[:n], writes[-n:]):
            ctx.submit(*batch)
            reaped = ctx.reap(min_nr=n)
            assert requests(reaped) == batch
            assert results(reaped) == [request.nbytes for request in batch]
    ctx._queue._check()


def test_errors_are_seen_and_other_requests_and_fewer(
    ctx: rawaio.IOContext, null: int, tmp_path: Path
) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        good = [Request.pwrite(null, b"xy", 0) for _ in range(5)]
        bad = Request.fsync(fd)  # of a directory: what comes of it is not 2
        for batch in (good, good, [*good[:4], bad], good, good[:3], good[2:], good, [bad, bad][:1]):
            ctx.submit(*batch)
            reaped = ctx.reap(min_nr=len(batch))
            assert requests(reaped) == batch
            for completion in reaped:
                assert completion.res == 2 if completion.request is not bad else completion.res <= 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("before", [0, 2])
def test_what_an_interrupted_reap_left_in_the_ring_is_not_the_next_batch(
    ring: rawaio.IOContext,
    pipes: _Pipes,
    threads: Threads,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
) -> None:
    """Its events are still there, as a batch in flight would end; a thread is the first to look."""
    with ring as ctx:
        ready, others = pipes(2), pipes(2)
        for pipe in ready:
            pipe.fire()
        polls, late = [pipe.poll() for pipe in ready], [pipe.poll() for pipe in others]
        for _ in range(before):
            ctx.submit(*polls)
            assert requests(ctx.reap(min_nr=2)) == polls
        ctx.submit(*polls)
        recover, between = ctx._recover, list[list[rawaio.Completion]]()

        def struck(_: object) -> None:
            raise KeyboardInterrupt

        def look() -> None:
            assert not ctx._ring.empty
            ctx.submit(*late)
            between.append(ctx.reap())

        def recovered(error: BaseException) -> None:
            monkeypatch.undo()
            threads.start(look)
            threads.join()
            recover(error)

        monkeypatch.setattr(type(ctx._ring), "commit_run", struck)
        monkeypatch.setattr(ctx, "_recover", recovered)
        with pytest.raises(KeyboardInterrupt):
            ctx.reap(min_nr=2)
        assert between == [[]]
        assert all(poll.state is rawaio.State.IN_FLIGHT for poll in late)
        assert requests(ctx.reap()) == polls
        for pipe in others:
            pipe.fire()
        assert requests(ctx.drain(timeout=LIMIT_S)) == late
        ctx._queue._check()


def test_tokens_of_a_piece_are_not_used_again(
    make: _Make, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not begin a series, so that a whole batch may not count up from them."""
    ctx = make(nr_events=8)
    tokens = tokens_of(ctx, monkeypatch)
    writes = [Request.pwrite(null, b"x", 0) for _ in range(8)]
    for first, rest in ((4, 4), (8, 0), (5, 3), (1, 7), (8, 0), (8, 0), (6, 2), (4, 4)):
        ctx.submit(*writes)
        reaped = ctx.reap(min_nr=first, max_nr=first)
        if rest:
            reaped += ctx.reap(min_nr=rest)
        assert requests(reaped) == writes
    assert not any(token % SERIES for token in tokens)
    ctx._queue._check()


def test_tokens_are_not_used_again_while_some_of_them_are_in_flight(
    make: _Make, pipes: _Pipes
) -> None:
    """The first piece of a batch begins as the batch does."""
    ctx = make(nr_events=16)
    ten = pipes(10)
    polls = [pipe.poll() for pipe in ten]
    for _ in range(2):
        ctx.submit(*polls[:5])
        for pipe in ten[:2]:
            pipe.fire()
        assert requests(ctx.reap(min_nr=2)) == polls[:2]
        ctx.submit(*polls[5:])
        for pipe in (ten[9], *ten[2:5], *ten[5:9]):
            pipe.fire()
            (completion,) = ctx.reap(min_nr=1)
            assert completion.request is polls[ten.index(pipe)]
        ctx._queue._check()
        for pipe in ten:
            pipe.quench()


def test_batches_where_the_ring_cannot_be_read(monkeypatch: pytest.MonkeyPatch, null: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("rawaio.ring.choose_ordering", lambda *_, **__: (Ordering.NONE, None))
        ctx = rawaio.IOContext(8)
    with ctx:
        assert ctx.why_not_ring
        writes = [Request.pwrite(null, b"x", 0) for _ in range(3)]
        for _ in range(3):
            ctx.submit(*writes)
            assert requests(ctx.reap(min_nr=3)) == writes


def test_a_batch_is_whole_only_within_max_nr(
    ring: rawaio.IOContext, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ring as ctx:
        writes = [Request.pwrite(null, b"x", 0) for _ in range(4)]
        for _ in range(2):
            ctx.submit(*writes)
            assert requests(ctx.reap(min_nr=4)) == writes
        taken = whole(ctx, monkeypatch)
        ctx.submit(*writes)
        assert requests(ctx.reap(min_nr=4, max_nr=4)) == writes
        assert taken == [True]
        ctx.submit(*writes)
        assert requests(ctx.reap(max_nr=3)) == writes[:3]
        assert requests(ctx.reap()) == writes[3:]


def test_callbacks_and_buffers_that_may_move(ctx: rawaio.IOContext, null: int) -> None:
    """A callback may be assigned at any time, also between submission and completion."""
    called: list[rawaio.Completion] = []
    memory = bytearray(b"abc")
    batch = [Request.pwrite(null, memory if i == 1 else b"abc", 0) for i in range(4)]
    for turn in range(6):
        ctx.submit(*batch)
        with pytest.raises(BufferError):
            memory.append(0)
        batch[2].callback = called.append if turn > 2 else None
        assert requests(ctx.reap(min_nr=4)) == batch
        memory.append(0)
        del memory[-1]
        assert len(called) == max(turn - 2, 0)
    assert {c.request for c in called} == {batch[2]}


@pytest.mark.parametrize("how", ["collected", "unplug"])
def test_a_section_is_collected_while_a_batch_is_taken_again(
    ctx: rawaio.IOContext, null: int, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """In the same thread. What a program's own finalizer flushes moves the batch, when refused."""
    batch, refused = (
        [Request.pwrite(null, b"x", 0) for _ in range(3)],
        Request.pwrite(1 << 20, b"x", 0),
    )
    for _ in range(2):
        ctx.submit(*batch)
        assert requests(ctx.reap(min_nr=3)) == batch
    ctx.submit(*batch)
    ctx._queue.plug("collected")
    ctx.submit(refused)
    made: list[rawaio.Completion] = []

    def make(values: tuple[Request, int, int]) -> rawaio.Completion:
        getattr(ctx._queue, how)("collected")
        made.append(rawaio.Completion(values))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(reaping, "Completion", make)
        reaped = ctx.reap(min_nr=3)
    assert made
    reaped += ctx.drain(timeout=LIMIT_S)
    assert sorted(map(id, requests(reaped))) == sorted(map(id, [*batch, refused]))
    assert [c.res for c in reaped if c.request is refused] == [-errno.EBADF]
    assert (ctx.statistics().in_queue, ctx.statistics().in_flight) == (0, 0)
    ctx._queue._check()
    ctx.submit(*batch)
    assert requests(ctx.reap(min_nr=3)) == batch


def test_what_is_in_flight_has_other_tokens_than_what_is_submitted_beside_it(
    make: _Make, null: int, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = make(nr_events=8)
    tokens = tokens_of(ctx, monkeypatch)
    writes = [Request.pwrite(null, b"x", 0) for _ in range(3)]
    poll = pipe.poll()
    for beside in (False, False, True, False, False):
        seen = len(tokens)
        ctx.submit(*writes)
        if beside:
            ctx.submit(poll)
            assert requests(ctx.reap(min_nr=3)) == writes
            ctx.submit(*writes)
            assert requests(ctx.reap(min_nr=3)) == writes
            pipe.fire()
            assert requests(ctx.reap(min_nr=1)) == [poll]
            assert tokens[seen + 1] not in (tokens[seen], tokens[seen + 2])
        else:
            assert requests(ctx.reap(min_nr=3)) == writes
    ctx._queue._check()


def test_threads_with_batches_of_their_own(make: _Make, null: int, threads: Threads) -> None:
    ctx = make(nr_events=32)
    batches = [[Request.pwrite(null, b"x" * n, 0) for _ in range(n)] for n in (2, 3, 7)]
    seen: list[rawaio.Completion] = []

    def rounds(batch: list[Request]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(200):
                ctx.submit(*batch)
                while any(r.state is not rawaio.State.COMPLETED for r in batch):
                    seen.extend(ctx.reap())

        return run

    together(threads, *map(rounds, batches))
    seen.extend(ctx.drain(timeout=LIMIT_S))
    for batch in batches:
        for request in batch:
            own = [c.res for c in seen if c.request is request]
            assert own == [len(batch)] * 200
    ctx._queue._check()

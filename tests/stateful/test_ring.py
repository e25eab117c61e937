"""The same history of the live kernel through the ring and through io_getevents.

Each source of completions has a context of its own, into which the same requests go: one-byte
writes to /dev/null, which complete at once, and polls of pipes, which complete when the test says
so. A list is the model of what is completed and not yet committed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import select
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rawaio import syscalls
from rawaio.protocols import CompletionSource
from rawaio.ring import CompletionRing, Ordering, SyscallEvents
from rawaio.syscalls import Opcode

ROOM = 64
PIPES = 4
CAPACITY = 3  # of SyscallEvents: small, so that one call does not bring everything


@dataclass
class Side:
    """A context, the source that it is reaped by, and what the kernel has of it."""

    name: str
    ctx_id: int
    source: CompletionSource
    eventfd: int
    pipes: list[tuple[int, int]]
    null: int
    byte: ctypes.Array[ctypes.c_char]
    run: int = 0
    model: list[tuple[int, int]] = field(default_factory=list)

    def submit(self, token: int, opcode: Opcode, fd: int, address: int, nbytes: int) -> None:
        it = syscalls.iocb(
            aio_data=token,
            aio_lio_opcode=opcode,
            aio_fildes=fd,
            aio_buf=address,
            aio_nbytes=nbytes,
            aio_flags=syscalls.IOCB_FLAG_RESFD,
            aio_resfd=self.eventfd,
        )
        pointer = ctypes.c_uint64(ctypes.addressof(it))
        assert syscalls.io_submit(self.ctx_id, 1, ctypes.addressof(pointer)) == 1

    def completed(self, token: int, res: int) -> None:
        """Wait until the kernel has published it; the eventfd is signalled after that."""
        counted = os.eventfd_read(self.eventfd)
        assert counted == 1
        if isinstance(self.source, CompletionRing):
            self.source.credit(counted)
        self.model.append((token, res))


def open_side(name: str) -> Side:
    ctx_id = syscalls.io_setup(ROOM)
    source: CompletionSource
    if name == "io_getevents":
        source = SyscallEvents(ctx_id, CAPACITY)
    else:
        source = CompletionRing(
            ctx_id, ordering=(Ordering.COUNTED, None) if name == "counted" else None
        )
        if not source.usable:
            why = source.why_not
            source.close()
            syscalls.io_destroy(ctx_id)
            pytest.skip(f"the kernel's ring is not usable: {why}")
    return Side(
        name,
        ctx_id,
        source,
        os.eventfd(0),
        [os.pipe() for _ in range(PIPES)],
        os.open("/dev/null", os.O_WRONLY),
        ctypes.create_string_buffer(b"x", 1),
    )


def close_side(side: Side) -> None:
    side.source.close()
    syscalls.io_destroy(side.ctx_id)
    for fd in [side.eventfd, side.null, *[end for pipe in side.pipes for end in pipe]]:
        os.close(fd)


@pytest.fixture
def sides() -> Generator[list[Side], None, None]:
    names = ["io_getevents", "counted"]
    if platform.machine() == "x86_64":
        names.append("ring")
    opened: list[Side] = []
    try:
        for name in names:
            try:
                opened.append(open_side(name))
            except OSError as error:
                pytest.skip(f"no context: {error}")
        yield opened
    finally:
        for side in opened:
            close_side(side)


class TwoImplementations(RuleBasedStateMachine):
    """Every rule is done to all sides; each must do as its model, and the models are alike."""

    # Contexts are used for all examples: to destroy one takes 30 ms, and head is anywhere this way.
    sides: list[Side]
    token = 1  # also goes on from example to example

    def __init__(self) -> None:
        super().__init__()
        self.polls: dict[int, int] = {}  # pipe -> token

    @initialize()
    def start_empty(self) -> None:
        for side in self.sides:
            assert side.source.peek() == side.run == 0
            assert side.model == []

    @property
    def unreaped(self) -> int:
        return max(len(side.model) for side in self.sides) + len(self.polls)

    def next_token(self) -> int:
        TwoImplementations.token += 1
        return TwoImplementations.token

    @rule(n=st.integers(1, 12))
    def write(self, n: int) -> None:
        for _ in range(min(n, ROOM - PIPES - self.unreaped)):
            token = self.next_token()
            for side in self.sides:
                side.submit(token, Opcode.PWRITE, side.null, ctypes.addressof(side.byte), 1)
                side.completed(token, 1)

    @precondition(lambda self: len(self.polls) < PIPES)
    @rule(pipe=st.integers(0, PIPES - 1))
    def poll(self, pipe: int) -> None:
        if pipe in self.polls:
            return
        token = self.polls[pipe] = self.next_token()
        for side in self.sides:
            side.submit(token, Opcode.POLL, side.pipes[pipe][0], select.POLLIN, 0)

    @precondition(lambda self: self.polls)
    @rule(data=st.data())
    def fire(self, data: st.DataObject) -> None:
        self.end_poll(data.draw(st.sampled_from(sorted(self.polls))))

    def end_poll(self, pipe: int) -> None:
        token = self.polls.pop(pipe)
        for side in self.sides:
            os.write(side.pipes[pipe][1], b"x")
            side.completed(token, select.POLLIN)
            os.read(side.pipes[pipe][0], 1)

    @rule()
    def peek(self) -> None:
        for side in self.sides:
            side.run = side.source.peek()
            self.check_run(side)

    @rule(n=st.integers(0, 8), which=st.integers(0, 2))
    def take(self, n: int, which: int) -> None:
        side = self.sides[which % len(self.sides)]
        self.take_of(side, n, and_peek=False)

    @rule(n=st.integers(0, 8))
    def take_and_peek(self, n: int) -> None:
        for side in self.sides:
            self.take_of(side, n, and_peek=True)
            self.check_run(side)

    def take_of(self, side: Side, n: int, *, and_peek: bool) -> None:
        source = side.source
        n = min(n, side.run)
        expected = side.model[:n]
        data, res, res2 = source.columns(n)
        masked = [r & 1 for r in res]  # a poll's mask can hold bits that nobody asked for
        assert list(zip(data, masked, strict=True)) == expected
        assert res2 == [0] * n
        assert [(d, r, r2) for d, _, r, r2 in source.decode(n)] == list(
            zip(data, res, res2, strict=True)
        )
        with pytest.raises(ValueError, match=str(side.run + 1)):
            source.commit(side.run + 1)
        if and_peek:
            side.run = source.advance_and_peek(n)
        else:
            source.commit(n)
            side.run -= n
        del side.model[:n]

    def check_run(self, side: Side) -> None:
        assert side.run <= len(side.model)
        assert (side.run > 0) is bool(side.model), f"{side.name} has {side.model}"

    @invariant()
    def models_are_alike(self) -> None:
        """What a side still has is the end of what the slowest one has."""
        slowest = max((side.model for side in self.sides), key=len)
        for side in self.sides:
            assert slowest[len(slowest) - len(side.model) :] == side.model

    def teardown(self) -> None:
        for pipe in list(self.polls):
            self.end_poll(pipe)
        for side in self.sides:
            side.run = side.source.peek()
            for _ in range(2 * ROOM):  # whatever a failed example has left
                side.run = side.source.advance_and_peek(side.run)
            side.model.clear()


def test_the_ring_and_the_system_call_agree(sides: list[Side]) -> None:
    class Machine(TwoImplementations):
        pass

    Machine.sides = sides
    try:
        side = sides[0]
        side.submit(1, Opcode.POLL, side.pipes[0][0], select.POLLIN, 0)
    except OSError as error:
        pytest.skip(f"no IOCB_CMD_POLL: {error}")
    os.write(side.pipes[0][1], b"x")
    side.completed(1, select.POLLIN)
    os.read(side.pipes[0][0], 1)
    side.source.peek()
    side.source.commit(1)
    side.source.peek()
    side.model.clear()
    run_state_machine_as_test(
        Machine, settings=settings(deadline=None, max_examples=80, stateful_step_count=40)
    )

"""Queue and kernel in any order, beside a model.

The same rules run on the queue alone with a simulated kernel that does what it likes, on a context
with a simulated kernel, and on a context with the real one, by its ring and by io_getevents. And
the last three have to agree, on the same history, in everything that can be seen.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rawaio import IOContext
from rawaio.testing import Chances
from tests.stateful.queue_world import (
    ACTS,
    KINDS,
    ContextHarness,
    Files,
    Harness,
    QueueHarness,
    SimulatedContextHarness,
    Spec,
    World,
)

specs: st.SearchStrategy[Spec] = st.builds(
    Spec, st.sampled_from(sorted(KINDS)), st.sampled_from(ACTS), st.none()
)
for _ in range(2):
    specs = st.builds(
        Spec, st.sampled_from(sorted(KINDS)), st.sampled_from(ACTS), st.none() | specs
    )
batches = st.lists(specs, min_size=1, max_size=4)
places = st.integers(0, 7)
chances = st.builds(
    Chances,
    eagain=st.sampled_from([0, 0.2, 0.6]),
    partial=st.sampled_from([0, 0.3]),
    refuse=st.sampled_from([0, 0.2]),
    fail=st.sampled_from([0, 0.2]),
    short=st.sampled_from([0, 0.2]),
    at_once=st.sampled_from([0, 0.3, 1]),
)


@cache
def why_no_context() -> str | None:
    """Why there is no real kernel to run on; None when there is."""
    try:
        IOContext(1).close()
    except OSError as error:
        return f"no context: {error}"
    return None


@pytest.fixture
def real_kernel() -> None:
    why_not = why_no_context()
    if why_not is not None:
        pytest.skip(why_not)


@contextmanager
def worlds(*makers: Callable[[], Harness]) -> Generator[list[World]]:
    """A world for each, given back in any case."""
    files = Files()
    open_worlds: list[World] = []
    try:
        open_worlds.extend(World(maker(), files) for maker in makers)
        yield open_worlds
    finally:
        for world in open_worlds:
            world.close()
        files.close()


class QueueRules(RuleBasedStateMachine):
    """What can be done with any of the worlds."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.files = Files()

    @rule(batch=batches)
    def submit(self, batch: list[Spec]) -> None:
        self.world.submit(batch)

    @rule(place=places)
    def submit_again(self, place: int) -> None:
        self.world.submit_again(place)

    @rule(spec=specs)
    def submit_refused(self, spec: Spec) -> None:
        self.world.submit_refused(spec)

    @precondition(lambda self: len(self.world.sections) < 3)
    @rule()
    def enter_a_section(self) -> None:
        self.world.enter()

    @precondition(lambda self: self.world.sections)
    @rule(place=places, collected=st.booleans())
    def leave_a_section(self, place: int, collected: bool) -> None:
        if collected:
            self.world.abandon(place)
        else:
            self.world.leave(place)

    @precondition(lambda self: self.world.open)
    @rule(place=places)
    def finish(self, place: int) -> None:
        self.world.finish(place)

    @precondition(lambda self: self.world.open)
    @rule()
    def reap(self) -> None:
        self.world.reap()

    @precondition(lambda self: self.world.queue.pending)
    @rule(place=places)
    def cancel(self, place: int) -> None:
        self.world.cancel(place)

    @rule()
    def timer(self) -> None:
        self.world.kick()

    @invariant()
    def laws_hold(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                try:
                    self.world.drain()
                finally:
                    self.world.close()
        finally:
            self.files.close()


class SimulatedQueue(QueueRules):
    """The queue alone, and a kernel that is told what to do, or draws it."""

    harness: QueueHarness

    @initialize(seed=st.integers(0, 1 << 16), chances=chances)
    def start(self, seed: int, chances: Chances) -> None:
        self.harness = QueueHarness(seed, chances)
        self.world = World(self.harness, self.files)

    @rule(answers=st.lists(st.sampled_from([0, 1, 2, -errno.EAGAIN, -errno.EBADF]), max_size=4))
    def script(self, answers: list[int]) -> None:
        self.harness.kernel.answers.extend(answers)

    @rule(slots=st.integers(0, 4))
    def strand_slots(self, slots: int) -> None:
        self.harness.kernel.slots = slots


class SimulatedContext(QueueRules):
    """A context whose kernel is simulated, and does as the real one would."""

    @initialize()
    def start(self) -> None:
        self.world = World(SimulatedContextHarness(), self.files)


class ContextByRing(QueueRules):
    """A context on the real kernel, its completions read from the ring."""

    @initialize()
    def start(self) -> None:
        self.world = World(ContextHarness(force_syscalls=False), self.files)


class ContextBySyscall(QueueRules):
    """A context on the real kernel, its completions had by io_getevents."""

    @initialize()
    def start(self) -> None:
        self.world = World(ContextHarness(force_syscalls=True), self.files)


def run(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_queue_on_the_simulated_kernel() -> None:
    run(SimulatedQueue, 150, 40)


@pytest.mark.usefixtures("real_kernel")
@pytest.mark.parametrize("machine", [SimulatedContext, ContextByRing, ContextBySyscall])
def test_context(machine: type[QueueRules]) -> None:
    run(machine, 40, 30)


histories = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), batches),
        st.tuples(
            st.sampled_from(["submit_again", "finish", "leave", "abandon", "cancel"]), places
        ),
        st.tuples(st.sampled_from(["enter", "reap", "kick"])),
    ),
    max_size=30,
)


@pytest.mark.usefixtures("real_kernel")
@settings(max_examples=40, deadline=None)
@given(history=histories)
def test_the_simulated_and_the_real_kernel_agree(history: list[tuple[Any, ...]]) -> None:
    with worlds(
        SimulatedContextHarness,
        partial(ContextHarness, force_syscalls=False),
        partial(ContextHarness, force_syscalls=True),
    ) as (simulated, *real):
        for action, *arguments in [*history, ("drain",)]:
            for world in (simulated, *real):
                getattr(world, action)(*arguments)
                world.check()
            for world in real:
                assert world.view() == simulated.view()
                assert world.seen == simulated.seen

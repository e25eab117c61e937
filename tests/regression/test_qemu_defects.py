"""What a queue of this kind got wrong elsewhere: one test for each, of the behaviour wanted."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
from collections.abc import Iterator

import pytest

from rawaio import Completion, IOContext, Request, State, syscalls
from rawaio.ring import CompletionRing, Ordering
from rawaio.testing import SimulatedKernel
from tests.queue_support import Driver

BAD_FD = (1 << 31) - 1
NR = 8  # events of a ring made here


def fsyncs(n: int) -> list[Request]:
    return [Request.fsync(0, user_data=i) for i in range(n)]


@pytest.fixture
def context() -> Iterator[IOContext]:
    try:
        context = IOContext(8)
    except OSError as error:
        pytest.skip(f"no context: {error}")
    with context:
        yield context


class Memory:
    """A ring in memory of our own."""

    def __init__(self, *, nr: int = NR, magic: int = syscalls.AIO_RING_MAGIC) -> None:
        self.mapping = mmap.mmap(-1, mmap.PAGESIZE)
        self.ring = syscalls.aio_ring.from_buffer(self.mapping)
        self.ring.nr = nr
        self.ring.magic = magic
        self.ring.header_length = 32
        self.address = ctypes.addressof(self.ring)

    def put(self, slot: int, data: int, res: int = 0, res2: int = 0) -> None:
        event = syscalls.io_event.from_buffer(self.mapping, 32 + 32 * slot)
        event.data, event.res, event.res2 = data, res, res2


def ring_at(address: int) -> CompletionRing:
    """With one thread there is no order to be kept, on whatever machine."""
    return CompletionRing(address, ordering=(Ordering.TSO, None))


# -- D1 ----------------------------------------------------------------------------------------


def test_d1_behind_a_refused_request_the_rest_is_submitted() -> None:
    """A request that the kernel refuses costs the ones behind it nothing, not even a wait.

    All this happens in the one flush, since with nothing in flight nobody would come to start
    another one.
    """
    kernel = SimulatedKernel(8)
    queue = Driver(kernel).queue
    requests = fsyncs(5)
    for request in (requests[0], requests[1], requests[3]):
        kernel.plan(request, refuse=errno.EBADF)
    queue.push(requests)
    assert list(queue.in_flight_table.values()) == [requests[2], requests[4]]
    assert [(c.request, c.res) for c in queue.rejected] == [
        (r, -errno.EBADF) for r in (requests[0], requests[1], requests[3])
    ]
    assert not queue.pending
    assert not queue.blocked


def test_d1_a_refused_request_alone_leaves_the_queue_open() -> None:
    """After a refusal with nothing behind it, the next request is submitted at once."""
    kernel = SimulatedKernel(8)
    queue = Driver(kernel).queue
    refused, late = fsyncs(2)
    kernel.plan(refused, refuse=errno.EINVAL)
    queue.push([refused])
    queue.push([late])
    assert late.state is State.IN_FLIGHT


# -- D2 ----------------------------------------------------------------------------------------


def test_d2_eagain_with_nothing_in_flight_is_retried_by_a_timer(context: IOContext) -> None:
    """When no completion can come to try again, a timer does."""
    queue = context._queue
    submit = queue._submit
    left = 3

    def scarce(first_token: int, batch: object, outcome: list[int]) -> None:
        nonlocal left
        if left:
            left -= 1
            outcome.extend((-1, errno.EAGAIN))
        else:
            submit(first_token, batch, outcome)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    queue._submit = scarce
    try:
        with open("/dev/null", "wb") as null:
            context.submit(Request.pwrite(null, b"x", 0))
            assert queue.in_queue == 1
            assert context.retry_in is not None  # or the wait below would have no end
            assert [c.res for c in context.reap(min_nr=1)] == [1]
    finally:
        queue._submit = submit
    assert context.statistics().eagain == 3


# -- D3 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [0, 1])
def test_d3_a_full_batch_is_no_larger_than_the_free_slots(free: int) -> None:
    """No free slot means that nothing is submitted, and not that there is no limit."""
    kernel = SimulatedKernel(3)
    driver = Driver(kernel, max_batch=2)
    queue = driver.queue
    queue.push(fsyncs(3 - free))
    calls = len(kernel.calls)
    queue.plug()
    for request in fsyncs(5):
        queue.push([request])
        assert queue.in_flight <= 3
    assert [len(c.batch) for c in kernel.calls[calls:]] == [1] * free
    queue.unplug()
    queue._check()
    while queue.outstanding:
        kernel.complete()
        driver.reap()
    assert max(len(c.batch) for c in kernel.calls) <= 3


# -- D4 ----------------------------------------------------------------------------------------


def test_d4_a_header_that_is_not_a_ring_s_is_not_believed() -> None:
    """A ring is read only when its header says that it is one, in a layout that is known."""
    assert ring_at(Memory().address).usable
    wrong = Memory(magic=0)
    assert not ring_at(wrong.address).usable
    for nr in (0, 1, mmap.PAGESIZE):
        assert not ring_at(Memory(nr=nr).address).usable
    other = Memory()
    other.ring.incompat_features = 1
    assert not ring_at(other.address).usable
    short = Memory()
    short.ring.header_length = 24
    assert not ring_at(short.address).usable


@pytest.mark.parametrize("later", [0, 1, 3, 1 << 31])
def test_d4_nr_is_taken_once(later: int) -> None:
    """The number of events is that of the set-up, whatever the shared page says afterwards."""
    memory = Memory()
    ring = ring_at(memory.address)
    for slot in range(NR):
        memory.put(slot, data=100 + slot)
    memory.ring.head, memory.ring.tail = NR - 2, 2
    memory.ring.nr = later
    assert ring.nr == NR
    assert ring.peek() == 2
    assert [e[0] for e in ring.decode(2)] == [100 + NR - 2, 100 + NR - 1]
    assert ring.advance_and_peek(2) == 2
    assert memory.ring.head == 0
    assert ring.columns(2)[0] == [100, 101]


# -- D5 ----------------------------------------------------------------------------------------


def test_d5_head_is_published_behind_a_fence() -> None:
    """Where the machine does not keep the order, a fence stands between events and head.

    And one between the load of tail and those of the events.
    """
    memory = Memory()
    heads: list[int] = []
    ring = CompletionRing(
        memory.address, ordering=(Ordering.FENCE, lambda: heads.append(memory.ring.head))
    )
    memory.ring.tail = 3
    assert ring.peek() == 3
    assert heads == [0]
    ring.decode(3)
    ring.commit(3)
    assert heads == [0, 0]
    assert memory.ring.head == 3


# -- D6 ----------------------------------------------------------------------------------------


def test_d6_an_unplug_with_a_full_batch_is_an_unplug() -> None:
    """Every unplug undoes one plug, also when max_batch requests are waiting at that moment."""
    kernel = SimulatedKernel(8)
    queue = Driver(kernel, max_batch=2).queue
    kernel.answers.append(-errno.EAGAIN)
    queue.push(fsyncs(1))
    queue.plug()
    queue.plug()
    queue.push(fsyncs(4))  # the queue is blocked, so they wait
    assert queue.in_queue == 5
    queue.unplug()
    assert queue.plugged == 1
    queue.unplug()
    assert queue.plugged == 0
    assert queue.in_flight == 5
    queue.push(fsyncs(1))
    assert queue.in_flight == 6


# -- D7 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("res", "res2", "result"),
    [
        (1 << 31, 0, 1 << 31),
        ((1 << 40) + 3, 0, (1 << 40) + 3),
        (5, 1, (1 << 32) + 5),
        (0, 3, 3 << 32),
    ],
)
def test_d7_results_have_64_bits(res: int, res2: int, result: int) -> None:
    """What the kernel counts beyond 32 bits is neither cut off nor taken for an error."""
    memory = Memory()
    memory.put(0, 1, res, res2)
    memory.ring.tail = 1
    ring = ring_at(memory.address)
    ring.peek()
    _, [found], [found2] = ring.columns(1)
    request = Request.pread(0, bytearray(8), 0)
    assert Completion((request, found, found2)).result() == result


def test_d7_a_short_read_says_how_short_and_touches_nothing_else(context: IOContext) -> None:
    """At the end of the file the result is what was read, and the rest of the buffer is as it was.

    Whoever wants zeros there knows from the result where they go.
    """
    buffer = bytearray(b"." * 8)
    fd = os.memfd_create("short")
    try:
        os.write(fd, b"abc")
        context.submit(Request.pread(fd, buffer, 0))
        [completion] = context.reap(min_nr=1)
    finally:
        os.close(fd)
    assert completion.result() == 3
    assert bytes(buffer) == b"abc....."


# -- D8 ----------------------------------------------------------------------------------------


def test_d8_at_the_bound_the_rest_is_announced(context: IOContext) -> None:
    """A chain that is cut at the bound goes on: the loop is told, without help from the kernel.

    Each request is refused by io_submit, so that no completion in the kernel signals anything.
    """
    links = 100
    done: list[Completion] = []

    def again(completion: Completion) -> None:
        done.append(completion)
        if len(done) < links:
            context.submit(completion.request)

    ready = select.poll()
    ready.register(context.fileno(), select.POLLIN)
    context.submit(Request.pwrite(BAD_FD, b"x", 0, callback=again))
    turns = 0
    context.process_completions()
    while len(done) < links:
        assert ready.poll(0), f"nobody is told of the rest, after {len(done)} of {links}"
        context.process_completions()
        turns += 1
    assert turns > 1  # the bound is what this is about
    assert all(c.res == -errno.EBADF for c in done)


def test_d8_at_the_bound_the_eventfd_is_not_relied_on(context: IOContext) -> None:
    """What the kernel has signalled may have been read meanwhile, by a reap in another thread."""
    links = 100
    done: list[Completion] = []

    def again(completion: Completion) -> None:
        done.append(completion)
        if len(done) < links:
            context.submit(completion.request)
            context._kernel.reset()  # the other thread; what has completed is still in the ring

    ready = select.poll()
    ready.register(context.fileno(), select.POLLIN)
    turns = 0
    with open("/dev/null", "wb") as null:
        context.submit(Request.pwrite(null, b"x", 0, callback=again))
        while len(done) < links:
            assert ready.poll(0), f"nobody is told of the rest, after {len(done)} of {links}"
            context.process_completions()
            turns += 1
    assert turns > 1


# -- D9 ----------------------------------------------------------------------------------------


def test_d9_a_section_inside_a_submission_starts_nothing_twice() -> None:
    """What is being submitted is no longer listed: an inner section submits its own only."""
    kernel = SimulatedKernel(16)
    queue = Driver(kernel).queue
    outer, inner = fsyncs(3), fsyncs(2)

    def inside() -> None:
        kernel.inside = None
        with queue.section():
            queue.push(inner[:1])
            with queue.section():
                queue.push(inner[1:])
        assert not set(outer) & set(queue.pending)

    kernel.inside = inside
    with queue.section():
        queue.push(outer)
    offered = [r for call in kernel.calls for r in call.batch]
    assert offered == [*outer, *inner]
    queue._check()


# -- D10 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("force_syscalls", [False, True])
def test_d10_a_callback_may_wait_for_what_was_fetched_with_it(force_syscalls: bool) -> None:
    """A callback that reaps finds the completions that came in the same batch as its own."""
    try:
        context = IOContext(8, force_syscalls=force_syscalls)
    except OSError as error:
        pytest.skip(f"no context: {error}")
    order: list[str] = []

    def wait_for_second(completion: Completion) -> None:
        order.append("first")
        assert second.state is not State.COMPLETED
        found = context.reap(min_nr=1)
        assert [c.request for c in found] == [second]
        order.append("first goes on")

    with context, open("/dev/null", "wb") as null:
        first = Request.pwrite(null, b"x", 0, callback=wait_for_second)
        second = Request.pwrite(null, b"x", 0, callback=lambda _: order.append("second"))
        third = Request.pwrite(null, b"x", 0, callback=lambda _: order.append("third"))
        context.submit(first, second)
        assert [c.request for c in context.reap()] == [first]
        assert order == ["first", "second", "first goes on"]
        context.submit(third)
        assert [c.request for c in context.reap()] == [third]

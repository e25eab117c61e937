"""Contexts and event loops that look for completions before they sleep."""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Iterable
from pathlib import Path

import pytest

import rawaio
from rawaio.bulk import Bulk, BulkLane
from rawaio.busypoll import BusyPoll
from rawaio.loops.polling import PollingEventLoop, polling_loop
from rawaio.many import lanes_of
from rawaio.pieces import Pieces
from rawaio.polling import GrowthRule, HandlerPolling, PollingParameters, WeightedRule
from rawaio.syscalls import Opcode
from tests.context_support import ConstantRule
from tests.fuse_server import FuseServer


@pytest.mark.parametrize("kind", [WeightedRule, GrowthRule])
def test_reap_by_a_rule(tmp_path: Path, kind: type[WeightedRule | GrowthRule]) -> None:
    """The same completions, whether it looks or sleeps; and the rule has learnt something."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 16)
    fd = os.open(path, os.O_RDONLY)
    rule = kind(PollingParameters(max_ns=10_000_000))
    reader, writer = os.pipe()
    try:
        with rawaio.IOContext(4, polling=rule) as ctx:
            for i in range(20):
                request = rawaio.Request.poll(reader, 1)
                ctx.submit(request)
                os.write(writer, bytes([i]))
                (completion,) = ctx.reap(1)
                assert completion.request is request
                assert os.read(reader, 1) == bytes([i])
            assert ctx.reap(timeout=0) == []
    finally:
        for number in (fd, reader, writer):
            os.close(number)
    assert 0 <= rule.poll_ns <= 10_000_000


def test_a_lane_by_a_rule(tmp_path: Path) -> None:
    """It goes on with each operation; and where it does not read the ring, it has no use for it."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    busy = BusyPoll(WeightedRule(PollingParameters()))
    lanes = [BulkLane(8, portion=8, busy=busy, force_syscalls=forced) for forced in (False, True)]
    if not lanes[0]._ring.usable:
        pytest.skip(f"nothing is polled: {lanes[0]._ring.why_not}")
    assert [(lane._busy, lane._part) for lane in lanes] == [(busy, 1), (None, 4)]
    with path.open("rb") as file:
        for lane in lanes:
            job = Bulk(Opcode.PREAD, file, Pieces(range(100), None, 1, reading=True))
            lane.run(job)
            job.check()
            assert job.pieces.made is not None
            assert bytes(job.pieces.made) == bytes(range(100))
            lane.close()


def test_a_loop_that_polls(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)

    async def main() -> None:
        assert isinstance(asyncio.get_running_loop(), PollingEventLoop)
        async with rawaio.open(path, direct="prefer") as f:
            for i in range(50):
                assert await f.pread(16, 16 * i) == (bytes(range(256)) * 64)[16 * i : 16 * i + 16]
        await asyncio.sleep(0.001)  # nothing is under way: an ordinary sleep

    with asyncio.Runner(loop_factory=polling_loop) as runner:
        runner.run(main())


class _Releasing:
    """A rule by which a wait begins with the server's answer to one read."""

    def __init__(self, fuse: FuseServer, poll_ns: int) -> None:
        self._fuse = fuse
        self._poll_ns = poll_ns
        self.asked = 0
        self.found: list[bool] = []

    @property
    def poll_ns(self) -> int:
        self.asked += 1
        self._fuse.wait_held(1)
        self._fuse.release(1)
        return self._poll_ns

    def add(self) -> HandlerPolling:
        return HandlerPolling()

    def remove(self, handler: HandlerPolling) -> None:
        raise AssertionError(handler)

    def adjust(self, block_ns: int, active: Iterable[HandlerPolling], now_ns: int) -> None:
        assert 0 <= block_ns <= now_ns
        self.found.append(bool(list(active)))


@pytest.mark.parametrize("max_batch", [1, 3])
@pytest.mark.parametrize("poll_ns", [0, 1 << 50])
def test_a_bulk_call_by_a_rule(
    monkeypatch: pytest.MonkeyPatch, poll_ns: int, max_batch: int
) -> None:
    """It looks before it sleeps, and only when nothing else is to be done."""
    slept: list[int] = []
    wait = BulkLane._wait

    def sleep(lane: BulkLane, min_nr: int) -> int:
        slept.append(min_nr)
        return wait(lane, min_nr)

    monkeypatch.setattr(BulkLane, "_wait", sleep)
    content = bytes(range(256)) * 16 * 8
    with FuseServer() as fuse:
        fuse.write_file("file", content)
        fuse.hold("read")
        rule = _Releasing(fuse, poll_ns)
        fd = os.open(fuse.path("file"), os.O_RDONLY | os.O_DIRECT)
        try:
            with rawaio.IOContext(3, max_batch=max_batch, polling=rule) as ctx:
                if not ctx.visible:
                    pytest.skip(f"nothing is polled: {ctx.why_not_ring or 'no GIL'}")
                out = rawaio.aligned_buffer(len(content))
                assert ctx.pread_many(fd, range(0, len(content), 4096), 4096, out) == len(content)
        finally:
            os.close(fd)
    assert bytes(out) == content
    # One read more is answered in each wait.
    assert rule.asked == 8
    assert rule.found == [True] * 7  # the last is told when there is another
    assert slept == ([] if poll_ns else [1] * 8)


@pytest.mark.parametrize("poll_ns", [0, 1 << 50])
def test_bulk_calls_of_a_file_in_a_loop_that_polls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poll_ns: int
) -> None:
    """Their completions are looked for as those of single calls are."""
    waits: list[BulkLane] = []
    select = selectors.EpollSelector.select

    def watched(
        selector: selectors.EpollSelector, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            waits.extend(lane for lane in lanes if lane.outstanding)
        return select(selector, timeout)

    lanes: list[BulkLane] = []
    path = tmp_path / "file"
    content = bytes(range(256)) * 16 * 64
    path.write_bytes(content)

    async def main() -> None:
        async with rawaio.open(path, direct="prefer") as f:
            if not f.direct:
                pytest.skip(f"no direct I/O in {tmp_path}")
            out = rawaio.aligned_buffer(len(content))
            offsets = range(0, len(content), 4096)
            await f.pread_many(offsets, 4096, out)  # makes the lane
            lanes.extend(lanes_of(f.driver)._lanes)
            if not (len(lanes) == 1 and lanes[0].visible):
                pytest.skip("no lane whose ring can be looked at")
            with monkeypatch.context() as patch:
                patch.setattr(selectors.EpollSelector, "select", watched)
                for _ in range(30):
                    assert await f.pread_many(offsets, 4096, out) == len(content)
            assert bytes(out) == content

    with asyncio.Runner(loop_factory=lambda: polling_loop(ConstantRule(poll_ns))) as runner:
        runner.run(main())
    if poll_ns:
        assert waits == []
    elif not waits:
        pytest.skip("this device completes everything while it is submitted")


def test_what_cannot_be_looked_at_is_slept_for() -> None:
    """As where completions come by io_getevents, and on a build without the GIL."""

    class Unasked(ConstantRule):
        @property
        def poll_ns(self) -> int:
            raise AssertionError

        @poll_ns.setter
        def poll_ns(self, value: int) -> None:
            """As it is made."""

    reader, writer = os.pipe()
    loop = polling_loop(Unasked(0))
    try:
        with rawaio.IOContext(1, force_syscalls=True) as ctx:
            loop.watch_ring(ctx)
            ctx.submit(rawaio.Request.poll(reader, 1))
            assert (ctx.outstanding, ctx.visible, ctx.empty) == (1, False, True)
            assert loop._polling.select(0.001) == []
            os.write(writer, b"x")
            assert len(ctx.reap(1)) == 1
    finally:
        loop.close()
        os.close(reader)
        os.close(writer)


def test_a_ring_is_looked_at_once_and_until_it_is_closed() -> None:
    """However often it is watched, as at each move of its driver; and a lane after its job."""
    lane = BulkLane(2, signals=True)
    loop = polling_loop(WeightedRule(PollingParameters(max_ns=1000)))
    try:
        other = rawaio.IOContext(1)
        for _ in range(3):
            loop.watch_ring(lane)
            loop.watch_ring(other)
        assert list(loop._polling._watched) == [lane, other]
        assert (lane.outstanding, lane.empty) == (0, True)
        with open("/dev/zero", "rb") as file:
            job = Bulk(Opcode.PREAD, file, Pieces(range(2), None, 1, reading=True))
            lane.begin(job)
            lane.submit()
            assert lane.outstanding == 2
            assert lane.empty is not lane.visible
            lane.collect()
            assert (lane.outstanding, lane.empty) == (0, True)
            lane.end()
            quiet = Bulk(Opcode.PREAD, file, Pieces([0], None, 1, reading=True), signals=False)
            lane.begin(quiet)
            lane.submit()
            assert lane.outstanding == 0  # nobody is told when it is over
            lane.collect()
            lane.end()
        lane.close()
        assert lane.empty
        other.close()
        with rawaio.IOContext(1) as third:
            loop.watch_ring(third)
            assert list(loop._polling._watched) == [third]
    finally:
        loop.close()

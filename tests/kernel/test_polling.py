"""Contexts and event loops that look for completions before they sleep."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

import rawaio
from rawaio.loops.polling import PollingEventLoop, polling_loop
from rawaio.polling import GrowthRule, PollingParameters, WeightedRule


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

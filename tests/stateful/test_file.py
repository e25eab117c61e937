"""Files in any order of calls, on each of the file systems; tools/soak does so for hours."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.context_support import LIMIT_S
from tests.filesystems import FileSystem
from tests.fuse_server import FuseServer
from tests.stateful.file_world import FileMachine, Run

SETTINGS = settings(
    max_examples=int(os.environ.get("RAWAIO_SOAK_EXAMPLES", "20")),
    stateful_step_count=12,
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.generate],  # shrinking takes minutes, and does not end where it is a race
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:

        def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return runner.run(asyncio.wait_for(coroutine, LIMIT_S))

        yield run


def perform(run: Run, path: Path, **options: Any) -> None:
    def machine() -> FileMachine:
        return FileMachine(run, path, **options)

    run_state_machine_as_test(cast("type[RuleBasedStateMachine]", machine), settings=SETTINGS)


def test_any_order_of_calls(run: Run, filesystem: FileSystem) -> None:
    perform(run, filesystem.path / "file")


@pytest.mark.parametrize("async_dio", [True, False])
def test_where_transfers_are_short(run: Run, async_dio: bool) -> None:
    # A short write is an error with FUSE_ASYNC_DIO, and a short one without.
    with FuseServer(async_dio=async_dio) as fuse:
        if async_dio:
            fuse.short(3000, "read")
        else:
            fuse.short(3000)

        def contents(path: Path, direct: bool) -> bytes:
            return fuse.contents(path.name)

        perform(run, fuse.path("file"), contents=contents, appends=async_dio)

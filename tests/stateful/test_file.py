"""Files in any order of calls, on each of the file systems; tools/soak does so for hours."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.filesystems import FileSystem
from tests.fuse_server import FuseServer
from tests.stateful.file_world import Contents, FileMachine, Run, plain

SETTINGS = settings(
    max_examples=int(os.environ.get("RAWAIO_SOAK_EXAMPLES", "15")),
    stateful_step_count=12,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture
def run() -> Iterator[Run]:
    with asyncio.Runner() as runner:
        yield runner.run


def perform(run: Run, path: Path, contents: Contents = plain) -> None:
    def machine() -> FileMachine:
        return FileMachine(run, path, contents)

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
        perform(run, fuse.path("file"), lambda path, _: fuse.contents(path.name))

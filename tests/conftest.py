"""Fixtures of all tests: real file systems, as tests/filesystems.py makes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filesystems import KINDS, FileSystem, Mounts


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounts]:
    with Mounts(tmp_path_factory.mktemp("mounts")) as mounts:
        yield mounts


@pytest.fixture(params=KINDS)
def filesystem(request: pytest.FixtureRequest, mounts: Mounts) -> Iterator[FileSystem]:
    """A new folder on each of the file systems, one after the other."""
    kind: str = request.param
    with mounts.folder(kind) as path:
        yield FileSystem(kind, path)


@pytest.fixture
def ext4(mounts: Mounts) -> Iterator[Path]:
    with mounts.folder("ext4") as path:
        yield path


@pytest.fixture
def ext4_4k(mounts: Mounts) -> Iterator[Path]:
    """On a device of 4096-byte sectors."""
    with mounts.folder("ext4_4k") as path:
        yield path


@pytest.fixture
def xfs(mounts: Mounts) -> Iterator[Path]:
    with mounts.folder("xfs") as path:
        yield path


@pytest.fixture
def btrfs(mounts: Mounts) -> Iterator[Path]:
    with mounts.folder("btrfs") as path:
        yield path


@pytest.fixture
def tmpfs(mounts: Mounts) -> Iterator[Path]:
    with mounts.folder("tmpfs") as path:
        yield path


@pytest.fixture
def small(mounts: Mounts) -> Iterator[Path]:
    """On an ext4 with some MiB free, to be filled up by `leave_free`."""
    with mounts.folder("small") as path:
        yield path

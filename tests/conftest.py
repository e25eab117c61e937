"""Fixtures of all tests, real file systems as tests/filesystems.py makes them; and `--share`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from tests.filesystems import KINDS, FileSystem, Mounts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=Path,
        metavar="FOLDER",
        help="do no file that another run, which is given the same new folder, has begun",
    )


def pytest_configure(config: pytest.Config) -> None:
    folder: Path | None = config.getoption("--share")
    if folder is not None:
        config.pluginmanager.register(_Share(folder))


class _Share:
    """Two runs do all files together: one from the first on, the other from the last on."""

    def __init__(self, folder: Path) -> None:
        # A shell starts what is to run in the background with these ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        self._folder = folder
        self._backwards = not self._claim("first")
        self._ours: dict[Path, bool] = {}

    def _claim(self, name: str) -> bool:
        try:
            (self._folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._backwards:
            files = [list(group) for _, group in groupby(items, lambda item: item.path)]
            items[:] = [item for file in reversed(files) for item in file]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        path = item.path
        if path not in self._ours:
            self._ours[path] = self._claim(
                str(path.relative_to(item.config.rootpath)).replace("/", "+")
            )
        return None if self._ours[path] else True  # True: it is dealt with


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

"""The Python code in the documents runs as it stands there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
BLOCKS = [
    (path.name, block)
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The checkout's own disk, where there may be O_DIRECT; /tmp may be a tmpfs."""
    path = ROOT / ".readme-test"
    path.mkdir(exist_ok=True)
    (path / "data.bin").write_bytes(os.urandom(32 * 4096))
    monkeypatch.chdir(path)
    yield path
    (path / "data.bin").unlink()
    path.rmdir()


@pytest.mark.parametrize("block", [block for _, block in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_the_code_runs(block: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        os.close(os.open("data.bin", os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {folder}: {error}")
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 32 if "IOContext(" in block else lines


def test_there_is_code() -> None:
    assert any(name == "README.md" for name, _ in BLOCKS)

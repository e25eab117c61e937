"""Type checkers accept right uses of the public names, and refuse wrong ones.

`public_api.py` says which are which; checked as it stands, mypy has nothing to say. Without its
remarks mypy has to complain of exactly the lines that had one.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

CHECKED = Path(__file__).with_name("public_api.py")
REMARK = re.compile(r"  # type: ignore\[(.*?)\].*")


def mypy(folder: Path, shadow: Path) -> subprocess.CompletedProcess[str]:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    return subprocess.run(
        [
            *(sys.executable, "-m", "mypy"),
            *("--config-file", "pyproject.toml"),
            *("--cache-dir", folder / "cache"),
            *("--shadow-file", CHECKED, shadow),
            "--no-pretty",
            CHECKED,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_mypy_complains_of_every_wrong_use_and_of_nothing_else(tmp_path: Path) -> None:
    lines = CHECKED.read_text().splitlines()
    expected = {
        (number, code)
        for number, line in enumerate(lines, 1)
        for found in REMARK.finditer(line)
        for code in found[1].split(", ")
    }
    assert len(expected) > 30
    shadow = tmp_path / "bare.py"
    shadow.write_text("\n".join(REMARK.sub("", line) for line in lines) + "\n")
    done = mypy(tmp_path, shadow)
    told = re.findall(
        r"^.*?public_api\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE
    )
    assert {(int(number), code) for number, code in told} == expected, done.stdout + done.stderr
    others = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(others) == len(told), done.stdout
    assert done.returncode == 1

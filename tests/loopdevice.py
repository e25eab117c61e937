"""Loop devices for tests: needs root, losetup and a kernel that has them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop_device(
    directory: Path, size: int = 4 << 20, *, sector_size: int = 512
) -> Generator[str, None, None]:
    """The node of a device over a new file of random bytes; skips where none can be had."""
    image = directory / "image"
    image.write_bytes(os.urandom(size))
    attach = ["losetup", "--find", "--show", "--sector-size", str(sector_size), str(image)]
    try:
        done = subprocess.run(attach, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("no losetup")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no loop device: {error.stderr.strip()}")
    node = done.stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)

"""That the benchmarks' programs do their work on this kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rawaio
from benchmarks import null_requests

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def native_aio() -> None:
    try:
        context = rawaio.IOContext(1)
    except (rawaio.UnsupportedError, OSError) as error:
        pytest.skip(f"no native AIO: {error}")
    context.close()


@pytest.mark.parametrize("way", null_requests.RAWAIO)
@pytest.mark.parametrize("mechanism", null_requests.MECHANISMS)
def test_our_programs_read_what_they_should(way: str, mechanism: str) -> None:
    with rawaio.IOContext(1) as context:
        if mechanism == "ring" and (reason := context.why_not_ring):
            pytest.skip(reason)
    null_requests.work(f"rawaio/{way}/{mechanism}", 96)


@pytest.mark.parametrize("way", null_requests.LIBAIO)
def test_the_rival_reads_what_it_should(way: str) -> None:
    pytest.importorskip("libaio")
    null_requests.work(f"python-libaio/{way}", 96)


def test_a_short_read_is_an_error() -> None:
    with pytest.raises(OSError, match="res is 0, not 512"):
        null_requests.check(0)


def test_a_program_runs_on_its_own(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "null_requests.py"
    command = [sys.executable, "-W", "error", str(script)]
    subprocess.run(
        [*command, "--work", "rawaio/batch/io_getevents", "64"], cwd=tmp_path, check=True
    )

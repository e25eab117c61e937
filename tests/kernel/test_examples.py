"""The examples do what they say, as somebody would start them."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rawaio
from examples import page_store
from tests.support import ROOT

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(EXAMPLES / script), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(autouse=True)
def native_aio() -> None:
    try:
        rawaio.IOContext(1).close()
    except (rawaio.UnsupportedError, OSError) as error:
        pytest.skip(f"no native AIO: {error}")


def test_page_store(tmp_path: Path) -> None:
    output = run("page_store.py", "--pages", "100", folder=tmp_path)
    assert "400 random reads, 64 at a time" in output
    assert output.endswith("every page is as it was written\n")
    assert list(tmp_path.iterdir()) == []


def test_page_store_in_a_file_of_ones_own(tmp_path: Path) -> None:
    run("page_store.py", "--pages", "3", "--path", "pages", folder=tmp_path)
    assert (tmp_path / "pages").stat().st_size == 3 * page_store.PAGE


def test_pages_survive_and_damage_shows(tmp_path: Path) -> None:
    path = tmp_path / "pages"

    async def put() -> None:
        async with rawaio.open(path, "x+", direct="prefer") as file:
            store = page_store.PageStore(file)
            for key, byte in ((7, b"a"), (1 << 40, b"b"), (7, b"c")):
                await store.put(key, byte * page_store.PAYLOAD)
            with pytest.raises(ValueError, match="a page has"):
                await store.put(8, b"short")
            await store.sync()

    async def get() -> None:
        async with rawaio.open(path, direct="prefer") as file:
            store = await page_store.PageStore.load(file)
            assert len(store) == 2
            assert await store.get(7) == b"c" * page_store.PAYLOAD
            assert await store.get(1 << 40) == b"b" * page_store.PAYLOAD
            with pytest.raises(KeyError):
                await store.get(8)

    async def get_damaged() -> None:
        async with rawaio.open(path, direct="prefer") as file:
            store = await page_store.PageStore.load(file)
            with pytest.raises(page_store.DamagedPageError, match="page 7"):
                await store.get(7)
            assert await store.get(1 << 40) == b"b" * page_store.PAYLOAD

    asyncio.run(put())
    asyncio.run(get())
    with open(path, "r+b") as file:
        file.seek(2000)
        file.write(b"x")
    asyncio.run(get_damaged())


def test_tensor_offload(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    output = run("tensor_offload.py", "--mib", "3", folder=tmp_path)
    assert output.endswith("the arrays are equal\n")
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_not_copied(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    from examples import tensor_offload

    async def there_and_back() -> None:
        async with rawaio.open(tmp_path / "tensor", "x+") as file:
            tensor = tensor_offload.aligned_array(3, 1 << 18)
            tensor[:] = 1.5
            await tensor_offload.offload(file, tensor)
            again = tensor_offload.aligned_array(3, 1 << 18)
            await tensor_offload.load(file, again)
            assert again.tobytes() == tensor.tobytes()
            statistics = file.statistics()
            assert (statistics.writes, statistics.unaligned_writes) == (3, 0)
            geometry = file.geometry
            assert geometry is not None
            for array in (tensor, again):
                for piece, offset in tensor_offload.pieces(array):
                    address = rawaio.Request.pread(0, piece, offset).address
                    assert geometry.is_aligned(address, len(piece), offset)

    try:
        asyncio.run(there_and_back())
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip(f"no O_DIRECT in {tmp_path}: {error}")


def test_without_numpy_it_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('numpy')")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "tensor_offload.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "this example needs NumPy: pip install numpy\n"

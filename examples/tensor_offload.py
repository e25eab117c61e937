"""A NumPy array out to disk and back, by direct I/O, without a copy.

    python3 examples/tensor_offload.py [--path P] [--mib N]

The arrays lie in aligned memory, so that the disk reads and writes them where they are, in pieces
of 1 MiB, many at a time; the page cache sees nothing of it. Without --path the file is a temporary
one in the current directory; with it, it must not exist yet, and stays.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

# A plain checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rawaio

try:
    import numpy as np
except ModuleNotFoundError:
    sys.exit("this example needs NumPy: pip install numpy")

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE: Final = 1 << 20


def aligned_array(*shape: int) -> NDArray[np.float32]:
    """An array of zeroes in memory that direct I/O can use as it is."""
    memory = rawaio.aligned_buffer(math.prod(shape) * np.dtype(np.float32).itemsize)
    return np.frombuffer(memory, np.float32).reshape(shape)


def pieces(array: NDArray[np.float32]) -> list[tuple[memoryview, int]]:
    """The array's own memory in pieces, each with its offset in the file."""
    memory = array.data.cast("B")
    return [(memory[at : at + PIECE], at) for at in range(0, len(memory), PIECE)]


async def offload(file: rawaio.File, array: NDArray[np.float32]) -> None:
    """Write an array to the beginning of a file, and wait until it is on stable storage."""
    try:
        # Direct writes that extend a file wait for one another.
        await file.allocate(0, array.nbytes)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    await asyncio.gather(*(file.pwrite(piece, offset) for piece, offset in pieces(array)))
    await file.fdatasync()


async def load(file: rawaio.File, array: NDArray[np.float32]) -> None:
    """Fill an array from the beginning of a file."""
    lengths = await asyncio.gather(
        *(file.preadinto(piece, offset) for piece, offset in pieces(array))
    )
    if sum(lengths) != array.nbytes:
        raise EOFError(f"the file has {sum(lengths)} bytes for an array of {array.nbytes}")


async def run(path: Path, mib: int) -> str:
    """Send an array out and fetch it back; what came out of it."""
    tensor = aligned_array(mib, PIECE // 4)
    tensor[:] = np.random.default_rng(0).random(tensor.shape, np.float32)
    again = aligned_array(*tensor.shape)
    async with rawaio.open(path, "x+", direct="prefer") as file:
        begin = time.perf_counter()
        await offload(file, tensor)
        written = time.perf_counter()
        await load(file, again)
        loaded = time.perf_counter()
        if not np.array_equal(tensor, again):
            raise ValueError("what was read is not what was written")
        return (
            f"{file!r}\n"
            f"{mib} MiB out: {mib / (written - begin):,.0f} MiB/s; "
            f"back: {mib / (loaded - written):,.0f} MiB/s\n"
            "the arrays are equal"
        )


def main() -> int:
    """Run it on a file, and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", type=Path, help="of the file, which must not exist yet")
    parser.add_argument("--mib", type=int, default=64, help="size of the array; default 64")
    arguments = parser.parse_args()
    if arguments.mib < 1:
        parser.error("--mib must be 1 at least")
    if arguments.path is not None:
        print(asyncio.run(run(arguments.path, arguments.mib)))
        return 0
    with tempfile.TemporaryDirectory(dir=".", prefix="tensor-offload-") as folder:
        print(asyncio.run(run(Path(folder, "tensor"), arguments.mib)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

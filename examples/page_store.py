"""Pages of 4 KiB by key, in one file: what a database or a cache begins with.

    python3 examples/page_store.py [--path P] [--pages N]

Writes N pages, opens the file again, finds them, and reads them in random order, 64 at a time,
each checked. Without --path the file is a temporary one in the current directory; with it, it must
not exist yet, and stays.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

# A plain checkout is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rawaio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

PAGE: Final = 4096
DEPTH: Final = 64
# In front of each page: its key, and the checksum of key and payload. All zeroes: no page.
_HEADER: Final = struct.Struct("<QI")
PAYLOAD: Final = PAGE - _HEADER.size


class DamagedPageError(Exception):
    """What stands in the file is not what was put there."""


class PageStore:
    """Pages by key. Which page is where is kept in memory, and read from the file at the start.

    A page is written in one piece, where it was before or at the end. One that a crash cut in two
    is told by its checksum.
    """

    def __init__(self, file: rawaio.File) -> None:
        """For a new file; `load` is for others."""
        self._file = file
        self._places: dict[int, int] = {}
        self._nr_places = 0

    @classmethod
    async def load(cls, file: rawaio.File) -> Self:
        """Look at every page of a file."""
        store = cls(file)
        async for chunk in file.stream(chunk_size=256 * PAGE):
            for start in range(0, len(chunk) - PAGE + 1, PAGE):
                key, checksum = _HEADER.unpack_from(chunk, start)
                if checksum:
                    store._places[key] = store._nr_places
                store._nr_places += 1
        return store

    def __len__(self) -> int:
        """How many pages there are."""
        return len(self._places)

    async def get(self, key: int) -> bytes:
        """The page put there last.

        Raises:
            KeyError: there is none.
            DamagedPageError, OSError.
        """
        page = await self._file.pread(PAGE, PAGE * self._places[key])
        payload = page[_HEADER.size :]
        if len(page) < PAGE or _HEADER.unpack_from(page) != (key, _checksum(key, payload)):
            raise DamagedPageError(f"page {key}")
        return payload

    async def put(self, key: int, payload: bytes) -> None:
        """Write a page of `PAYLOAD` bytes; on stable storage after `sync`.

        Raises:
            ValueError: another length.
            OSError: of pwrite(2).
        """
        if len(payload) != PAYLOAD:
            raise ValueError(f"a page has {PAYLOAD} bytes, not {len(payload)}")
        place = self._places.get(key)
        if place is None:
            # Before the first await: no two tasks have the same place.
            place = self._places[key] = self._nr_places
            self._nr_places += 1
        page = rawaio.aligned_buffer(PAGE)
        _HEADER.pack_into(page, 0, key, _checksum(key, payload))
        page[_HEADER.size :] = payload
        await self._file.pwrite(page, PAGE * place)

    async def sync(self) -> None:
        """Have what was put on stable storage."""
        await self._file.fdatasync()


def _checksum(key: int, payload: bytes) -> int:
    return zlib.crc32(payload, key & 0xFFFFFFFF) or 1


async def each(
    keys: Iterable[int], depth: int, function: Callable[[int], Awaitable[object]]
) -> None:
    """Call a function with every key, depth of them at a time."""
    source = iter(keys)

    async def work() -> None:
        for key in source:
            await function(key)

    async with asyncio.TaskGroup() as group:
        for _ in range(depth):
            group.create_task(work())


async def run(path: Path, nr_pages: int) -> str:
    """Write, find and read pages; what came out of it."""

    def payload(key: int) -> bytes:
        return random.Random(key).randbytes(PAYLOAD)

    async def check(key: int) -> None:
        if await store.get(key) != payloads[key]:
            raise DamagedPageError(f"page {key} is another one")

    payloads = [payload(key) for key in range(nr_pages)]
    async with rawaio.open(path, "x+", direct="prefer") as file:
        store = PageStore(file)
        begin = time.perf_counter()
        await each(range(nr_pages), DEPTH, lambda key: store.put(key, payloads[key]))
        await store.sync()
        write_s = time.perf_counter() - begin
    async with rawaio.open(path, direct="prefer") as file:
        store = await PageStore.load(file)
        if len(store) != nr_pages:
            raise DamagedPageError(f"{len(store)} pages instead of {nr_pages}")
        order = random.Random(0).choices(range(nr_pages), k=4 * nr_pages)
        begin = time.perf_counter()
        await each(order, DEPTH, check)
        read_s = time.perf_counter() - begin
        return (
            f"{file!r}\n"
            f"{nr_pages} pages written and synced: {nr_pages / write_s:,.0f} a second\n"
            f"{len(order)} random reads, {DEPTH} at a time: {len(order) / read_s:,.0f} a second\n"
            "every page is as it was written"
        )


def main() -> int:
    """Run it on a file, and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", type=Path, help="of the file, which must not exist yet")
    parser.add_argument("--pages", type=int, default=4096, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.pages < 1:
        parser.error("--pages must be 1 at least")
    if arguments.path is not None:
        print(asyncio.run(run(arguments.path, arguments.pages)))
        return 0
    with tempfile.TemporaryDirectory(dir=".", prefix="page-store-") as folder:
        print(asyncio.run(run(Path(folder, "pages"), arguments.pages)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Reads and writes of one file, so many at a time, for so many seconds.

- IOContext: a window of requests; what has completed is submitted again at once, as a batch;
- IOContext, polling: the same, looking for completions for up to 200 us before sleeping;
- IOContext, bulk: IOContext.pread_many and pwrite_many, again and again, with as few system calls
  as there may be;
- IOContext, bulk, portions: the same, submitted an eighth of the depth at a time;
- IOContext, bulk, polling: the same, looking for completions for up to 200 us before sleeping;
- File.pread, File.preadinto, File.pwrite: that many tasks, each one after another; "polling", on
  rawaio's polling loop;
- File.pread_many, File.pwrite_many: the same in one task, at the depth of a loop;
- File.stream: chunks of the file from its beginning, again and again;
- threads: that many, each of which calls os.preadv or os.pwritev in a loop.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import stat
import threading
import time
from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import rawaio
from benchmarks import files
from benchmarks.programs.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from rawaio.polling import PollingRule

__all__ = ["POLLING", "WAYS", "Job", "check", "run"]

POLLING: Final = ", polling"
# What a character device is read of: as much as a small file has.
_DEVICE_NBYTES: Final = 64 << 20
_OFFSETS: Final = 1 << 16
# Of a bulk call: much more operations than any depth, so that the queue is full most of the time,
# and no more memory than this.
_BULK: Final = 4096
_BULK_OF_DEPTH: Final = 128
_BULK_NBYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Job:
    """What is done."""

    path: Path
    depth: int
    seconds: float
    nbytes: int = files.BLOCK
    writes: bool = False
    direct: bool = True
    sequential: bool = False
    latency: bool = False
    least: int = 1  # operations of each worker
    per_call: int = 0  # operations of a bulk call; 0: as many as make sense

    def places(self) -> array[int]:
        """Offsets, in the order in which they are used."""
        found = self.path.stat()
        size = found.st_size if stat.S_ISREG(found.st_mode) else _DEVICE_NBYTES
        if self.sequential:
            return array("q", range(0, size - self.nbytes + 1, self.nbytes))
        return array("q", files.random_offsets(size, _OFFSETS, self.nbytes))

    def offsets(self) -> Iterator[int]:
        """The same, for ever."""
        return cycle(self.places())

    def calls(self) -> Iterator[memoryview]:
        """The same, for ever, in columns for bulk calls."""
        places = memoryview(self.places())
        most = _BULK_NBYTES // self.nbytes
        per_call = self.per_call or min(_BULK, _BULK_OF_DEPTH * self.depth)
        step = min(per_call, most, len(places))
        return cycle([places[i : i + step] for i in range(0, len(places) - step + 1, step)])

    def buffer(self, n: int = 1) -> memoryview:
        """Memory for n operations, and it is there: fio fills its buffers beforehand, too."""
        memory = rawaio.aligned_buffer(self.nbytes * n)
        memory[:: files.BLOCK] = bytes(-(-len(memory) // files.BLOCK))
        return memory

    def check(self, nbytes: int) -> None:
        """Refuse a short transfer, by OSError."""
        check(nbytes, self.nbytes)

    @contextmanager
    def opened(self) -> Generator[int]:
        """The file's descriptor."""
        flags = (os.O_RDWR if self.writes else os.O_RDONLY) | os.O_DIRECT * self.direct
        fd = os.open(self.path, flags | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def file(self) -> rawaio.file.Opening:
        """The file, to be entered."""
        return rawaio.open(
            self.path, "r+" if self.writes else "r", direct=self.direct, engine="aio"
        )


def check(nbytes: int, wanted: int) -> None:
    if nbytes != wanted:
        raise OSError(f"{nbytes} bytes instead of {wanted}")


# -- contexts ------------------------------------------------------------------------------------


def context_window(job: Job, watch: Watch, *, rule: PollingRule | None = None) -> None:
    depth, offsets = job.depth, job.offsets()
    make = rawaio.Request.pwrite if job.writes else rawaio.Request.pread
    with job.opened() as fd, rawaio.IOContext(depth, max_batch=depth, polling=rule) as context:
        requests = [make(fd, job.buffer(), next(offsets)) for _ in range(depth)]
        began_s = {id(request): 0.0 for request in requests}
        submit, reap, clock = context.submit, context.reap, time.perf_counter
        wanted, latency = job.nbytes, job.latency
        with watch.running():
            while True:
                if latency:
                    began_s.update(dict.fromkeys(map(id, requests), clock()))
                submit(*requests)
                completions = reap(1)
                watch.operations += len(completions)
                if latency:
                    now = clock()
                    watch.latencies_s += [now - began_s[id(each.request)] for each in completions]
                requests.clear()
                for request, res, _ in completions:
                    if res != wanted:
                        check(res, wanted)
                    request.offset = next(offsets)
                    requests.append(request)
                if clock() >= watch.end:
                    break
            watch.operations += len(context.drain())


def context_polling(job: Job, watch: Watch) -> None:
    context_window(job, watch, rule=files.polling_rule())


def context_bulk(
    job: Job, watch: Watch, *, parts: int = 1, rule: PollingRule | None = None
) -> None:
    depth, calls = job.depth, job.calls()
    n = len(next(calls))
    memory = job.buffer(n)
    portion = max(depth // parts, 2)  # two are passed on by io_submit without waiting for others
    made = rawaio.IOContext(depth, max_batch=portion, polling=rule)
    with job.opened() as fd, made as context, watch.running():
        while not watch.is_over():
            if job.writes:
                context.pwrite_many(fd, next(calls), memory, job.nbytes)
            else:
                context.pread_many(fd, next(calls), job.nbytes, memory)
            watch.operations += n


def context_bulk_polling(job: Job, watch: Watch) -> None:
    context_bulk(job, watch, parts=8, rule=files.polling_rule())


# -- files ---------------------------------------------------------------------------------------


async def by_tasks(
    job: Job, watch: Watch, work: Callable[[rawaio.File, Iterator[int]], Any]
) -> None:
    """So many tasks, which begin together when all are there."""
    offsets = job.offsets()
    async with job.file() as file:
        gate = asyncio.Event()

        async def task() -> None:
            await gate.wait()
            await work(file, watch.each(offsets))

        tasks = [asyncio.create_task(task()) for _ in range(job.depth)]
        await asyncio.sleep(0)
        with watch.running():
            gate.set()
            await asyncio.gather(*tasks)


async def file_pread(job: Job, watch: Watch) -> None:
    async def work(file: rawaio.File, offsets: Iterator[int]) -> None:
        nbytes = job.nbytes
        for offset in offsets:
            check(len(await file.pread(nbytes, offset)), nbytes)

    await by_tasks(job, watch, work)


async def file_preadinto(job: Job, watch: Watch) -> None:
    async def work(file: rawaio.File, offsets: Iterator[int]) -> None:
        buffer, nbytes = job.buffer(), job.nbytes
        for offset in offsets:
            check(await file.preadinto(buffer, offset), nbytes)

    await by_tasks(job, watch, work)


async def file_pwrite(job: Job, watch: Watch) -> None:
    async def work(file: rawaio.File, offsets: Iterator[int]) -> None:
        buffer, nbytes = job.buffer(), job.nbytes
        for offset in offsets:
            check(await file.pwrite(buffer, offset), nbytes)

    await by_tasks(job, watch, work)


async def file_bulk(job: Job, watch: Watch) -> None:
    calls = job.calls()
    n = len(next(calls))
    memory = job.buffer(n)
    async with job.file() as file:
        with watch.running():
            while not watch.is_over():
                if job.writes:
                    await file.pwrite_many(next(calls), memory, job.nbytes)
                else:
                    await file.pread_many(next(calls), job.nbytes, memory)
                watch.operations += n


async def file_stream(job: Job, watch: Watch) -> None:
    async with job.file() as file:
        with watch.running():
            while not watch.is_over():
                async for chunk in file.stream(chunk_size=job.nbytes, depth=job.depth):
                    job.check(len(chunk))
                    watch.operations += 1
                    if watch.is_over():
                        break


# -- threads -------------------------------------------------------------------------------------


def threads_transfer(job: Job, watch: Watch) -> None:
    transfer = os.pwritev if job.writes else os.preadv
    places = job.places().tolist()
    step = len(places) // job.depth

    def task(offsets: Iterator[int]) -> None:
        buffer = job.buffer()
        for offset in watch.each(offsets):
            job.check(transfer(fd, [buffer], offset))

    with job.opened() as fd:
        threads = [
            threading.Thread(target=task, args=(cycle(places[i * step :] + places[: i * step]),))
            for i in range(job.depth)
        ]
        with watch.running():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()


WAYS: Final[dict[str, Callable[[Job, Watch], Any]]] = {
    "rawaio/IOContext": context_window,
    f"rawaio/IOContext{POLLING}": context_polling,
    "rawaio/IOContext, bulk": context_bulk,
    "rawaio/IOContext, bulk, portions": partial(context_bulk, parts=8),
    f"rawaio/IOContext, bulk{POLLING}": context_bulk_polling,
    "rawaio/File.pread": file_pread,
    f"rawaio/File.pread{POLLING}": file_pread,
    "rawaio/File.preadinto": file_preadinto,
    "rawaio/File.pread_many": file_bulk,
    "rawaio/File.stream": file_stream,
    "rawaio/File.pwrite": file_pwrite,
    "rawaio/File.pwrite_many": file_bulk,
    "threads/os.preadv": threads_transfer,
    "threads/os.pwritev": threads_transfer,
}


def run(way: str, path: str, loop: str, **job: Any) -> dict[str, float]:  # noqa: ANN401
    """Do one of `WAYS`; what it took, by metric. job: what else a `Job` has."""
    what = Job(Path(path), **job)
    watch = Watch(what.seconds, latency=what.latency, least=what.least)
    work = WAYS[way]
    if inspect.iscoroutinefunction(work):

        async def main() -> None:
            await work(what, watch)

        files.run_in_loop(main, "polling" if way.endswith(POLLING) else loop)
    else:
        work(what, watch)
    return watch.figures(what.nbytes)

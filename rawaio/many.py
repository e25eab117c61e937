"""L3: many operations of one size on one file, under an event loop.

First all of them by a `bulk` lane, with RWF_NOWAIT, a window at a time whenever the lane's eventfd
is readable. Then, one by one, those that were not whole: what would have blocked, and what was
short, by threads, many to a call; what is not aligned on a direct file, as any single operation. So
each means the same as the single call, and what is still not whole then is in the `BulkError`.

It is done in sections of `_SECTION` operations, so that what is remembered of them stays small
however many there are.
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from .blocking import read_whole, write_whole
from .bulk import Bulk, BulkLane
from .errors import BulkError, written
from .memory import pin_source
from .operation import Operation, Phase
from .syscalls import Opcode
from .transfer import LOST, FileCall, FileSide, Patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .driver import Driver
    from .rangelock import Hold, RangeLock

__all__ = ["BulkOperation", "Lanes", "ManySide", "lanes_of", "transfer_many"]

# What the kernel says of an operation that another way may do.
_AGAIN: Final = frozenset({errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL})
_MAX_WINDOW: Final = 1024
_SECTION: Final = 16384
# What one turn of the loop starts of it, in bytes and in windows.
_TURN_BYTES: Final = 4 << 20
_TURN_WINDOWS: Final = 4
# Operations, and bytes, in one call to a thread; and how many such calls there are at a time.
_CHUNK: Final = 64
_CHUNK_BYTES: Final = 4 << 20
_CHUNKS: Final = 8
_RETRY_S: Final = 0.001


class BulkOperation(Operation):
    """One job on one lane."""

    __slots__ = ("job", "lane", "most", "wakes")

    def __init__(self, driver: Driver, lane: BulkLane, job: Bulk) -> None:
        super().__init__(driver)
        self.lane = lane
        self.job = job
        self.most = max(_TURN_BYTES // job.nbytes, 1)
        #: Seconds after which to step although the eventfd is not set; None: it is, or will be.
        self.wakes: float | None = None

    def begin(self) -> None:
        """Start it."""
        self.lane.begin(self.job)
        self.phase = Phase.STARTED
        self.step()

    def step(self) -> bool:
        """Collect and submit; whether it is over. To be called when the lane's eventfd is set."""
        lane, job = self.lane, self.job
        collected = lane.collect()
        submitted = 0
        for _ in range(_TURN_WINDOWS):
            n = lane.submit(self.most - submitted)
            if not n:
                break
            submitted += n
            collected += lane.collect()
        self.wakes = None
        if job.finished == job.total:
            lane.end()
            self.finish(None)
            return True
        if not job.in_flight and not collected:
            # All were refused at once; or EAGAIN: the kernel is short of what nobody gives back.
            self.wakes = 0 if submitted else _RETRY_S
        return False

    def cancelled(self) -> None:
        """Start no more of it."""
        self.job.total = self.job.next


class Lanes:
    """The lanes of one driver: one for each job at a time, used again and again."""

    def __init__(self, driver: Driver) -> None:
        self._driver = weakref.ref(driver)
        self._owned = driver.owned
        self._lanes: dict[BulkLane, BulkOperation | None] = {}

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return any(operation is not None for operation in self._lanes.values())

    def start(self, job: Bulk) -> BulkOperation:
        """Begin a job; await the operation's waiter, by `Driver.settle`.

        Raises:
            OSError: io_setup's, with advice.
        """
        driver = self._driver()
        assert driver is not None
        lane = next((lane for lane, user in self._lanes.items() if user is None), None)
        if lane is None:
            lane = BulkLane(min(driver.nr_events, _MAX_WINDOW), signals=True)
            self._owned.append(lane)
            self._watch(driver, lane)
        operation = BulkOperation(driver, lane, job)
        self._lanes[lane] = operation
        try:
            operation.begin()
        except Exception as error:  # noqa: BLE001 - its task has to know
            self._broken(driver, lane, operation, error)
        else:
            self._after(driver, lane, operation)
        return operation

    def _watch(self, driver: Driver, lane: BulkLane) -> None:
        driver._watch(lane.eventfd, partial(self._on_readable, lane))

    def _on_readable(self, lane: BulkLane) -> None:
        lane.reset()
        self._step(lane)

    def _step(self, lane: BulkLane) -> None:
        driver, operation = self._driver(), self._lanes.get(lane)
        if driver is not None and operation is not None:
            try:
                operation.step()
            except Exception as error:  # noqa: BLE001 - its task has to know
                self._broken(driver, lane, operation, error)
            else:
                self._after(driver, lane, operation)

    def _broken(
        self, driver: Driver, lane: BulkLane, operation: BulkOperation, error: Exception
    ) -> None:
        """Give up a lane; its job fails when the kernel has nothing of it any more."""
        del self._lanes[lane]
        driver._unwatch(lane.eventfd)

        def close() -> None:
            lane.close()
            driver._call_threadsafe(partial(operation.fail, error))

        driver.dispose(close)

    def _after(self, driver: Driver, lane: BulkLane, operation: BulkOperation) -> None:
        if operation.phase == Phase.FINISHED:
            self._lanes[lane] = None
            driver._ended()
        elif operation.wakes is not None:
            driver._call_later(operation.wakes, partial(self._step, lane))

    def move(self, driver: Driver) -> None:
        """The driver is attached to a loop: watch there."""
        for lane in self._lanes:
            if lane.closed:
                continue
            self._watch(driver, lane)
            driver._call_later(0, partial(self._on_readable, lane))

    def leave(self, driver: Driver) -> None:
        """The driver leaves its loop."""
        for lane in self._lanes:
            if not lane.closed:
                driver._unwatch(lane.eventfd)


def lanes_of(driver: Driver) -> Lanes:
    """The driver's lanes; made at the first call."""
    if driver.lanes is None:
        driver.lanes = Lanes(driver)
    assert isinstance(driver.lanes, Lanes)
    return driver.lanes


# -- a file's part -------------------------------------------------------------------------------


class ManySide(FileSide, Protocol):
    """What many operations of a file need of it."""

    @property
    def direct(self) -> bool:
        """Whether it goes past the page cache."""
        ...

    @property
    def engine(self) -> str:
        """Whether there is native AIO: "aio"."""
        ...

    def is_aligned(self, address: int, bits: int = 0) -> bool:
        """Whether direct I/O takes an address, and lengths and offsets or-ed together."""
        ...

    async def hold(self, lock: RangeLock, start: int, stop: int, *, exclusive: bool = True) -> Hold:
        """Wait for a range."""
        ...

    async def hold_cached(self, start: int, stop: int) -> Hold:
        """Wait for a range to be written through the page cache."""
        ...

    async def read_direct(self, view: memoryview, offset: int) -> int:
        """Read a direct file, whatever is aligned or not."""
        ...

    async def write_direct(self, view: memoryview, offset: int, flags: int) -> None:
        """Write a direct file, whatever is aligned or not."""
        ...


async def transfer_many(
    file: ManySide, opcode: Opcode, offsets: memoryview, nbytes: int, memory: memoryview
) -> None:
    """Do all the operations, of a file that is known to be open and in the right mode.

    Raises:
        BulkError: some were short or failed; all ran to their end.
    """
    results: dict[int, tuple[int, int]] = {}
    patience = Patience()
    for first in range(0, len(offsets), _SECTION):
        count = min(_SECTION, len(offsets) - first)
        section = _Section(
            file,
            opcode,
            offsets[first : first + count],
            nbytes,
            memory[first * nbytes : (first + count) * nbytes],
        )
        await section.run(patience)
        for i, result in section.results.items():
            results[first + i] = result
    if results:
        error = BulkError(results, len(offsets), nbytes)
        error.add_note(f"of {file!r}")
        try:
            raise error
        finally:
            del error, memory  # its traceback has this frame


class _Section:
    """So many operations as are remembered one by one."""

    def __init__(
        self,
        file: ManySide,
        opcode: Opcode,
        offsets: memoryview,
        nbytes: int,
        memory: memoryview,
    ) -> None:
        self.file = file
        self.opcode = opcode
        self.offsets = offsets
        self.nbytes = nbytes
        self.memory = memory
        self.address = pin_source(memory).address
        #: errno and bytes, of those that were not whole.
        self.results: dict[int, tuple[int, int]] = {}

    async def run(self, patience: Patience) -> None:
        """Do them all. patience: with RWF_NOWAIT, from one section to the next."""
        ragged: list[int] = []
        if self.opcode is Opcode.PREAD:
            await self._aligned(patience, ragged)
        else:
            first, last = min(self.offsets), max(self.offsets) + self.nbytes
            lock = self.file.lock
            if self.file.direct:
                hold = await self.file.hold(lock, first, last, exclusive=False)
            else:
                hold = await self.file.hold_cached(first, last)
            try:
                await self._aligned(patience, ragged)
            finally:
                lock.release(hold)
        for i in ragged:
            await self._single(i)

    async def _aligned(self, patience: Patience, ragged: list[int]) -> None:
        """Do all but those that are not aligned, which are added to ragged."""
        file = self.file
        todo: Sequence[int] = range(len(self.offsets))
        if (
            file.nowait_flag
            and file.engine == "aio"
            and not patience.lost()
            and not (file.direct and not file.is_aligned(self.address, self.nbytes))
        ):
            job = Bulk(
                self.opcode,
                file.descriptor,
                self.offsets,
                self.nbytes,
                self.memory,
                rw_flags=file.nowait_flag,
            )
            await file.driver.settle(lanes_of(file.driver).start(job))
            # As good as always refused, or worth another try.
            patience.refused = LOST if len(job.failures) > job.total // 2 else 0
            todo = self._unfinished(job)
        await self._by_threads(todo, ragged)

    def _unfinished(self, job: Bulk) -> list[int]:
        """Which operations are to be tried in another way; the others failed for good."""
        todo: list[int] = []
        for i in sorted(job.failures):
            res = job.failures[i]
            if res >= 0 or -res in _AGAIN:
                todo.append(i)
            else:
                self.results[i] = -res, 0
        return todo

    async def _by_threads(self, todo: Sequence[int], ragged: list[int]) -> None:
        file, nbytes = self.file, self.nbytes
        size = max(min(_CHUNK, _CHUNK_BYTES // nbytes), 1)
        indexes: list[int] = []
        ahead: deque[FileCall] = deque()
        try:
            for i in todo:
                bits = nbytes | self.offsets[i]
                if file.direct and not file.is_aligned(self.address + i * nbytes, bits):
                    ragged.append(i)
                    continue
                indexes.append(i)
                if len(indexes) == size:
                    if len(ahead) == _CHUNKS:
                        await self._ended(ahead)
                    self._begin(ahead, indexes)
                    indexes = []
            if indexes:
                self._begin(ahead, indexes)
            while ahead:
                await self._ended(ahead)
        except GeneratorExit:
            raise
        except BaseException:
            # The memory is not the caller's again before they have ended.
            for call in ahead:
                if not call.withdraw():
                    try:
                        await file.driver.settle(call)
                    except BaseException:  # noqa: BLE001 - the first one is raised
                        pass
            raise

    def _begin(self, ahead: deque[FileCall], indexes: list[int]) -> None:
        call = FileCall(self.file, partial(self._in_thread, indexes))
        call.begin()
        ahead.append(call)

    async def _ended(self, ahead: deque[FileCall]) -> None:
        self.results.update(await self.file.driver.settle(ahead[0]))
        ahead.popleft()

    def _in_thread(self, indexes: list[int]) -> dict[int, tuple[int, int]]:
        results: dict[int, tuple[int, int]] = {}
        for i in indexes:
            view = self.memory[i * self.nbytes : (i + 1) * self.nbytes]
            code = 0
            try:
                if self.opcode is Opcode.PREAD:
                    n = read_whole(self.file.descriptor, [view], self.offsets[i])
                else:
                    write_whole(self.file.descriptor, [view], self.offsets[i], 0)
                    n = self.nbytes
            except OSError as error:
                code, n = error.errno or errno.EIO, written(error)
            if n != self.nbytes:
                results[i] = code, n
        return results

    async def _single(self, i: int) -> None:
        view = self.memory[i * self.nbytes : (i + 1) * self.nbytes]
        code = 0
        try:
            if self.opcode is Opcode.PREAD:
                n = await self.file.read_direct(view, self.offsets[i])
            else:
                await self.file.write_direct(view, self.offsets[i], 0)
                n = self.nbytes
        except OSError as error:
            code, n = error.errno or errno.EIO, written(error)
        if n != self.nbytes:
            self.results[i] = code, n

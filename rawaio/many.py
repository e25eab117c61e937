"""L3: many operations on one file, under an event loop.

First all of them by a `bulk` lane, with RWF_NOWAIT, a window at a time: what has not completed when
it was submitted, whenever the lane's eventfd is readable. (Of the page cache everything has, so
nobody sets an eventfd; what is in flight all the same is looked for each millisecond.) Then, one by
one, those that were not whole: what would have blocked, and what was short, by threads, many to a
call; what is not aligned on a direct file, as any single operation. So each means the same as the
single call, and what is still not whole then is in the `BulkError`.

It is done in sections of `_SECTION` operations, so that what is remembered of them stays small
however many there are.

A lane that anything was raised in is of no other use: it is closed, and its job fails when the
kernel has nothing of it any more.
"""

from __future__ import annotations

import errno
import weakref
from collections import deque
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Final, Protocol

from .blocking import read_whole, write_whole
from .bulk import Bulk, BulkLane
from .errors import BulkError, RawAIOError, written
from .operation import Operation, Phase
from .syscalls import Opcode
from .transfer import LOST, BouncedRead, FileCall, FileSide, Patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .driver import Driver
    from .pieces import Pieces
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
# One of the driver's credits is for so many operations that completed at once, and so many bytes.
_CREDIT: Final = 2
_CREDIT_BYTES: Final = 1 << 14
# Reads that are not aligned, at a time; and how long one is that has a buffer to itself.
_RAGGED: Final = 32
_RAGGED_BYTES: Final = 1 << 17


class BulkOperation(Operation):
    """One job on one lane."""

    __slots__ = ("job", "lane", "most", "wakes")

    def __init__(self, driver: Driver, lane: BulkLane, job: Bulk) -> None:
        super().__init__(driver)
        self.lane = lane
        self.job = job
        # Of several lengths, as many as there would be of their mean.
        self.most = max(_TURN_BYTES * job.total // max(job.pieces.total, 1), 1)
        #: Seconds after which to step although the eventfd is not set; None: it is, or will be.
        self.wakes: float | None = None

    def begin(self) -> None:
        """Start it."""
        self.lane.begin(self.job)
        self.phase = Phase.STARTED
        self.step()

    def step(self) -> bool:
        """Collect and submit; whether it is over.

        To be called when the lane's eventfd is set, and `wakes` seconds after the last time.
        """
        lane, job = self.lane, self.job
        if job.next != job.finished:
            lane.collect()  # what the eventfd told of, which was reset since
        collected = submitted = 0
        for _ in range(_TURN_WINDOWS):
            n = lane.submit(self.most - submitted)
            if not n:
                break
            submitted += n
            collected += lane.collect()
            if job.next == job.total:
                break
        self.wakes = None
        if job.finished == job.total:
            lane.end()
            self.finish(None)
            return True
        if not job.signals:
            # Nothing sets the eventfd. What is in flight all the same is looked for.
            self.wakes = 0 if submitted or collected else _RETRY_S
        elif not job.in_flight and not collected:
            # Nothing will set it. All were refused at once; or EAGAIN: the kernel is short of what
            # nobody gives back.
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
            # Made at the first call, and for each that is under way beside others.
            lane = BulkLane(min(driver.nr_events, _MAX_WINDOW), signals=True)
            self._owned.append(lane)
            self._watch(driver, lane)
        operation = BulkOperation(driver, lane, job)
        try:
            self._lanes[lane] = operation
            operation.begin()
            self._after(driver, lane, operation)
        except Exception as error:  # noqa: BLE001 - its task has to know
            self._broken(driver, lane, operation, error)
        except BaseException:
            # Who waits is about to be told, and may use the memory then.
            self._give_up(driver, lane)
            lane.close()
            raise
        return operation

    def abort(self, job: Bulk) -> None:
        """Nobody waits for a job, and its memory is about to be used. Can block: 30 ms and more."""
        driver = self._driver()
        assert driver is not None
        for lane, operation in list(self._lanes.items()):
            if operation is not None and operation.job is job:
                self._give_up(driver, lane)
                lane.close()

    def _watch(self, driver: Driver, lane: BulkLane) -> None:
        driver._watch(lane.eventfd, partial(self._on_readable, lane), lane)

    def _on_readable(self, lane: BulkLane) -> None:
        self._step(lane, reset=True)

    def _step(self, lane: BulkLane, *, reset: bool = False) -> None:
        driver = operation = None
        try:
            driver, operation = self._driver(), self._lanes.get(lane)
            if driver is None or driver._is_stale():
                return  # `move` does everything
            if reset:
                lane.reset()
            if operation is not None:
                operation.step()
                self._after(driver, lane, operation)
        except BaseException as error:
            driver, operation = self._driver(), self._lanes.get(lane)
            if driver is not None:
                self._broken(driver, lane, operation, error)
            if not isinstance(error, Exception):
                raise

    def _give_up(self, driver: Driver, lane: BulkLane) -> None:
        self._lanes.pop(lane, None)
        driver._unwatch(lane.eventfd)

    def _broken(
        self,
        driver: Driver,
        lane: BulkLane,
        operation: BulkOperation | None,
        error: BaseException,
    ) -> None:
        """Give up a lane; its job fails when the kernel has nothing of it any more."""
        self._give_up(driver, lane)
        failure: Exception
        if isinstance(error, Exception):
            failure = error
        else:
            # That one is raised out of the loop, and not a second time in the task.
            failure = RawAIOError(f"many operations were cut short by {type(error).__name__}")

        # A thread may remember what it has called, and is not to keep the caller's memory so.
        ends = [] if operation is None else [partial(operation.fail, failure)]

        def close() -> None:
            lane.close()
            if ends:
                driver._call_threadsafe(ends.pop())

        driver.dispose(close)

    def _after(self, driver: Driver, lane: BulkLane, operation: BulkOperation) -> None:
        if operation.phase == Phase.FINISHED:
            self._lanes[lane] = None
            driver._ended()
        elif operation.wakes == 0:
            lane.nudge()
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

    async def write_direct(self, view: memoryview, offset: int, flags: int) -> None:
        """Write a direct file, whatever is aligned or not."""
        ...

    #: Whether what is cached can be read, and written, at once.
    _reads_cached: bool
    _writes_cached: bool

    async def read_direct(self, view: memoryview, offset: int) -> int:
        """Read a direct file, whatever is aligned or not."""
        ...


async def transfer_many(file: ManySide, opcode: Opcode, pieces: Pieces) -> None:
    """Do all the operations, of a file that is known to be open and in the right mode.

    Raises:
        BulkError: some were short or failed; all ran to their end.
    """
    total = len(pieces.offsets)
    patience = Patience()
    if total <= _SECTION:
        results = await _Section(file, opcode, pieces).run(patience)
    else:
        results = {}
        for first in range(0, total, _SECTION):
            part = pieces.part(first, min(_SECTION, total - first))
            for i, result in (await _Section(file, opcode, part).run(patience)).items():
                results[first + i] = result
    if results:
        error = BulkError(results, total, pieces.nbytes)
        error.add_note(f"of {file!r}")
        try:
            raise error
        finally:
            del error, pieces  # its traceback has this frame


def _or(numbers: Sequence[int]) -> int:
    """The bits that are in any of them."""
    return reduce(int.__or__, numbers)


class _Section:
    """So many operations as are remembered one by one."""

    __slots__ = ("file", "offsets", "opcode", "pieces", "reading", "results")

    def __init__(self, file: ManySide, opcode: Opcode, pieces: Pieces) -> None:
        self.file = file
        self.opcode = opcode
        self.reading = opcode is Opcode.PREAD
        self.pieces = pieces
        self.offsets = pieces.offsets
        #: errno and bytes, of those that were not whole.
        self.results: dict[int, tuple[int, int]] = {}

    async def run(self, patience: Patience) -> dict[int, tuple[int, int]]:
        """Do them all; errno and bytes of those that are not whole.

        patience: with RWF_NOWAIT, from one section to the next.
        """
        if self.reading:
            todo = await self._by_lane(patience)
            if todo:
                await self._read_ragged(await self._by_threads(todo))
            return self.results
        first, last = min(self.offsets), self._end()
        lock = self.file.lock
        if self.file.direct:
            hold = await self.file.hold(lock, first, last, exclusive=False)
        else:
            hold = await self.file.hold_cached(first, last)
        try:
            todo = await self._by_lane(patience)
            ragged = await self._by_threads(todo) if todo else []
        finally:
            lock.release(hold)
        for i in ragged:
            await self._single(i)
        return self.results

    def _end(self) -> int:
        """Where the last of them ends in the file."""
        lengths = self.pieces.lengths
        if lengths is None:
            return max(self.offsets) + self.pieces.length(0)
        end: int = max(map(add, self.offsets, lengths))
        return end

    # -- on a lane ------------------------------------------------------------------------------

    async def _by_lane(self, patience: Patience) -> Sequence[int]:
        """All that can be had without waiting; the others are to be done in another way."""
        file = self.file
        if (
            not file.nowait_flag
            or file.engine != "aio"
            or patience.lost()
            or (self._mostly_ragged() if file.direct else not self._asks())
        ):
            return range(len(self.offsets))
        driver = file.driver
        if driver.credit <= 0:
            await driver.breathe()
        job = Bulk(
            self.opcode,
            file.descriptor,
            self.pieces,
            rw_flags=file.nowait_flag,
            # The page cache answers at once, or with EAGAIN: nothing is left to be told of.
            signals=file.direct,
        )
        lanes = lanes_of(driver)
        try:
            operation = lanes.start(job)
            if operation.phase == Phase.FINISHED:
                # Nothing was waited for: others are to have their turn all the same.
                driver.credit -= 1 + job.total // _CREDIT + self.pieces.total // _CREDIT_BYTES
            await driver.settle(operation)  # also for its error
        except GeneratorExit:
            raise
        except BaseException:
            if job.finished != job.total:  # as it is when it is settled
                lanes.abort(job)
            raise
        failures = job.failures
        # As good as always refused, or worth another try.
        patience.refused = LOST if len(failures) > job.total // 2 else 0
        return self._unfinished(failures) if failures else ()

    def _asks(self) -> bool:
        """Whether the file system was not found to refuse RWF_NOWAIT."""
        return self.file._reads_cached if self.reading else self.file._writes_cached

    def _mostly_ragged(self) -> bool:
        """Whether memory and lengths are such that the kernel would refuse most of them."""
        file, pieces = self.file, self.pieces
        lengths = pieces.lengths
        if lengths is None:
            return not file.is_aligned(pieces.address, pieces.length(0))
        addresses = pieces.part(0, len(lengths)).addresses
        if file.is_aligned(_or(addresses), _or(lengths)):
            return False
        aligned = sum(map(file.is_aligned, addresses, lengths))
        return aligned <= len(lengths) // 2

    def _unfinished(self, failures: dict[int, int]) -> list[int]:
        """Which operations are to be tried in another way; the others failed for good."""
        todo: list[int] = []
        for i in sorted(failures):
            res = failures[i]
            if res == -errno.EOPNOTSUPP and not self.file.direct:
                # As a single call remembers it.
                if self.reading:
                    self.file._reads_cached = False
                else:
                    self.file._writes_cached = False
            if res >= 0 or -res in _AGAIN:
                todo.append(i)
            else:
                self.results[i] = -res, 0
        return todo

    # -- in threads -----------------------------------------------------------------------------

    async def _by_threads(self, todo: Sequence[int]) -> list[int]:
        """Do all but those that are not aligned, which are returned."""
        file = self.file
        self.pieces = pieces = self.pieces.part(0, len(self.offsets))
        ragged: list[int] = []
        addresses = pieces.addresses
        indexes: list[int] = []
        size = 0
        ahead: deque[FileCall] = deque()
        try:
            for i in todo:
                length = pieces.length(i)
                if not length:
                    continue  # whole, wherever it is
                if file.direct and not file.is_aligned(addresses[i], length | self.offsets[i]):
                    ragged.append(i)
                    continue
                indexes.append(i)
                size += length
                if len(indexes) == _CHUNK or size >= _CHUNK_BYTES:
                    await self._begin(ahead, indexes)
                    indexes, size = [], 0
            if indexes:
                await self._begin(ahead, indexes)
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
        return ragged

    async def _begin(self, ahead: deque[FileCall], indexes: list[int]) -> None:
        if len(ahead) == _CHUNKS:
            await self._ended(ahead)
        call = FileCall(self.file, partial(self._in_thread, indexes))
        call.begin()
        ahead.append(call)

    async def _ended(self, ahead: deque[FileCall]) -> None:
        self.results.update(await self.file.driver.settle(ahead[0]))
        ahead.popleft()

    def _in_thread(self, indexes: list[int]) -> dict[int, tuple[int, int]]:
        results: dict[int, tuple[int, int]] = {}
        descriptor = self.file.descriptor
        for i in indexes:
            view, offset, code = self.pieces.view(i), self.offsets[i], 0
            try:
                if self.reading:
                    n = read_whole(descriptor, [view], offset)
                else:
                    write_whole(descriptor, [view], offset, 0)
                    n = len(view)
            except OSError as error:
                code, n = error.errno or errno.EIO, written(error)
                if code == errno.EINVAL and self.reading and offset >= self.file.size:
                    code = 0  # so some file systems say that there is nothing behind the end
            if n != len(view):
                results[i] = code, n
        return results

    # -- what is not aligned --------------------------------------------------------------------

    async def _read_ragged(self, ragged: list[int]) -> None:
        """Some at a time, each through a buffer of its own, if it is not long."""
        ahead: deque[tuple[int, BouncedRead]] = deque()
        try:
            for i in ragged:
                view = self.pieces.view(i)
                if len(view) > _RAGGED_BYTES:
                    await self._single(i)
                    continue
                if len(ahead) == _RAGGED:
                    await self._bounced(ahead)
                ahead.append((i, BouncedRead(self.file, len(view), self.offsets[i], view)))
                ahead[-1][1].begin()
            while ahead:
                await self._bounced(ahead)
        finally:
            # An error has this frame in its traceback: nothing that has the error stays here.
            while ahead:
                ahead[0][1].forget_target()
                self.file.driver.abandon(ahead.popleft()[1])

    async def _bounced(self, ahead: deque[tuple[int, BouncedRead]]) -> None:
        i, wanted, code = ahead[0][0], ahead[0][1].wanted_bytes, 0
        try:
            n: int = await ahead[0][1].waiter
        except OSError as error:
            code, n = error.errno or errno.EIO, written(error)
        ahead.popleft()
        if n != wanted:
            self.results[i] = code, n

    async def _single(self, i: int) -> None:
        view, offset, code = self.pieces.view(i), self.offsets[i], 0
        try:
            if self.reading:
                n = await self.file.read_direct(view, offset)
            else:
                await self.file.write_direct(view, offset, 0)
                n = len(view)
        except OSError as error:
            code, n = error.errno or errno.EIO, written(error)
        if n != len(view):
            self.results[i] = code, n

"""L3: the operations of a file: reads and writes that go on until they are whole, and syncs.

A transfer is one aligned stretch of memory and of the file. It is asked for as a whole; a short
answer is not an error yet:

- less than asked for, of a read: the file may end there; its size says so. Otherwise the rest is
  asked for, from the last block boundary on.
- 0, of a read: the end of the file. 0, of a write: no space.
- EAGAIN: the kernel would have had to wait, which RWF_NOWAIT forbids; a thread does it then. Where
  nothing else comes (btrfs, or a file that grows by each write), threads do it at once: `Patience`.
- EOPNOTSUPP: the file system does not know RWF_NOWAIT; threads do it from now on.
- EINVAL, of a read at or behind the end of the file: also the end, on some file systems.

Each step is computed from the offset of the request that completed, and so may be repeated.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final, Protocol

from .errors import ClosedError, set_written
from .memory import aligned_buffer
from .operation import Call, Operation, Phase
from .request import Request
from .syscalls import RWF

if TYPE_CHECKING:
    from collections.abc import Callable

    from .descriptor import Descriptor
    from .driver import Driver
    from .rangelock import Hold, RangeLock

__all__ = [
    "LOST",
    "MOST",
    "BouncedRead",
    "FileCall",
    "Patience",
    "ReadInto",
    "Slot",
    "Sync",
    "Transfer",
    "Vector",
    "Write",
]

_NOWAIT: Final = int(RWF.NOWAIT)
#: The most bytes in one request: a round number below the kernel's 0x7ffff000.
MOST: Final = 1 << 30


#: So many EAGAINs in a row make one lose patience.
LOST: Final = 8
# So many operations threads do at once before the next try.
_SKIPPED: Final = 64


class Patience:
    """Whether it is worth while to ask for what RWF_NOWAIT may refuse."""

    __slots__ = ("refused",)

    def __init__(self) -> None:
        #: How often it was refused since it was last granted; 0 to be set by who is granted it.
        self.refused = 0

    def lost(self) -> bool:
        """Whether a thread should do the next operation at once."""
        if self.refused < LOST:
            return False
        self.refused += 1
        if self.refused > LOST + _SKIPPED:
            self.refused = LOST - 1
            return False
        return True


class FileSide(Protocol):
    """What the operations of a file need of it."""

    driver: Driver
    descriptor: Descriptor
    #: Bytes: of addresses; and as a mask, of offsets and lengths.
    memory_alignment: int
    mask: int
    #: RWF_NOWAIT or 0, for each request.
    nowait_flag: int
    #: Whether transfers, and syncs, are performed by threads.
    offloads: bool
    syncs_offload: bool
    read_patience: Patience
    write_patience: Patience
    #: How many operations threads have performed.
    threaded: int
    #: What is being written.
    lock: RangeLock
    #: The operations that have not ended.
    under_way: set[object]
    #: How many requests were for the rest of a short transfer.
    continued: int

    @property
    def size(self) -> int:
        """Bytes, now."""
        ...

    @property
    def closed(self) -> bool:
        """Whether nothing new is taken."""
        ...

    def fileno(self) -> int:
        """-1 when the descriptor is closed."""
        ...

    def round_down(self, offset: int) -> int:
        """The last block boundary up to offset."""
        ...

    def take_slot(self, nbytes: int) -> Slot:
        """A buffer of nbytes bytes."""
        ...

    def give_slot(self, slot: Slot) -> None:
        """It is not needed any more."""
        ...

    def no_nowait(self) -> None:
        """The file system does not know RWF_NOWAIT."""
        ...

    def ended(self, operation: object) -> None:
        """It is not under way any more."""
        ...


class Slot:
    """A buffer of rawaio's own, and a request that reads into it, for one use after another."""

    __slots__ = ("buffer", "nbytes", "request")

    def __init__(self, file: FileSide, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffer = aligned_buffer(nbytes, file.memory_alignment)
        self.request = Request.pread(
            file.descriptor, self.buffer[:MOST], 0, rw_flags=file.nowait_flag
        )


class _FileOperation(Operation):
    """An operation of a file, which counts it from its beginning to its end."""

    __slots__ = ("file", "offloaded")

    def __init__(self, file: FileSide, nbytes: int, offloaded: bool) -> None:
        super().__init__(file.driver, nbytes)
        self.file = file
        self.offloaded = offloaded

    def begin(self) -> None:
        """Give it to the driver.

        Raises:
            ClosedError, ForkedError, RuntimeError: it was not taken.
        """
        try:
            self.driver.admit()
            self.file.under_way.add(self)
            self._enqueue()
        except BaseException:
            self.withdraw()
            raise

    def _enqueue(self) -> None:
        """Have it started in its turn."""
        self.phase = Phase.WAITING
        if self.offloaded:
            self.driver.offload(self)
        else:
            self.driver.begin(self)

    def start(self) -> Request | None:
        """See `Operation`."""
        if self.phase >= Phase.FINISHED:
            return None
        if self.waiter.done():  # nobody waits any more, and the kernel has nothing of it
            self.finish(None)
            return None
        if self.file.fileno() < 0:
            raise ClosedError("the file was closed before this operation could start")
        if self.request is None:
            self.request = self._first()
            if self.request is None:
                return None
        self.phase = Phase.STARTED
        return self.request

    def _first(self) -> Request | None:
        """The first request, with its memory; None: not now."""
        raise NotImplementedError

    def _offload(self) -> None:
        """Do the same request again, in a thread."""
        assert self.request is not None
        self.file.threaded += 1
        self.driver.requeue(self, self.request, offloaded=True)

    def released(self) -> None:
        """See `Operation`."""
        self.file.ended(self)


class Transfer(_FileOperation):
    """Bytes between the file and one stretch of memory."""

    __slots__ = ("offset", "patience", "view")

    # What the base classes' do stands here too: three calls, one inside another, cost as much.
    def __init__(self, file: FileSide, nbytes: int, offset: int, patience: Patience) -> None:
        self.driver = driver = file.driver
        self.waiter = driver.waiter()
        self.phase = Phase.WAITING
        self.request = None
        self.nbytes = nbytes
        self.file = file
        self.offloaded = offloaded = file.offloads or (patience.refused > 0 and patience.lost())
        if offloaded:
            file.threaded += 1
        self.patience = patience
        self.offset = offset
        #: The memory; None until there is some.
        self.view: memoryview | None = None

    def _rest(self, done: int) -> Request:
        """A request for what is left."""
        raise NotImplementedError

    def _ended(self, done: int) -> None:
        """The whole was transferred, or, for a read, what there was before the end."""
        raise NotImplementedError

    def completed(self, res: int) -> None:
        """See `Operation`."""
        request = self.request
        if request is None:
            return
        before = request.offset - self.offset
        if res >= 0 and not self.offloaded:
            self.patience.refused = 0
        if res >= 0 and before + res >= self.nbytes:
            self._ended(self.nbytes)
        elif res == -errno.EAGAIN and not self.offloaded:
            self.patience.refused += 1
            self._offload()
        elif res == -errno.EOPNOTSUPP and not self.offloaded and request.rw_flags & _NOWAIT:
            self.file.no_nowait()
            self._offload()
        else:
            self._partly(request, before, res)

    def _partly(self, request: Request, before: int, res: int) -> None:
        raise NotImplementedError

    def _go_on(self, done: int) -> None:
        self.file.continued += 1
        self.driver.requeue(self, self._rest(done), offloaded=self.offloaded)

    def _failed(self, request: Request, failure: int, done: int) -> None:
        error = request.error(failure)
        set_written(error, done)
        error.add_note(f"{done} of {self.nbytes} bytes were transferred, of {self.file!r}")
        self.fail(error)

    def released(self) -> None:
        """See `Operation`."""
        self.view = None
        super().released()


class _Read(Transfer):
    __slots__ = ("_again",)

    def __init__(self, file: FileSide, nbytes: int, offset: int) -> None:
        super().__init__(file, nbytes, offset, file.read_patience)
        # How far the last try came that ended inside of a block.
        self._again = 0

    def _partly(self, request: Request, before: int, res: int) -> None:
        file = self.file
        done = before + max(res, 0)
        if res == -errno.EINVAL and request.offset >= file.size:
            self._ended(done)
        elif res < 0:
            self._failed(request, -res, done)
        elif res == 0 or self.offset + done >= file.size:
            self._ended(done)
        else:
            start = file.round_down(self.offset + done) - self.offset
            if start > before or done > self._again:
                # Also the same block once more: the file may have grown since.
                self._again = done
                self._go_on(start)
            else:  # a file system that serves parts of blocks has to take them too
                self._go_on(done)

    def _rest(self, done: int) -> Request:
        assert self.view is not None
        return Request.pread(
            self.file.descriptor,
            self.view[done : done + MOST],
            self.offset + done,
            rw_flags=self.file.nowait_flag,
        )


class BouncedRead(_Read):
    """Reads the blocks around a stretch of the file into a buffer of rawaio's.

    Gives bytes; with a target, copies there and gives their number. Has no memory until it is
    submitted. Whoever does not wait for it any more may forget it, and the target with it.

    The one operation that there is by the hundred thousand a second: what its base classes do in
    small steps stands here in one piece, for the case that nothing is special.
    """

    __slots__ = ("_head", "_slot", "_tail", "_target")

    def __init__(
        self, file: FileSide, nbytes: int, offset: int, target: memoryview | None = None
    ) -> None:
        self.driver = driver = file.driver
        self.waiter = driver.waiter()
        self.phase = Phase.WAITING
        self.request = None
        self.file = file
        self.patience = patience = file.read_patience
        self.offloaded = offloaded = file.offloads or (patience.refused > 0 and patience.lost())
        if offloaded:
            file.threaded += 1
        self.view = None
        mask = file.mask
        self.offset = start = offset & mask
        self._head = head = offset - start
        self._tail = tail = head + nbytes
        self.nbytes = -(-tail & mask)
        self._target = target
        self._again = 0
        self._slot: Slot | None = None

    def _offload(self) -> None:
        slot = self._slot
        if slot is None or slot.request is not self.request:
            super()._offload()
            return
        # Nothing has been read: what waits for a thread holds no memory.
        self.file.threaded += 1
        self.driver.requeue(self, None, offloaded=True)
        self.view = self._slot = None
        self.file.give_slot(slot)

    def forget_target(self) -> None:
        """Nothing is to be copied any more, and the caller has his memory again."""
        self._target = None

    @property
    def wanted_bytes(self) -> int:
        """How many bytes are asked for."""
        return self._tail - self._head

    def start(self) -> Request | None:
        """See `Operation`."""
        file = self.file
        if self.phase != Phase.WAITING or self.request is not None or file.closed:
            return super().start()
        if self.waiter.done():  # nobody waits any more
            self.finish(None)
            return None
        self._slot = slot = file.take_slot(self.nbytes)
        self.view = slot.buffer
        self.request = request = slot.request
        # Known to be right, and the request not to be under way.
        request._iocb = request._iocb[0], self.offset
        self.phase = Phase.STARTED
        return request

    def _first(self) -> Request:
        self._slot = slot = self.file.take_slot(self.nbytes)
        self.view = slot.buffer
        slot.request.offset = self.offset
        return slot.request

    def completed(self, res: int) -> None:
        """See `Operation`."""
        waiter, slot, file = self.waiter, self._slot, self.file
        if (
            res < self._tail
            or slot is None
            or slot.request is not self.request
            or self._target is not None
            or self.driver.moved
        ):
            super().completed(res)
            return
        if not waiter.done():
            if self._tail == self.nbytes and not self._head:
                waiter.set_result(slot.buffer.tobytes())
            else:
                waiter.set_result(slot.buffer[self._head : self._tail].tobytes())
        if self.patience.refused and not self.offloaded:
            self.patience.refused = 0
        # In this order it may be repeated: a buffer is not given back twice, rather never.
        self.view = self._slot = None
        file.give_slot(slot)
        file.under_way.discard(self)
        if file.closed:
            file.ended(self)
        self.phase = Phase.FINISHED
        self.request = None

    def _ended(self, done: int) -> None:
        if self.waiter.done():
            self.finish(None)
            return
        assert self.view is not None
        part = self.view[self._head : max(min(done, self._tail), self._head)]
        if self._target is None:
            self.finish(part.tobytes())
        else:
            self._target[: len(part)] = part
            self.finish(len(part))

    def released(self) -> None:
        """See `Operation`."""
        slot, self._slot = self._slot, None
        self._target = None
        if slot is not None:
            self.file.give_slot(slot)
        super().released()


class ReadInto(_Read):
    """Reads into the caller's memory, without a copy; gives the number of bytes."""

    __slots__ = ("_prepared",)

    def __init__(self, file: FileSide, request: Request, view: memoryview) -> None:
        super().__init__(file, view.nbytes, request.offset)
        self.view = view
        self._prepared = request

    def _first(self) -> Request:
        return self._prepared

    def _ended(self, done: int) -> None:
        self.finish(done)


class Write(Transfer):
    """Writes memory that nobody changes meanwhile, as a whole; gives the number of bytes."""

    __slots__ = ("_flags", "_held", "_hold", "_once", "_prepared")

    def __init__(
        self,
        file: FileSide,
        view: memoryview,
        offset: int,
        flags: int,
        *,
        request: Request | None = None,
        held: bool = False,
        once: bool = False,
    ) -> None:
        """held: the caller holds the range. once: what is short is not written again."""
        super().__init__(file, view.nbytes, offset, file.write_patience)
        self.view = view
        self._flags = flags
        self._prepared = request
        self._once = once
        self._held = held
        self._hold: Hold | None = None

    def _first(self) -> Request | None:
        if not self._held:
            if self._hold is None:
                self._hold = self.file.lock.acquire(
                    self.offset, self.offset + self.nbytes, granted=self._granted
                )
            if not self._hold.granted:
                return None
        return self._prepared if self._prepared is not None else self._rest(0)

    def _granted(self) -> None:
        refusal = self.driver.refusal
        if refusal is None:
            self._enqueue()
        else:  # nobody waited for what nothing was under way of
            self.fail(type(refusal)(*refusal.args))

    def _rest(self, done: int) -> Request:
        assert self.view is not None
        return Request.pwrite(
            self.file.descriptor,
            self.view[done : done + MOST],
            self.offset + done,
            rw_flags=self._flags | self.file.nowait_flag,
        )

    def _partly(self, request: Request, before: int, res: int) -> None:
        done = before + max(res, 0)
        if res < 0:
            self._failed(request, -res, done)
            return
        if res == 0 or (self._once and res < request.nbytes):
            self._failed(request, errno.ENOSPC, done)
            return
        start = self.file.round_down(self.offset + done) - self.offset
        self._go_on(start if start > before else done)

    def _ended(self, done: int) -> None:
        self.finish(done)

    def released(self) -> None:
        """See `Operation`."""
        if self._hold is not None:
            self.file.lock.release(self._hold)
            self._hold = None  # it has this operation, and so the caller's memory
        self._held = True
        super().released()


class Vector(_FileOperation):
    """One request over several stretches of the caller's memory; gives what the kernel gave."""

    __slots__ = ("_prepared",)

    def __init__(self, file: FileSide, request: Request) -> None:
        super().__init__(file, request.nbytes, file.offloads)
        self._prepared = request

    def _first(self) -> Request:
        return self._prepared

    def completed(self, res: int) -> None:
        """See `Operation`."""
        request = self.request
        if request is None:
            return
        if res in (-errno.EAGAIN, -errno.EOPNOTSUPP) and not self.offloaded:
            self._offload()
        elif res < 0:
            error = request.error(-res)
            set_written(error, 0)
            error.add_note(f"of {self.file!r}")
            self.fail(error)
        else:
            self.finish(res)


class FileCall(Call):
    """A function of a file, called in a thread."""

    __slots__ = ("_file",)

    def __init__(self, file: FileSide, function: Callable[[], object]) -> None:
        super().__init__(file.driver, function)
        self._file = file

    def begin(self) -> None:
        """Give it to the driver.

        Raises:
            ClosedError, ForkedError, RuntimeError: it was not taken.
        """
        try:
            self.driver.admit()
            self._file.threaded += 1
            self._file.under_way.add(self)
            self.driver.offload(self)
        except BaseException:
            self.withdraw()
            raise

    def released(self) -> None:
        """See `Operation`."""
        self._file.ended(self)


class Sync(_FileOperation):
    """fsync or fdatasync, by the kernel's worker; by a thread where the file has no such thing."""

    __slots__ = ("_make",)

    def __init__(self, file: FileSide, *, data_only: bool) -> None:
        super().__init__(file, 0, file.syncs_offload)
        self._make: Any = Request.fdsync if data_only else Request.fsync

    def _first(self) -> Request:
        request: Request = self._make(self.file.descriptor)
        return request

    def completed(self, res: int) -> None:
        """See `Operation`."""
        request = self.request
        if request is None:
            return
        if res == -errno.EINVAL and not self.offloaded:
            self.file.syncs_offload = True
            self._offload()
        elif res < 0:
            error = request.error(-res)
            error.add_note(f"of {self.file!r}")
            self.fail(error)
        else:
            self.finish(None)

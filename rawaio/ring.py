"""L1: the completion ring, read in user space. All memory ordering of rawaio is in this file.

Facts about the kernel (`fs/aio.c`):

- The context id is the address of the ring, a header of eight 32-bit words and nr events of
  32 bytes. tail is written by the kernel only; head by user space, or by the kernel inside
  io_getevents. Both are indices modulo nr; head == tail is empty.
- `aio_complete()` writes the event, `smp_wmb()`, then tail; and signals the eventfd after that.
- The kernel overwrites a slot once head has passed it, and believes any head it sees. A head that
  is wrong for an instant, as the zero that `struct.pack_into` stores first, destroys events.

What this means here:

- R1, the loads of events come after the load of tail. Partner: the `smp_wmb()` above.
- R2, the store of head comes after the loads of events. Partner: the kernel's load of head, before
  it hands out slots again.
- R3, head and tail are accessed as single, aligned 32-bit words: items of a memoryview cast to
  'I', which CPython copies with a memcpy of four bytes, one load or store on both machines.

`Ordering` says how R1 and R2 are had:

- TSO (x86_64): loads stay in order with loads, and stores behind loads, in hardware. CPython makes
  each access in a C call of its own, in program order, so no compiler moves them either.
- FENCE (aarch64, where libatomic is installed): `atomic_thread_fence(seq_cst)`, between the load
  of tail and the loads of events (R1), and before the store of head (R2).
- COUNTED (aarch64 otherwise, every request with the context's eventfd): the kernel signals the
  eventfd after the store of tail, under the lock of the eventfd's wait queue, and a read of the
  eventfd takes that lock. So a read of N happens after the publication of at least N events, and
  reaping no more events than the reads have reported needs no barrier for R1. For R2: each word
  loaded from an event becomes an int by code that branches on its value, or is compared with
  another word, and a store does not overtake a branch that it depends on.
- Otherwise the ring is not usable. A load that depends on a branch is not ordered by it, and a
  system call is no barrier by itself; so nothing is left to argue with.

An unfenced peek that finds head == tail may always answer "nothing yet".

`SyscallEvents` obeys the same rules of peek, decode and commit through io_getevents, where the
kernel does all of this itself.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from itertools import starmap

from . import syscalls
from ._light import partial
from ._uninterrupted import int_call
from .errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, ClassVar, Final, Literal, NoReturn

__all__ = ["CompletionRing", "Ordering", "SyscallEvents", "choose_ordering"]

_EVENT: Final = struct.Struct("=QQqq")
_SIZE: Final = _EVENT.size
_COLUMNS: Final = struct.Struct("=q8xqq")  # data, res and res2 of an event
_NR, _HEAD, _TAIL, _MAGIC, _INCOMPAT, _HEADER_LENGTH = 1, 2, 3, 4, 6, 7
_SEQ_CST: Final = 5  # memory_order_seq_cst of <stdatomic.h>
_WORD: Final = 8  # bytes of a field of an event


class Ordering:
    """How the loads and stores of the ring are kept in order; see the module's text.

    One of four; no `Enum`, which would take longer to import than all of this.
    """

    __slots__ = ("name", "value")
    TSO: ClassVar[Ordering]
    FENCE: ClassVar[Ordering]
    COUNTED: ClassVar[Ordering]
    NONE: ClassVar[Ordering]

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self.value = value

    def __repr__(self) -> str:
        return f"<Ordering.{self.name}: {self.value!r}>"


Ordering.TSO = Ordering("TSO", "x86_64 keeps loads in order, no fence needed")
Ordering.FENCE = Ordering("FENCE", "atomic_thread_fence of libatomic")
Ordering.COUNTED = Ordering("COUNTED", "no more events than the eventfd has counted")
Ordering.NONE = Ordering("NONE", "no means found")


def choose_ordering(
    machine: str, *, counted: bool, load_fence: Callable[[], Callable[[], object] | None]
) -> tuple[Ordering, Callable[[], object] | None]:
    """The ordering for a machine, and the fence to call for it (FENCE only).

    counted: whether every request signals an eventfd, whose count is given to the ring.
    """
    if machine == "x86_64":
        return Ordering.TSO, None
    if machine == "aarch64":
        fence = load_fence()
        if fence is not None:
            return Ordering.FENCE, fence
        if counted:
            return Ordering.COUNTED, None
    return Ordering.NONE, None


def libatomic_fence() -> Callable[[], object] | None:
    """A full fence, `atomic_thread_fence(memory_order_seq_cst)`; None without libatomic."""
    try:
        # PyDLL: letting go of the GIL would cost more than the fence.
        fence = ctypes.PyDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    fence.restype = None
    return partial(fence, ctypes.c_int(_SEQ_CST))


class CompletionRing:
    """The ring of one context: peek, decode, commit. Does not enter the kernel after set-up.

    Use it from one thread at a time. `usable` says whether it may be read at all; `why_not` says
    why it may not, and then `SyscallEvents` does the same work.

    Safety: ctx_id must be a live context, made in this process, or 0. `close` must come before
    io_destroy, which unmaps the ring.
    """

    __slots__ = (
        "_counted",
        "_credit",
        "_events",
        "_fence",
        "_next",
        "_octets",
        "_run",
        "_words",
        "nr",
        "ordering",
        "why_not",
    )

    def __init__(
        self,
        ctx_id: int,
        *,
        counted: bool = False,
        ordering: tuple[Ordering, Callable[[], object] | None] | None = None,
    ) -> None:
        """Read and validate the header, once.

        counted: the owner reports each read of the eventfd to `credit`. ordering: in place of the
        one chosen for this machine.
        """
        chosen = ordering or choose_ordering(
            syscalls.machine(), counted=counted, load_fence=libatomic_fence
        )
        self.ordering, self._fence = chosen
        self._counted = self.ordering is Ordering.COUNTED
        self._run = 0
        self._next = 0  # head, once what `next_events` gave is committed
        self._credit = 0
        self.why_not: str | None
        self._words: memoryview | _Closed = _CLOSED
        self._events: memoryview | _Closed = _CLOSED
        self._octets: memoryview | _Closed = _CLOSED  # the same, byte by byte
        room, access = _mapping(ctx_id)
        if room < ctypes.sizeof(syscalls.aio_ring) or b"r" not in access:
            self.nr = 0
            self.why_not = f"nothing readable is mapped at {ctx_id:#x}"
            return
        words = _view(ctx_id, ctypes.sizeof(syscalls.aio_ring), "I")
        self.nr = words[_NR]
        self.why_not = _validate(words, room)
        if self.why_not is None and b"w" not in access:
            self.why_not = "the mapping is read-only, so head cannot be published"
        if self.why_not is None and self.ordering is Ordering.NONE:
            self.why_not = (
                f"no ordering of loads is known for {syscalls.machine()} "
                f"(on aarch64, libatomic.so.1 gives one)"
            )
        if self.why_not is None:
            self._words = words
            self._events = _view(ctx_id + words[_HEADER_LENGTH], _SIZE * self.nr, "q")
            self._octets = self._events.cast("B")

    @property
    def usable(self) -> bool:
        """Whether the ring may be read."""
        return self.why_not is None

    def credit(self, counted: int) -> None:
        """Tell the ring that the eventfd has counted so many more events (COUNTED only).

        A negative number takes back what was not an event, or was reaped in another way.
        """
        self._credit += counted

    @property
    def hidden(self) -> bool:
        """Whether there are events that the eventfd has not yet vouched for (COUNTED only)."""
        return self._counted and self._credit <= 0 and not self.empty

    @property
    def empty(self) -> bool:
        """Whether there is nothing to be read yet.

        With the GIL any thread may ask at any time, also beside `close`.

        Raises:
            ClosedError: closed, or not usable.
        """
        return self._words[_HEAD] == self._words[_TAIL]

    def peek(self) -> int:
        """Length of the contiguous run of completed events from head on. Moves nothing.

        Raises:
            ClosedError: closed, or not usable.
        """
        words = self._words
        head = words[_HEAD]
        tail = words[_TAIL]  # R1: the loads of events come after this one
        if head == tail:
            self._run = 0
            return 0
        if self._fence is not None:
            self._fence()  # R1; pairs with smp_wmb() in aio_complete()
        nr = self.nr
        head %= nr  # as the kernel takes it
        run = tail - head if tail >= head else nr - head
        if self._counted:
            run = min(run, max(self._credit, 0))
        self._run = run
        return run

    def next_events(self, most: int | None = None) -> tuple[int, int, bool] | None:
        """`peek` that is committed by `commit_run`: where in the ring the next run begins, and n.

        At most so many events. The third: whether there are more behind them. None: there is
        nothing. What was given is given again until it is committed.
        """
        words = self._words
        head = words[_HEAD]
        run = words[_TAIL] - head  # R1: the loads of events come after this one
        if not run:
            self._run = 0
            return None
        if self._fence is not None:
            self._fence()  # R1; pairs with smp_wmb() in aio_complete()
        nr = self.nr
        if head >= nr:  # as the kernel takes it
            run += head
            head %= nr
            run -= head
        more = False
        if run < 0:
            more = run > -head  # tail is beyond 0 again
            run = nr - head
        if self._counted and run > self._credit:
            run, more = max(self._credit, 0), False
        if most is not None and run > most:
            run, more = most, True
        self._run = run
        if not run:
            return None
        self._next = stop = head + run
        if stop >= nr:
            self._next = 0
        return head, run, more

    def next_run(
        self, most: int | None = None
    ) -> tuple[Sequence[int], list[int], list[int], bool] | None:
        """data, res and res2 of `next_events`, as signed ints, and whether there are more.

        data may be a view of the ring: it is to be read before `commit_run`.
        """
        found = self.next_events(most)
        if found is None:
            return None
        head, run, more = found
        events: Any = self._events
        if run == 1:
            data, res, res2 = _COLUMNS.unpack_from(events, _SIZE * head)
            return [data], [res], [res2], more
        head, stop = 4 * head, 4 * (head + run)
        return (
            events[head:stop:4],
            events[head + 2 : stop : 4].tolist(),
            events[head + 3 : stop : 4].tolist(),
            more,
        )

    def commit_run(self) -> None:
        """Give back to the kernel what `next_events` gave, and nobody has committed since."""
        words = self._words
        run, self._run = self._run, 0
        if self._fence is not None:
            self._fence()  # R2; pairs with the kernel's load of head in refill_reqs_available()
        if run:
            self._credit -= run
            words[_HEAD] = self._next

    def take_expected(
        self, expected: bytes | bytearray, at: int, n: int, *, commit: bool = True
    ) -> bool:
        """Commit the events there are, if they are n and, byte for byte, those in expected from at.

        Otherwise nothing is moved. For COUNTED this is never so: it would have to be counted.
        commit: at once; otherwise `commit_run` does it.
        """
        words = self._words
        head = words[_HEAD]
        stop = head + n
        nr = self.nr
        events: Any = self._octets
        if stop < nr:
            if words[_TAIL] != stop or self._counted:  # R1: the loads of events come after this one
                return False
            if self._fence is not None:
                self._fence()  # R1; pairs with smp_wmb() in aio_complete()
            if not expected.startswith(events[_SIZE * head : _SIZE * stop], at):
                return False
        else:
            stop -= nr
            if words[_TAIL] != stop or self._counted or not stop < head < nr:  # R1
                return False
            if self._fence is not None:
                self._fence()  # R1
            first = _SIZE * (nr - head)
            if not expected.startswith(events[_SIZE * head :], at) or not expected.startswith(
                events[: _SIZE * stop], at + first
            ):
                return False
        if not commit:
            self._run, self._next = n, stop
            return True
        self._run = 0
        if self._fence is not None:
            self._fence()  # R2; pairs with the kernel's load of head in refill_reqs_available()
        words[_HEAD] = stop
        return True

    def given_events(self) -> bytes:
        """What `next_events` gave, for `take_expected`. To be asked for before `commit_run`."""
        events: Any = self._octets
        head = self._words[_HEAD] % self.nr
        return events[_SIZE * head : _SIZE * (head + self._run)].tobytes()  # type: ignore[no-any-return]

    def columns(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """data, res and res2 of the first n events of the run that peek found, as signed ints."""
        if not 0 <= n <= self._run:
            self._beyond(n)
        start = 4 * (self._words[_HEAD] % self.nr)
        events = self._events
        if n == 1:
            return [events[start]], [events[start + 2]], [events[start + 3]]
        stop = start + 4 * n
        return (
            events[start:stop:4].tolist(),
            events[start + 2 : stop : 4].tolist(),
            events[start + 3 : stop : 4].tolist(),
        )

    @property
    def events(self) -> memoryview[int]:
        """All places of the ring, as 32-bit words: eight for each event.

        Safety: what `next_events` gave is to be read before `commit_run`, and the view not to be
        kept beyond `close`.

        Raises:
            ClosedError: closed, or not usable.
        """
        events = self._events
        if not isinstance(events, memoryview):
            _closed()
        return events.cast("B").cast("I")

    def decode(self, n: int) -> list[tuple[int, int, int, int]]:
        """(data, obj, res, res2) of the first n events of the run that peek found."""
        if not 0 <= n <= self._run:
            self._beyond(n)
        start = 4 * (self._words[_HEAD] % self.nr)
        return list(_EVENT.iter_unpack(self._events[start : start + 4 * n].tobytes()))

    def commit(self, n: int) -> None:
        """Publish head, n events further, by one 32-bit store.

        Raises:
            ValueError: n is not within the run that peek found; nothing is changed.
        """
        if not 0 <= n <= self._run:
            self._beyond(n)
        words = self._words
        head = (words[_HEAD] + n) % self.nr
        self._run -= n
        self._credit -= n
        if self._fence is not None:
            self._fence()  # R2; pairs with the kernel's load of head in refill_reqs_available()
        words[_HEAD] = head

    def advance_and_peek(self, n: int) -> int:
        """commit(n), then peek()."""
        self.commit(n)
        return self.peek()

    def close(self) -> None:
        """Drop every view of the ring. Idempotent."""
        self._words = self._events = self._octets = _CLOSED
        if self.why_not is None:
            self.why_not = "closed"

    def _beyond(self, n: int) -> NoReturn:
        raise ValueError(f"{n} events of a run of {self._run}")


class SyscallEvents:
    """The same rules through io_getevents, never waiting. Use it from one thread at a time.

    What one call has brought is kept until it is committed, so that an exception from outside
    loses nothing.
    """

    __slots__ = (
        "_buffer",
        "_calls",
        "_capacity",
        "_closed",
        "_events",
        "_fetched",
        "_given",
        "_index",
    )

    def __init__(self, ctx_id: int, capacity: int = 256) -> None:
        """capacity: events per system call; 256 are 8 KiB, and more at once gains nothing."""
        self._buffer = (ctypes.c_char * (_SIZE * capacity))()
        self._events = memoryview(self._buffer).cast("B").cast("q")
        self._capacity = capacity
        self._given = 0
        self._fetched: list[int] = []  # io_getevents' return value and errno, until committed
        self._index = 0
        self._closed = False
        no_wait = syscalls.timespec(0, 0)
        # io_getevents, and what became of it: functions with their arguments.
        self._calls = (
            (
                syscalls.raw_syscall(),
                syscalls.fixed(ctypes.c_long, syscalls.numbers().io_getevents),
                syscalls.fixed(ctypes.c_ulong, ctx_id),
                syscalls.fixed(ctypes.c_long, 0),
                syscalls.fixed(ctypes.c_long, capacity),
                syscalls.fixed(ctypes.c_void_p, ctypes.addressof(self._buffer)),
                ctypes.byref(no_wait),
            ),
            (ctypes.get_errno,),
        )

    @property
    def buffered(self) -> bool:
        """Whether events that were fetched are not yet committed."""
        return bool(self._fetched) and self._fetched[0] > self._index

    def peek(self) -> int:
        """How many events there are. Enters the kernel once when none are left from before.

        Raises:
            OSError: EINVAL, no such context.
            ClosedError: closed.
        """
        if self._closed:
            _closed()
        fetched = self._fetched
        if fetched and fetched[0] == self._index:
            self._index = 0
            fetched.clear()
        if not fetched:
            fetched.extend(starmap(int_call, self._calls))
        if fetched[0] < 0:
            failure = fetched[1]
            fetched.clear()
            if failure == errno.EINTR:
                return 0
            raise syscalls.kernel_error(failure, "io_getevents")
        return fetched[0] - self._index

    def next_run(
        self, most: int | None = None
    ) -> tuple[Sequence[int], list[int], list[int], bool] | None:
        """As of `CompletionRing`. Enters the kernel as `peek`.

        There may be more behind what was fetched earlier, and behind as much as fits.
        """
        earlier = self.buffered
        n = self.peek()
        if not n:
            return None
        more = earlier or n == self._capacity
        if most is not None and n > most:
            n, more = most, True
        self._given = n
        start, stop = self._span(n)
        events = self._events
        return (
            events[start:stop:4],
            events[start + 2 : stop : 4].tolist(),
            events[start + 3 : stop : 4].tolist(),
            more,
        )

    def commit_run(self) -> None:
        """Forget what `next_run` gave last."""
        self.commit(self._given)
        self._given = 0

    def columns(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """data, res and res2 of the first n events, as signed ints."""
        start, stop = self._span(n)
        events = self._events
        return (
            events[start:stop:4].tolist(),
            events[start + 2 : stop : 4].tolist(),
            events[start + 3 : stop : 4].tolist(),
        )

    def decode(self, n: int) -> list[tuple[int, int, int, int]]:
        """(data, obj, res, res2) of the first n events."""
        start, stop = self._span(n)
        return list(_EVENT.iter_unpack(self._events[start:stop].tobytes()))

    def commit(self, n: int) -> None:
        """Forget the first n events.

        Raises:
            ValueError: there are fewer; nothing is changed.
        """
        self._span(n)
        self._index += n

    def advance_and_peek(self, n: int) -> int:
        """commit(n), then peek()."""
        self.commit(n)
        return self.peek()

    def close(self) -> None:
        """No call after this one enters the kernel. Idempotent."""
        self._closed = True

    def _span(self, n: int) -> tuple[int, int]:
        there = self._fetched[0] - self._index if self._fetched else 0
        if not 0 <= n <= there:
            raise ValueError(f"cannot take {n} events of {there}")
        return 4 * self._index, 4 * (self._index + n)


class _Closed:
    """In place of a view that is gone: every access is a clear error and not a fault."""

    __slots__ = ()

    def __getitem__(self, key: object) -> NoReturn:
        _closed()

    def __setitem__(self, key: object, value: object) -> NoReturn:
        _closed()


_CLOSED: Final = _Closed()


def _closed() -> NoReturn:
    raise ClosedError("the completion ring is closed or not usable")


def _view(address: int, nbytes: int, code: Literal["I", "q"]) -> memoryview[int]:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B").cast(code)


def _validate(words: memoryview, room: int) -> str | None:
    """Why a ring with this header cannot be read in room mapped bytes; None when it can."""
    nr, header_length = words[_NR], words[_HEADER_LENGTH]
    if words[_MAGIC] != syscalls.AIO_RING_MAGIC:
        return f"magic is {words[_MAGIC]:#x}, not {syscalls.AIO_RING_MAGIC:#x}"
    if words[_INCOMPAT] != syscalls.AIO_RING_INCOMPAT_FEATURES:
        return f"incompat_features is {words[_INCOMPAT]:#x}: a layout that is not known"
    if header_length < ctypes.sizeof(syscalls.aio_ring) or header_length % _WORD:
        return f"header_length is {header_length}"
    if nr < 2:  # one slot is always empty
        return f"nr is {nr}"
    if header_length + _SIZE * nr > room:
        return f"nr is {nr}, more than the {room} mapped bytes hold"
    if words[_TAIL] >= nr:
        return f"tail is {words[_TAIL]}, not below nr, {nr}"
    return None


def _mapping(address: int) -> tuple[int, bytes]:
    """Bytes from address to the end of the mapping that it lies in, and its access (b"rw-p")."""
    try:
        with open("/proc/self/maps", "rb") as maps:  # names of files are bytes
            for line in maps:
                limits, access, _ = line.split(maxsplit=2)
                start, end = (int(limit, 16) for limit in limits.split(b"-"))
                if start <= address < end:
                    return end - address, access
    except OSError:
        pass  # without /proc nothing vouches for the mapping
    return 0, b""

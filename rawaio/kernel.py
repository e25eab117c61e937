"""L2: what a context has of the kernel's: the context id, the eventfd, and the way to io_submit.

Laws:

- What the kernel gave is given back exactly once, whatever is raised in between: it is recorded in
  the same uninterrupted step that got it, and dropped in the one that gives it back.
- Nobody's memory is freed while the kernel holds it: the last resort, for a context that nobody
  closed, is io_destroy, which waits; and the queue with its table lives until that has returned.
- Nobody reads completions any more when io_destroy unmaps the ring they come from: also a daemon
  thread, which goes on when the program ends, gets a `ClosedError`.
- In a forked child nothing is done at all.
"""

from __future__ import annotations

import ctypes
import errno
import os
from _warnings import warn  # what `warnings` has it from, and takes half a millisecond to import
from itertools import starmap

from . import syscalls
from ._light import deque, setitem
from ._uninterrupted import int_call, uninterrupted
from .errors import ClosedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Final

    from .protocols import CompletionSource
    from .queue import SubmissionQueue
    from .request import Request
    from .ring import CompletionRing
    from .slab import IocbSlab

__all__ = ["Kernel", "Submitter", "advice"]

_ONCE: Final = ((),)  # the arguments of one call without any, for starmap


class Kernel:
    """The context id and the eventfd: what has to be given back, and the last to see to it.

    Refers to the queue, whose table owns what the kernel holds, and not to the `IOContext`.
    """

    __slots__ = (
        "__weakref__",
        "_cell",
        "_ctx_id",
        "_fds",
        "closing",
        "keeps",
        "pid",
        "queue",
        "quiet",
        "ring",
        "sources",
    )

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.queue: SubmissionQueue | None = None
        # A ring that believes only what the eventfd has counted, if it is one.
        self.ring: CompletionRing | None = None
        #: What completions are read from, under the queue's lock.
        self.sources: tuple[CompletionSource, ...] = ()
        #: Whether somebody else complains when nobody has closed it.
        self.quiet = False
        #: What the kernel may be reading or writing, where that is not the queue's.
        self.keeps: object = None
        # Set with the queue's lock held: from then on a nudge lasts, for all who are about to wait.
        self.closing = False
        self._ctx_id = ctypes.c_ulong(0)
        self._cell = memoryview(self._ctx_id).cast("B").cast("Q")
        self._fds: list[int] = []

    @property
    def ctx_id(self) -> int:
        """The context id; 0 before `open` and after `destroy`."""
        return self._ctx_id.value

    @property
    def eventfd(self) -> int:
        """The eventfd that every request signals.

        Raises:
            ClosedError: it is closed, maybe since the caller has looked.
        """
        try:
            return self._fds[0]
        except IndexError:
            raise ClosedError("the context is closed") from None

    def open(self, nr_events: int) -> None:
        """Get both.

        Raises:
            OSError: io_setup's errno with advice, or eventfd's; then neither is kept.
        """
        # Each result is kept in the same uninterrupted step that made it.
        self._fds.extend(starmap(os.eventfd, ((0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),)))
        setup = (
            ctypes.c_long(syscalls.numbers().io_setup),
            ctypes.c_ulong(nr_events),
            ctypes.c_void_p(ctypes.addressof(self._ctx_id)),
        )
        if syscalls.raw_syscall()(*setup) < 0:
            failure = ctypes.get_errno()
            self.close_eventfd()
            raise syscalls.kernel_error(failure, "io_setup", *advice(failure, nr_events))

    def nudge(self) -> None:
        """Make the eventfd readable, so that whoever waits looks again."""
        assert self.queue is not None
        if self.queue.dead:
            return
        with self.queue.lock:
            if self._fds:
                if self.ring is not None:
                    self.ring.credit(-1)  # before it can be counted
                try:
                    os.eventfd_write(self._fds[0], 1)
                except BlockingIOError:
                    pass  # the count is as high as it goes, so it is readable all the same

    def reset(self) -> None:
        """Make the eventfd unreadable until the next completion; nothing when closing."""
        assert self.queue is not None
        with self.queue.lock:
            if self._fds and not self.closing:
                try:
                    counted = os.eventfd_read(self._fds[0])
                except BlockingIOError:
                    return  # nothing was counted
                if self.ring is not None:
                    self.ring.credit(counted)

    def close_sources(self) -> None:
        """Let nobody read completions any more. Idempotent; to be called before `destroy`."""
        assert self.queue is not None
        with self.queue.lock:  # and so nobody is reading
            for source in self.sources:
                source.close()

    def destroy(self) -> None:
        """io_destroy, unless that was done. Can block: until the kernel is done with everything."""
        if self._cell[0]:
            uninterrupted(
                (
                    syscalls.raw_syscall(),
                    ctypes.c_long(syscalls.numbers().io_destroy),
                    ctypes.c_ulong(self._cell[0]),
                ),
                (setitem, self._cell, 0, 0),
            )

    def close_eventfd(self) -> None:
        """Close the eventfd, unless that was done."""
        if self._fds:
            # Who pops it closes it: its number may be another file's right afterwards.
            try:
                deque(map(os.close, starmap(self._fds.pop, _ONCE)), maxlen=0)
            except IndexError:
                pass  # another thread was quicker

    def finalize(self) -> None:
        """For a context that nobody closed; never run before the kernel is done with its memory."""
        if self.pid != os.getpid():
            return
        unclosed, in_flight = bool(self._cell[0]) and not self.quiet, 0
        if self.queue is not None:
            self.queue.refuse(ClosedError("the context was never closed, and is gone"))
            self.queue.dead = True
            in_flight = self.queue.in_flight
            self.close_sources()
        self.destroy()
        if self.queue is None:
            self.close_eventfd()
        else:
            with self.queue.lock:  # nobody is about to read it, or to write to it
                self.close_eventfd()
        if unclosed:  # the last, because a warning may be an exception
            warn(
                f"unclosed rawaio.IOContext, {in_flight} requests in flight",
                ResourceWarning,
                stacklevel=2,
            )


class Submitter:
    """The queue's way to the kernel."""

    __slots__ = ("_asked", "_calls", "_nr", "_slab")

    def __init__(self, ctx_id: int, slab: IocbSlab) -> None:
        self._slab = slab
        self._nr = ctypes.c_long(0)
        self._asked = 0  # what it has; 0 while that is changed
        # io_submit, and what became of it: functions with their arguments.
        self._calls = (
            (
                syscalls.raw_syscall(),
                syscalls.fixed(ctypes.c_long, syscalls.numbers().io_submit),
                syscalls.fixed(ctypes.c_ulong, ctx_id),
                self._nr,
                syscalls.fixed(ctypes.c_void_p, slab.address),
            ),
            (ctypes.get_errno,),
        )

    def submit(self, first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        """As `queue.Submit` says. Can block: in io_submit."""
        self._slab.fill(first_token, batch)
        n = len(batch)
        if n != self._asked:
            self._asked = 0
            self._nr.value = n
            self._asked = n
        # The return value and errno are kept before an exception can strike.
        outcome.extend(starmap(int_call, self._calls))


def advice(failure: int, nr_events: int) -> list[str]:
    """What to do about an errno of io_setup, in sentences; empty when there is nothing to say."""
    if failure == errno.EAGAIN:
        used, limit = _aio_number("aio-nr"), _aio_number("aio-max-nr")
        wanted = 2 * max((limit or 0), (used or 0) + nr_events)
        taken = f"system-wide fs.aio-nr={used} of fs.aio-max-nr={limit} are taken"
        return [
            f"nr_events={nr_events} are asked for, and {taken}.",
            f"Use fewer or smaller contexts, or raise the limit: sysctl -w fs.aio-max-nr={wanted}",
        ]
    if failure == errno.ENOSYS:
        return ["This kernel has no Linux AIO (CONFIG_AIO is not set), or a sandbox hides it."]
    if failure == errno.EPERM:
        return ["A seccomp filter denies io_setup; a container's profile has to allow it."]
    if failure == errno.EINVAL:
        return [f"nr_events={nr_events} is more than this kernel can do."]
    return []


def _aio_number(name: str) -> int | None:
    try:
        with open(f"/proc/sys/fs/{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None

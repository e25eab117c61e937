"""L2: threads for what can only be done blocking.

They are started when there is work that no idle one could take, end after `_IDLE_S` without any,
and are daemons: a program does not wait for them to end. Whoever posts work that must be finished
waits for it himself.
"""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from ._uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_THREADS", "Workers"]

# A disk behind a blocking call is kept busy by this many, and each costs a stack.
MAX_THREADS: Final = 16
_IDLE_S: Final = 5.0

_Job = tuple["Callable[..., object]", tuple[object, ...]]


class Workers:
    """At most `MAX_THREADS` threads. `post` and `stop` are for one thread at a time."""

    __slots__ = ("_jobs", "_lock", "_open", "_spare", "_threads")

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        # Threads that there are, and how many of them have nothing to do, less the jobs for them.
        self._threads = 0
        self._spare = 0
        self._open = True

    def post(self, job: _Job, *calls: tuple[Callable[..., object], *tuple[object, ...]]) -> None:
        """Have a job, function and arguments, done in a thread. It must not raise.

        calls: made in the same uninterrupted step; as of `uninterrupted`.

        Raises:
            RuntimeError: there is no thread, and none can be started; nothing was posted.
        """
        with self._lock:
            start = self._spare <= 0 and self._threads < MAX_THREADS
            if start:
                self._threads += 1
            else:
                self._spare -= 1
        if start:
            self._start()
        uninterrupted((self._jobs.put, job), *calls)

    def _start(self) -> None:
        try:
            threading.Thread(
                target=_run, args=(self, self._jobs), name="rawaio worker", daemon=True
            ).start()
        except RuntimeError:  # no more threads; those that there are have to do
            with self._lock:
                self._threads -= 1
                self._spare -= bool(self._threads)
                if not self._threads:
                    raise

    def stop(self) -> None:
        """Let the threads end, after what was posted. Idempotent."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            threads = self._threads
        for _ in range(threads):
            self._jobs.put(None)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return not self._open

    def _rest(self) -> None:
        with self._lock:
            self._spare += 1

    def _leave(self) -> bool:
        """Whether an idle thread may end: nothing was posted for it."""
        with self._lock:
            if self._spare <= 0:
                return False
            self._spare -= 1
            self._threads -= 1
            return True


def _run(workers: Workers, jobs: SimpleQueue[_Job | None]) -> None:
    while True:
        try:
            job = jobs.get(timeout=_IDLE_S)
        except Empty:
            if workers._leave():
                return
            continue
        if job is None:
            return
        function, args = job
        function(*args)
        # A thread that waits must not keep alive what it worked for.
        del job, function, args
        workers._rest()

"""L4: a kernel for tests: deterministic, scriptable, and strict about what it is offered.

`SimulatedKernel` stands in for io_submit and for the completion ring, so that the code of
`rawaio.queue`, and what is built on it, runs without entering the kernel::

    kernel = SimulatedKernel(nr_events=4, seed=1, chances=Chances(eagain=0.1, at_once=0.5))
    queue = SubmissionQueue(kernel, nr_events=4)
    queue.push([Request.fsync(0)])
    kernel.complete()
    data, res, res2 = kernel.columns(kernel.peek())

Facts about the kernel that it keeps to:

- io_submit returns how many it accepted. It stops at the first request that it cannot take, whose
  errno is the result when it is the first of the batch, and is lost otherwise.
- EAGAIN comes when no slot is free, and also for want of memory, with nothing in flight. A slot is
  free again when its event is committed.
- A request may complete before io_submit has returned, and requests complete in any order.
- Events are read in runs that end where the ring wraps.

The same seed, script and calls give the same history.
"""

from __future__ import annotations

import errno
from collections import deque
from dataclasses import dataclass
from random import Random
from threading import Lock
from typing import TYPE_CHECKING, Final, NamedTuple

from .errors import ClosedError
from .request import State
from .syscalls import Opcode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .request import Request

__all__ = ["Call", "Chances", "SimulatedKernel"]

# What io_submit, and what an event, may say of a request that is wrong or unlucky.
_REFUSALS: Final = (errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP)
_FAILURES: Final = (errno.EIO, errno.ENOSPC, errno.EINVAL)
_OBJ_NBYTES: Final = 64  # size of an iocb, so that addresses of two are never the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Chances:
    """How often a `SimulatedKernel` does what nobody has told it to: probabilities, 0 to 1."""

    eagain: float = 0.0  # a call takes nothing, although there is room
    partial: float = 0.0  # a call takes the first few only
    refuse: float = 0.0  # io_submit has an errno for the request
    fail: float = 0.0  # the request's event has one
    short: float = 0.0  # less is transferred than was asked for
    at_once: float = 0.0  # the request completes before io_submit has returned


class Call(NamedTuple):
    """One io_submit: what was offered, and the answer."""

    first_token: int
    batch: tuple[Request, ...]
    returned: int  # how many were accepted; -1: errno tells why not
    errno: int


class _Fate(NamedTuple):
    refuse: int
    res: int
    res2: int
    at_once: bool


class _Event(NamedTuple):
    data: int
    obj: int
    res: int
    res2: int


class SimulatedKernel:
    """Takes requests as io_submit does, and completes them when and as it is told.

    An instance is the submit callable of a `SubmissionQueue`, and a `protocols.CompletionSource`.
    What it does with a call comes from `answers`, with a request from `plan`, and where these say
    nothing from `chances` and the seed. It never enters the kernel and never waits.

    Every call is checked, and AssertionError raised for: more than nr_events requests submitted
    and not yet reaped; a token that is not higher than all before; an empty batch; a request that
    is not IN_FLIGHT, or that it has already; a batch that does not begin with what was not
    accepted of the one before; a call while another is under way.
    """

    def __init__(
        self,
        nr_events: int,
        *,
        seed: int = 0,
        chances: Chances | None = None,
        nr: int | None = None,
    ) -> None:
        """nr_events: what the queue promises. nr: events in the ring, one of them always empty.

        Raises:
            ValueError: nr_events below 1, or nr below 2.
        """
        self.nr_events = nr_events
        self.nr = 2 * nr_events + 2 if nr is None else nr
        if nr_events < 1 or self.nr < 2:
            raise ValueError(f"nr_events must be 1 and nr 2 at least, not {nr_events} and {nr}")
        self.chances = chances or Chances()
        #: What the next calls do, first to last. A number above 0: accept so many at most. 0:
        #: return 0. A negative errno: fail with it. An exception: raise it, having taken nothing.
        self.answers: deque[int | BaseException] = deque()
        #: Every call, but for those that raised.
        self.calls: list[Call] = []
        #: How many requests it can hold; changed at will. Never more than the ring has room for.
        self.slots = self.nr - 1
        #: Called in every io_submit that takes requests, before it returns; must not raise.
        self.inside: Callable[[], object] | None = None
        self._random = Random(seed)
        self._entered = Lock()
        self._plans: dict[Request, _Fate] = {}
        self._next_token = 1
        # Not accepted, in the order in which they have to be offered again.
        self._returned: list[Request] = []
        # token -> request: accepted and not reaped.
        self._held: dict[int, Request] = {}
        # request -> its token and what it will complete with.
        self._running: dict[Request, tuple[int, _Fate]] = {}
        self._events: deque[_Event] = deque()
        self._head = 0
        self._run = 0
        self._given = 0
        self._closed = False

    # -- what happens -------------------------------------------------------------------------

    def plan(
        self,
        request: Request,
        *,
        refuse: int = 0,
        res: int | None = None,
        res2: int = 0,
        at_once: bool = False,
    ) -> None:
        """Say what becomes of the request the next time that it is accepted or refused.

        refuse: io_submit's errno for it. res, res2: what its event says; None: full success.
        at_once: it completes before io_submit has returned.
        """
        self._plans[request] = _Fate(
            refuse, _success(request) if res is None else res, res2, at_once
        )

    @property
    def running(self) -> list[Request]:
        """The requests that were accepted and have not completed, in order of acceptance."""
        return list(self._running)

    @property
    def unreaped(self) -> int:
        """How many requests were accepted, and have no event that was committed."""
        return len(self._held)

    def complete(self, request: Request | None = None, *, res: int | None = None) -> Request:
        """Complete one request, a running one chosen by the seed if None; return it.

        res: in place of what was planned.

        Raises:
            ValueError: it is not running, or none is.
        """
        if request is None:
            if not self._running:
                raise ValueError("no request is running")
            request = self._random.choice(list(self._running))
        if request not in self._running:
            raise ValueError(f"not running: {request!r}")
        token, fate = self._running.pop(request)
        outcome = fate.res if res is None else res
        self._events.append(_Event(token, _OBJ_NBYTES * token, outcome, fate.res2))
        return request

    def withdrawn(self, request: Request) -> None:
        """Be told that the queue gave up a request, which need not be offered again."""
        if request in self._returned:
            self._returned.remove(request)

    # -- io_submit ----------------------------------------------------------------------------

    def __call__(self, first_token: int, batch: Sequence[Request], outcome: list[int]) -> None:
        """Take the batch, or some of it, or none; see `queue.Submit`."""
        if not self._entered.acquire(blocking=False):
            raise AssertionError("io_submit is called while another call is under way")
        try:
            self._look_at(first_token, batch)
            n = len(batch)
            # In case of an exception.
            self._returned = [*batch, *self._returned[n:]]
            returned, failure = self._take(first_token, batch)
            gone = max(returned, 0)
            if returned < 0 and failure != errno.EAGAIN:
                gone = 1  # the first has failed, and is not offered again
            del self._returned[:gone]
            self.calls.append(Call(first_token, tuple(batch), returned, failure))
            if returned > 0 and self.inside is not None:
                self.inside()
            outcome.extend((returned, failure))
        finally:
            self._entered.release()

    def _look_at(self, first_token: int, batch: Sequence[Request]) -> None:
        n = len(batch)
        _demand(n > 0, "an empty batch is offered")
        _demand(
            first_token >= self._next_token,
            f"token {first_token} is not above all before, the last of them {self._next_token - 1}",
        )
        self._next_token = first_token + n
        held = set(self._held.values())
        for request in batch:
            _demand(request not in held, f"it has this request already: {request!r}")
            held.add(request)
            _demand(request.state is State.IN_FLIGHT, f"not IN_FLIGHT: {request!r}")
        _demand(
            len(held) <= self.nr_events,
            f"{n} requests more than the {len(held) - n} it has are more than {self.nr_events}",
        )
        again = self._returned[:n]
        _demand(
            list(batch[: len(again)]) == again,
            f"what was not accepted has to be offered again first: {again}, not {list(batch)}",
        )

    def _take(self, first_token: int, batch: Sequence[Request]) -> tuple[int, int]:
        """The return value, and errno."""
        limit = len(batch)
        if self.answers:
            answer = self.answers.popleft()
            if isinstance(answer, BaseException):
                raise answer
            if answer < 0:
                return -1, -answer
            limit = min(limit, answer)
        elif self._happens(self.chances.eagain):
            return -1, errno.EAGAIN
        elif self._happens(self.chances.partial):
            limit = self._random.randint(1, limit)
        accepted = 0
        for request in batch[:limit]:
            if len(self._held) >= min(self.slots, self.nr - 1):
                return (accepted, 0) if accepted else (-1, errno.EAGAIN)
            fate = self._plans.get(request) or self._draw(request)
            if fate.refuse:
                if accepted:
                    break
                self._plans.pop(request, None)
                return -1, fate.refuse
            self._plans.pop(request, None)
            token = first_token + accepted
            accepted += 1
            self._held[token] = request
            self._running[request] = token, fate
            if fate.at_once:
                self.complete(request)
        return accepted, 0

    def _draw(self, request: Request) -> _Fate:
        refuse, res = 0, _success(request)
        if self._happens(self.chances.refuse):
            refuse = self._random.choice(_REFUSALS)
        if self._happens(self.chances.fail):
            res = -self._random.choice(_FAILURES)
        elif request.nbytes and self._happens(self.chances.short):
            res = self._random.randrange(request.nbytes)
        return _Fate(refuse, res, 0, self._happens(self.chances.at_once))

    def _happens(self, chance: float) -> bool:
        return self._random.random() < chance

    # -- the ring -----------------------------------------------------------------------------

    def peek(self) -> int:
        """How many events can be read in one run. Moves nothing.

        Raises:
            ClosedError: closed.
        """
        if self._closed:
            raise ClosedError("the simulated ring is closed")
        self._run = min(len(self._events), self.nr - self._head)
        return self._run

    def next_run(
        self, most: int | None = None
    ) -> tuple[list[int], list[int], list[int], bool] | None:
        """As of `CompletionRing`."""
        n = there = self.peek()
        if not n:
            return None
        if most is not None:
            n = min(n, most)
        self._given = n
        return *self.columns(n), n < there or there < len(self._events)

    def commit_run(self) -> None:
        """As of `CompletionRing`."""
        n, self._given = self._given, 0
        self.commit(n)

    def columns(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """data, res and res2 of the first n events of the run that peek found.

        Raises:
            ValueError: n is not within that run.
        """
        events = self._first(n)
        return [e.data for e in events], [e.res for e in events], [e.res2 for e in events]

    def decode(self, n: int) -> list[tuple[int, int, int, int]]:
        """(data, obj, res, res2) of the first n events of the run that peek found.

        Raises:
            ValueError: n is not within that run.
        """
        return [(e.data, e.obj, e.res, e.res2) for e in self._first(n)]

    def commit(self, n: int) -> None:
        """Give the first n events of the run back; their slots are free.

        Raises:
            ValueError: n is not within that run; nothing is changed.
        """
        for event in self._first(n):
            self._events.popleft()
            del self._held[event.data]
        self._run -= n
        self._head = (self._head + n) % self.nr

    def advance_and_peek(self, n: int) -> int:
        """commit(n), then peek()."""
        self.commit(n)
        return self.peek()

    def close(self) -> None:
        """Let nobody read events any more. Idempotent."""
        self._closed = True
        self._run = 0

    def _first(self, n: int) -> list[_Event]:
        if not 0 <= n <= self._run:
            raise ValueError(f"{n} events of a run of {self._run}")
        return [self._events[i] for i in range(n)]


def _demand(condition: bool, message: str) -> None:
    # Not an assert statement: it holds under `python -O` as well.
    if not condition:
        raise AssertionError(message)


def _success(request: Request) -> int:
    if request.opcode is Opcode.POLL:
        return request.poll_result(-1) & 0xFFFF  # every event that it may be told of
    return request.nbytes

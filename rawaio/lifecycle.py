"""L1: the steps of requests' life cycle, for whole batches.

`enums.TRANSITIONS` is the table, and `advance` follows it to the letter. The others make the same
steps for requests whose state is known from where they are, at no cost for looking. What may be cut
short by an exception from outside can be undone or repeated; each says which.
"""

from __future__ import annotations

from ._light import itemgetter, length_hint
from .errors import BusyError
from .request import COMPLETED, IN_FLIGHT, NEW, PENDING, RELEASED, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Final

    from .request import Completion, Step

__all__ = [
    "admit",
    "advance",
    "complete",
    "complete_one",
    "looked_at",
    "offer",
    "reopen",
    "restore",
    "take_back",
]

_request_of: Final = itemgetter(0)


def advance(requests: Sequence[Request], step: Step) -> None:
    """Take all the requests a step further in their life cycle, or none.

    The plain form; `admit`, `offer` and `complete` do the same for whole batches.

    Raises:
        BusyError: the step is not possible for one of them, or one is there twice; nothing has
            changed.
        TypeError: not a Request; nothing has changed. And what pinning a buffer again raises.
    """
    from .enums import TRANSITIONS, State, Step  # noqa: PLC0415 - see there

    for request in requests:
        if not isinstance(request, Request):
            raise TypeError(f"a Request is needed, not {type(request).__name__}")
        if (request._state, step) not in TRANSITIONS:
            raise BusyError(f"{step.value} is not possible: {request!r}")
    if len(set(requests)) != len(requests):
        raise BusyError("the same request is there twice")
    if step is Step.PUSH:
        before: dict[Request | None, int] = {}
        looking = iter(requests)
        try:
            admit(looking, before)
        except BaseException:
            restore(looked_at(requests, looking, before), before)
            raise
    else:
        for request in requests:
            request._state = int(TRANSITIONS[State(request._state), step])


def admit(
    requests: Iterable[Request], before: dict[Request | None, int], to: int = PENDING
) -> None:
    """Take the requests to PENDING, or `to`, one by one, with their buffers pinned.

    before gets the states of those that were not COMPLETED, and the key None when the last one
    looked at is refused for what it is; with it `restore` undoes what an exception cut short.

    Raises:
        BusyError: the last one looked at is under way, or there twice.
        TypeError: it is not a Request. And what pinning its buffer again raises.
    """
    request: object = None
    completed = COMPLETED  # a local name is read in a third of the time
    try:
        for request in requests:
            if request._state is completed:
                request._state = to
            else:
                _admit_anew(request, before)
                request._state = to
    except AttributeError:
        if isinstance(request, Request):
            raise
        before[None] = NEW
        raise TypeError(f"a Request is needed, not {type(request).__name__}") from None


def _admit_anew(request: Request, before: dict[Request | None, int]) -> None:
    state = request._state
    if state is PENDING or state is IN_FLIGHT:
        before[None] = state
        raise BusyError(f"{request!r} is under way already, or there twice")
    before[request] = state
    if request._resizable:
        request._make_ready()


def restore(
    requests: Iterable[Request], before: dict[Request | None, int], to: int = PENDING
) -> None:
    """Undo `admit` for the requests that it looked at and did not refuse."""
    for request in requests:
        if request in before or request._state is to:
            request._state = before.get(request, COMPLETED)
            if request._resizable:
                request._anchor = None


def looked_at(
    requests: Sequence[Request], looking: Iterator[Request], before: dict[Request | None, int]
) -> Sequence[Request]:
    """What `admit` took before it was cut short; looking: the iterator it was given."""
    return requests[: len(requests) - length_hint(looking) - (None in before)]


def offer(requests: Iterable[Request]) -> None:
    """`advance` by OFFER, for requests that are known to be PENDING."""
    for request in requests:
        request._state = IN_FLIGHT


def take_back(requests: Iterable[Request]) -> None:
    """`advance` by RETURN, for those that are IN_FLIGHT. May be repeated."""
    for request in requests:
        if request._state is IN_FLIGHT:
            request._state = PENDING


def complete(completions: Sequence[Completion], requests: Sequence[Request] | None = None) -> int:
    """Mark the requests of completions COMPLETED, up to the first with a callback.

    requests: theirs, where they are at hand. Returns how many are marked. May be repeated.
    """
    completed = COMPLETED
    for request in map(_request_of, completions) if requests is None else requests:
        if request.callback is not None:
            return next(i for i, c in enumerate(completions) if c[0] is request)
        if request._resizable:
            request._anchor = None
            request._state = RELEASED
        else:
            request._state = completed
    return len(completions)


def complete_one(request: Request) -> None:
    """Mark one request COMPLETED, whether or not it has a callback. May be repeated."""
    if request._resizable:
        request._anchor = None
        request._state = RELEASED
    else:
        request._state = COMPLETED


def reopen(completions: Sequence[Completion], start: int) -> None:
    """Undo `complete` for the completions from start on, which are to be completed again."""
    for completion in completions[start:]:
        completion[0]._state = IN_FLIGHT

"""Several steps as one, as far as exceptions from outside are concerned.

A signal handler, and with it KeyboardInterrupt, runs between two bytecodes of Python code, never
inside a function written in C that calls no Python code. So what must happen together, or not at
all, is written as one call of such a function. The standard library has the pieces:
`starmap(operator.call, ...)` makes calls, `deque(..., maxlen=0)` runs an iterator dry, and
`list.extend(starmap(f, ...))` calls f and keeps what it returned before anything can strike.
"""

from __future__ import annotations

from itertools import starmap

from ._light import call, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["int_call", "uninterrupted"]

_any_call: Any = call
#: `operator.call` of what returns ints: for `list.extend(starmap(int_call, calls))`.
int_call: Callable[..., int] = _any_call


def uninterrupted(*calls: tuple[Callable[..., object], *tuple[object, ...]]) -> None:
    """Make each call, a tuple of function and arguments, with no bytecode in between.

    Safety: the functions must be implemented in C and call no Python code. The first exception
    ends it; the calls before that one have happened.
    """
    deque(starmap(call, calls), maxlen=0)

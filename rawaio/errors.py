"""What rawaio raises of its own.

A refusal by the kernel is a plain `OSError` with its errno. The classes here are for states
that rawaio itself is in, split by who has to act: the caller (`ClosedError`, `ForkedError`,
`BusyError`) or the place the program runs in (`UnsupportedError`).
"""

__all__ = [
    "BusyError",
    "ClosedError",
    "ForkedError",
    "RawAIOError",
    "UnsupportedError",
    "set_written",
    "written",
]


class RawAIOError(Exception):
    """Base of every error that is rawaio's own."""


class ClosedError(RawAIOError):
    """The object was closed; make a new one."""


class ForkedError(RawAIOError):
    """The object belongs to the parent process; make a new one in this process."""


class BusyError(RawAIOError):
    """The object is in use, and what was asked for has to wait until it is not."""


class UnsupportedError(RawAIOError):
    """This machine, process or kernel cannot do what was asked for, however often it is tried."""


def set_written(error: OSError, nbytes: int) -> None:
    """Say how much was written all the same, in `characters_written`, as of BlockingIOError."""
    # Every OSError has the attribute; typeshed knows it of BlockingIOError alone.
    error.characters_written = nbytes  # type: ignore[attr-defined]


def written(error: OSError) -> int:
    """How much was written all the same; 0 when nothing says so."""
    nbytes: int = getattr(error, "characters_written", 0)
    return nbytes

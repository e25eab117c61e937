"""What rawaio raises of its own.

A refusal by the kernel is a plain `OSError` with its errno. The classes here are for states
that rawaio itself is in, split by who has to act: the caller (`ClosedError`, `ForkedError`,
`BusyError`) or the place the program runs in (`UnsupportedError`).
"""

__all__ = ["BusyError", "ClosedError", "ForkedError", "RawAIOError", "UnsupportedError"]


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

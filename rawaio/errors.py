"""What rawaio raises of its own.

A refusal by the kernel is a plain `OSError` with its errno. The classes here are for states
that rawaio itself is in, split by who has to act: the caller (`ClosedError`, `ForkedError`,
`BusyError`) or the place the program runs in (`UnsupportedError`).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Final

__all__ = [
    "BulkError",
    "BusyError",
    "ClosedError",
    "ForkedError",
    "RawAIOError",
    "UnsupportedError",
    "set_written",
    "written",
]

# How many operations an error names in its text.
_SHOWN: Final = 5


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


class BulkError(OSError):
    """Some of many operations were not whole; all the others were, and their data are valid.

    errno is that of the first that failed, in the order of the operations; 0 when all that were not
    whole were short.
    """

    def __init__(
        self, results: Mapping[int, tuple[int, int]], total: int, nbytes: int | None = None
    ) -> None:
        """results: errno, or 0, and bytes by index, of those that were not whole.

        nbytes: of each operation; None where they are of several lengths.
        """
        #: The errno of each that was not whole; 0 of those that were short.
        self.errors: dict[int, int] = {i: results[i][0] for i in sorted(results)}
        #: The bytes that each of them transferred.
        self.counts: dict[int, int] = {i: results[i][1] for i in sorted(results)}
        self.total = total
        failed = [code for code in self.errors.values() if code]
        code = failed[0] if failed else 0
        what = f"{len(failed)} failed" if failed else ""
        short = len(self.errors) - len(failed)
        if short:
            what += f"{' and ' * bool(what)}{short} were short"
        some = ", ".join(
            f"{i}: {os.strerror(e) if e else f'{self.counts[i]} bytes'}"
            for i, e in list(self.errors.items())[:_SHOWN]
        )
        more = ", ..." if len(self.errors) > _SHOWN else ""
        each = "" if nbytes is None else f" of {nbytes} bytes"
        super().__init__(code, f"of {total} operations{each} {what} ({some}{more})")

    @property
    def indexes(self) -> list[int]:
        """Which operations were not whole, in order."""
        return list(self.errors)


def set_written(error: OSError, nbytes: int) -> None:
    """Say how much was written all the same, in `characters_written`, as of BlockingIOError."""
    # Every OSError has the attribute; typeshed knows it of BlockingIOError alone.
    setattr(error, "characters_written", nbytes)  # noqa: B010


def written(error: OSError) -> int:
    """How much was written all the same; 0 when nothing says so."""
    nbytes: int = getattr(error, "characters_written", 0)
    return nbytes

"""What the layers ask of each other, for type checkers and for readers.

No module of the core imports this one at run time: `typing` takes longer to import than all of
rawaio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

__all__ = ["CompletionSource", "HasFileno", "OwnedLock", "PolledRing"]


class HasFileno(Protocol):
    """An object that owns a descriptor."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


class CompletionSource(Protocol):
    """Completed events in order; the rules of QEMU's peek and commit."""

    def peek(self) -> int:
        """How many events can be read in one run. Moves nothing."""
        ...

    def next_run(
        self, most: int | None = None
    ) -> tuple[Sequence[int], list[int], list[int], bool] | None:
        """`peek` and `columns` in one, and whether there are more behind; None: nothing.

        data may be a view of the kernel's memory: it is to be read before `commit_run`.
        """
        ...

    def commit_run(self) -> None:
        """Commit what `next_run` gave."""
        ...

    def columns(self, n: int) -> tuple[list[int], list[int], list[int]]:
        """data, res and res2 of the first n events of the run that peek found."""
        ...

    def decode(self, n: int) -> list[tuple[int, int, int, int]]:
        """(data, obj, res, res2) of the first n events of the run that peek found."""
        ...

    def commit(self, n: int) -> None:
        """Give the first n events of the run back to the kernel; they are not read again."""
        ...

    def advance_and_peek(self, n: int) -> int:
        """commit(n), then peek()."""
        ...

    def close(self) -> None:
        """Drop every view of the kernel's memory; to be called before io_destroy."""
        ...


class PolledRing(Protocol):
    """What a loop looks at before it sleeps: a context, or a lane for bulk calls."""

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more."""
        ...

    @property
    def visible(self) -> bool:
        """Whether it can be told, without entering the kernel, if there is something in it."""
        ...

    @property
    def outstanding(self) -> int:
        """How many operations are under way whose completion sets its eventfd."""
        ...

    @property
    def empty(self) -> bool:
        """Whether its ring is; True also where that cannot be told."""
        ...


class OwnedLock(Protocol):
    """A re-entrant lock that tells whether the calling thread holds it."""

    def acquire(self, blocking: bool = True) -> bool:
        """As of `threading.RLock`."""
        ...

    def release(self) -> None:
        """As of `threading.RLock`."""
        ...

    def _is_owned(self) -> bool: ...
    def __enter__(self) -> bool: ...
    def __exit__(
        self,
        t: type[BaseException] | None,
        v: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...

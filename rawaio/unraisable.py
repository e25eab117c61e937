"""L0: exceptions that have nobody to go to."""

from __future__ import annotations

from _weakref import ref  # all of `weakref` takes a millisecond to import

__all__ = ["report"]


class _Raiser:
    """Raises an exception where Python cannot pass one on, and so gives it to the hook."""

    __slots__ = ("_error", "_source")

    def __init__(self, error: Exception, source: object) -> None:
        self._error = error
        self._source = source

    def __call__(self, reference: object) -> None:
        raise self._error

    def __repr__(self) -> str:
        return repr(self._source)


def report(error: Exception, source: object) -> None:
    """Give an exception that has nobody to go to to sys.unraisablehook, as from source."""
    # The hook's argument cannot be made by Python code; an exception in a weakref's callback is
    # passed to the hook by the interpreter.
    target = _Target()
    reference = ref(target, _Raiser(error, source))
    del target, reference


class _Target:
    __slots__ = ("__weakref__",)

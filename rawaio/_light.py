"""What the standard library has in C, without the modules around it, which take ms to import.

`collections`, `functools` and `operator` together are a fifth of what `import rawaio` would take.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable, Iterable
    from functools import cache, partial
    from operator import call, index, itemgetter, length_hint, neg, setitem
    from typing import Any

    tuplegetter: Any

    def new_tuple(cls: type, values: tuple[object, ...]) -> tuple[object, ...]: ...

else:
    from _collections import _tuplegetter as tuplegetter
    from _collections import deque
    from _functools import _lru_cache_wrapper, partial
    from _operator import call, index, itemgetter, length_hint, neg, setitem

    new_tuple = tuple.__new__

    def cache(function: Callable[..., Any]) -> Callable[..., Any]:
        """As of `functools`."""
        return _lru_cache_wrapper(function, None, False, None)


__all__ = [
    "cache",
    "call",
    "deque",
    "index",
    "itemgetter",
    "length_hint",
    "named_tuple",
    "neg",
    "partial",
    "setitem",
    "tuplegetter",
]


def named_tuple(name: str, fields: str) -> type[Any]:
    """What `collections.namedtuple` makes, without what is not needed here."""
    names = fields.split()

    def new(cls: type, *values: object) -> tuple[object, ...]:
        return new_tuple(cls, values)

    def asdict(self: Iterable[object]) -> dict[str, object]:
        return dict(zip(names, self, strict=True))

    def text(self: Iterable[object]) -> str:
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in asdict(self).items())})"

    def replace(self: Iterable[object], **fields: object) -> tuple[object, ...]:
        return new(type(self), *{**asdict(self), **fields}.values())

    methods = {"__new__": new, "__repr__": text, "_asdict": asdict, "_replace": replace}
    getters = {field: tuplegetter(i, "") for i, field in enumerate(names)}
    return type(name, (tuple,), {"__slots__": (), "_fields": (*names,), **methods, **getters})

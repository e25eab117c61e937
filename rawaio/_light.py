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
        cached = _lru_cache_wrapper(function, None, False, lambda *counts: counts)
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(cached, name, getattr(function, name))
        cached.__wrapped__ = function
        return cached


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


def named_tuple(module: str, name: str, fields: str) -> type[Any]:
    """What `collections.namedtuple` makes, but for its defaults."""
    names = (*fields.split(),)

    def new(cls: type, *values: object, **named: object) -> tuple[object, ...]:
        if named:
            values += tuple(named.pop(field) for field in names[len(values) :] if field in named)
        if named or len(values) != len(names):
            raise TypeError(f"{name} takes {', '.join(names)}")
        return new_tuple(cls, values)

    def make(cls: type, values: Iterable[object]) -> tuple[object, ...]:
        return new(cls, *values)

    def asdict(self: Iterable[object]) -> dict[str, object]:
        return dict(zip(names, self, strict=True))

    def replace(self: Iterable[object], **changed: object) -> tuple[object, ...]:
        return new(type(self), **{**asdict(self), **changed})

    def text(self: Iterable[object]) -> str:
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in asdict(self).items())})"

    def arguments(self: Iterable[object]) -> tuple[object, ...]:
        return (*self,)

    contents: dict[str, object] = {
        "__getnewargs__": arguments,
        "__match_args__": names,
        "__module__": module,
        "__new__": new,
        "__repr__": text,
        "__slots__": (),
        "_asdict": asdict,
        "_fields": names,
        "_make": classmethod(make),
        "_replace": replace,
        **{field: tuplegetter(i, "") for i, field in enumerate(names)},
    }
    return type(name, (tuple,), contents)

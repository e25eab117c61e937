"""What stands for `collections` and `functools` where those would take too long to import."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest

from rawaio import _light

# What `import rawaio` must do without, for it takes long.
HEAVY = ["asyncio", "collections", "dataclasses", "enum", "functools", "operator", "re", "typing"]


class Pair(NamedTuple):
    first: int
    second: str


def test_a_named_tuple_is_what_collections_makes() -> None:
    ours, theirs = _light.named_tuple("Pair", "first second")(1, "b"), Pair(1, "b")
    assert ours == theirs == (1, "b")
    assert (ours.first, ours.second) == (1, "b")
    assert repr(ours) == repr(theirs)
    assert ours._asdict() == theirs._asdict()
    assert ours._fields == theirs._fields
    assert ours._replace(first=3) == theirs._replace(first=3) == (3, "b")
    assert type(ours._replace(first=3)) is type(ours)
    with pytest.raises(AttributeError):
        ours.first = 2
    with pytest.raises(AttributeError):
        ours.third = 3


def test_cache_calls_once_for_each_argument() -> None:
    calls: list[int] = []

    def double(n: int) -> int:
        calls.append(n)
        return 2 * n

    cached = _light.cache(double)
    assert [cached(2), cached(3), cached(2)] == [4, 6, 4]
    assert calls == [2, 3]


def test_import_rawaio_imports_nothing_heavy() -> None:
    """Nor do a request and a look at the version; -S keeps `site` from importing it."""
    code = (
        "import sys, rawaio; rawaio.Request.fsync(0); rawaio.__version__;"
        f"print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_enumerations_are_there_on_first_use() -> None:
    import rawaio
    from rawaio import request, syscalls

    assert rawaio.State is request.State
    assert rawaio.Opcode is syscalls.Opcode
    assert rawaio.RWF is syscalls.RWF
    for module in (rawaio, request, syscalls):
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            _ = module.Nothing
    numbers = {name: getattr(syscalls, f"IOCB_CMD_{name}") for name in rawaio.Opcode.__members__}
    assert numbers == {o.name: o.value for o in rawaio.Opcode}
    states = {name: getattr(request, name) for name in rawaio.State.__members__}
    assert states == {s.name: s.value for s in rawaio.State}

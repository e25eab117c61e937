"""What stands for `collections` and `functools` where those would take too long to import."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from rawaio import _light, syscalls

# What `import rawaio` must do without, for it takes long.
HEAVY = ["asyncio", "collections", "dataclasses", "enum", "functools", "operator", "re", "typing"]


class Pair(NamedTuple):
    first: int
    second: str


def test_a_named_tuple_is_what_collections_makes() -> None:
    ours, theirs = _light.named_tuple(__name__, "Pair", "first second")(1, "b"), Pair(1, "b")
    assert ours == theirs == (1, "b")
    assert (ours.first, ours.second) == (1, "b")
    assert repr(ours) == repr(theirs)
    assert ours._asdict() == theirs._asdict()
    assert ours._fields == theirs._fields
    assert ours._replace(first=3) == theirs._replace(first=3) == (3, "b")
    assert type(ours._replace(first=3)) is type(ours)
    again = type(ours)(1, second="b"), type(ours)._make([1, "b"]), copy.copy(ours)
    assert again == (ours, ours, ours)
    with pytest.raises(AttributeError):
        ours.first = 2
    with pytest.raises(AttributeError):
        ours.third = 3


def test_a_named_tuple_can_be_pickled() -> None:
    numbers = syscalls.SyscallNumbers(*range(10))
    assert pickle.loads(pickle.dumps(numbers)) == numbers
    assert copy.deepcopy(numbers)._fields == syscalls.SyscallNumbers._fields


@pytest.mark.parametrize(
    "make",
    [
        lambda pair: pair(1),
        lambda pair: pair(1, 2, 3),
        lambda pair: pair(1, third=2),
        lambda pair: pair(1, 2, second=2),
        lambda pair: pair(1, 2)._replace(third=3),
        lambda pair: pair._make([1]),
    ],
)
def test_a_named_tuple_has_all_its_fields_and_no_others(make: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match="Pair takes first, second"):
        make(_light.named_tuple(__name__, "Pair", "first second"))


def test_cache_calls_once_for_each_argument() -> None:
    calls: list[int] = []

    def double(n: int) -> int:
        calls.append(n)
        return 2 * n

    cached = _light.cache(double)
    assert [cached(2), cached(3), cached(2)] == [4, 6, 4]
    assert calls == [2, 3]
    assert syscalls.raw_syscall.__name__ == "raw_syscall"
    assert "Safety" in (syscalls.raw_syscall.__doc__ or "")


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
    from rawaio import request

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

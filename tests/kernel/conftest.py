"""Fixtures of the tests of `IOContext`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

import rawaio
from tests.context_support import KINDS, Pipe, Threads, new_context

_Make = Callable[..., rawaio.IOContext]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make(kind: str, null: int, pipes: object) -> Iterator[_Make]:
    """Makes contexts of the kind, and closes them, before the descriptors that they use."""
    made: list[rawaio.IOContext] = []

    def make(**limits: int) -> rawaio.IOContext:
        made.append(new_context(kind, **limits))
        return made[-1]

    try:
        yield make
    finally:
        for ctx in made:
            ctx.close()


@pytest.fixture
def ctx(make: _Make) -> rawaio.IOContext:
    return make()


@pytest.fixture
def null() -> Iterator[int]:
    """/dev/null: a write to it completes inside io_submit."""
    fd = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def pipes() -> Iterator[Callable[[int], list[Pipe]]]:
    made: list[Pipe] = []

    def make(n: int) -> list[Pipe]:
        new = [Pipe() for _ in range(n)]
        made.extend(new)
        return new

    try:
        yield make
    finally:
        for pipe in made:
            pipe.close()


@pytest.fixture
def pipe(pipes: Callable[[int], list[Pipe]]) -> Pipe:
    return pipes(1)[0]


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads()
    try:
        yield threads
    finally:
        threads.join()

"""Modes, and descriptors that are closed once. tests/kernel/test_file_open.py opens files."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest

from rawaio.descriptor import Descriptor, parse_mode


@pytest.mark.parametrize(
    ("mode", "text", "readable", "writable", "create"),
    [
        ("r", "r", True, False, 0),
        ("r+", "r+", True, True, 0),
        ("w", "w", False, True, os.O_CREAT),
        ("w+", "w+", True, True, os.O_CREAT),
        ("x", "x", False, True, os.O_CREAT | os.O_EXCL),
        ("x+", "x+", True, True, os.O_CREAT | os.O_EXCL),
    ],
)
@pytest.mark.parametrize("b", ["", "b in front", "b behind"])
def test_modes(  # noqa: PLR0917 - a table
    mode: str, text: str, readable: bool, writable: bool, create: int, b: str
) -> None:
    if b:
        mode = mode[0] + "b" + mode[1:] if b == "b in front" else mode + "b"
    parsed = parse_mode(mode)
    assert (parsed.text, parsed.readable, parsed.writable) == (text, readable, writable)
    assert parsed.create == create  # and never O_TRUNC: what is refused is not cut


@pytest.mark.parametrize(
    "mode", ["", "b", "+", "br", "rw", "r++", "rbb", "rt", "rU", "wx", "R", " r", "r ", "+r"]
)
def test_modes_that_there_are_not(mode: str) -> None:
    with pytest.raises(ValueError, match="mode must be"):
        parse_mode(mode)


@pytest.mark.parametrize("mode", ["a", "a+", "ab"])
def test_appending_is_a_method_and_no_mode(mode: str) -> None:
    with pytest.raises(ValueError, match=r"append\(\)"):
        parse_mode(mode)


@pytest.mark.parametrize("mode", [None, 5, b"r"])
def test_a_mode_is_text(mode: Any) -> None:
    with pytest.raises(TypeError, match="mode must be a str"):
        parse_mode(mode)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    closed: list[int] = []
    monkeypatch.setattr(os, "close", closed.append)
    return closed


def test_a_descriptor_is_closed_once(closed: list[int]) -> None:
    descriptor = Descriptor(1234, "name")
    assert descriptor.fileno() == 1234
    descriptor.close()
    descriptor.close()
    assert descriptor.fileno() == -1
    assert closed == [1234]
    del descriptor
    gc.collect()
    assert closed == [1234]


def test_a_descriptor_is_closed_once_by_many_threads(closed: list[int]) -> None:
    for _ in range(50):
        descriptor = Descriptor(1234, "name")
        barrier = threading.Barrier(4)

        def close(descriptor: Descriptor = descriptor, barrier: Any = barrier) -> None:
            barrier.wait()
            descriptor.close()

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert closed == [1234]
        closed.clear()


def test_the_caller_s_descriptor_is_not_closed(closed: list[int]) -> None:
    descriptor = Descriptor(1234, "name", owned=False)
    descriptor.close()
    assert descriptor.fileno() == -1
    del descriptor
    gc.collect()
    assert closed == []


def test_an_owned_descriptor_is_closed_when_it_is_forgotten() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    descriptor = Descriptor(fd, "name", owned=False)
    descriptor.own()
    with pytest.warns(ResourceWarning, match="unclosed rawaio.File 'name'"):
        del descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_an_error_of_a_forgotten_descriptor_is_nobody_s() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    descriptor = Descriptor(fd, "name")
    with pytest.warns(ResourceWarning):
        del descriptor


def test_a_forgotten_descriptor_needs_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the program's end there may be none left."""
    fd = os.open(os.devnull, os.O_RDONLY)
    descriptor = Descriptor(fd, "name")
    for name in ("os", "warnings"):
        monkeypatch.setattr(f"rawaio.descriptor.{name}", None)
    with pytest.warns(ResourceWarning, match="unclosed rawaio.File 'name'"):
        del descriptor
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)

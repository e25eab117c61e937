"""Calls of functions in threads: what they hold, and until when."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import pytest

from rawaio.errors import RawAIOError, set_written
from rawaio.operation import Call, Operation, Phase
from rawaio.request import Request


@pytest.fixture(autouse=True)
def _no_collection() -> Generator[None, None, None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Waiter:
    """Looks, when it is woken."""

    def __init__(self) -> None:
        self.look: Callable[[], object] = lambda: None
        self.result: object = None
        self.error: BaseException | None = None
        self._done = False

    def done(self) -> bool:
        return self._done

    def cancel(self) -> object:
        raise AssertionError("nobody cancels")

    def set_result(self, result: Any, /) -> None:
        self._done, self.result = True, result
        self.look()

    def set_exception(self, exception: Any, /) -> None:
        self._done, self.error = True, exception
        self.look()

    def __await__(self) -> Generator[Any, None, Any]:
        raise AssertionError("nobody awaits")


class Driver:
    """What a call needs of its driver."""

    moved = False
    refusal: RawAIOError | None = None

    def __init__(self) -> None:
        self.made: list[Waiter] = []

    def waiter(self) -> Waiter:
        self.made.append(Waiter())
        return self.made[-1]

    def admit(self) -> None:
        raise AssertionError("not asked")

    def begin(self, operation: Operation, /) -> None:
        raise AssertionError("not asked")

    def offload(self, operation: Operation, /) -> None:
        raise AssertionError("not asked")

    def requeue(self, operation: Operation, /, request: Request | None, *, offloaded: bool) -> None:
        raise AssertionError("not asked")

    def wake(self, waiter: object, result: object, error: BaseException | None) -> None:
        raise AssertionError("not asked")

    def dispose(self, function: Callable[[], object]) -> None:
        raise AssertionError("not asked")


class Memory:
    """What is lent."""


def _done(function: Callable[[], object], look: Callable[[], object]) -> tuple[Call, Waiter]:
    driver = Driver()
    call = Call(driver, function)
    driver.made[0].look = look
    call.start()
    call.perform(None)
    del function
    call.completed(0)
    assert call.phase == Phase.FINISHED
    return call, driver.made[0]


def _lent(fail: Callable[[], None]) -> tuple[Callable[[], int], weakref.ref[Memory]]:
    memory = Memory()
    return partial(_use, memory, fail), weakref.ref(memory)


def _use(memory: Memory, fail: Callable[[], None]) -> int:
    fail()
    return id(memory)


def test_the_function_is_let_go_before_the_waiter_is_woken() -> None:
    seen: list[object] = []
    function, memory = _lent(lambda: None)
    functions = [function]
    del function
    call, waiter = _done(functions.pop(), lambda: seen.append(memory()))
    assert seen == [None]
    assert isinstance(waiter.result, int)
    call.completed(0)  # repeated


def _no_space() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")
    set_written(error, 5)
    error.add_note("a note")
    try:
        raise ValueError("before")
    except ValueError as before:
        raise error from before


class Interrupted(KeyboardInterrupt):
    """Can be referred to weakly."""


def _interrupted() -> None:
    raise Interrupted


@pytest.mark.parametrize("fail", [_no_space, _interrupted])
def test_an_error_holds_nothing_of_what_the_function_had(fail: Callable[[], None]) -> None:
    seen: list[object] = []
    function, memory = _lent(fail)
    functions = [function]
    del function
    call, waiter = _done(functions.pop(), lambda: seen.append(memory()))
    assert seen == [None]
    error = waiter.error
    assert error is not None
    lines: list[str] = []
    traceback = error.__traceback__
    while traceback is not None:
        lines.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert lines == ["perform", "_use", fail.__name__]
    call.completed(0)  # repeated, it changes nothing
    assert waiter.error is error
    # And the call does not hold the error, which holds the call.
    if fail is _interrupted:
        gone = weakref.ref(error)
        waiter.error = error = None
        assert gone() is None


def test_an_error_of_the_kernel_is_made_anew_and_is_the_same() -> None:
    raised: list[OSError] = []

    def fail() -> None:
        try:
            _no_space()
        except OSError as error:
            raised.append(error)
            raise

    _, waiter = _done(fail, lambda: None)
    error = waiter.error
    assert error is not raised[0]
    assert type(error) is OSError
    assert (error.errno, error.strerror, error.filename) == (
        errno.ENOSPC,
        os.strerror(errno.ENOSPC),
        "a file",
    )
    assert getattr(error, "characters_written") == 5  # noqa: B009 - typeshed knows it not
    assert error.__notes__ == ["a note"]
    assert repr(error.__cause__) == repr(error.__context__) == "ValueError('before')"
    assert error.__suppress_context__


def test_an_error_that_says_nothing_of_bytes_goes_on_saying_nothing() -> None:
    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, "nothing there", "a file")

    _, waiter = _done(fail, lambda: None)
    assert type(waiter.error) is FileNotFoundError
    assert not hasattr(waiter.error, "characters_written")
    assert str(waiter.error) == "[Errno 2] nothing there: 'a file'"

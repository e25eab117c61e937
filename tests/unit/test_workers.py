"""Threads for what blocks: how many there are, when they start, and that they end."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from rawaio.workers import MAX_THREADS, Workers
from tests.context_support import LIMIT_S


class Work:
    """Jobs that tell when they begin, and go on when they are let."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []

    def __call__(self) -> None:
        self.threads.append(threading.current_thread())
        self.begun.release()
        assert self.go.acquire(timeout=LIMIT_S)
        self.ended.release()

    def wait_begun(self, n: int = 1) -> None:
        for _ in range(n):
            assert self.begun.acquire(timeout=LIMIT_S)

    def let(self, n: int = 1) -> None:
        self.go.release(n)
        for _ in range(n):
            assert self.ended.acquire(timeout=LIMIT_S)


@pytest.fixture
def work() -> Work:
    return Work()


class Observed(Workers):
    """Tells when a thread has nothing to do any more."""

    def __init__(self) -> None:
        super().__init__()
        self.rested = threading.Semaphore(0)

    def _rest(self) -> None:
        super()._rest()
        self.rested.release()

    def wait_rested(self, n: int = 1) -> None:
        for _ in range(n):
            assert self.rested.acquire(timeout=LIMIT_S)


@pytest.fixture
def workers(work: Work) -> Iterator[Observed]:
    workers = Observed()
    try:
        yield workers
    finally:
        work.go.release(1000)
        workers.stop()
        join(work)


def join(work: Work) -> None:
    for thread in set(work.threads):
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_a_thread_is_started_for_work_and_used_again(workers: Observed, work: Work) -> None:
    for _ in range(3):
        workers.post((work, ()))
        work.wait_begun()
        work.let()
        workers.wait_rested()
    assert len(set(work.threads)) == 1
    assert work.threads[0].daemon


def test_arguments_are_passed_on(workers: Observed) -> None:
    got: list[object] = []
    done = threading.Event()

    def take(*arguments: object) -> None:
        got.extend(arguments)
        done.set()

    workers.post((take, (1, "two")))
    assert done.wait(LIMIT_S)
    assert got == [1, "two"]


def test_there_are_not_more_threads_than_may_be(workers: Observed, work: Work) -> None:
    for _ in range(MAX_THREADS + 5):
        workers.post((work, ()))
    work.wait_begun(MAX_THREADS)
    assert not work.begun.acquire(blocking=False)
    work.let(5)
    work.wait_begun(5)
    work.let(MAX_THREADS)
    workers.wait_rested(MAX_THREADS + 5)
    assert len(set(work.threads)) == MAX_THREADS


def test_jobs_for_which_there_is_no_thread_are_done_in_their_order(
    workers: Observed, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rawaio.workers.MAX_THREADS", 1)
    order: list[int] = []
    workers.post((work, ()))
    for i in range(10):
        workers.post((order.append, (i,)))
    workers.post((work, ()))
    work.wait_begun()
    work.let()
    work.wait_begun()
    assert order == [*range(10)]


def test_a_second_thread_is_started_when_the_first_is_busy(workers: Observed, work: Work) -> None:
    workers.post((work, ()))
    work.wait_begun()
    workers.post((work, ()))
    work.wait_begun()
    assert len(set(work.threads)) == 2


def test_idle_threads_end(workers: Observed, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rawaio.workers._IDLE_S", 0.001)
    for _ in range(3):
        workers.post((work, ()))
    work.wait_begun(3)
    work.let(3)
    join(work)
    assert (workers._threads, workers._spare) == (0, 0)
    workers.post((work, ()))  # and are started anew
    work.wait_begun()
    work.let()


def test_no_job_is_lost_to_a_thread_that_ends(
    workers: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rawaio.workers._IDLE_S", 0)
    done = threading.Semaphore(0)
    for _ in range(2000):
        workers.post((done.release, ()))
        assert done.acquire(timeout=LIMIT_S)


def test_what_was_posted_before_stop_is_done(work: Work) -> None:
    workers = Workers()
    for _ in range(MAX_THREADS * 2):
        workers.post((work, ()))
    workers.stop()
    workers.stop()
    assert workers.stopped
    work.let(MAX_THREADS * 2)
    join(work)
    assert len(work.threads) == MAX_THREADS * 2


def test_a_thread_that_waits_keeps_nothing_alive(workers: Observed) -> None:
    class Thing:
        def __call__(self, other: object) -> None:
            assert other is not None

    thing, argument = Thing(), Thing()
    alive = weakref.ref(thing), weakref.ref(argument)
    workers.post((thing, (argument,)))
    workers.wait_rested()
    del thing, argument
    gc.collect()
    assert [one() for one in alive] == [None, None]


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets no thread be started any more."""

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    return lambda: monkeypatch.setattr(threading.Thread, "start", start)


def test_without_any_thread_a_job_is_refused(
    workers: Observed, work: Work, no_threads: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        workers.post((work, ()))
    assert (workers._threads, workers._spare) == (0, 0)
    monkeypatch.undo()
    workers.post((work, ()))
    work.wait_begun()
    work.let()
    workers.wait_rested()
    assert len(work.threads) == 1  # the refused one was not done after all


def test_one_thread_does_it_where_no_second_can_be_started(
    workers: Observed, work: Work, no_threads: Callable[[], None]
) -> None:
    workers.post((work, ()))
    work.wait_begun()
    no_threads()
    workers.post((work, ()))
    work.let()
    work.wait_begun()
    work.let()
    workers.wait_rested(2)
    assert len(set(work.threads)) == 1

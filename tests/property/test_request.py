"""The iocbs of all batches against a model, and the life cycle of buffers in any history."""

from __future__ import annotations

import ctypes
from array import array
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rawaio import BusyError, Completion, Opcode, Request, State, aligned_buffer
from rawaio import slab as slab_module
from rawaio.lifecycle import admit, complete_one, offer
from rawaio.request import SERIES
from rawaio.slab import IocbSlab
from rawaio.syscalls import iocb, iovec
from tests.support import interrupted_at

NO_DEADLINE = settings(deadline=None)  # an emulated machine is slow, not wrong

RESFD = 0x7FFF_FFF0
CAPACITY = 200

FDS = st.one_of(st.integers(0, 5), st.integers(0, 2**31 - 1))
OFFSETS = st.one_of(st.integers(0, 9), st.integers(0, 2**63 - 1), st.just(2**63 - 1))
FLAGS = st.one_of(st.just(0), st.integers(0, 2**31 - 1))
PRIORITIES = st.one_of(st.none(), st.integers(0, 2**15 - 1))
# The number of a series of tokens, of which 32 bits are where a fill may change them alone.
SERIES_NUMBERS = st.one_of(
    st.integers(1, 9), st.integers(1, 2**47 - 2), st.integers(2**32 - 2, 2**32 + 2)
)


@dataclass
class Model:
    """What a request was made of; knows what the kernel is to be told."""

    opcode: Opcode
    fd: int
    buffers: list[Any]
    offset: int = 0
    rw_flags: int = 0
    priority: int | None = None
    events: int = 0

    def request(self) -> Request:
        match self.opcode:
            case Opcode.PREAD | Opcode.PWRITE:
                buffer: Any = self.buffers[0]
            case Opcode.PREADV | Opcode.PWRITEV:
                buffer = self.buffers
            case _:
                buffer = None
        return Request(
            self.opcode,
            self.fd,
            buffer,
            self.offset,
            events=self.events,
            rw_flags=self.rw_flags,
            priority=self.priority,
        )

    def places(self) -> list[tuple[int, int]]:
        return [place(buffer) for buffer in self.buffers]

    def check(self, it: iocb, token: int) -> None:
        constant = {
            "aio_data": token,
            "aio_key": 0,
            "aio_rw_flags": self.rw_flags,
            "aio_lio_opcode": int(self.opcode),
            "aio_reqprio": self.priority or 0,
            "aio_fildes": self.fd,
            "aio_offset": self.offset,
            "aio_reserved2": 0,
            "aio_flags": 1 if self.priority is None else 3,
            "aio_resfd": RESFD,
        }
        told = {name: getattr(it, name) for name, *_ in iocb._fields_}
        memory = told.pop("aio_buf"), told.pop("aio_nbytes")
        assert told == constant
        match self.opcode:
            case Opcode.PREAD | Opcode.PWRITE:
                assert memory == self.places()[0]
            case Opcode.PREADV | Opcode.PWRITEV:
                assert memory[1] == len(self.buffers)
                vector = [iovec.from_address(memory[0] + 16 * i) for i in range(memory[1])]
                assert [(v.iov_base, v.iov_len) for v in vector] == self.places()
            case Opcode.POLL:
                assert memory == (self.events, 0)
            case _:
                assert memory == (0, 0)


def place(buffer: Any) -> tuple[int, int]:
    """Address and size, found without what is under test."""
    if isinstance(buffer, bytes):
        # What comes before the bytes of a bytes object is the same for all of them.
        return id(buffer) + bytes.__basicsize__ - 1, len(buffer)
    whole = memoryview(buffer)
    return ctypes.addressof((ctypes.c_char * 0).from_buffer(buffer)), whole.nbytes


@st.composite
def buffers(draw: st.DrawFn, *, writable: bool) -> Any:
    nbytes = draw(st.integers(0, 40))
    kinds: list[Any] = [
        lambda: aligned_buffer(nbytes, 512),
        lambda: bytearray(nbytes),
        lambda: array("i", [7] * nbytes),
        lambda: memoryview(bytearray(nbytes + 3))[3:],
        ctypes.c_uint16 * nbytes,
    ]
    if not writable:
        kinds.append(lambda: bytes(nbytes))
    return draw(st.sampled_from(kinds))()


@st.composite
def models(draw: st.DrawFn) -> Model:
    opcode = draw(st.sampled_from(Opcode))
    fd = draw(FDS)
    if opcode is Opcode.POLL:
        return Model(opcode, fd, [], events=draw(st.integers(1, 2**16 - 1)))
    priority = draw(PRIORITIES)
    if opcode in {Opcode.FSYNC, Opcode.FDSYNC}:
        return Model(opcode, fd, [], priority=priority)
    writable = opcode in {Opcode.PREAD, Opcode.PREADV}
    single = opcode in {Opcode.PREAD, Opcode.PWRITE}
    most = 1 if single else 4
    own = draw(st.lists(buffers(writable=writable), min_size=int(single), max_size=most))
    return Model(opcode, fd, own, draw(OFFSETS), draw(FLAGS), priority)


def pointers_of(slab: IocbSlab) -> list[int]:
    return list((ctypes.c_uint64 * slab.capacity).from_address(slab.address))


def check_fill(slab: IocbSlab, series: int, batch: list[tuple[Model, Request]]) -> None:
    token = series * SERIES
    slab.fill(token, [request for _, request in batch])
    pointers = pointers_of(slab)
    assert len(set(pointers)) == len(pointers)
    for i, (model, request) in enumerate(batch):
        if model.opcode is Opcode.POLL:
            assert pointers[i] == request.own_iocb()[1]
        model.check(iocb.from_address(pointers[i]), token + i)
    n = len(batch)
    assert list(slab.tokens(token, n)) == list(range(token, token + n))
    assert list(slab.tokens(token + n - 1, 1)) == [token + n - 1]
    assert token - 1 not in slab.tokens(token - 1, n)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(models(), min_size=1, max_size=5),
            st.one_of(st.integers(1, 17), st.sampled_from([64, 199, 200])),
            SERIES_NUMBERS,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_iocbs_of_every_batch(rounds: list[tuple[list[Model], int, int]]) -> None:
    slab = IocbSlab(CAPACITY, RESFD)
    places = pointers_of(slab)
    for few, n, token in rounds:
        # A few kinds, over and over, each as requests of their own.
        batch = [(model, model.request()) for model in (few * n)[:n]]
        admit(iter([request for _, request in batch]), {})
        check_fill(slab, token, batch)
        check_fill(slab, token + 1, batch[::-1])
        own = {i for i, (model, _) in enumerate(batch[::-1]) if model.opcode is Opcode.POLL}
        assert [p for i, p in enumerate(pointers_of(slab)) if i not in own] == [
            p for i, p in enumerate(places) if i not in own
        ]
    slab.fill(SERIES, [Request.fsync(0)])
    assert pointers_of(slab) == places


@pytest.mark.parametrize("few", [1, 2, 4])
def test_the_upper_bits_of_a_few_tokens_are_not_left_to_the_next_batch(few: int) -> None:
    slab = IocbSlab(CAPACITY, RESFD)
    models = [Model(Opcode.PREAD, 0, [bytearray(1)], offset=i) for i in range(12)]
    batch = [(model, model.request()) for model in models]
    admit(iter([request for _, request in batch]), {})
    for n, series in ((12, 1), (few, 1 << 32 | 1), (12, 1), (few, 1), (12, 1 << 32 | 1)):
        check_fill(slab, series, batch[:n])


CHANGES = st.lists(
    st.tuples(st.integers(0, 11), st.sampled_from(["offset", "rw_flags"]), st.integers(0, 2)),
    max_size=3,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(models(), min_size=12, max_size=12),
    st.lists(
        st.tuples(CHANGES, st.sampled_from([1, 2, 8, 9, 11, 12]), st.booleans(), SERIES_NUMBERS),
        min_size=2,
        max_size=8,
    ),
)
def test_requests_that_come_again(
    kinds: list[Model], rounds: list[tuple[list[tuple[int, str, int]], int, bool, int]]
) -> None:
    """In the same batches and in others, some of them changed since."""
    slab = IocbSlab(CAPACITY, RESFD)
    batch = [(model, model.request()) for model in kinds]
    for changes, n, reverse, token in rounds:
        for i, name, value in changes:
            model, request = batch[i]
            if model.opcode in {Opcode.PREAD, Opcode.PWRITE, Opcode.PREADV, Opcode.PWRITEV}:
                setattr(model, name, value)
                setattr(request, name, value)
        there = batch[:n][:: -1 if reverse else 1]
        admit(iter([request for _, request in there]), {})
        check_fill(slab, token, there)
        offer([request for _, request in there])
        for _, request in there:
            complete_one(request)


@pytest.mark.parametrize("n", [1, 2, 12])
@pytest.mark.parametrize("before", [1, 2, 12])
def test_a_fill_that_is_struck_leaves_no_wrong_memory(before: int, n: int) -> None:
    """Wherever an exception from outside strikes, the next batch is right."""
    kinds = [Model(Opcode.PWRITE, i, [aligned_buffer(64)], 512 * i) for i in range(24)]
    batch = [(model, model.request()) for model in kinds]
    first, other = batch[:before], batch[12 : 12 + n]
    moved = [(replace(model, offset=7), replace(model, offset=7).request()) for model, _ in first]
    # The batch after it may have tokens that it had, or that the one before it had.
    for struck, series in product((other, moved, first), (5, 70, 99)):
        requests = [request for _, request in struck]
        step = 0
        interrupted = True
        while interrupted:
            slab = IocbSlab(12, RESFD)
            check_fill(slab, 5, first)
            fill = partial(slab.fill, 70 * SERIES, requests)
            interrupted = interrupted_at(step, slab_module.__file__, fill)
            for following in (first, struck, first):
                check_fill(slab, series, following)
            step += 1
        assert step > 20


@pytest.mark.parametrize("n", range(1, CAPACITY + 1))
def test_every_size_of_batch(n: int) -> None:
    slab = IocbSlab(CAPACITY, RESFD)
    buffer = aligned_buffer(64)
    kinds = [
        Model(Opcode.PWRITE, 3, [buffer], 512),
        Model(Opcode.PREADV, 4, [buffer, buffer[:7]], 2**63 - 1, 8, 5),
        Model(Opcode.FSYNC, 5, []),
    ]
    if n % 2:
        kinds.append(Model(Opcode.POLL, 6, [], events=5))
    batch = [(m, m.request()) for m in (kinds * n)[:n]]
    check_fill(slab, 2**33, batch)
    untouched = ctypes.string_at(pointers_of(slab)[CAPACITY - 1], 64)
    assert n == CAPACITY or untouched == bytes(60) + RESFD.to_bytes(4, "little")


@NO_DEADLINE
@given(
    models(),
    st.lists(
        st.tuples(
            st.sampled_from(["offset", "fd", "rw_flags", "priority", "push", "complete"]),
            st.integers(0, 2**15 - 1),
        ),
        max_size=12,
    ),
)
def test_every_history_of_changes(model: Model, steps: list[tuple[str, int]]) -> None:
    request = model.request()
    under_way = False
    slab = IocbSlab(1, RESFD)
    for step, value in steps:
        if step == "push":
            if not under_way:
                admit(iter([request]), {})
                under_way = True
                check_fill(slab, value + 1, [(model, request)])
        elif step == "complete":
            if under_way:
                offer([request])
                complete_one(request)
                under_way = False
        elif under_way:
            with pytest.raises(BusyError):
                setattr(request, step, value)
        elif step in {"offset", "rw_flags"} and not model.buffers and model.opcode.name[-1] != "V":
            with pytest.raises(TypeError):
                setattr(request, step, value)
        else:
            setattr(request, step, value)
            setattr(model, step, value)
            assert getattr(request, step) == value
    if not under_way:
        admit(iter([request]), {})
    check_fill(slab, 7, [(model, request)])


@NO_DEADLINE
@given(
    st.sampled_from(["pread", "pwrite", "preadv", "pwritev"]),
    st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    st.booleans(),
)
def test_a_buffer_is_held_exactly_while_the_request_is_under_way(
    name: str, sizes: list[int], vetoed: bool
) -> None:
    buffer = bytearray(3)
    whole: Any = [aligned_buffer(8), buffer] if name.endswith("v") else buffer
    request: Request = getattr(Request, name)(1, whole, 0)
    for size in sizes:
        buffer[:] = bytes(size)
        admit(iter([request]), {})
        with pytest.raises(BufferError):
            buffer.append(1)
        model = Model(request.opcode, 1, list(whole) if name.endswith("v") else [buffer])
        check_fill(IocbSlab(1, RESFD), 1, [(model, request)])
        assert request.nbytes == size + (8 if name.endswith("v") else 0)
        if vetoed:
            with pytest.raises(BusyError):
                request.offset = 5
        offer([request])
        complete_one(request)
        assert request.state is State.COMPLETED
    buffer.append(1)


INT64 = st.integers(-(2**63), 2**63 - 1)


@NO_DEADLINE
@given(INT64, INT64)
@example(0, 0)
@example(-1, 0)
@example(0, -1)
@example(0, 1)
def test_results_are_composed_as_c_does_it(res: int, res2: int) -> None:
    # QEMU: (ssize_t)(((uint64_t)ev->res2 << 32) | ev->res)
    upper = ctypes.c_uint64(ctypes.c_uint64(res2).value << 32).value
    expected = ctypes.c_int64(upper | ctypes.c_uint64(res).value).value
    completion = Completion((Request.fsync(1), res, res2))
    if expected >= 0:
        assert completion.result() == expected
    elif expected >= -(2**31):  # what is no errno in C either is nobody's business
        with pytest.raises(OSError, match="fsync: ") as caught:
            completion.result()
        assert caught.value.errno == -expected

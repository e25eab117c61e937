"""Requests one by one: what is refused, what the iocb says, the life cycle, and the result."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import length_hint
from typing import Any, cast

import pytest

from rawaio import RWF, BusyError, Completion, Opcode, Request, State, aligned_buffer, memory
from rawaio import slab as slab_module
from rawaio.lifecycle import (
    admit,
    advance,
    complete,
    complete_one,
    offer,
    reopen,
    restore,
    take_back,
)
from rawaio.request import (
    SERIES,
    TRANSITIONS,
    Step,
)
from rawaio.slab import IocbSlab
from rawaio.syscalls import iocb, iovec
from tests.queue_support import at_switch_point
from tests.support import address_of

MAX_OFFSET = 2**63 - 1
MAX_FD = 2**31 - 1
MAX_BYTES = 0x7FFFF000
RESFD = 33

TRANSFERS = ["pread", "pwrite", "preadv", "pwritev"]
SINGLE = ["pread", "pwrite"]
VECTORED = ["preadv", "pwritev"]
OTHERS = ["fsync", "fdsync", "poll"]
ALL = TRANSFERS + OTHERS


def make(name: str, *, fd: Any = 3, buffer: Any = None, **options: Any) -> Request:
    """A request of a kind; its buffer is one that stays where it is."""
    constructor = getattr(Request, name)
    if name in OTHERS:
        arguments = [select.POLLIN] if name == "poll" else []
    else:
        offset = options.pop("offset", 4096)
        if buffer is None:
            buffer = aligned_buffer(512)
            if name in VECTORED:
                buffer = [buffer, aligned_buffer(1024)]
        arguments = [buffer, offset]
    return cast("Request", constructor(fd, *arguments, **options))


def encoded(request: Request, token: int = 1) -> iocb:
    """What the kernel would be given."""
    slab = IocbSlab(1, RESFD)
    slab.fill(token, [request])
    pointers = (ctypes.c_uint64 * 1).from_address(slab.address)
    return iocb.from_buffer_copy(ctypes.string_at(pointers[0], 64))


def fields(it: iocb) -> dict[str, int]:
    return {name: getattr(it, name) for name, *_ in iocb._fields_}


def snapshot(request: Request) -> tuple[object, ...]:
    """All that can be seen of a request."""
    return (
        request.state,
        request.opcode,
        request.fd,
        id(request.buffer),
        request.nbytes,
        request.offset,
        request.rw_flags,
        request.priority,
        repr(request),
        fields(encoded(request)),
    )


def admitted(*requests: Request) -> None:
    admit(iter(requests), {})


def in_state(state: State, name: str = "pread", **options: Any) -> Request:
    request = make(name, **options)
    if state is State.RELEASED:
        request = make(name, buffer=bytearray(512), **options)
    if state is not State.NEW:
        admitted(request)
    if state >= State.IN_FLIGHT:
        offer([request])
    if state >= State.COMPLETED:
        complete_one(request)
    assert request._state == state
    return request


# -- constructors ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_constructor_keeps_what_it_was_given(name: str) -> None:
    def callback(completion: Completion) -> None:
        pass

    data = object()
    request = make(name, fd=7, callback=callback, user_data=data)
    assert request.state is State.NEW
    assert request.opcode is Opcode[name.upper()]
    assert request.fd == 7
    assert request.callback is callback
    assert request.user_data is data
    assert (request.rw_flags, request.priority) == (0, None)
    if name in TRANSFERS:
        assert request.offset == 4096
        assert request.nbytes == (512 if name in SINGLE else 1536)
    else:
        assert (request.offset, request.nbytes, request.buffer) == (0, 0, None)
    plain = make(name)
    assert (plain.callback, plain.user_data) == (None, None)


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_take_flags_and_priority(name: str) -> None:
    request = make(name, rw_flags=RWF.DSYNC | RWF.NOWAIT, priority=5)
    assert (request.rw_flags, request.priority) == (10, 5)
    it = encoded(request)
    assert (it.aio_rw_flags, it.aio_reqprio, it.aio_flags) == (10, 5, 3)


@pytest.mark.parametrize("name", ["fsync", "fdsync"])
def test_syncs_take_a_priority(name: str) -> None:
    it = encoded(make(name, priority=9))
    assert (it.aio_reqprio, it.aio_flags) == (9, 3)


@pytest.mark.parametrize("name", ALL)
def test_the_general_form_makes_the_same(name: str) -> None:
    if name in TRANSFERS:
        model = make(name, rw_flags=2, priority=1)
        general = Request(
            Opcode[name.upper()], 3, cast("Any", model.buffer), 4096, rw_flags=2, priority=1
        )
    else:
        model = make(name)
        events = select.POLLIN if name == "poll" else 0
        general = Request(Opcode[name.upper()].value, 3, events=events)
    ours, theirs = fields(encoded(general)), fields(encoded(model))
    if name in VECTORED:
        del ours["aio_buf"], theirs["aio_buf"]
    assert ours == theirs


@pytest.mark.parametrize("buffer", [b"read-only", bytearray(5), array("q", [1]), memoryview(b"x")])
def test_any_buffer_can_be_written_from(buffer: Any) -> None:
    nbytes = memoryview(buffer).nbytes
    assert Request.pwrite(1, buffer, 0).nbytes == nbytes
    assert Request.pwritev(1, [buffer, buffer], 0).nbytes == 2 * nbytes


def test_nbytes_is_bytes_and_not_items() -> None:
    assert Request.pread(1, array("f", [0.0] * 10), 0).nbytes == 40
    assert Request.preadv(1, [array("d", [0.0]), bytearray(3)], 0).nbytes == 11
    assert Request.preadv(1, (), 0).nbytes == 0
    assert Request.pread(1, bytearray(), 0).nbytes == 0


class File:
    def __init__(self, number: Any) -> None:
        self.number = number

    def fileno(self) -> Any:
        return self.number


@pytest.mark.parametrize("name", ALL)
def test_a_file_object_is_kept_alive_and_its_descriptor_used(name: str) -> None:
    file = File(12)
    reference = weakref.ref(file)
    request = make(name, fd=file)
    assert request.fd is file
    assert encoded(request).aio_fildes == 12
    assert "fd 12" in repr(request)
    del file
    assert reference() is not None
    del request
    gc.collect()
    assert reference() is None


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [4, 6, 9, -1, 255, "pread", None, 2**16])
def test_an_unknown_opcode_is_refused(opcode: Any) -> None:
    with pytest.raises(ValueError, match="unknown opcode") as caught:
        Request(opcode, 1, bytearray(1))
    assert str(caught.value).endswith(
        f"{opcode!r}; known are PREAD 0, PWRITE 1, FSYNC 2, FDSYNC 3, POLL 5, PREADV 7, PWRITEV 8"
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fd", [-1, -(2**31), MAX_FD + 1, 2**32, File(-1), File(2**31)])
def test_a_descriptor_out_of_range_is_refused(name: str, fd: Any) -> None:
    number = fd.number if isinstance(fd, File) else fd
    with pytest.raises(ValueError, match=rf"fd must be within 0\.\.2\*\*31-1, not {number}"):
        make(name, fd=fd)


@pytest.mark.parametrize("fd", [None, "0", 1.0, object(), b"0"])
def test_what_has_no_descriptor_is_refused(fd: Any) -> None:
    expected = rf"fd must be an int or have fileno\(\), not {type(fd).__name__}"
    with pytest.raises(TypeError, match=expected) as caught:
        make("fsync", fd=fd)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("number", [3.0, "3", None])
def test_a_fileno_that_is_no_int_is_refused(number: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r".*"):
        make("fsync", fd=File(number))


@pytest.mark.parametrize("fd", [0, 1, MAX_FD])
def test_the_ends_of_the_range_of_descriptors(fd: int) -> None:
    assert encoded(make("pread", fd=fd)).aio_fildes == fd
    assert encoded(make("pread", fd=File(fd))).aio_fildes == fd


@pytest.mark.parametrize("name", TRANSFERS)
@pytest.mark.parametrize("offset", [-1, -(2**63), MAX_OFFSET + 1, 2**64])
def test_an_offset_out_of_range_is_refused(name: str, offset: int) -> None:
    with pytest.raises(ValueError, match=rf"offset must be within 0\.\.2\*\*63-1, not {offset}"):
        make(name, offset=offset)


@pytest.mark.parametrize("offset", [1.0, "1", None])
def test_an_offset_that_is_no_int_is_refused(offset: Any) -> None:
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        make("pread", offset=offset)


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("offset", [0, 1, MAX_OFFSET, Index(77), True])
def test_offsets_are_what_index_makes_of_them(offset: Any) -> None:
    expected = offset.value if isinstance(offset, Index) else int(offset)
    request = make("pread", offset=offset)
    assert request.offset == expected
    assert type(request.offset) is int
    assert encoded(request).aio_offset == expected


@pytest.mark.parametrize("rw_flags", [-1, 1 << 31, 1 << 32])
def test_flags_out_of_range_are_refused(rw_flags: int) -> None:
    expected = rf"rw_flags must be within 0\.\.2\*\*31-1, not {rw_flags}"
    with pytest.raises(ValueError, match=expected):
        make("pread", rw_flags=rw_flags)


@pytest.mark.parametrize("rw_flags", [0, RWF.APPEND, 0xFF, (1 << 31) - 1, Index(4)])
def test_unknown_flags_are_the_kernel_s_to_refuse(rw_flags: Any) -> None:
    expected = rw_flags.value if isinstance(rw_flags, Index) else int(rw_flags)
    request = make("pwrite", rw_flags=rw_flags)
    assert request.rw_flags == expected
    assert encoded(request).aio_rw_flags == expected


@pytest.mark.parametrize("priority", [-1, 1 << 15, 1 << 16])
def test_a_priority_out_of_range_is_refused(priority: int) -> None:
    with pytest.raises(ValueError, match=rf"priority must be within 0\.\.32767, not {priority}"):
        make("fsync", priority=priority)


@pytest.mark.parametrize("priority", [0, 1, (1 << 15) - 1, Index(8), None])
def test_priorities(priority: Any) -> None:
    expected = priority.value if isinstance(priority, Index) else priority
    request = make("pread", priority=priority)
    assert request.priority == expected
    it = encoded(request)
    assert it.aio_reqprio == (expected or 0)
    assert it.aio_flags == (1 if expected is None else 3)


@pytest.mark.parametrize("option", ["rw_flags", "priority"])
@pytest.mark.parametrize("value", [1.5, "1"])
def test_options_that_are_no_ints_are_refused(option: str, value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        make("pread", **{option: value})


@pytest.mark.parametrize("events", [0, -1, 1 << 16, 1 << 20])
def test_a_mask_that_asks_for_nothing_or_too_much_is_refused(events: int) -> None:
    with pytest.raises(ValueError, match=f"events must be a mask of 16 bits .*, not {events}"):
        Request.poll(1, events)


@pytest.mark.parametrize("events", [1, 1 << 15, (1 << 16) - 1, Index(5)])
def test_masks(events: Any) -> None:
    request = Request.poll(1, events)
    expected = events.value if isinstance(events, Index) else events
    assert encoded(request).aio_buf == expected


@pytest.mark.parametrize("opcode", [Opcode.FSYNC, Opcode.FDSYNC, Opcode.POLL])
def test_operations_without_memory_take_none(opcode: Opcode) -> None:
    events = 1 if opcode is Opcode.POLL else 0
    for wrong, what in [
        ({"buffer": bytearray(4)}, "neither buffer nor offset"),
        ({"buffer": b""}, "neither buffer nor offset"),
        ({"offset": 1}, "neither buffer nor offset"),
        ({"rw_flags": 1}, "no rw_flags"),
    ]:
        with pytest.raises(ValueError, match=f"{opcode.name} takes {what}"):
            Request(opcode, 1, events=events, **cast("Any", wrong))


@pytest.mark.parametrize("opcode", [o for o in Opcode if o is not Opcode.POLL])
def test_only_polls_have_events(opcode: Opcode) -> None:
    buffer: Any = {7: [bytearray(1)], 8: [b""], 0: bytearray(1), 1: b"1"}.get(opcode)
    with pytest.raises(ValueError, match=f"{opcode.name} takes no events"):
        Request(opcode, 1, buffer, events=1)


@pytest.mark.parametrize("buffer", [None, "text", 5, [bytearray(4)]])
@pytest.mark.parametrize("name", SINGLE)
def test_what_is_no_buffer_is_refused(name: str, buffer: Any) -> None:
    with pytest.raises(TypeError, match=f"a buffer is needed .*, not {type(buffer).__name__}"):
        getattr(Request, name)(1, buffer, 0)


@pytest.mark.parametrize("buffer", [b"ab", bytearray(4), memoryview(b""), {b"": 1}, 5, None])
@pytest.mark.parametrize("name", VECTORED)
def test_what_is_no_sequence_of_buffers_is_refused(name: str, buffer: Any) -> None:
    expected = f"{name.upper()} takes a sequence of buffers, not {type(buffer).__name__}"
    with pytest.raises(TypeError, match=expected):
        getattr(Request, name)(1, buffer, 0)


@pytest.mark.parametrize("name", VECTORED)
def test_one_wrong_buffer_of_many_is_refused(name: str) -> None:
    good = bytearray(4)
    for wrong in ("text", 5, memoryview(bytearray(8))[::2]):
        with pytest.raises(TypeError):
            getattr(Request, name)(1, [good, wrong, good], 0)
    gc.collect()
    good.append(1)


@pytest.mark.parametrize("buffer", [b"bytes", memoryview(b"bytes")])
def test_read_only_memory_cannot_be_read_into(buffer: Any) -> None:
    with pytest.raises(TypeError, match="read-only"):
        Request.pread(1, buffer, 0)
    with pytest.raises(TypeError, match="read-only"):
        Request.preadv(1, [bytearray(1), buffer], 0)


@pytest.mark.parametrize("name", VECTORED)
def test_1024_segments_and_no_more(name: str) -> None:
    segment = aligned_buffer(4)
    request = make(name, buffer=[segment] * 1024)
    assert request.nbytes == 4096
    assert encoded(request).aio_nbytes == 1024
    with pytest.raises(ValueError, match="at most 1024 segments in a request, not 1025"):
        make(name, buffer=[segment] * 1025)


def untouched(nbytes: int) -> Any:
    """A buffer of that size that is never looked at: there is no such memory."""
    return (ctypes.c_char * nbytes).from_address(4096)


@pytest.mark.parametrize("name", TRANSFERS)
def test_the_kernel_s_limit_of_a_transfer(name: str) -> None:
    most, more = [untouched(MAX_BYTES + d) for d in (0, 1)]
    if name in SINGLE:
        assert make(name, buffer=most).nbytes == MAX_BYTES
        assert encoded(make(name, buffer=most)).aio_nbytes == MAX_BYTES
    else:
        half = untouched(MAX_BYTES // 2)
        assert make(name, buffer=[half, half]).nbytes == MAX_BYTES
        more = [half, half, untouched(1)]
    expected = f"at most {MAX_BYTES} bytes a request, not {MAX_BYTES + 1}"
    with pytest.raises(ValueError, match=expected):
        make(name, buffer=more)


# -- iocbs, one at a time ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_iocb(name: str) -> None:
    request = make(name, fd=5)
    it = fields(encoded(request, token=2**40 + 3))
    buffer = cast("Any", request.buffer)
    if name in SINGLE:
        expected = address_of(buffer), 512, 4096
    elif name in VECTORED:
        vector = [iovec.from_address(it["aio_buf"] + 16 * i) for i in range(2)]
        assert [(v.iov_base, v.iov_len) for v in vector] == [
            (address_of(buffer[0]), 512),
            (address_of(buffer[1]), 1024),
        ]
        expected = it["aio_buf"], 2, 4096
    else:
        expected = (select.POLLIN if name == "poll" else 0), 0, 0
    address, nbytes, offset = expected
    assert it == {
        "aio_data": 2**40 + 3,
        "aio_key": 0,
        "aio_rw_flags": 0,
        "aio_lio_opcode": Opcode[name.upper()],
        "aio_reqprio": 0,
        "aio_fildes": 5,
        "aio_buf": address,
        "aio_nbytes": nbytes,
        "aio_offset": offset,
        "aio_reserved2": 0,
        "aio_flags": 1,
        "aio_resfd": RESFD,
    }


# -- change by assignment ----------------------------------------------------------------------

ASSIGNABLE = [State.NEW, State.COMPLETED, State.RELEASED]


@pytest.mark.parametrize("state", ASSIGNABLE)
@pytest.mark.parametrize("name", TRANSFERS)
def test_assignment(name: str, state: State) -> None:
    if state is State.RELEASED and name in VECTORED:
        request = make(name, buffer=[bytearray(16)])
        admitted(request)
        complete_one(request)
    else:
        request = in_state(state, name)
    request.offset = 2**40
    request.rw_flags = RWF.HIPRI
    request.priority = 3
    file = File(99)
    request.fd = file
    new = aligned_buffer(2048)
    request.buffer = new if name in SINGLE else [new, new, new]
    admitted(request)
    it = encoded(request)
    assert (it.aio_offset, it.aio_rw_flags, it.aio_reqprio) == (2**40, 1, 3)
    assert (it.aio_fildes, it.aio_flags, request.fd) == (99, 3, file)
    if name in SINGLE:
        assert (it.aio_buf, it.aio_nbytes, request.nbytes) == (address_of(new), 2048, 2048)
    else:
        assert (it.aio_nbytes, request.nbytes) == (3, 6144)
        assert iovec.from_address(it.aio_buf + 32).iov_base == address_of(new)
    complete_one(request)
    request.priority = None
    request.fd = 4
    it = encoded(request)
    assert (it.aio_reqprio, it.aio_flags, it.aio_fildes) == (0, 1, 4)


@pytest.mark.parametrize("name", OTHERS)
def test_operations_without_memory_cannot_be_given_any(name: str) -> None:
    request: Any = make(name)
    before = snapshot(request)
    for attribute, value in [("offset", 1), ("buffer", bytearray(1)), ("rw_flags", 1)]:
        with pytest.raises(TypeError, match=f"{name.upper()} has no {attribute}"):
            setattr(request, attribute, value)
    with pytest.raises(TypeError, match="has no buffer"):
        request.buffers = [b""]
    assert snapshot(request) == before
    request.priority = 3
    request.fd = 8
    it = encoded(request)
    assert (it.aio_reqprio, it.aio_fildes) == (3, 8)


CHANGES: dict[str, Any] = {
    "offset": 1,
    "buffer": bytearray(7),
    "buffers": [bytearray(7)],
    "fd": 1,
    "rw_flags": 1,
    "priority": 1,
}


@pytest.mark.parametrize("state", [State.PENDING, State.IN_FLIGHT])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("attribute", CHANGES)
def test_a_request_under_way_cannot_be_changed(name: str, attribute: str, state: State) -> None:
    request = in_state(state, name)
    before = snapshot(request)
    with pytest.raises(BusyError, match="is under way and cannot be changed"):
        setattr(request, attribute, CHANGES[attribute])
    assert snapshot(request) == before
    request.callback = print
    request.user_data = 5
    assert (request.callback, request.user_data) == (print, 5)


WRONG: list[tuple[str, Any]] = [
    ("offset", -1),
    ("offset", 2**63),
    ("offset", "0"),
    ("buffer", None),
    ("buffer", "text"),
    ("buffer", memoryview(bytearray(8))[::2]),
    ("buffer", b"read-only"),
    ("buffer", untouched(MAX_BYTES + 1)),
    ("fd", -1),
    ("fd", 2**31),
    ("fd", "0"),
    ("rw_flags", -1),
    ("rw_flags", 2**31),
    ("rw_flags", 0.5),
    ("priority", -1),
    ("priority", 2**15),
    ("priority", "1"),
]


@pytest.mark.parametrize("state", ASSIGNABLE)
@pytest.mark.parametrize(("attribute", "value"), WRONG)
def test_a_refused_assignment_changes_nothing(attribute: str, value: Any, state: State) -> None:
    request = in_state(state)
    before = snapshot(request)
    with pytest.raises((TypeError, ValueError), match=r".*"):
        setattr(request, attribute, value)
    assert snapshot(request) == before
    admitted(request)
    assert request.state is State.PENDING


@pytest.mark.parametrize("wrong", [[1], [b"read-only"], "text", [bytearray(1)] * 1025])
def test_a_refused_assignment_of_buffers_changes_nothing(wrong: Any) -> None:
    request = make("preadv")
    before = snapshot(request)
    with pytest.raises((TypeError, ValueError), match=r".*"):
        request.buffers = wrong
    assert snapshot(request) == before


class Failing(Sequence[bytearray]):
    """A sequence that raises what it is told to."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, at: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("x"), BufferError("x"), MemoryError()])
def test_whatever_an_assignment_raises_nothing_is_changed(error: Exception) -> None:
    request = make("preadv")
    before = snapshot(request)
    with pytest.raises(type(error)):
        request.buffers = Failing(error)
    assert snapshot(request) == before


def test_buffers_is_another_name_of_buffer() -> None:
    request = make("preadv")
    assert request.buffers is request.buffer
    new = [aligned_buffer(8)]
    request.buffers = new
    assert list(cast("Any", request.buffer)) == new
    assert request.nbytes == 8


@pytest.mark.parametrize("name", VECTORED)
def test_a_sequence_that_changes_afterwards_does_not_change_the_request(name: str) -> None:
    """The count in the iocb is that of the iovecs, or the kernel reads behind their end."""
    buffers = [aligned_buffer(512), aligned_buffer(512)]
    request = make(name, buffer=buffers)
    buffers.append(aligned_buffer(512))
    request.priority = 1
    request.fd = 4
    assert encoded(request).aio_nbytes == 2
    del buffers[:]
    request.priority = 2
    admitted(request)
    it = encoded(request)
    assert it.aio_nbytes == 2
    assert [iovec.from_address(it.aio_buf + 16 * i).iov_len for i in range(2)] == [512, 512]


# -- buffers that can be resized ---------------------------------------------------------------


def lent(name: str, buffer: Any) -> Request:
    return make(name, buffer=buffer if name in SINGLE else [buffer])


def length_in(it: iocb, name: str) -> tuple[int, int]:
    """Address and size of the only buffer."""
    if name in SINGLE:
        return it.aio_buf, it.aio_nbytes
    assert it.aio_nbytes == 1
    segment = iovec.from_address(it.aio_buf)
    return segment.iov_base, segment.iov_len


@pytest.mark.parametrize("make_buffer", [lambda: bytearray(64), lambda: array("B", bytes(64))])
@pytest.mark.parametrize("name", TRANSFERS)
def test_a_resizable_buffer_is_held_from_push_to_completion(
    name: str, make_buffer: Callable[[], Any]
) -> None:
    buffer = make_buffer()
    request = lent(name, buffer)
    buffer.extend(bytes(100_000))  # nothing is held before it is pushed
    for nbytes in (100_064, 200_064, 200_064, 300_064):
        admitted(request)
        assert request.nbytes == nbytes
        assert length_in(encoded(request), name) == (address_of(buffer), nbytes)
        with pytest.raises(BufferError):
            buffer.append(1)
        offer([request])
        with pytest.raises(BufferError):
            buffer.append(1)
        complete_one(request)
        assert request.state is State.COMPLETED
        if nbytes != 200_064 or len(buffer) != 200_064:
            buffer.extend(bytes(100_000))
        elif request.user_data is None:
            request.user_data = "once more, unchanged"
        else:
            buffer.extend(bytes(100_000))
    assert len(buffer) == 400_064


@pytest.mark.parametrize("name", TRANSFERS)
def test_a_buffer_that_was_made_smaller_is_used_as_it_is_now(name: str) -> None:
    buffer = bytearray(100_000)
    request = lent(name, buffer)
    admitted(request)
    complete_one(request)
    del buffer[5:]
    admitted(request)
    assert request.nbytes == 5
    assert length_in(encoded(request), name) == (address_of(buffer), 5)


@pytest.mark.parametrize("name", TRANSFERS)
def test_another_place_alone_is_enough_to_encode_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = bytearray(64)
    request = lent(name, buffer)
    elsewhere = bytearray(64)
    for pin in ("pin_source", "pin_destination"):
        real = getattr(memory, pin)
        monkeypatch.setattr(memory, pin, lambda _, real=real: real(elsewhere))
    admitted(request)
    assert length_in(encoded(request), name) == (address_of(elsewhere), 64)


@pytest.mark.parametrize("name", TRANSFERS)
def test_a_buffer_that_stays_where_it_is_is_held_on(name: str) -> None:
    owner = bytearray(64)
    request = lent(name, memoryview(owner))
    for _ in range(2):
        admitted(request)
        offer([request])
        complete_one(request)
        assert request._state == State.COMPLETED
        with pytest.raises(BufferError):
            owner.append(1)
    del request
    gc.collect()
    owner.append(1)


@pytest.mark.parametrize("name", VECTORED)
def test_one_resizable_buffer_of_many_makes_the_request_let_go_of_all(name: str) -> None:
    fixed, growing = aligned_buffer(64), bytearray(64)
    request = make(name, buffer=[fixed, growing, fixed])
    growing.append(1)
    admitted(request)
    assert request.nbytes == 193
    with pytest.raises(BufferError):
        growing.append(1)
    complete_one(request)
    growing.append(1)
    admitted(request)
    it = encoded(request)
    assert [iovec.from_address(it.aio_buf + 16 * i).iov_len for i in range(3)] == [64, 66, 64]


@pytest.mark.parametrize("state", ASSIGNABLE)
def test_from_a_resizable_buffer_to_one_that_stays_and_back(state: State) -> None:
    request = in_state(state)
    owner, growing = bytearray(32), bytearray(16)
    request.buffer = memoryview(owner)
    with pytest.raises(BufferError):
        owner.append(1)
    request.buffer = growing
    owner.append(1)
    growing.append(1)
    assert request.state is (State.NEW if state is State.NEW else State.COMPLETED)
    admitted(request)
    assert request.nbytes == 17
    assert length_in(encoded(request), "pread") == (address_of(growing), 17)
    with pytest.raises(BufferError):
        growing.append(1)
    complete_one(request)
    growing.append(1)
    request.buffer = memoryview(owner)
    admitted(request)
    assert encoded(request).aio_buf == address_of(owner)
    with pytest.raises(BufferError):
        owner.append(1)


def test_the_request_gives_its_memory_up_with_its_end() -> None:
    owner = bytearray(64)
    for request in (make("pread", buffer=memoryview(owner)), make("pwrite", buffer=owner)):
        admitted(request)
    del request
    gc.collect()
    owner.append(1)


# -- life cycle --------------------------------------------------------------------------------


def test_the_table() -> None:
    assert {
        (State.NEW, Step.PUSH): State.PENDING,
        (State.COMPLETED, Step.PUSH): State.PENDING,
        (State.RELEASED, Step.PUSH): State.PENDING,
        (State.PENDING, Step.OFFER): State.IN_FLIGHT,
        (State.PENDING, Step.REJECT): State.COMPLETED,
        (State.IN_FLIGHT, Step.RETURN): State.PENDING,
        (State.IN_FLIGHT, Step.COMPLETE): State.COMPLETED,
    } == TRANSITIONS
    assert [s.value for s in State] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("state", State)
def test_every_step_from_every_state(state: State, step: Step) -> None:
    request = in_state(state)
    before = snapshot(request)
    target = TRANSITIONS.get((state, step))
    if target is None:
        with pytest.raises(BusyError, match=f"{step.value} is not possible: <rawaio.Request"):
            advance([request], step)
        assert snapshot(request) == before
        assert request._state == state
    else:
        advance([request], step)
        assert request._state == target
        # Where there are faster ways, they go the same way.
        other = in_state(state)
        if step is Step.PUSH:
            admitted(other)
        elif step is Step.OFFER:
            offer([other])
        elif step in {Step.COMPLETE, Step.REJECT}:
            complete_one(other)
        else:
            return
        assert other._state == target


@pytest.mark.parametrize("step", Step)
@pytest.mark.parametrize("first", State)
@pytest.mark.parametrize("second", State)
def test_a_step_is_taken_by_all_or_none(step: Step, first: State, second: State) -> None:
    requests = [in_state(first), in_state(second), in_state(first)]
    states = [r._state for r in requests]
    if all((state, step) in TRANSITIONS for state in states):
        advance(requests, step)
        assert [r._state for r in requests] == [TRANSITIONS[State(s), step] for s in states]
    else:
        with pytest.raises(BusyError, match=f"{step.value} is not possible"):
            advance(requests, step)
        assert [r._state for r in requests] == states


@pytest.mark.parametrize("step", Step)
def test_nobody_takes_a_step(step: Step) -> None:
    advance([], step)


@pytest.mark.parametrize("step", Step)
def test_a_step_of_what_is_no_request_changes_nothing(step: Step) -> None:
    source = next(source for source, s in TRANSITIONS if s is step)
    request = in_state(source)
    with pytest.raises(TypeError, match=r"^a Request is needed, not str$"):
        advance([request, cast("Any", "request")], step)
    assert request._state == source


@pytest.mark.parametrize("step", Step)
def test_a_step_is_not_taken_twice_at_once(step: Step) -> None:
    source = next(source for source, s in TRANSITIONS if s is step)
    request = in_state(source)
    with pytest.raises(BusyError, match=r"^the same request is there twice$"):
        advance([request, request], step)
    assert request._state == source


@pytest.mark.parametrize("state", [State.NEW, State.RELEASED])
def test_nothing_is_pending_with_its_buffer_let_go(state: State) -> None:
    buffer = bytearray(8)
    request = make("pread", buffer=buffer)
    if state is State.RELEASED:
        admitted(request)
        complete_one(request)
    advance([request], Step.PUSH)
    with pytest.raises(BufferError):
        buffer.append(1)


def test_released_is_completed_to_everyone_else() -> None:
    request = in_state(State.RELEASED)
    assert request.state is State.COMPLETED
    assert "COMPLETED" in repr(request)


# -- admit and restore -------------------------------------------------------------------------


def push(requests: Sequence[Any]) -> None:
    """As the queue does it: all or none."""
    before: dict[Request | None, int] = {}
    looking = iter(requests)
    try:
        admit(looking, before)
    except BaseException as error:
        looked_at = len(requests) - length_hint(looking) - isinstance(error, Exception)
        restore(requests[:looked_at], before)
        raise


def some(*states: State) -> list[Request]:
    return [in_state(state) for state in states]


MIXED = (State.NEW, State.COMPLETED, State.RELEASED, State.COMPLETED)


@pytest.mark.parametrize("states", [MIXED, MIXED[::-1], (State.COMPLETED,) * 3, ()])
def test_admit_takes_all(states: Sequence[State]) -> None:
    requests = some(*states)
    push(requests)
    assert all(r._state == State.PENDING for r in requests)


def refuse(requests: Sequence[Any], kind: type[Exception], match: str) -> None:
    own = [r for r in requests if isinstance(r, Request)]
    before = [(r._state, snapshot(r)) for r in own]
    with pytest.raises(kind, match=match):
        push(requests)
    assert [(r._state, snapshot(r)) for r in own] == before
    for request in own:
        if request._state == State.RELEASED:
            cast("bytearray", request.buffer).append(1)  # nothing is held
            cast("bytearray", request.buffer).pop()


@pytest.mark.parametrize("first", MIXED[:3])
@pytest.mark.parametrize("between", [0, 1, 3])
def test_a_request_that_is_there_twice_is_refused_with_all(first: State, between: int) -> None:
    twice, others = some(first), some(*MIXED[:between])
    refuse([*twice, *others, *twice, *some(*MIXED)], BusyError, "under way already, or there twice")
    push([*twice, *others])


@pytest.mark.parametrize("state", [State.PENDING, State.IN_FLIGHT])
@pytest.mark.parametrize("before", [(), MIXED])
def test_a_request_under_way_is_refused_with_all(state: State, before: Sequence[State]) -> None:
    busy = in_state(state)
    refuse([*some(*before), busy, *some(*MIXED)], BusyError, "under way already, or there twice")
    assert busy._state == state


@pytest.mark.parametrize("thing", [None, 5, "request", object()])
@pytest.mark.parametrize("before", [(), MIXED])
def test_what_is_no_request_is_refused_with_all(thing: object, before: Sequence[State]) -> None:
    expected = f"a Request is needed, not {type(thing).__name__}"
    refuse([*some(*before), thing, *some(*MIXED)], TypeError, expected)


def test_a_buffer_that_cannot_be_pinned_again_is_refused_with_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = some(*MIXED)
    real = memory.pin_destination
    hopeless = requests[2].buffer

    def pin(buffer: Any) -> memory.Pin:
        if buffer is hopeless:
            raise BufferError("not now")
        return real(buffer)

    first = make("pread", buffer=bytearray(8))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "pin_destination", pin)
        refuse([first, *requests, *some(*MIXED)], BufferError, "not now")
    assert first.state is State.NEW
    cast("bytearray", first.buffer).append(1)  # what was pinned before is let go
    push([first, *requests])


def test_a_step_whose_pinning_fails_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [make("pwrite", buffer=bytearray(8)) for _ in range(3)]
    hopeless, real = requests[1].buffer, memory.pin_source

    def pin(buffer: Any) -> memory.Pin:
        if buffer is hopeless:
            raise BufferError("not now")
        return real(buffer)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "pin_source", pin)
        with pytest.raises(BufferError, match="not now"):
            advance(requests, Step.PUSH)
    for request in requests:
        assert request.state is State.NEW
        cast("bytearray", request.buffer).append(1)


def test_an_error_of_pinning_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AttributeError says that something is no request, when it is none."""

    def fails(request: Request) -> None:
        raise AttributeError("of the buffer")

    monkeypatch.setattr(Request, "_make_ready", fails)
    with pytest.raises(AttributeError, match="of the buffer"):
        admitted(make("pwrite", buffer=bytearray(8)))


def test_restore_leaves_alone_what_was_not_looked_at() -> None:
    completed, new, other = some(State.COMPLETED, State.NEW, State.COMPLETED)
    before: dict[Request | None, int] = {}
    admit(iter([completed, new]), before)
    assert before == {new: State.NEW}
    restore([completed, new, other], before)
    assert [r._state for r in (completed, new, other)] == [
        State.COMPLETED,
        State.NEW,
        State.COMPLETED,
    ]


def test_restore_lets_go_of_what_was_pinned() -> None:
    buffer = bytearray(8)
    for state in (State.NEW, State.RELEASED):
        request = make("pwrite", buffer=buffer)
        if state is State.RELEASED:
            admitted(request)
            complete_one(request)
        before: dict[Request | None, int] = {}
        admit(iter([request]), before)
        assert before == {request: state}
        with pytest.raises(BufferError):
            buffer.append(1)
        restore([request], before)
        assert request._state == state
        buffer.append(1)
        admitted(request)
        assert length_in(encoded(request), "pwrite") == (address_of(buffer), len(buffer))
        with pytest.raises(BufferError):
            buffer.append(1)  # it is pinned again
        complete_one(request)
    fixed = make("pwrite", buffer=memoryview(buffer))
    before = {}
    admit(iter([fixed]), before)
    restore([fixed], before)
    with pytest.raises(BufferError):
        buffer.append(1)  # one that stays where it is is held on


def test_an_iterator_is_not_read_beyond_the_refused() -> None:
    busy = in_state(State.PENDING)
    rest = some(*MIXED)
    requests: Iterator[Request] = iter([busy, *rest])
    with pytest.raises(BusyError):
        admit(requests, {})
    assert list(requests) == rest


# -- complete ----------------------------------------------------------------------------------


def completions_of(requests: Iterable[Request]) -> list[Completion]:
    return [Completion((r, 0, 0)) for r in requests]


def in_flight(*callbacks: bool) -> list[Request]:
    requests = [
        make("pwrite", buffer=bytearray(8), callback=print if with_callback else None)
        for with_callback in callbacks
    ]
    admitted(*requests)
    offer(requests)
    return requests


def marked(requests: Iterable[Request]) -> list[bool]:
    return [r.state is State.COMPLETED for r in requests]


def test_complete_stops_at_the_first_callback() -> None:
    requests = in_flight(False, False, True, False)
    completions = completions_of(requests)
    assert complete(completions) == 2
    assert marked(requests) == [True, True, False, False]
    assert complete(completions) == 2
    assert marked(requests) == [True, True, False, False]
    requests[2].callback = None
    assert complete(completions) == 4
    assert marked(requests) == [True, True, True, True]


def test_complete_of_requests_that_are_known() -> None:
    requests = in_flight(False, True, False)
    completions = completions_of(requests)
    assert complete(completions, requests) == 1
    assert marked(requests) == [True, False, False]
    requests[1].callback = None
    assert complete(completions, requests) == 3
    assert marked(requests) == [True, True, True]
    assert complete([], ()) == complete([]) == 0


def test_complete_lets_go_of_resizable_buffers_and_keeps_others() -> None:
    owner, growing = bytearray(8), bytearray(8)
    fixed = make("pwrite", buffer=memoryview(owner))
    lent_one = make("pwrite", buffer=growing)
    admitted(fixed, lent_one)
    offer([fixed, lent_one])
    assert complete(completions_of([fixed, lent_one])) == 2
    assert (fixed._state, lent_one._state) == (State.COMPLETED, State.RELEASED)
    growing.append(1)
    with pytest.raises(BufferError):
        owner.append(1)
    admitted(lent_one)
    assert length_in(encoded(lent_one), "pwrite") == (address_of(growing), 9)
    with pytest.raises(BufferError):
        growing.append(1)  # it is pinned again


def test_complete_one_asks_for_no_callback() -> None:
    (request,) = in_flight(True)
    complete_one(request)
    complete_one(request)
    assert request._state == State.RELEASED
    cast("bytearray", request.buffer).append(1)


@pytest.mark.parametrize("offset", [None, 0.0, "", False])
@pytest.mark.parametrize("opcode", [Opcode.FSYNC, Opcode.FDSYNC, Opcode.POLL])
def test_what_is_no_transfer_has_no_offset_whatever_is_given(
    opcode: Opcode, offset: object
) -> None:
    events = 1 if opcode is Opcode.POLL else 0
    request = Request(opcode, 3, None, cast("int", offset), events=events)
    assert request.offset == 0
    assert encoded(request, SERIES).aio_offset == 0


def test_a_request_that_is_struck_while_it_is_pinned_again_is_pinned_or_not() -> None:
    """By what an exception from outside can strike behind: a call."""
    for place in ("pin_destination", "resizable"):
        buffer = bytearray(8)
        request = Request.pread(0, buffer, 0)
        buffer[:] = bytes(1 << 20)
        real = getattr(memory, place)

        def struck(thing: object, real: Callable[[object], object] = real) -> None:
            real(thing)
            raise KeyboardInterrupt

        before: dict[Request | None, int] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, place, struck)
            with pytest.raises(KeyboardInterrupt):
                admit(iter([request]), before)
        restore([request], before)
        admit(iter([request]), {})
        assert length_in(encoded(request), "pread") == (address_of(buffer), 1 << 20)


@pytest.mark.parametrize("name", ["fd", "rw_flags", "priority", "buffer"])
def test_an_assignment_that_is_struck_leaves_image_and_attributes_alike(name: str) -> None:
    values = {"fd": 9, "rw_flags": 8, "priority": 5, "buffer": aligned_buffer(64)}
    request = make("pwrite")
    before = snapshot(request), request._iocb
    with pytest.MonkeyPatch.context() as patch:

        def struck(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(Request, "_image", struck)
        with pytest.raises(KeyboardInterrupt):
            setattr(request, name, values[name])
    assert (snapshot(request), request._iocb) == before


def test_take_back_is_return_for_those_in_flight() -> None:
    requests = in_flight(False, False, False)
    complete_one(requests[1])
    for _ in range(2):
        take_back(requests)
        assert [r.state for r in requests] == [State.PENDING, State.COMPLETED, State.PENDING]


def test_reopen_undoes_from_start_on() -> None:
    requests = in_flight(False, False, False)
    completions = completions_of(requests)
    complete(completions)
    reopen(completions, 1)
    assert [r.state for r in requests] == [State.COMPLETED, State.IN_FLIGHT, State.IN_FLIGHT]
    assert complete(completions) == 3


# -- Completion --------------------------------------------------------------------------------


def test_a_completion_is_a_tuple() -> None:
    request = make("pread")
    completion = Completion((request, 512, 0))
    assert isinstance(completion, tuple)
    assert completion == (request, 512, 0)
    assert (completion.request, completion.res, completion.res2) == (request, 512, 0)
    got, res, res2 = completion
    assert (got, res, res2) == completion
    it: Any = completion
    for name in ("request", "res", "res2", "other"):
        with pytest.raises(AttributeError):
            setattr(it, name, 1)
    assert repr(completion) == f"<rawaio.Completion res 512, res2 0, of {request!r}>"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("res", [0, 1, 512])
def test_results_are_what_the_kernel_said(name: str, res: int) -> None:
    if name == "poll":
        res = min(res, 1)
    assert Completion((make(name), res, 0)).result() == res


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "failure", [errno.EIO, errno.ENOSPC, errno.ECANCELED, errno.EAGAIN, errno.EPERM, 4095]
)
def test_errors_are_os_errors_that_say_what_was_asked_for(name: str, failure: int) -> None:
    request = make(name)
    with pytest.raises(OSError, match=f"^\\[Errno {failure}\\] {name}: ") as caught:
        Completion((request, -failure, 0)).result()
    error = caught.value
    assert error.errno == failure
    assert error.strerror == f"{name}: {os.strerror(failure)}"
    assert type(error) is type(OSError(failure, ""))
    assert error.__notes__ == [repr(request)]


@pytest.mark.parametrize(
    ("res", "res2", "expected"),
    [
        (5, 0, 5),
        (5, 1, (1 << 32) + 5),
        (0, 1, 1 << 32),
        (0xFFFF_FFFF, 1, (1 << 33) - 1),
        (7, 0x7FFF_FFFF, (0x7FFF_FFFF << 32) + 7),
        (7, 1 << 32, 7),  # what is above 64 bits is lost, as in C
    ],
)
def test_res2_is_the_upper_half(res: int, res2: int, expected: int) -> None:
    assert Completion((make("pread"), res, res2)).result() == expected


@pytest.mark.parametrize(("res", "res2"), [(-5, 0), (-5, -1), (-5, 3), (0xFFFF_FFFB, -1)])
def test_errors_of_64_bits(res: int, res2: int) -> None:
    with pytest.raises(OSError, match="pread") as caught:
        Completion((make("pread"), res, res2)).result()
    assert caught.value.errno == 5


@pytest.mark.parametrize(
    ("asked", "res", "expected"),
    [
        (select.POLLIN, 65, 1),  # as the kernel has been seen to answer
        (select.POLLIN | 64, 65, 65),
        (select.POLLIN, select.POLLOUT, 0),
        (select.POLLIN, select.POLLERR | select.POLLHUP | select.POLLNVAL | 1, 0x39),
        (select.POLLOUT, 0xFFFF, 0x3C),
        (select.POLLPRI, 0, 0),
    ],
)
def test_a_poll_s_result_has_what_was_asked_for_and_what_nobody_has_to_ask_for(
    asked: int, res: int, expected: int
) -> None:
    request = Request.poll(1, asked)
    assert Completion((request, res, 0)).result() == expected
    assert request.poll_result(res) == expected


def test_only_polls_are_masked() -> None:
    assert make("pread").poll_result(0xFFFF) == 0xFFFF


# -- repr --------------------------------------------------------------------------------------


def test_repr() -> None:
    assert repr(make("pread", fd=3)) == (
        "<rawaio.Request pread fd 3, 512 bytes at offset 4096, NEW>"
    )
    assert repr(in_state(State.PENDING, "pwritev", fd=4)) == (
        "<rawaio.Request pwritev fd 4, 1536 bytes at offset 4096, PENDING>"
    )
    assert repr(in_state(State.IN_FLIGHT, "fsync")) == "<rawaio.Request fsync fd 3, IN_FLIGHT>"
    assert repr(in_state(State.COMPLETED, "fdsync")) == "<rawaio.Request fdsync fd 3, COMPLETED>"
    assert repr(Request.poll(File(9), 0x11)) == "<rawaio.Request poll fd 9, events 0x11, NEW>"


def test_a_request_has_no_other_attributes() -> None:
    request: Any = make("pread")
    with pytest.raises(AttributeError):
        request.ofset = 1
    for name in ("state", "opcode", "nbytes"):
        with pytest.raises(AttributeError):
            setattr(request, name, 1)
    assert weakref.ref(request)() is request


# -- slabs -------------------------------------------------------------------------------------


def pointers_of(slab: IocbSlab) -> list[int]:
    return list((ctypes.c_uint64 * slab.capacity).from_address(slab.address))


@pytest.mark.parametrize("capacity", [1, 2, 100])
def test_the_addresses_of_a_slab_are_those_of_its_iocbs(capacity: int) -> None:
    slab = IocbSlab(capacity, 3)
    assert slab.capacity == capacity
    pointers = pointers_of(slab)
    assert [p - pointers[0] for p in pointers] == [64 * i for i in range(capacity)]


@pytest.mark.parametrize("n", [2, 7, 8, 9, 20])
def test_a_poll_has_an_iocb_of_its_own_and_the_slab_s_is_put_back(n: int) -> None:
    slab = IocbSlab(20, 3)
    at_first = pointers_of(slab)
    polls = {1, n - 1}
    batch = [make("poll" if i in polls else "fsync", fd=i) for i in range(n)]
    for _ in range(2):
        slab.fill(5 * SERIES, batch)
        expected = [
            batch[i].own_iocb()[1] if i in polls and i < n else at_first[i] for i in range(20)
        ]
        assert pointers_of(slab) == expected
        for i in range(n):
            it = iocb.from_address(expected[i])
            assert (it.aio_data, it.aio_fildes, it.aio_resfd) == (5 * SERIES + i, i, 3)
    slab.fill(6 * SERIES, [make("fsync", fd=7)])
    assert pointers_of(slab) == at_first
    assert iocb.from_address(at_first[0]).aio_data == 6 * SERIES
    # What the kernel has of them is still there, wherever their poll stands.
    assert iocb.from_address(batch[1].own_iocb()[1]).aio_data == 5 * SERIES + 1


def test_an_own_iocb_never_moves() -> None:
    request = make("poll")
    block, address = request.own_iocb()
    again, same = request.own_iocb()
    assert (again is block, same) == (True, address)
    assert len(block) == 64
    block[0] = 77
    assert ctypes.string_at(address, 64) == block.tobytes()
    assert make("poll").own_iocb()[1] != address


def test_two_threads_that_ask_for_the_own_iocb_get_the_same() -> None:
    """One that submits the poll, and one that cancels it."""
    number = 0
    while True:
        request = make("poll")
        found: list[tuple[memoryview, int]] = []

        def ask(request: Request = request, found: list[Any] = found) -> None:
            found.append(request.own_iocb())

        def ask_beside(ask: Callable[[], None] = ask) -> None:
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()

        with at_switch_point(number, ask_beside) as passed:
            ask()
        ask()
        assert len({address for _, address in found}) == 1
        if passed[0] <= number:
            break
        number += 1
    assert number >= 1


def test_a_batch_larger_than_the_slab_is_refused() -> None:
    slab = IocbSlab(4, 3)
    with pytest.raises(ValueError, match=r".*"):
        slab.fill(SERIES, [make("fsync") for _ in range(5)])


def test_an_empty_batch() -> None:
    slab = IocbSlab(4, 3)
    slab.fill(SERIES, [])
    assert ctypes.string_at(pointers_of(slab)[0], 256) == (bytes(60) + b"\3\0\0\0") * 4


def test_both_ways_of_filling_are_used() -> None:
    """The one of single stores, and the one of columns; the property test runs through both."""
    assert 1 < slab_module._FEW < 100

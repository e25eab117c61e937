"""What several test files share: shared memory, and rings that no kernel made."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rawaio import syscalls

ROOT = Path(__file__).resolve().parents[1]

NR, HEAD, TAIL, MAGIC, COMPAT, INCOMPAT, HEADER_LENGTH = range(1, 8)  # words of a ring's header
EVENT_SIZE = 32

PROT_NONE, PROT_READ = 0, 1

Event = tuple[int, int, int, int]  # data, obj, res, res2


def address_of(buffer: Any) -> int:
    """Where the bytes of a writable buffer of one byte at least are."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def passed(argument: Any) -> int:
    """What an argument of `raw_syscall` is, boxed or made by `fixed`."""
    if hasattr(argument, "value"):
        return argument.value or 0
    # As in "<cparam 'l' (209)>": nothing else tells what is in it.
    text = repr(argument).partition("(")[2].removesuffix(")>")
    return 0 if "nil" in text else int(text, 0)


class Interruption(BaseException):
    """In place of KeyboardInterrupt."""


def interrupted_at(step: int, module: str | None, call: Callable[[], object]) -> bool:
    """Make a call, with an exception from outside before the step-th bytecode of a module's code.

    module: its file. True if the exception struck; False: there are fewer bytecodes.
    """
    left = step

    def trace(frame: Any, what: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != module:
            return None
        frame.f_trace_opcodes = True
        if what == "opcode":
            left -= 1
            if left < 0:
                raise Interruption
        return trace

    sys._getframe().f_trace_opcodes = True  # CPython 3.12 has such events once a frame asked
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


class Mapping(NamedTuple):
    """A line of /proc/self/maps."""

    start: int
    end: int
    access: str


def mapping_of(address: int) -> Mapping | None:
    """The mapping that an address lies in."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            limits, access = line.split()[:2]
            start, end = (int(limit, 16) for limit in limits.split("-"))
            if start <= address < end:
                return Mapping(start, end, access)
    return None


class FakeRing:
    """A ring in shared memory of its own mapping, with the test in the kernel's place.

    room: bytes from the ring to the end of the mapping. offset: bytes in front of it. fd: the
    shared memory, if a second process is to have it too.
    """

    def __init__(
        self,
        nr: int,
        *,
        head: int = 0,
        tail: int = 0,
        magic: int = syscalls.AIO_RING_MAGIC,
        incompat: int = 0,
        header_length: int = 32,
        room: int | None = None,
        offset: int = 0,
        fd: int | None = None,
    ) -> None:
        if room is None:
            room = -(-(header_length + EVENT_SIZE * nr) // mmap.PAGESIZE) * mmap.PAGESIZE
        size = offset + room
        own = os.memfd_create("ring") if fd is None else fd
        os.ftruncate(own, size)
        # Two mappings of two files are never merged into one, as those of anonymous memory are.
        self.memory = mmap.mmap(own, size)
        if fd is None:
            os.close(own)
        self.nr = nr
        self.start = offset
        self.header_length = header_length
        self.address = address_of(self.memory) + offset
        self.words = memoryview(self.memory)[offset:].cast("I")
        self.words[NR] = nr
        self.words[HEAD] = head
        self.words[TAIL] = tail
        self.words[MAGIC] = magic
        self.words[COMPAT] = 1
        self.words[INCOMPAT] = incompat
        self.words[HEADER_LENGTH] = header_length

    def __len__(self) -> int:
        """How many events are in it."""
        return (self.words[TAIL] - self.words[HEAD]) % self.nr

    def write(self, slot: int, event: Event) -> None:
        at = self.start + self.header_length + EVENT_SIZE * slot
        struct.pack_into("=QQqq", self.memory, at, *event)

    def produce(self, event: Event) -> None:
        """Do as the kernel does: the event, and then tail."""
        assert len(self) < self.nr - 1, "the ring is full"
        tail = self.words[TAIL]
        self.write(tail, event)
        self.words[TAIL] = (tail + 1) % self.nr

    def close(self) -> None:
        """Unmap it: nothing may refer to it any more."""
        self.words.release()
        self.memory.close()

    def consume(self) -> bytes:
        """Take the first event, as io_getevents does."""
        head = self.words[HEAD]
        at = self.start + self.header_length + EVENT_SIZE * head
        self.words[HEAD] = (head + 1) % self.nr
        return self.memory[at : at + EVENT_SIZE]

    def protect(self, access: int, nbytes: int | None = None) -> None:
        """Take access to the memory away, by mprotect(2); or to the first nbytes of it."""
        mprotect = ctypes.CDLL(None).mprotect
        mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert mprotect(self.address - self.start, nbytes or len(self.memory), access) == 0

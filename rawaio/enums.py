"""L0: the enumerations that programs see. Inside rawaio the plain numbers stand for them.

Imported on first use: `enum` and what it imports are a third of what `import rawaio` would take.
"""

from __future__ import annotations

from enum import Enum, IntEnum, IntFlag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["RWF", "TRANSITIONS", "Opcode", "State", "Step"]


class Opcode(IntEnum):
    """`IOCB_CMD_*` of `<linux/aio_abi.h>`, those that the kernel implements."""

    PREAD = 0
    PWRITE = 1
    FSYNC = 2
    FDSYNC = 3
    POLL = 5
    PREADV = 7
    PWRITEV = 8


class RWF(IntFlag):
    """`RWF_*` of `<linux/fs.h>`; a kernel that lacks one refuses the request with EOPNOTSUPP."""

    HIPRI = 0x01
    DSYNC = 0x02
    SYNC = 0x04
    NOWAIT = 0x08
    APPEND = 0x10
    NOAPPEND = 0x20
    ATOMIC = 0x40
    DONTCACHE = 0x80


class State(IntEnum):
    """Where a request is."""

    NEW = 0
    PENDING = 1  # taken, not yet offered to the kernel
    IN_FLIGHT = 2  # offered to the kernel, not yet completed
    COMPLETED = 3
    RELEASED = 4  # completed, and its resizable buffer let go


class Step(Enum):
    """What happens to a request."""

    PUSH = "push"  # given to a queue
    OFFER = "offer"  # part of an io_submit
    RETURN = "return"  # not accepted by that io_submit, to be offered again
    REJECT = "reject"  # completed without having been in flight: refused or cancelled
    COMPLETE = "complete"  # its event was reaped


TRANSITIONS: Final[dict[tuple[State, Step], State]] = {
    (State.NEW, Step.PUSH): State.PENDING,
    (State.COMPLETED, Step.PUSH): State.PENDING,
    (State.RELEASED, Step.PUSH): State.PENDING,
    (State.PENDING, Step.OFFER): State.IN_FLIGHT,
    (State.PENDING, Step.REJECT): State.COMPLETED,
    (State.IN_FLIGHT, Step.RETURN): State.PENDING,
    (State.IN_FLIGHT, Step.COMPLETE): State.COMPLETED,
}

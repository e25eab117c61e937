"""L2: what a context tells of itself."""

from dataclasses import dataclass

__all__ = ["Statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a context has done until now. Counts, but for the mechanism.

    `submitted == in_queue + in_flight + completed`, when nothing is going on in other threads.
    """

    nr_events: int
    in_queue: int  # taken, not yet offered to the kernel
    in_flight: int
    submitted: int  # requests that submit took
    completed: int  # of these, what has completed, reaped by the caller or not
    io_submit_calls: int
    eagain: int  # io_submit calls that took nothing for want of room
    ring_reaps: int  # completions read from the ring
    syscall_reaps: int  # completions had by io_getevents
    waits: int  # times a reap slept
    mechanism: str  # "ring" or "io_getevents"

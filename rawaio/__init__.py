"""Asynchronous disk I/O on Linux for Python, with nothing compiled: native AIO through ctypes."""

from .context import IOContext, Statistics
from .errors import BusyError, ClosedError, ForkedError, RawAIOError, UnsupportedError
from .memory import aligned_buffer
from .request import Completion, Request, State
from .syscalls import RWF, Opcode

__all__ = [
    "RWF",
    "BusyError",
    "ClosedError",
    "Completion",
    "ForkedError",
    "IOContext",
    "Opcode",
    "RawAIOError",
    "Request",
    "State",
    "Statistics",
    "UnsupportedError",
    "aligned_buffer",
]

__version__ = "0.1.0"

"""Asynchronous disk I/O on Linux for Python, with nothing compiled: native AIO through ctypes."""

from .context import IOContext
from .errors import BulkError, BusyError, ClosedError, ForkedError, RawAIOError, UnsupportedError
from .memory import aligned_buffer
from .request import Completion, Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .enums import RWF, Opcode, State
    from .file import File, FileStatistics, open
    from .loops import shutdown
    from .statistics import Statistics

__all__ = [
    "RWF",
    "BulkError",
    "BusyError",
    "ClosedError",
    "Completion",
    "File",
    "FileStatistics",
    "ForkedError",
    "IOContext",
    "Opcode",
    "RawAIOError",
    "Request",
    "State",
    "Statistics",
    "UnsupportedError",
    "aligned_buffer",
    "open",
    "shutdown",
]

__version__ = "0.1.0"

# Imported on first use, to keep `import rawaio` quick.
_LATER = {
    "File": ".file",
    "FileStatistics": ".file",
    "Opcode": ".enums",
    "RWF": ".enums",
    "State": ".enums",
    "Statistics": ".statistics",
    "open": ".file",
    "shutdown": ".loops",
}


if not TYPE_CHECKING:  # or checkers would believe in any name

    def __getattr__(name: str) -> object:
        if name in _LATER:
            from importlib import import_module

            found = getattr(import_module(_LATER[name], __name__), name)
            globals()[name] = found
            return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

# python-libaio 0.9.5, which has no annotations: what the benchmarks use of it.
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, Self, final

from _typeshed import WriteableBuffer

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

@final
class _Mode: ...

AIOBLOCK_MODE_READ: _Mode
AIOBLOCK_MODE_WRITE: _Mode

class AIOBlock:
    offset: int
    def __init__(
        self,
        mode: _Mode,
        target_file: int | _HasFileno | None = None,
        buffer_list: Iterable[WriteableBuffer] = (),
        offset: int = 0,
        eventfd: int | _HasFileno | None = None,
        onCompletion: Callable[[AIOBlock, int, int], object] = ...,
        rw_flags: int = 0,
        io_priority: int | None = None,
        event_mask: int = 0,
    ) -> None: ...

class AIOContext:
    def __init__(self, maxevents: int) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, exc_type: object, ex_val: object, exc_tb: object) -> None: ...
    def submit(self, block_list: Sequence[AIOBlock]) -> int: ...
    def getEvents(
        self, min_nr: int | None = 1, nr: int | None = None, timeout: float | None = None
    ) -> list[tuple[AIOBlock, int, int]]: ...

"""L3: drivers for event loops, one module each. Which loop runs is asked when a file is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..driver import Driver

__all__ = ["running_driver", "shutdown"]


def running_driver() -> Driver:
    """The driver of the event loop that runs in this thread; made at first use.

    Raises:
        RuntimeError: no event loop is running.
    """
    from . import asyncio  # noqa: PLC0415 - 50 ms, and only for who uses it

    return asyncio.running_driver()


async def shutdown() -> None:
    """Wait for all that is under way on the running event loop, and give its context back.

    Files that are still open refuse every method but close afterwards. Not needed with
    `asyncio.run`, which does it at its end. A new driver is made when files are opened afterwards.
    """
    from . import asyncio  # noqa: PLC0415

    await asyncio.shutdown()

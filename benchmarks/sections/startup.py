"""How long it takes to begin: `import rawaio`, a first read, a first file in an asyncio program.

Each is a run of `python -S`, without what else is installed; a run of it with nothing to do stands
beside them. What asyncio itself takes is a run of its own.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks import files
from benchmarks.harness import Cell, Outcome, measure, output_of, usage_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.harness import Setting

__all__ = ["BARE", "PROGRAMS", "count_modules", "section"]

BARE: Final = "python/-S -c pass"
_CONTEXT: Final = """\
import os, sys, rawaio
fd = os.open(sys.argv[1], os.O_RDONLY)
with rawaio.IOContext() as context:
    context.submit(rawaio.Request.pread(fd, bytearray(4096), 0))
    assert context.reap(1)[0].result() == 4096
"""
_FILE: Final = """\
import asyncio, sys, rawaio
async def main():
    async with rawaio.open(sys.argv[1]) as file:
        assert len(await file.pread(4096, 0)) == 4096
asyncio.run(main())
"""
_ASYNCIO: Final = """\
import asyncio
async def main():
    pass
asyncio.run(main())
"""
PROGRAMS: Final = {
    BARE: "pass",
    "rawaio/import": "import rawaio",
    "rawaio/import, IOContext, a read": _CONTEXT,
    "asyncio/import, run": _ASYNCIO,
    "rawaio/asyncio, import, open, a read": _FILE,
}
_LOADED: Final = """\
import sys, rawaio
print(sum(name.partition(".")[0] == "asyncio" for name in sys.modules))
"""


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-S", "-c", program, *arguments]


def start(words: Sequence[str]) -> dict[str, float]:
    """One run, from outside."""
    usage = usage_of(words)
    return {"ms": 1e3 * usage.wall_s, "cpu_ms": 1e3 * usage.cpu_s}


def count_modules() -> dict[str, float]:
    """How many modules of asyncio there are when rawaio has been imported."""
    return {"modules": float(output_of(command(_LOADED)))}


def section(setting: Setting) -> Outcome:
    """Measure."""
    with files.temporary_file(setting.folder, 1 << 20) as path:
        cells = [
            Cell("startup", name, partial(start, command(program, str(path))))
            for name, program in PROGRAMS.items()
        ]
        measure(cells, 1, setting.say)  # compiles the modules
        outcome = measure(cells, setting.pick(15, 40), setting.say)
    loaded = Cell("asyncio's modules", "rawaio/import", count_modules)
    outcome.add(measure([loaded], 1, setting.say))
    return outcome

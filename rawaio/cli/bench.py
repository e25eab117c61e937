"""`python3 -m rawaio bench`: random direct reads, by rawaio and by `os.preadv`, side by side.

What is asked for is in `_bench_settings`, what is read in `_bench_target`. The engines of
`_bench_engines` make `Slice`s, which `_bench_figures` makes into `Cell`s and shows. Every engine
reads the same blocks in the same order. The time of a cell is cut into rounds, and in each round
every engine has its turn, so that a disk that becomes faster or slower does so for all of them.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import rawaio

from ._bench_engines import make_engines, open_contexts
from ._bench_figures import make_report, render_json, render_text, summarize
from ._bench_settings import BenchError, Settings, add_arguments
from ._bench_target import choose_offsets, existing_target, temporary_target, warm
from ._progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ._bench_engines import Engine, Slice
    from ._bench_figures import Cell, Report

__all__ = ["add_arguments", "bench", "measure", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, or 1 when there is nothing to measure or no way to.

    Can block: for as long as it measures.
    """
    settings = Settings(
        path=arguments.path,
        seconds=arguments.seconds,
        depths=arguments.depths,
        block_size=arguments.block_size,
        size=arguments.size,
        seed=arguments.seed,
    )
    progress = Progress(sys.stderr)
    try:
        report = bench(settings, progress)
    except (BenchError, rawaio.UnsupportedError, OSError) as error:
        progress.clear()
        for line in (f"rawaio bench: {error}", *getattr(error, "__notes__", ())):
            print(line, file=sys.stderr)
        return 1
    finally:
        progress.clear()
    print(render_json(report) if arguments.json else render_text(report))
    return 0


def bench(settings: Settings, progress: Progress) -> Report:
    """Do it all. Can block: for as long as it measures.

    Raises:
        BenchError: nothing to measure.
        UnsupportedError, OSError: as `IOContext`, or from the file.
    """
    with ExitStack() as stack:
        # First, so that nobody waits for a file that cannot be read.
        contexts = open_contexts(settings, stack)
        if settings.path is None:
            target = temporary_target(os.getcwd(), settings, progress)
        else:
            target = existing_target(settings.path, settings)
        opened = stack.enter_context(target)
        # Their reads end before the file is closed.
        for context in contexts:
            stack.callback(context.close)
        warm(opened, settings, progress)
        engines = make_engines(opened, settings, contexts, stack)
        offsets = choose_offsets(opened.nr_blocks, settings.block_size, settings.seed)
        cells = measure(engines, offsets, settings, progress)
        return make_report(opened, settings, contexts[0].why_not_ring, cells)


def measure(
    engines: Sequence[Sequence[Engine]],
    offsets: Sequence[int],
    settings: Settings,
    progress: Progress,
) -> list[Cell]:
    """Give every engine its turn in each round; a cell for each of them, in their order."""
    seconds = settings.seconds / settings.rounds
    slices: dict[Engine, list[Slice]] = {engine: [] for group in engines for engine in group}
    nr_turns = len(slices) * settings.rounds
    turn = 0
    for round_ in range(settings.rounds):
        for group in engines:
            # Nobody is always the first, who finds the disk as the depth before has left it.
            first = round_ % len(group)
            for engine in (*group[first:], *group[:first]):
                progress.show(f"depth {engine.depth}, {engine.label}", turn / nr_turns)
                slices[engine].append(engine.run(offsets, seconds))
                turn += 1
    return [summarize(engine, turns) for engine, turns in slices.items()]

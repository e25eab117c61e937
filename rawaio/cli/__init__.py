"""L4: the command line, `python -m rawaio`.

Each command is a module of this package with `add_arguments(parser)` and `run(arguments)`, which
returns the exit status; it is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Final

import rawaio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

__all__ = ["main"]

_COMMANDS: Final = {
    "bench": "measure random direct reads of a disk, with rawaio and without",
    "doctor": "say whether native AIO works here, how well, and what to do about it",
}


class _Parser(argparse.ArgumentParser):
    """Ends with 1 on wrong arguments: argparse's 2 would be doctor's "with reservations"."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def _parser(named: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of everything; of the commands only those named get arguments of their own."""
    parser = _Parser(prog="rawaio", description=rawaio.__doc__)
    parser.add_argument("--version", action="version", version=f"rawaio {rawaio.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in named:
            module = import_module(f".{name}", __name__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Can block: as long as the command takes.

    argv: without the program's name; left out, the process's own.

    Raises:
        SystemExit: with 0 after `--help` and `--version`, with 1 when the arguments are wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser(argv).parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except rawaio.RawAIOError as error:
        print(f"rawaio: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has gone; at exit the interpreter would flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130  # as a shell says it: 128 and SIGINT
    return status

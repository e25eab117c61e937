"""What `rawaio bench` is asked for: the options, checked."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Final

__all__ = [
    "BenchError",
    "Settings",
    "add_arguments",
    "format_size",
    "parse_depths",
    "parse_seconds",
    "parse_size",
]

# A slice lasts this long at most, which bounds the latencies that are kept one by one.
_LONGEST_SLICE_S: Final = 1.0
# So many turns for every engine at least; the spread between them tells what the figures are worth.
_FEWEST_ROUNDS: Final = 4
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class BenchError(Exception):
    """Why there is nothing to measure; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure."""

    path: str | None  # None: a temporary file in the current directory
    seconds: float  # in each cell
    depths: tuple[int, ...]
    block_size: int  # bytes
    size: int  # bytes: of the temporary file, or of the beginning of path that is read
    seed: int

    @property
    def rounds(self) -> int:
        """Turns of every engine in each of its cells."""
        return max(_FEWEST_ROUNDS, math.ceil(self.seconds / _LONGEST_SLICE_S))


def parse_size(text: str) -> int:
    """Bytes, from a number with an optional k, M, G or T (powers of 1024).

    Raises:
        ArgumentTypeError: something else, or not above 0.
    """
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    digits = number.rstrip("kmgt")
    unit = _UNITS.get(number[len(digits) :])
    if unit is None or not _is_number(digits):
        raise argparse.ArgumentTypeError(
            f"a number above 0 with an optional k, M, G or T is needed, not {text!r}"
        )
    return int(digits) * unit


def format_size(nbytes: int) -> str:
    """Bytes in the largest unit that they are at least one of, as in "4 KiB"."""
    size, unit = float(nbytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"


def parse_depths(text: str) -> tuple[int, ...]:
    """Depths, from numbers with commas between them; each once, in the order given.

    Raises:
        ArgumentTypeError: something else, or a number below 1.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(map(_is_number, words)):
        raise argparse.ArgumentTypeError(
            f"numbers above 0 with commas between them are needed, not {text!r}"
        )
    return tuple(dict.fromkeys(map(int, words)))


def parse_seconds(text: str) -> float:
    """Seconds above 0.

    Raises:
        ArgumentTypeError: something else.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0 is needed, not {text!r}")
    return seconds


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        help="a file or a block device to read, which is never written to; "
        "without it a temporary file is made in the current directory",
    )
    parser.add_argument(
        "--seconds",
        type=parse_seconds,
        default=1.0,
        help="how long each engine is measured at each depth (default: %(default)s)",
    )
    parser.add_argument(
        "--depths",
        type=parse_depths,
        default=(1, 8, 32, 128),
        metavar="N,N,...",
        help="how many reads are under way at a time (default: 1,8,32,128)",
    )
    parser.add_argument(
        "--block-size",
        type=parse_size,
        default=4096,
        metavar="BYTES",
        help="bytes in each read (default: 4k)",
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        default=256 << 20,
        metavar="BYTES",
        help="size of the temporary file; of PATH, how much of its beginning is read "
        "(default: 256M)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of the order of the blocks (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")

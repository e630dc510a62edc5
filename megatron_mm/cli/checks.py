"""Types of arguments that check a value before any work is done: numbers in a range, files to read and to write."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from megatron_mm.platform.local_copies import address_of

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")
"""Endings of the files that matplotlib writes."""


def number(*, above: float = -math.inf, least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of an argument that is a finite number in a range."""

    def check(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is not a number") from None
        if math.isfinite(value) and above < value and least <= value <= most:
            return value
        limits = ((above, "more than"), (least, "at least"), (most, "at most"))
        wanted = " and ".join(f"{words} {limit:g}" for limit, words in limits if math.isfinite(limit))
        raise argparse.ArgumentTypeError(f"{word} is impossible: give a number that is {wanted or 'finite'}")

    return check


def output(*endings: str) -> Callable[[str], Path]:
    """The type of an argument that names a file to write, in an existing folder.

    Args:
        endings: what its name must end in; without any, it may have any name.
    """

    def check(word: str) -> Path:
        path = place(word)
        if endings and path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"{word} must end in {', '.join(endings[:-1])} or {endings[-1]}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{word} is a directory: name a file in it")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{word} cannot be written, because {path.parent} is not a directory: create it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{word} cannot be written: choose a place where you have write permission")
        return path

    return check


def existing_file(word: str) -> Path:
    """The type of an argument that names a file to read."""
    if not Path(word).is_file():
        raise argparse.ArgumentTypeError(f"{word} is not a file: correct the path")
    return Path(word)


def place(word: str) -> Path:
    """The type of an argument that names a file or a directory to write. It must be on this machine: as a path, an address would be that of
    a folder `s3:`."""
    if (address := address_of(Path(word))) is not None:
        raise argparse.ArgumentTypeError(f"{address} is an address, but this command writes only to file systems: give a folder or a file")
    return Path(word)


def directory(word: str) -> Path:
    """The type of an argument that names a run directory, which may be created."""
    if (address := address_of(Path(word))) is not None:
        raise argparse.ArgumentTypeError(
            f"{address} is an address, but a run writes only to file systems: give a folder; --checkpoint.copy-to {address} copies "
            "checkpoints there"
        )
    if Path(word).exists() and not Path(word).is_dir():
        raise argparse.ArgumentTypeError(f"{word} is a file, but must be a directory: choose another name")
    return Path(word)

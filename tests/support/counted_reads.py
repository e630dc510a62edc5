"""Counts the bytes that torch's checkpoint reader reads from files."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

BLOCK = 8192
"""Smallest read of a buffered file, in bytes; a stored piece is inspected in a few such reads."""


class CountingFile(io.FileIO):
    """Counts the bytes read from the files of all instances."""

    total = 0

    def readinto(self, buffer: Any) -> Any:
        count = super().readinto(buffer)
        CountingFile.total += count or 0
        return count


def install() -> None:
    """Count the checkpoint reader's reads in this process."""
    FileSystem.create_stream = _counted_stream  # type: ignore[method-assign,assignment]


@contextlib.contextmanager
def _counted_stream(self: FileSystem, path: Path, mode: str) -> Iterator[Any]:
    with io.BufferedReader(CountingFile(os.fspath(path)), BLOCK) as file:
        yield file

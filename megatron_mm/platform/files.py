"""Helpers for files: checksums, and making sure that files have reached the disk."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

BLOCK_BYTES = 1 << 24
"""Bytes that are read and summed at once."""
_FULL = 1 << 26
"""Free bytes below which a disk counts as full."""


def checksum_of(path: Path, *, offset: int = 0, length: int | None = None) -> int:
    """CRC-32 of a file or of a part of it; if the file ends earlier, of the bytes up to its end.

    Raises OSError if the file cannot be read.
    """
    checksum, left = 0, path.stat().st_size - offset if length is None else length
    buffer = bytearray(min(BLOCK_BYTES, max(left, 1)))
    with path.open("rb", buffering=0) as file:
        while left > 0:
            count = os.preadv(file.fileno(), [memoryview(buffer)[: min(left, len(buffer))]], offset)
            if count == 0:
                break
            checksum = zlib.crc32(memoryview(buffer)[:count], checksum)
            offset, left = offset + count, left - count
    return checksum


def sync_to_disk(path: Path) -> None:
    """Have the system write a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def full_disk(path: Path) -> str:
    """A remark for an error message if the disk of `path` is full, otherwise empty: errors of torch's writers do not name this cause."""
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return ""
    return f" (the disk of {path} is full: {free / 1e6:.1f} MB are free)" if free < _FULL else ""

"""Helpers for files: checksums, and making sure that files have reached the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zlib
from collections.abc import Iterable
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


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is either complete or as it was before. Raises OSError, which names the file, if that fails."""
    target = path.resolve()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        if target.exists() and not (target.is_file() and os.access(target.parent, os.W_OK)):  # a pipe, or a folder that may not change
            target.write_text(text, encoding="utf-8")
            return
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_full_disk(error: OSError) -> bool:
    """Whether an error says that a disk is full, or a quota used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def file_error(error: OSError, *, places: Iterable[Path]) -> str:
    """Describe the error of a file by its name; if the error has none, as those of writing, by which disk of some places is full."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{error.strerror or error}{next(filter(None, map(full_disk, places)), '') if is_full_disk(error) else ''}"


def full_disk(path: Path) -> str:
    """A remark for an error message if the disk of `path` is full, otherwise empty: errors of torch's writers do not name this cause.

    If there is no `path` yet, the disk is that of the first folder above it that exists.
    """
    try:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
    except OSError:
        return ""
    return f" (the disk of {path} is full: {free / 1e6:.1f} MB are free)" if free < _FULL else ""

"""Opens published files from any place that fsspec supports. Their first bytes tell how to unpack them: .gz, .zst, .zip, .bz2, .xz, or not
at all.

Truncated archives count as damaged files; the usual readers of zstd take a truncated stream for a complete one.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from megatron_mm.data.prepare.notes import is_note
from megatron_mm.data.prepare.published.losses import DamagedFile

COMPRESSIONS = (".gz", ".zst", ".zstd", ".zip", ".bz2", ".xz")
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
"""Follows a first byte of 0x50 to 0x5f in a skippable frame, with which files written by `pzstd` begin."""
_ZSTD_WINDOW = 2**31
"""Largest window that is accepted. `zstd --long=31` writes such files, which zstd's default limit of 128 MiB refuses."""


def ending(path: str) -> str:
    """Return a file's extension, ignoring compression: ".jsonl" for "a.jsonl.zst"."""
    name = PurePosixPath(path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return PurePosixPath(name).suffix


def check_is_file(path: str) -> None:
    """Raise DamagedFile if a local path is a pipe or a device, because reading it might block or never end."""
    if "://" not in path and os.path.exists(path) and not os.path.isfile(path):
        raise DamagedFile("it is not a file but a pipe or a device: write its output to a file")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn every error of reading or unpacking a file into DamagedFile, with the file's name."""
    try:
        yield
    except DamagedFile as error:
        raise DamagedFile(f"{path}: {error}" if path not in str(error) else str(error)) from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{path} cannot be read to the end: {error}") from None


def open_streams(path: str) -> Iterator[BinaryIO]:
    """Yield the unpacked contents of a file; for a .zip, of each file in it. The first bytes, not the name, determine the compression.

    Raises DamagedFile if the file should be compressed according to its name but is empty, or is named .zip but is not one.
    """
    import fsspec

    with fsspec.open(path, "rb") as raw:
        file = cast(BinaryIO, raw)
        begin = file.read(6)
        file.seek(0)
        form = next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), "")
        if begin[1:4] == _ZSTD_SKIPPABLE and begin[0] >> 4 == 5:
            form = ".zst"
        if form == ".zip":
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and not is_note(info.filename):
                        with _member(archive, info) as member:
                            yield member
        elif form == ".gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif form == ".zst":
            yield cast(BinaryIO, io.BufferedReader(_ZstdStream(file), 2**20))
        elif form in (".bz2", ".xz"):
            yield cast(BinaryIO, bz2.BZ2File(file) if form == ".bz2" else lzma.LZMAFile(file))  # noqa: SIM115
        elif path.lower().endswith(".zip") or (not begin and path.lower().endswith(COMPRESSIONS)):
            raise DamagedFile("it is empty" if not begin else "it is not a zip file")
        else:
            yield file


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    """Open a file in a .zip. Raises DamagedFile if it is encrypted, or packed in a way that Python does not know."""
    try:
        return cast(BinaryIO, archive.open(info))
    except RuntimeError as error:  # includes NotImplementedError
        why = "it is encrypted" if info.flag_bits & 1 else str(error)
        raise DamagedFile(f"{info.filename} in it cannot be unpacked ({why}): unpack it with another program") from None


class _ZstdStream(io.RawIOBase):
    """Reads all frames of a zstd file. Raises EOFError if the last frame is truncated."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._left, self._pending = file, b"", b""
        self._frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: Any = None
        self._error = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._left or self._file.read(2**18)
            self._left = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("its last zstd frame is cut off")
                return 0
            self._frame = self._frame or self._frames.decompressobj()
            try:
                self._pending = self._frame.decompress(data)
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

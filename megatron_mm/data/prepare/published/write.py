"""Writes samples to shards of about equal size; each shard is either complete or absent."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import BinaryIO

from megatron_mm.data.prepare.published.layouts import OutSample


class ShardWriter:
    """Writes shards PREFIX-00000.tar and so on, or .jsonl for texts. The same samples result in the same bytes."""

    def __init__(self, out: Path, *, prefix: str, lines: bool, shard_bytes: int) -> None:
        """
        Args:
            lines: write .jsonl shards with only the documents, one per line.
            shard_bytes: size from which a shard is full.
        """
        self._out, self._prefix, self._lines, self._limit = out, prefix, lines, shard_bytes
        self._shards: list[str] = []
        self._file: BinaryIO | None = None
        self._archive: tarfile.TarFile | None = None
        self._images: dict[bytes, str] = {}
        self._samples = 0

    def add(self, sample: OutSample) -> None:
        """Append a sample, starting a new shard if the current one is full."""
        if self._file is not None and self._file.tell() >= self._limit:
            self._finish()
        if self._file is None:
            self._begin()
        assert self._file is not None
        if self._lines:
            self._file.write(sample.document + b"\n")
            return
        key = f"{self._samples:09d}"
        self._samples += 1
        for extension, data in sample.images:
            self._add_image(f"{key}.{extension}", data)
        self._add_file(f"{key}.{'json' if sample.is_json else 'txt'}", sample.document)

    def _add_image(self, name: str, data: bytes) -> None:
        """Add an image, or a hard link if the shard already contains it, because questions often share an image."""
        digest = hashlib.blake2b(data, digest_size=16).digest()
        known = self._images.setdefault(digest, name)
        if known == name:
            self._add_file(name, data)
            return
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.LNKTYPE, known
        assert self._archive is not None
        self._archive.addfile(link)

    def _add_file(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        assert self._archive is not None
        self._archive.addfile(info, io.BytesIO(data))

    def _begin(self) -> None:
        name = f"{self._prefix}-{len(self._shards):05d}.{'jsonl' if self._lines else 'tar'}"
        self._shards.append(name)
        self._file = (self._out / f".{name}.partial").open("wb")
        self._images, self._samples = {}, 0
        if not self._lines:
            self._archive = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _finish(self) -> None:
        assert self._file is not None
        if self._archive is not None:
            self._archive.close()
        self._file.close()
        self._file = self._archive = None
        (self._out / f".{self._shards[-1]}.partial").replace(self._out / self._shards[-1])

    def close(self) -> list[str]:
        """Finish the last shard. Returns the names of all shards."""
        if self._file is not None:
            self._finish()
        return self._shards

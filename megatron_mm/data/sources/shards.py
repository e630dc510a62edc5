"""Shards: webdataset tars and .jsonl files, read without extracting anything.

Preparation walks a shard once and notes where each member's bytes are; training reads byte ranges.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

_OPEN_FILES = 128


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar."""

    name: str
    offset: int
    """First byte of its contents in the shard."""
    data: bytes


@dataclass
class WebSample:
    """The members of a tar that share a key: the path up to the first dot of its last part."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """By extension: what follows the key and its dot, in lower case ("jpg", "0.png", "json")."""


class BrokenShard(ValueError):
    """A shard that cannot be read to its end. Samples before the break are good; the last one, which may lack members, is left out."""


def iterate_tar(path: Path) -> Iterator[WebSample]:
    """The samples of a webdataset tar in order; neighbouring members with the same key belong together.

    Raises BrokenShard that names the shard and the offset where the tar is damaged or truncated.
    """
    sample: WebSample | None = None
    for member in _members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}"
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = WebSample(key=key)
        sample.members[extension.lower()] = member
    if sample is not None:
        yield sample


def _members(path: Path) -> Iterator[Member]:
    position = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                position = info.offset_data
                if not info.isreg():
                    continue
                contents = archive.extractfile(info)
                data = contents.read() if contents is not None else b""
                yield Member(name=info.name, offset=info.offset_data, data=data)
            position = archive.offset
        with path.open("rb") as file:
            file.seek(position)
            if file.read(512) != bytes(512):  # a whole tar ends with blocks of zeros
                raise BrokenShard(f"shard {path} ends without an end marker after byte {position}: it is truncated")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BrokenShard(f"shard {path} cannot be read after byte {position}: {error}") from None


def iterate_jsonl(path: Path) -> Iterator[Member]:
    """The lines of a .jsonl file, empty ones left out."""
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file):
            if line.strip():
                yield Member(name=f"line {number + 1}", offset=offset, data=line)
            offset += len(line)


class TarWriter:
    """Writes a webdataset tar whose bytes depend on nothing but its contents."""

    def __init__(self, path: Path) -> None:
        self._archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> None:
        """Append a file."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._archive.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        """Write the end of the tar."""
        self._archive.close()


_descriptors: OrderedDict[Path, int] = OrderedDict()
_lock = threading.Lock()


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a shard; any number of threads may call it.

    Raises ValueError that names the shard and the range where the file is shorter.
    """
    # A descriptor of its own, so that the cache may close the file while another thread still reads from it.
    with _lock:
        descriptor = _descriptors.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        _descriptors[path] = descriptor
        mine = os.dup(descriptor)
        while len(_descriptors) > _OPEN_FILES:
            os.close(_descriptors.popitem(last=False)[1])
    try:
        parts = bytearray()
        while len(parts) < size:
            part = os.pread(mine, size - len(parts), offset + len(parts))
            if not part:
                raise ValueError(f"shard {path} ends at byte {offset + len(parts)}, before the sample's last byte {offset + size}")
            parts += part
        return bytes(parts)
    finally:
        os.close(mine)

"""Shards: webdataset tars and .jsonl files, read without extracting anything.

Preparation reads a shard once and records where the bytes of each member are; training reads byte ranges.
"""

from __future__ import annotations

import io
import logging
import os
import resource
import sys
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from megatron_mm.data.image_formats import MAX_FILE_BYTES
from megatron_mm.data.sources.tar import NO_TAR, TRUNCATED, EndMarker, Skipped, TarFile, walk_tar

logger = logging.getLogger(__name__)

_OPEN_FILES = 4096
"""Maximum number of shards that a process keeps open, enough for a block of each source (`data.plan.stream`); less if the system allows
less."""
KeyEnds = Literal["first", "last"]
"""Whether a sample's key ends at the first or at the last dot of a file's name."""


@dataclass(frozen=True)
class Member:
    """A file inside a tar, or a line of a .jsonl."""

    name: str
    offset: int
    """Position in the shard of the first byte of its contents."""
    size: int
    """Size in bytes."""
    shard: Path

    @cached_property
    def data(self) -> bytes:
        """The contents, read on first access. Raises OSError or ValueError if the shard cannot be read."""
        return read_range(self.shard, self.offset, self.size)


@dataclass
class WebSample:
    """The members of a tar that share a key: the path up to the first dot of its last part (or up to the last dot)."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """Members by extension: the part of the name after the key and its dot, in lower case ("jpg", "0.png", "json")."""


class BrokenShard(ValueError):
    """A shard that has lost bytes. Samples before and after the damage are good; a sample next to it may lack members and is left out."""


def iterate_tar(path: Path, *, skipped: Callable[[Skipped], None] | None = None, key_ends: KeyEnds = "first") -> Iterator[WebSample]:
    """Yield the samples of a webdataset tar in order. Neighbouring members with the same key form a sample.

    If `skipped` is None and the shard is damaged, raises BrokenShard after the last sample, naming the shard and the first damaged byte.

    Args:
        skipped: called for everything that is left out: damage, and entries that are not files of a sample.
    """
    sample: WebSample | None = None
    damage: list[Skipped] = []
    try:
        with path.open("rb") as file:
            for entry in walk_tar(file, os.fstat(file.fileno()).st_size):
                if isinstance(entry, TarFile):
                    key, extension = split_key(entry.name, key_ends)
                    if sample is not None and (sample.key != key or extension in sample.members):
                        yield sample
                        sample = None
                    sample = sample or WebSample(key)
                    sample.members[extension] = Member(entry.name, entry.offset, entry.size, path)
                    continue
                if isinstance(entry, Skipped):
                    if entry.is_damage:
                        damage.append(entry)
                    if skipped is not None:
                        skipped(entry)
                        if entry.is_damage and sample is not None:
                            skipped(Skipped(BESIDE_DAMAGE, sample.key, entry.offset))
                if isinstance(entry, EndMarker) and sample is not None:
                    yield sample
                if isinstance(entry, EndMarker) or entry.is_damage:
                    sample = None
    except OSError as error:
        raise BrokenShard(f"shard {path} cannot be read: {error}") from None
    if sample is not None:
        yield sample
    if damage and skipped is None:
        raise BrokenShard(describe_damage(path, damage[0]))


BESIDE_DAMAGE = "sample next to damage in the shard"


def describe_damage(path: Path, damage: Skipped) -> str:
    """Describe the damage of a shard in a sentence."""
    if damage.reason == NO_TAR:
        return f"shard {path} is not a tar{_compression(path)}"
    if damage.reason == TRUNCATED:
        return f"shard {path} ends without an end marker after byte {damage.offset}: it is truncated"
    return f"shard {path} has {damage.size} damaged bytes after byte {damage.offset}"


def _compression(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(6)
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"PK", "zip")):
        if begin.startswith(magic):
            return f" but {name}: unpack it"
    return ": it is empty" if not begin else ""


def split_key(name: str, key_ends: KeyEnds = "first") -> tuple[str, str]:
    """Split the name of a file in a tar into key and extension.

    Worked example: "d.1/x.0.PNG" is ("d.1/x", "0.png"), or ("d.1/x.0", "png") if keys end at the last dot.
    """
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".") if key_ends == "first" else base.rpartition(".")
    if key_ends == "last" and not stem:
        stem, extension = extension, ""
    return f"{folder}/{stem}", extension.lower()


def iterate_jsonl(path: Path, *, skipped: Callable[[Skipped], None] | None = None) -> Iterator[Member]:
    """Yield the lines of a .jsonl file, except empty ones.

    Args:
        skipped: called for lines that are too long to read.
    """
    with path.open("rb") as file:
        offset = number = 0
        while line := file.readline(MAX_FILE_BYTES + 1):
            begin, number, length = offset, number + 1, len(line)
            long = not line.endswith(b"\n") and length > MAX_FILE_BYTES
            while long and (rest := file.readline(MAX_FILE_BYTES)):
                length += len(rest)
                if rest.endswith(b"\n"):
                    break
            offset += length
            if long and skipped is not None:
                skipped(Skipped(LONG_LINE, f"line {number}", begin, length))
            elif not long and line.strip():
                yield Line(f"line {number}", begin, length, path, line)


LONG_LINE = f"line longer than {MAX_FILE_BYTES // 2**20} MiB"


@dataclass(frozen=True)
class Line(Member):
    """A line of a .jsonl, whose contents are already in memory."""

    line: bytes = b""

    @cached_property
    def data(self) -> bytes:
        """The line, including its line break."""
        return self.line


class TarWriter:
    """Writes a webdataset tar whose bytes depend only on its contents."""

    def __init__(self, path: Path) -> None:
        self._archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes) -> None:
        """Append a file."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._archive.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        """Write the end marker and close the file."""
        self._archive.close()


_descriptors: OrderedDict[Path, int] = OrderedDict()
_lock = threading.Lock()


@cache
def _allowed_files() -> int:
    """Return the number of files that this process may open, after raising its limit if possible."""
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    wanted = min(2 * _OPEN_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(soft, wanted)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """Read bytes [offset, offset + size) of a shard. Thread-safe.

    Raises ValueError, naming the shard and the range, if the file is shorter.
    """
    # Each call has its own descriptor, so that the cache may close the file while another thread still reads from it.
    with _lock:
        mine = _duplicate(path)
    if mine is None:
        opened = os.open(path, os.O_RDONLY)  # not under the lock, because opening may be slow on a shared file system
        with _lock:
            if path in _descriptors:
                os.close(opened)
            else:
                _descriptors[path] = opened
            mine = _duplicate(path)
            while len(_descriptors) > min(_OPEN_FILES, _allowed_files() // 2):
                os.close(_descriptors.popitem(last=False)[1])
        assert mine is not None, "it has just been opened"
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


def _duplicate(path: Path) -> int | None:
    descriptor = _descriptors.get(path)
    if descriptor is None:
        return None
    _descriptors.move_to_end(path)
    return os.dup(descriptor)

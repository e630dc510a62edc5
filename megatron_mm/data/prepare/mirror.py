"""Indexes shards in an object store without copying all of them: a folder of empty files stands in for the objects.

    prepare index s3://bucket/data --index-dir DIR

lists the objects and creates a file of the same path, size and time for each in a temporary folder. The files are sparse, so they take no
disk space, and code that needs only names, sizes and times works as with real files. When a shard is to be read, its bytes are downloaded
to its file, in ranges that are retried after errors (`sources.stores`); they are removed once its rows are written. So the disk holds only
as many shards as there are workers. The first megabytes of a few shards are enough to detect the kind of a source.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_mm.data.sources.stores import ObjectStore

logger = logging.getLogger(__name__)

_BEGIN = 8 * 2**20
"""Bytes at the beginning of a shard that are downloaded to detect the kind of its source."""
_TOKENIZER = "tokenizer.model"


@dataclass(frozen=True)
class Mirror:
    """Empty local files that stand in for objects."""

    scratch: Path
    """Folder of the files, whose paths in it are those of the objects without the protocol."""
    protocol: str
    """Protocol of the store, such as s3."""

    def path_of(self, url: str) -> Path:
        """Return the local path of an object or a folder of the store."""
        return self.scratch / url.partition("://")[2].strip("/")

    def url_of(self, path: Path) -> str:
        """Return the address of a local file or folder in the store."""
        return f"{self.protocol}://{path.relative_to(self.scratch).as_posix()}"

    def shown(self, text: str) -> str:
        """Replace local paths in a message with addresses."""
        return text.replace(f"{self.scratch}/", f"{self.protocol}://")

    @contextmanager
    def beginnings(self, files: Sequence[Path]) -> Iterator[None]:
        """Fill files with only the first megabytes of their objects while the context is open. Raises OSError."""
        before = [file.stat() for file in files]
        try:
            for file, found in zip(files, before, strict=True):
                os.truncate(file, min(found.st_size, _BEGIN))
                _fill(file, self.url_of(file))
            yield
        finally:
            for file, found in zip(files, before, strict=True):
                _make_empty(file, found.st_size, found.st_mtime_ns)

    @contextmanager
    def filled(self, file: Path) -> Iterator[None]:
        """Fill a file with its object's bytes while the context is open. Raises OSError if they cannot be read."""
        _fill(file, self.url_of(file))
        try:
            yield
        finally:
            found = file.stat()
            _make_empty(file, found.st_size, found.st_mtime_ns)


@contextmanager
def mirrored(url: str) -> Iterator[Mirror]:
    """Mirror all objects below an address, except hidden ones and indexes. Raises ValueError if there are none, OSError if the store does
    not answer."""
    with tempfile.TemporaryDirectory(prefix="megatron_mm_mirror_") as scratch:
        mirror = Mirror(Path(scratch).resolve(), url.partition("://")[0])
        listed = ObjectStore(url).listed()
        root = mirror.path_of(url)
        for name, details in listed.items():
            file = mirror.scratch / name
            inside = PurePosixPath(os.path.relpath(file, root)).parts
            if ".." in inside or any(part.startswith(".") or part == "index" for part in inside) or details.get("type") == "directory":
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            _make_empty(file, int(details["size"]), _written(details))
            if file.name == _TOKENIZER:
                _fill(file, mirror.url_of(file))
        if not root.is_dir():
            raise ValueError(
                f"{url} contains no objects: specify the address of a data set, such as s3://bucket/data, of a split or of a source"
            )
        logger.info("%s: %d objects", url, len(listed))
        yield mirror


def _written(details: dict[str, Any]) -> int:
    """Return when an object was written, in nanoseconds. If the store does not tell, return a number derived from its entity tag; without
    a tag, return the current time, so that contents are compared."""
    for key in ("LastModified", "last_modified", "updated", "mtime", "created"):
        found = details.get(key)
        if isinstance(found, datetime):
            return int(found.timestamp() * 1e6) * 1000
        if isinstance(found, int | float):
            return int(found * 1e6) * 1000
    tag = str(details.get("ETag") or details.get("etag") or details.get("md5Hash") or "")
    if not tag:
        return time.time_ns()
    return int(hashlib.sha256(tag.encode()).hexdigest()[:7], 16) * 10**9


def _make_empty(file: Path, size: int, written: int) -> None:
    """Make a sparse file of this size and modification time."""
    with file.open("wb") as opened:
        opened.truncate(size)
    os.utime(file, ns=(written, written))


def _fill(file: Path, url: str) -> None:
    """Write the first bytes of an object to its file, up to the file's size."""
    folder, _, name = url.rpartition("/")
    store, found = ObjectStore(folder), file.stat()
    with file.open("r+b") as opened:
        store.copy(name, found.st_size, opened)
    os.utime(file, ns=(found.st_mtime_ns, found.st_mtime_ns))

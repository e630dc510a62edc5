"""Storage of shards: a folder, or an object store that fsspec supports (s3://, gs://, az://, https://).

A read from an object store is one request for a range. After network or server errors, or if the response ends early, it is retried with
growing waits. An object that is missing or forbidden is an error at once. Credentials and the address of the service come only from the
environment, from the variables of the store's own tools (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL), and never from an
index.

Ranges may be kept on a local disk for the next epoch, up to a limit over all processes of the machine: MEGATRON_MM_CACHE=/local/dir:200GB.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron_mm.data.sources.shards import read_range
from megatron_mm.platform.local_copies import address_of, bytes_in, cache_folder

logger = logging.getLogger(__name__)

ATTEMPTS = 6
"""Maximum number of attempts per read. The waits between them add up to about 12 seconds, plus the time that the store takes."""
FIRST_WAIT = 0.4
"""Wait before the second attempt, in seconds. It doubles before each further attempt, and varies randomly by up to half."""
TIMEOUT = 30
"""Seconds without an answer after which an attempt fails."""
_RANGE = 32 * 2**20
"""Bytes per read when a whole object is copied."""


def check_local(path: Path, *, instead: str) -> None:
    """Raise ValueError if a path is the address of an object store, which `Path` writes as s3:/bucket/...

    Args:
        instead: advice for the user, appended to the message.
    """
    address = address_of(path)
    if address is not None:
        raise ValueError(f"{address} is in an object store, not on this machine: {instead}")


class Store(Protocol):
    """Storage of a source's shards."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Read bytes [offset, offset + size) of a shard. Raises OSError or ValueError, naming the shard, if they cannot be read."""
        ...


@dataclass(frozen=True)
class FolderStore:
    """Shards in a folder."""

    root: Path

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Store.read`."""
        return read_range(self.root / name, offset, size)


class ObjectStore:
    """Shards in an object store."""

    def __init__(
        self, url: str, *, cache: RangeCache | None = None, attempts: int = ATTEMPTS, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """
        Args:
            url: address of the folder of the shards, such as s3://bucket/train/pairs.
            sleep: called to wait between attempts; tests replace it.
        """
        self.url = url.rstrip("/")
        self._cache, self._attempts, self._sleep = cache, attempts, sleep

    @cached_property
    def _files(self) -> Any:
        """fsspec's file system, created at the first read, in the process that reads."""
        try:
            import fsspec

            protocol = self.url.partition("://")[0]
            options: dict[str, Any] = {}
            if protocol == "s3":  # by default its client also retries, for minutes
                options = {"config_kwargs": {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"total_max_attempts": 1}}}
            files = fsspec.filesystem(protocol, **options)
            if protocol == "s3":
                files.retries = 1
            return files
        except ImportError as error:
            raise ValueError(f"{self.url} needs a package that is not installed ({error}): pip install 'megatron_mm[s3]'") from None

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Store.read`."""
        if size == 0:
            return b""
        key = f"{self.url}/{name} {offset} {size}"
        if self._cache is not None and (kept := self._cache.get(key, size)) is not None:
            return kept
        data = self._retrying(f"{self.url}/{name}", lambda path: self._read_once(path, offset, size))
        if self._cache is not None:
            self._cache.put(key, data)
        return data

    def problem(self, name: str, size: int) -> str | None:
        """Describe what is wrong with a shard that should have this many bytes; None if nothing is."""
        try:
            found = self.size(name)
        except OSError as error:
            return str(error)
        return None if found == size else f"{self.url}/{name} has {found} bytes, but had {size} when it was indexed"

    def size(self, name: str) -> int:
        """Return the size of an object in bytes. Raises OSError; FileNotFoundError if the object does not exist."""
        return int(self._retrying(f"{self.url}/{name}", lambda path: self._files.info(path)["size"]))

    def copy(self, name: str, size: int, file: BinaryIO) -> None:
        """Write the first `size` bytes of an object to a file. Raises OSError."""
        for begin in range(0, size, _RANGE):
            file.write(self.read(name, begin, min(_RANGE, size - begin)))

    def listed(self) -> dict[str, dict[str, Any]]:
        """Return the store's metadata of every object below this address, by its path without the protocol. Raises OSError."""
        found: dict[str, dict[str, Any]] = self._retrying(self.url, lambda path: self._files.find(path, detail=True))
        return found

    def _read_once(self, path: str, offset: int, size: int) -> bytes:
        data: bytes = self._files.cat_file(path, start=offset, end=offset + size)
        if len(data) != size:
            raise OSError(f"received {len(data)} of {size} bytes")
        return data

    def _retrying(self, path: str, action: Callable[[str], Any]) -> Any:
        for attempt in range(1, self._attempts + 1):
            try:
                return action(path)
            except (FileNotFoundError, PermissionError) as error:
                raise type(error)(f"{path} cannot be read: {error}") from None
            except ValueError:
                raise
            except Exception as error:  # each store raises its own exceptions for the same network faults
                if attempt == self._attempts:
                    raise OSError(f"{path} cannot be read after {attempt} attempts: {error!r}") from None
                wait = FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                logger.info("%s: %r; attempt %d in %.1f s", path, error, attempt + 1, wait)
                self._sleep(wait)
        raise AssertionError("unreachable")


class RangeCache:
    """Keeps ranges of objects on a local disk and removes the least recently read ones first. Processes of a machine may share a folder."""

    def __init__(self, folder: Path, limit: int) -> None:
        """
        Args:
            limit: maximum size of all files together, in bytes.
        """
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, size: int) -> bytes | None:
        """Return a range, or None if it is not in the cache."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if len(data) == size else None

    def put(self, key: str, data: bytes) -> None:
        """Add a range to the cache. If the disk is full or broken, the range is not kept, but the read still succeeds."""
        if len(data) > self.limit:
            return
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{random.getrandbits(32):08x}")
        try:
            with (self.folder / "total").open("a+") as total, _Locked(total):
                total.seek(0)
                used = int(total.read() or 0) - (path.stat().st_size if path.exists() else 0)
                if used + len(data) > self.limit:
                    used = self._make_room(self.limit - len(data))
                path.parent.mkdir(exist_ok=True)
                partial.write_bytes(data)
                partial.replace(path)
                total.truncate(0)
                total.write(str(used + len(data)))
        except (OSError, ValueError) as error:
            partial.unlink(missing_ok=True)
            logger.warning("cache %s: %s", self.folder, error)

    def _make_room(self, limit: int) -> int:
        """Remove the least recently read files until at most `limit` bytes are left and a tenth of the cache's own limit is free.

        Returns the number of bytes left.
        """
        files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self.folder.glob("??/*"))  # not the indexes
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used <= min(limit, self.limit * 9 // 10):
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:34]


class _Locked:
    """Context manager that holds the lock of a file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        fcntl.flock(self._file, fcntl.LOCK_UN)


def cache_of_environment() -> RangeCache | None:
    """Return the cache that MEGATRON_MM_CACHE defines, minus the space of copied indexes; None if it is unset. Raises ValueError if it is
    not FOLDER:NUMBER followed by MB, GB or TB."""
    found = cache_folder()
    if found is None:
        return None
    return RangeCache(found.path, max(0, found.limit - bytes_in(found.path / "indexes")))


def store_of(source: Path, url: str | None) -> Store:
    """Return the store of a source: its own folder, unless its index names an address."""
    return FolderStore(source) if url is None else ObjectStore(url, cache=cache_of_environment())

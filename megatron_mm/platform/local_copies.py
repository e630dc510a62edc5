"""The local cache for data from object stores: MEGATRON_MM_CACHE=/local/dir:200GB."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "MEGATRON_MM_CACHE"
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class CacheFolder:
    """A folder on a local disk."""

    path: Path
    limit: int
    """Maximum size of its contents, bytes."""

    def data_set(self, address: str) -> Path:
        """The folder for the indexes of a data set in an object store."""
        return self.path / "indexes" / hashlib.sha256(address.encode()).hexdigest()[:16]


def cache_folder() -> CacheFolder | None:
    """The cache that MEGATRON_MM_CACHE names; None if it is not set. Raises ValueError if it is not FOLDER:NUMBER and MB, GB or TB."""
    text = os.environ.get(CACHE_VARIABLE, "")
    if not text:
        return None
    found = re.fullmatch(r"(.+):(\d+)(MB|GB|TB)", text)
    if found is None:
        raise ValueError(f"{CACHE_VARIABLE}={text} is not FOLDER:SIZE, such as /local/cache:200GB")
    return CacheFolder(Path(found[1]), int(found[2]) * _UNITS[found[3]])


def bytes_in(folder: Path) -> int:
    """Total size of all files below a folder, bytes; 0 if there are none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def address_of(path: Path) -> str | None:
    """The address in an object store that a path refers to, which `Path` writes as s3:/bucket/...; None if it is a path on this machine."""
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(?=[^/])", str(path))
    return None if found is None else f"{found[1]}://{str(path)[found.end() :]}"


def local_folder(path: Path) -> Path:
    """A folder on this machine: the path, or, if it is in an object store, the folder for the local copy of the data set's indexes.

    Raises ValueError if there is no cache to copy them to.
    """
    address = address_of(path)
    if address is None:
        return path
    cache = cache_folder()
    if cache is None:
        raise ValueError(
            f"{address} is in an object store: set {CACHE_VARIABLE}=/local/dir:200GB, so that its indexes are copied there, or {COPY_INDEX}"
        )
    return cache.data_set(address)


COPY_INDEX = (
    "copy index and tokenizer (aws s3 sync s3://bucket/data DIR --exclude '*' --include '*/index/*' --include tokenizer.model "
    "--exclude '*/index/shards/*') and use DIR; the shards may stay in the store (`megatron-mm prepare store`)"
)

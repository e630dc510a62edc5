"""Indexes in an object store, copied to the local cache of each machine, where a run maps them: `--data.path s3://bucket/data`.

    s3://bucket/data/tokenizer.model                         CACHE/indexes/<digest of the address>/tokenizer.model
                     train/pairs/index/meta.json      ->                                           train/pairs/index/meta.json
                                       arrays-.../*                                                                  arrays-.../*
                     train/pairs/00000.tar ...               stay there and are read as ranges

The first process of a machine copies, and the others wait for it. An array folder is named after its contents, so an existing one is not
read again. The size limit of the cache (MEGATRON_MM_CACHE) covers both indexes and ranges; the least recently used data sets are removed
first.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from megatron_mm.data.sources.index_files import ARRAYS, META, write_json
from megatron_mm.data.sources.stores import ObjectStore
from megatron_mm.platform.local_copies import CACHE_VARIABLE, CacheFolder, address_of, bytes_in, cache_folder, local_folder

logger = logging.getLogger(__name__)

_TOKENIZER = "tokenizer.model"
_USED = ".used"


def data_folder(path: Path, *, sources: Sequence[str], tokenizer: bool = True) -> Path:
    """Return the local folder of a data set. If it is in an object store, its indexes are first copied to the cache.

    Raises ValueError if there is no index, no cache or no room in it, and OSError if the store does not answer.

    Args:
        sources: names of the sources whose indexes are needed, in every split that has them.
        tokenizer: also copy the data set's tokenizer.
    """
    address = address_of(path)
    return path if address is None else _copied(address, tuple(sources), tokenizer)


@cache  # once in each process
def _copied(address: str, sources: tuple[str, ...], tokenizer: bool) -> Path:
    found = cache_folder()
    home = local_folder(Path(address))  # raises if there is no cache
    assert found is not None, "local_folder found no cache"
    home.mkdir(parents=True, exist_ok=True)
    with (found.path / "indexes" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tokenizer:
            _copy(ObjectStore(address), _TOKENIZER, home / _TOKENIZER)
        any_source = False
        for split in ("train", "heldout"):
            for name in sources:
                any_source |= _copy_index(f"{address}/{split}/{name}", home / split / name, found)
        (home / _USED).touch()
        os.utime(home / _USED)
    if not any_source:
        raise ValueError(
            f"{address} has no index of the sources {', '.join(sources)}: run `megatron-mm prepare index {address} --index-dir DIR` and "
            "use DIR as --data.path, or upload the folders `index` that it writes"
        )
    return home


def _copy_index(address: str, source: Path, cache_to: CacheFolder) -> bool:
    """Copy the index of a source. Returns whether it has one. Raises ValueError if it is unusable or there is no room for it."""
    store = ObjectStore(f"{address}/index")
    try:
        text = store.read(META, 0, store.size(META))
    except FileNotFoundError:
        return False
    try:
        meta = json.loads(text)
        folder, files = Path(meta["arrays"]["folder"]).name, [name for name in ARRAYS if name in meta["arrays"]["files"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{address}/index/{META} does not describe the arrays: run `megatron-mm prepare index` again") from None
    if "root" in meta and "store" not in meta:
        raise ValueError(
            f"the shards of {address} are files in {meta['root']}: run `megatron-mm prepare store` to name their address in the store"
        )
    index = source / "index"
    sizes = {name: store.size(f"{folder}/{name}") for name in files}
    if not all((index / folder / name).is_file() and (index / folder / name).stat().st_size == size for name, size in sizes.items()):
        _make_room(cache_to, sum(sizes.values()), keep=source.parents[1], of=address)
        partial = index / f"{folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        logger.info("%s: copying its index, %.1f MB, to %s", address, sum(sizes.values()) / 1e6, index)
        for name, size in sizes.items():
            with (partial / name).open("wb") as file:
                store.copy(f"{folder}/{name}", size, file)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(index / folder, ignore_errors=True)
        partial.rename(index / folder)
    write_json(index / META, {"store": address, **meta})
    for old in index.glob("arrays-*"):
        if old.name != folder:
            shutil.rmtree(old, ignore_errors=True)  # a run that has mapped the files can still read them
    return True


def _copy(store: ObjectStore, name: str, to: Path) -> None:
    """Copy a small object if it exists."""
    try:
        data = store.read(name, 0, store.size(name))
    except FileNotFoundError:
        return
    if not to.is_file() or to.read_bytes() != data:
        partial = to.with_name(f"{to.name}.partial")
        partial.write_bytes(data)
        partial.replace(to)


def _make_room(cache_to: CacheFolder, needed: int, *, keep: Path, of: str) -> None:
    """Remove the least recently used data sets until there is room. Raises ValueError if there is not enough."""
    others = [folder for folder in (cache_to.path / "indexes").iterdir() if folder.is_dir() and folder != keep]
    others.sort(key=lambda folder: (folder / _USED).stat().st_mtime if (folder / _USED).is_file() else 0.0)
    while bytes_in(cache_to.path / "indexes") + needed > cache_to.limit and others:
        shutil.rmtree(others.pop(0), ignore_errors=True)
    if bytes_in(keep) + needed > cache_to.limit:
        raise ValueError(
            f"the index of {of} has {needed / 1e9:.2f} GB, more than {CACHE_VARIABLE} has room for ({cache_to.limit / 1e9:.2f} GB): "
            "set a larger size"
        )

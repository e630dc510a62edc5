"""The files of an index: they are written so that they are complete or absent, and checked before they are used.

    <source>/index/meta.json                  names the folder of the arrays; written last, by rename; about 1 kB for any source
    <source>/index/arrays-<16 hex digits>/    samples.npy, items.npy, sizes.npy, shards.npy, names.npy

Arrays are never overwritten, so a run that has mapped them can continue to read them. The folder that meta.json named before is kept until
the next indexing; older ones are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_mm.data.sources.rows import ITEM, SAMPLE, SHARD, SIZES
from megatron_mm.data.sources.shard_table import ShardTable

FORMAT_VERSION = 4
"""Version 3 lists shards in meta.json. Version 2 also has its arrays next to meta.json, and no sizes.npy. Both can still be read."""
META = "meta.json"
SAMPLES, ITEMS, SIZE_COLUMNS, SHARDS, NAMES = "samples.npy", "items.npy", "sizes.npy", "shards.npy", "names.npy"
ARRAYS = {SAMPLES: SAMPLE, ITEMS: ITEM, SIZE_COLUMNS: SIZES, SHARDS: SHARD, NAMES: np.dtype(np.uint8)}
_PROBES, _PROBE_BYTES = 8, 4096
_CHECKED_WHOLE, _CHECKED_ROWS = 1 << 20, 1 << 12
"""Largest number of rows that are all checked on opening, and approximate number checked in a larger array, because each may cost reading a
page."""


def sampled_digest(path: Path) -> str:
    """Return a digest of a file's size and of 8 blocks of 4 KiB spread over it, including the first and the last. It detects a different
    file of the same size, but not every changed byte."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for probe in range(_PROBES):
            file.seek(max(0, size - _PROBE_BYTES) * probe // (_PROBES - 1))
            digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]


class ArrayFile:
    """A .npy file with a known number of rows, written piece by piece."""

    def __init__(self, path: Path, dtype: np.dtype, rows: int) -> None:
        self._file: BinaryIO = path.open("wb")
        self._dtype, self._left = dtype, rows
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_2_0(self._file, header)
        self.checksum = 0
        """CRC-32 of the rows written so far."""

    def append(self, rows: np.ndarray) -> None:
        """Write the next rows."""
        assert rows.dtype == self._dtype and len(rows) <= self._left, "rows of another array"
        data = np.ascontiguousarray(rows).view(np.uint8).data if len(rows) else b""
        self.checksum = zlib.crc32(data, self.checksum)
        self._file.write(data)
        self._left -= len(rows)

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        assert self._left == 0, f"{self._left} rows are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def write_index(
    source: Path,
    *,
    meta: dict[str, Any],
    shards: ShardTable,
    num_samples: int,
    num_items: int,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write a new index into `<source>/index`, so that it is complete or absent. Holds one part in memory at a time.

    Raises OSError if the disk is full; the previous index is then kept.

    Args:
        num_samples, num_items: totals over all parts.
        parts: (SAMPLE rows, ITEM rows) in order, with `shard` and `first_item` counted over all parts.
    """
    index = source / "index"
    index.mkdir(exist_ok=True)
    before = _named_arrays(index)
    partial = index / f"arrays-{os.urandom(8).hex()}.partial"
    partial.mkdir()
    try:
        counts = {
            SAMPLES: num_samples,
            ITEMS: num_items,
            SIZE_COLUMNS: num_samples,
            SHARDS: len(shards.rows),
            NAMES: len(shards.names),
        }
        files = {name: ArrayFile(partial / name, dtype, counts[name]) for name, dtype in ARRAYS.items()}
        for samples, items in parts:
            files[SAMPLES].append(samples)
            files[ITEMS].append(items)
            sizes = np.empty(len(samples), SIZES)
            for column in SIZES.names or ():
                sizes[column] = samples[column]
            files[SIZE_COLUMNS].append(sizes)
        files[SHARDS].append(shards.rows)
        files[NAMES].append(shards.names)
        for file in files.values():
            file.close()
        _sync(partial)
        arrays = {
            name: {"rows": counts[name], "crc32": file.checksum, "digest": sampled_digest(partial / name)} for name, file in files.items()
        }
        folder = _name_by_contents(partial, arrays)
        write_json(index / META, {"version": FORMAT_VERSION, **meta, "arrays": {"folder": folder.name, "files": arrays}})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if before != folder.name:
        _remove_older(index, keep=(folder.name, before))


def _remove_older(index: Path, *, keep: tuple[str | None, ...]) -> None:
    for folder in index.glob("arrays-*"):
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)
    if keep[-1] is not None:  # the previous index has a folder of its own, so arrays of version 2 are older
        for name in (SAMPLES, ITEMS):
            (index / name).unlink(missing_ok=True)


def _name_by_contents(partial: Path, arrays: dict[str, Any]) -> Path:
    """Rename a folder of arrays after their contents. If a complete folder with the same contents exists, it is kept instead."""
    folder = partial.with_name(f"arrays-{hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()[:16]}")
    if folder.is_dir():
        same = all((folder / name).is_file() and sampled_digest(folder / name) == entry["digest"] for name, entry in arrays.items())
        if same:
            shutil.rmtree(partial)
            return folder
        folder.rename(folder.with_name(partial.name.replace(".partial", ".damaged")))
    partial.rename(folder)
    _sync(folder.parent)
    return folder


def _named_arrays(index: Path) -> str | None:
    try:
        return str(json.loads((index / META).read_text())["arrays"]["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_json(path: Path, content: object) -> None:
    """Write a JSON file so that it is complete or absent, even after a crash."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def map_arrays(index: Path, meta: dict[str, Any], *, check: bool) -> dict[str, np.ndarray]:
    """Memory-map the arrays of an index of any supported version. Returns them by file name.

    Raises ValueError, naming the file, if an array is missing or truncated, disagrees with meta.json, or points outside the index.

    Args:
        check: also check rows and digests. In a run, one process does this.
    """
    if meta["version"] == 2:
        expected: dict[str, Any] = {name: None for name in (SAMPLES, ITEMS)}
        folder = index
    else:
        expected, folder = _named_files(index, meta)
    arrays = {name: _map(folder / name, ARRAYS[name]) for name in expected}
    for name, entry in expected.items():
        if entry is not None and len(arrays[name]) != entry["rows"]:
            raise ValueError(f"{folder / name} has {len(arrays[name])} rows, but {index / META} says {entry['rows']}: {_AGAIN}")
        if entry is not None and check and sampled_digest(folder / name) != entry["digest"]:
            raise ValueError(f"{folder / name} is not the file that was written: its digest differs from {index / META}; {_AGAIN}")
    if check:
        num_shards = len(arrays[SHARDS]) if SHARDS in arrays else len(meta["shards"])
        _check_rows(folder, arrays[SAMPLES], num_items=len(arrays[ITEMS]), num_shards=num_shards)
    return arrays


def _named_files(index: Path, meta: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return meta.json's entry for each array, and the folder of the arrays. Raises ValueError if meta.json lacks them."""
    try:
        files, folder = dict(meta["arrays"]["files"]), str(meta["arrays"]["folder"])
        wanted = [name for name in ARRAYS if meta["version"] > 3 or name not in (SHARDS, NAMES)]
        return {name: {"rows": files[name]["rows"], "digest": files[name]["digest"]} for name in wanted}, index / Path(folder).name
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index / META} does not describe the arrays ({error!r}): {_AGAIN}") from None


_AGAIN = "run `megatron-mm prepare index` again"


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        # Plain arrays over the mapped files: with numpy's memmap class, reading a row is several times slower.
        array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {_AGAIN}") from None
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{path} has rows of {array.dtype}, expected {dtype}: {_AGAIN}")
    return array


def _check_rows(folder: Path, samples: np.ndarray, *, num_items: int, num_shards: int) -> None:
    """Raise ValueError if rows point outside the index."""
    stride = 1 if len(samples) <= _CHECKED_WHOLE else len(samples) // _CHECKED_ROWS
    rows = samples[::stride]
    if len(rows) == 0:
        return
    bad = (rows["shard"] < 0) | (rows["shard"] >= num_shards) | (rows["offset"] < 0) | (rows["size"] < 0)
    bad |= (rows["first_item"] < 0) | (rows["num_items"] < 1) | (rows["first_item"] + rows["num_items"] > num_items)
    bad |= (rows["text_tokens"] < 0) | (rows["num_images"] < 0) | (rows["num_images"] > rows["num_items"])
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{folder / 'samples.npy'}: row {row * stride} points outside the index: {_AGAIN}")
    if int(samples[-1]["first_item"]) + int(samples[-1]["num_items"]) != num_items:
        raise ValueError(f"{folder / 'items.npy'} has {num_items} rows, but samples.npy refers to a different number: {_AGAIN}")

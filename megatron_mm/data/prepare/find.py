"""Finds the sources of a data set and the shards among their files.

    DATA/SPLIT/SOURCE/**/*.tar|*.jsonl

A file that is neither a shard nor known to accompany one is an error: ignoring a .tar.gz, for example, would lose data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from megatron_mm.data.image_formats import is_image_name
from megatron_mm.data.sources.stores import check_local

SPLITS = ("train", "heldout")
SHARD_ENDINGS = (".tar", ".jsonl")
"""In lower or upper case."""
_UNREAD = (".ndjson", ".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".parquet", ".arrow", ".feather", ".lmdb")
"""Endings of files that hold data; of these only those that `_belongs` knows are passed over."""
_PERHAPS_UNREAD, _SMALL = (".json", ".txt", ".csv", ".tsv"), 2**20
"""Endings of files that hold data where they have so many bytes, and notes otherwise."""


def find_sources(path: Path) -> list[Path]:
    """The source folders of a data set, of one split, or the path itself.

    Raises ValueError if there is none, or if shards lie both in a folder and below it, so that some would not be read.
    """
    check_local(path, instead="copy it to a disk. `prepare index` alone takes addresses, with --index-dir")
    if not path.is_dir():
        raise ValueError(f"data path {path} does not exist")
    found = _candidates(path.resolve())
    if not found:
        other = next((file for file in _files(path) if _looks_like_data(file)), None)
        raise ValueError(
            f"data path {path} has no .tar or .jsonl shards, nor folders (split/source) that have"
            + (f"; {other.relative_to(path)} can be made into shards with `megatron-mm prepare pairs|text|...`" if other else "")
        )
    for source in found:
        _check_levels(source)
    left = _stray(path.resolve(), found)
    if left:
        raise ValueError(
            f"{left[0]} lies beside the folders of shards ({', '.join(sorted({p.name for p in found})[:5])}) and would be ignored: "
            "move it into a source folder of its own, or elsewhere"
        )
    return found if found != [path.resolve()] else [path]


def _candidates(path: Path) -> list[Path]:
    if path.parent.name in SPLITS and shards_of(path):
        return [path]
    if path.name in SPLITS:
        return [folder for folder in _folders(path) if shards_of(folder)]
    splits = [path / name for name in SPLITS if (path / name).is_dir()]
    found = [folder for split in splits for folder in _folders(split) if shards_of(folder)]
    if found:
        return found
    levels = ([path], _folders(path), [folder for above in _folders(path) for folder in _folders(above)])
    return next((folders for level in reversed(levels) if (folders := [f for f in level if _direct(f)])), [])


def _check_levels(source: Path) -> None:
    """Raise ValueError where shards lie in a source's folder and also below it: an index of some of them is easily taken for all."""
    direct = _direct(source)
    below = [shard for shard in shards_of(source) if shard.parent != source]
    if direct and below:
        raise ValueError(
            f"source {source} has shards of its own ({direct[0].name}) and in folders below ({below[0].relative_to(source)}): "
            "move them to one level, or index the folders one by one"
        )


def _stray(path: Path, sources: list[Path]) -> list[Path]:
    return [shard for shard in shards_of(path) if not any(source in shard.parents for source in sources)]


def _folders(path: Path) -> list[Path]:
    return sorted({folder.resolve() for folder in _subfolders(path)}) if path.is_dir() else []


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:  # which asks the file system about a folder, not about each file
        return sorted(found for entry in entries if entry.is_dir() and not _is_ours(found := Path(entry.path)))


def _direct(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if Path(entry.name).suffix.lower() in SHARD_ENDINGS and not entry.name.startswith(".")]
    found = sorted(Path(entry.path) for entry in named if not entry.is_dir())
    if broken := next((Path(entry.path) for entry in named if entry.is_symlink() and not os.path.exists(entry.path)), None):
        raise ValueError(f"shard {broken} is a link to {os.readlink(broken)}, which does not exist: restore it or remove the link")
    return found


def _is_ours(folder: Path) -> bool:
    return folder.name == "index" or folder.name.startswith(".")


def shards_of(source: Path) -> list[Path]:
    """The shards in a source's folder and the folders below it, in order."""
    if not source.is_dir():
        return []
    found = _direct(source)
    for folder in _subfolders(source):
        found += shards_of(folder)
    return found


def check_files(source: Path, shards: Sequence[Path], *, ignore: Sequence[str] = ()) -> None:
    """Raise ValueError where a source has files that look like data and are not read.

    Args:
        ignore: patterns of names that are left alone, such as "*.csv".
    """
    stems = {shard.name.partition(".")[0] for shard in shards}
    unread = []
    for file in _files(source):
        if _looks_like_data(file) and not _belongs(file.name, stems) and not any(fnmatch(file.name, pattern) for pattern in ignore):
            unread.append(file)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise ValueError(
            f"source {source} has files that are not read: {unread[0].relative_to(source)}{more}. Unpack archives, make shards of other "
            f"formats with `megatron-mm prepare pairs|text|...`, or leave them out with --ignore '*{unread[0].suffix}'"
        )


def _looks_like_data(file: Path) -> bool:
    ending = file.suffix.lower()
    if ending in _PERHAPS_UNREAD:
        return file.stat().st_size >= _SMALL
    return ending in _UNREAD or is_image_name(ending.lstrip("."))


def _files(source: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not _is_ours(Path(name)))
        found += [Path(folder, name) for name in sorted(names)]
    return found


def _belongs(name: str, stems: set[str]) -> bool:
    """Whether a file is what tools write beside shards: img2dataset's 00000.parquet and 00000_stats.json, energon's .nv-meta, a README."""
    if name.startswith(".") or name.partition(".")[0].upper().startswith(("README", "LICENSE", "LICENCE")):
        return True
    stem = name.partition(".")[0]
    return (name.endswith(".parquet") and stem in stems) or (name.endswith("_stats.json") and stem.removesuffix("_stats") in stems)

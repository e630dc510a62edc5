"""Finds the sources of a data set and the shards among their files.

    DATA/SPLIT/SOURCE/**/*.tar|*.jsonl

A file that is neither a shard nor known to accompany one is an error: ignoring a .tar.gz, for example, would lose data.
Folders and shards may be symbolic links; they keep their own names, and a folder that is reached twice is read once.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from megatron_mm.data.image_formats import is_image_name
from megatron_mm.data.prepare.notes import is_note
from megatron_mm.data.sources.stores import check_local

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
SHARD_ENDINGS = (".tar", ".jsonl")
"""Endings of shards, in lower or upper case."""
_UNREAD = (".ndjson", ".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".parquet", ".arrow", ".feather", ".lmdb")
"""Endings of files that contain data. Such a file is ignored only if `_belongs` recognises it."""
_PERHAPS_UNREAD, _SMALL = (".json", ".txt", ".csv", ".tsv"), 2**20
"""Endings of files that are taken for data from this many bytes on, and for notes below."""


def find_sources(path: Path, *, ignore: Sequence[str] = ()) -> list[Path]:
    """Return the source folders of a data set or of one split, or the path itself if it is a source.

    Raises ValueError if there is none, or if there are shards that would not be read: outside of the sources, or on two levels of one.

    Args:
        ignore: name patterns of shards outside of source folders to ignore, such as "*.jsonl".
    """
    check_local(path, instead="copy it to a local disk. Only `prepare index` accepts addresses, with --index-dir")
    if not path.is_dir():
        raise ValueError(f"data path {path} {'is a file, but must be a folder' if path.exists() else 'does not exist'}")
    found = _candidates(absolute(path))
    if not found:
        other = next((file for file in _files(path) if _looks_like_data(file)), None) or next(filter(_may_be_data, _files(path)), None)
        raise ValueError(
            f"data path {path} contains no .tar or .jsonl shards, and no folders (split/source) that contain any"
            + (f"; {other.relative_to(path)} can be made into shards with `megatron-mm prepare pairs|text|...`" if other else "")
        )
    for source in found:
        _check_levels(source)
    _say_left_out(found)
    left = [shard for shard in _stray(absolute(path), found) if not _is_ignored(shard, ignore)]
    if left:
        raise ValueError(
            f"{left[0]} is next to the folders of shards ({', '.join(sorted({p.name for p in found})[:5])}) and would be ignored: "
            f"move it to a source folder of its own or elsewhere, or skip it with --ignore '{left[0].name}'"
        )
    return found if found != [absolute(path)] else [path]


def _say_left_out(sources: list[Path]) -> None:
    """Warn about folders next to sources whose data is not in shards, because a user may expect them to be indexed, too."""
    for folder in sorted({source.parent for source in sources if source.parent.name in SPLITS}):
        for other in (below for below in _folders(folder) if below not in sources):
            if (file := next((file for file in _files(other) if _looks_like_data(file)), None)) is not None:
                logger.warning(
                    "%s has no .tar or .jsonl shards and is left out; %s can be made into shards with `megatron-mm prepare pairs|text|...`",
                    *(other, file.relative_to(other)),
                )


def absolute(path: Path) -> Path:
    """Return an absolute path without resolving links, so that a linked source keeps the name that it has in its split."""
    return path.resolve() if ".." in path.parts else path.absolute()


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
    """Raise ValueError if a source has shards both in its folder and below it, because an index of only some could be taken for all."""
    direct = _direct(source)
    below = [shard for shard in shards_of(source) if shard.parent != source]
    if direct and below:
        raise ValueError(
            f"source {source} has shards both at its top level ({direct[0].name}) and in folders below it "
            f"({below[0].relative_to(source)}): move them to one level, or index each folder separately"
        )


def _stray(path: Path, sources: list[Path]) -> list[Path]:
    """Return the shards below a path that no source reads, under any name, and from which no source was made."""
    real_folder = cache(Path.resolve)  # resolved once per folder, because a source has many more files
    inside = {source.resolve() for source in sources}
    left = [s for s in shards_of(path) if inside.isdisjoint((folder := real_folder(s.parent), *folder.parents))]
    if not left:
        return []
    read = {shard.resolve() for source in sources for shard in shards_of(source)} | _made_of(sources)
    return [shard for shard in left if shard.resolve() not in read]


def _made_of(sources: list[Path]) -> set[Path]:
    """Return the files from which `prepare pairs|text|...` made sources, according to the records that it keeps next to the shards."""
    found = set()
    for record in (record for source in sources for record in source.glob(".prepared/[0-9]*.json")):
        try:
            found.add(Path(json.loads(record.read_text())["input"]).resolve())
        except (OSError, ValueError, KeyError, TypeError):  # not written by this program, so the shard still counts as unread
            continue
    return found


def _folders(path: Path) -> list[Path]:
    return _subfolders(path) if path.is_dir() else []


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:  # one request for the folder, not one for each file
        return sorted(found for entry in entries if _is_folder(entry) and not _is_ours(found := Path(entry.path)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _direct(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        named = [entry for entry in entries if Path(entry.name).suffix.lower() in SHARD_ENDINGS and not entry.name.startswith(".")]
    found = sorted((entry for entry in named if not _is_folder(entry)), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise ValueError(
                f"shard {entry.path} is a link to {os.readlink(entry.path)}, which does not exist: restore it or remove the link"
            )
        if not entry.is_file():
            raise ValueError(f"shard {entry.path} is not a file but a pipe or a device: write its output to a file, or remove it")
    return [Path(entry.path) for entry in found]


def _is_ours(folder: Path) -> bool:
    """Return whether a folder was written by `prepare` or is hidden. A folder named "index" that contains shards is neither."""
    return folder.name.startswith(".") or (folder.name == "index" and not _direct(folder))


def shards_of(source: Path) -> list[Path]:
    """Return the shards in and below a source's folder, in order. Each folder is visited once, so a link to a parent does no harm."""
    return _shards_below(source, set()) if source.is_dir() else []


def _shards_below(folder: Path, seen: set[tuple[int, int]]) -> list[Path]:
    here = os.stat(folder)
    if (here.st_dev, here.st_ino) in seen:
        return []
    seen.add((here.st_dev, here.st_ino))
    found = _direct(folder)
    for below in _subfolders(folder):
        found += _shards_below(below, seen)
    return found


def check_files(source: Path, shards: Sequence[Path], *, ignore: Sequence[str] = ()) -> None:
    """Raise ValueError if a source has files that look like data but are not read.

    Args:
        ignore: name patterns of files to ignore, such as "*.csv".
    """
    stems = {shard.name.partition(".")[0] for shard in shards}
    unread = []
    for file in _files(source):
        if _looks_like_data(file) and not _belongs(file.name, stems) and not _is_ignored(file, ignore):
            unread.append(file)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise ValueError(
            f"source {source} has files that are not read: {unread[0].relative_to(source)}{more}. Unpack archives, make shards of other "
            f"formats with `megatron-mm prepare pairs|text|...`, or leave them out with --ignore '*{unread[0].suffix}'"
        )


def say_energon_split(source: Path) -> None:
    """Warn about shards that energon does not train on, because all shards of a source are indexed."""
    split = source / ".nv-meta" / "split.yaml"
    part, others = "", list[str]()
    for line in split.read_text("utf-8", "replace").splitlines() if split.is_file() else []:
        if found := _YAML_KEY.fullmatch(line):
            part = found["name"]
        elif (found := _YAML_ENTRY.fullmatch(line)) and part in ("val", "test", "exclude"):
            others.append(f"{found['name']} ({part})")
    if others:
        logger.warning(
            "%s leaves %d shards or samples out of training (%s ...), but all shards in the folder are indexed: move the others elsewhere",
            *(split, len(others), others[0]),
        )


_YAML_KEY, _YAML_ENTRY = re.compile(r"\s*(?P<name>\w+):.*"), re.compile(r"\s*-\s+(?P<name>\S.*)")


def _is_ignored(file: Path, ignore: Sequence[str]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in ignore)


def _looks_like_data(file: Path) -> bool:
    ending = file.suffix.lower()
    if ending in _PERHAPS_UNREAD:
        return file.is_file() and file.stat().st_size >= _SMALL
    return ending in _UNREAD or is_image_name(ending.lstrip("."))


def _files(source: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not _is_ours(Path(folder, name)))
        yield from (Path(folder, name) for name in sorted(names))


def _may_be_data(file: Path) -> bool:
    """Return whether a file that is too small to be taken for data may be data all the same."""
    return file.suffix.lower() in _PERHAPS_UNREAD and not is_note(file.name)


def _belongs(name: str, stems: set[str]) -> bool:
    """Return whether a file accompanies shards: img2dataset's 00000.parquet and 00000_stats.json, energon's .nv-meta, a README."""
    if is_note(name):
        return True
    stem = name.partition(".")[0]
    return (name.endswith(".parquet") and stem in stems) or (name.endswith("_stats.json") and stem.removesuffix("_stats") in stems)

"""Expands the inputs of `prepare pairs|obelics|...` to files: paths, folders, patterns and addresses, in order."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from megatron_mm.data.image_formats import is_image_name
from megatron_mm.data.prepare.notes import DATASETS_NOTES, is_note
from megatron_mm.data.prepare.published.files import ending

logger = logging.getLogger(__name__)


def expand(inputs: Iterable[str], *, images: bool = False) -> list[str]:
    """Return the files of paths, patterns and folders, in order. Raises ValueError if one does not exist or cannot be accessed.

    Args:
        images: also include images in folders.
    """
    import fsspec

    found: list[str] = []
    for pattern in inputs:
        try:
            system, path = fsspec.core.url_to_fs(pattern.removeprefix("file://"))
            files = sorted(system.glob(path)) if any(mark in path for mark in "*?[") and not system.exists(path) else [path]
            files = [file for file in files if system.exists(file) or os.path.islink(file)]
            remote = "://" in pattern and not pattern.startswith("file://")
            listed = [
                _readable(sorted(system.find(file) if remote else map(str, walk_files(Path(file)))), file, images)
                if system.isdir(file)
                else [file]
                for file in files
            ]
        except Exception as error:  # each store raises its own exceptions, for example for missing credentials
            raise ValueError(f"input {pattern} cannot be accessed: {error!r}") from None
        if not files:
            raise ValueError(f"input {pattern} does not exist")
        found += [system.unstrip_protocol(name) if remote else name for inside in listed for name in inside]
    return found


def walk_files(root: Path) -> Iterator[Path]:
    """Yield the files below a folder in order, following links. Each folder is visited once, so a link to a parent does no harm.

    Raises OSError if a folder cannot be read.
    """
    seen = set[tuple[int, int]]()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_fail):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        yield from (Path(folder) / name for name in sorted(files))


def _fail(error: OSError) -> None:
    raise error


_READ = (".parquet", ".arrow", ".feather", ".jsonl", ".json", ".ndjson", ".txt", ".tar")


def _readable(files: list[str], folder: str, images: bool) -> list[str]:
    """Return the files of a folder that contain records, and images if `images` is set. Logs how many others there are."""
    kept = [file for file in files if ending(file) in _READ or (images and _is_of_images(file))]
    kept = [file for file in kept if not is_note(file.removeprefix(folder))]
    _say_splits(kept, folder)
    by_datasets = {os.path.dirname(file) for file in files if os.path.basename(file) in DATASETS_NOTES}
    kept = [file for file in kept if not (os.path.dirname(file) in by_datasets and _is_cached(file))]
    unread = [file for file in set(files) - set(kept) if not is_note(file.removeprefix(folder))]
    if unread:
        others = Counter("cache-*.arrow" if _is_cached(file) else ending(file) or "without an extension" for file in unread)
        logger.warning(
            "%s: %d files are not read: %s", folder, others.total(), ", ".join(f"{n} {name}" for name, n in others.most_common(5))
        )
    return kept


_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
"""Usual names of splits."""
_SPLIT_FILE = re.compile(r"(?P<split>[a-z]+)-\d{5}-of-\d{5}(-\w+)?\.(parquet|arrow)")
"""Files of a split as the Hugging Face hub names them: train-00000-of-00004.parquet."""


def _say_splits(files: list[str], folder: str) -> None:
    """Warn if the files of a folder belong to several splits, because the user may not want to train on all of them."""
    splits = set[str]()
    for file in files:
        path = PurePosixPath(file)
        named = _SPLIT_FILE.fullmatch(path.name)
        name = named["split"] if named else ""
        name = path.parent.name if name == "data" else name  # `datasets` saves train/data-00000-of-00001.arrow
        if name in _SPLITS:
            splits.add(_SPLITS[name])
    if len(splits) > 1:
        logger.warning(
            "%s has files of several splits (%s), and all are converted: to train on one, pass only its files, such as '%s/.../train*'",
            *(folder, ", ".join(sorted(splits)), folder),
        )


def _is_of_images(file: str) -> bool:
    """Return whether a file is an image, or metadata.csv: Hugging Face's table of a folder's images in a format not in `_READ`."""
    return is_image_name(ending(file).lstrip(".")) or os.path.basename(file) == "metadata.csv"


def _is_cached(file: str) -> bool:
    """Return whether a file is `datasets`' cached result of a `map` or `filter`, whose records are already in the data set's own files."""
    name = PurePosixPath(file).name
    return name.startswith("cache-") and name.endswith(".arrow")

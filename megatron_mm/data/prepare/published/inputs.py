"""Expands the inputs of `prepare pairs|obelics|...` to files: paths, folders, patterns and addresses, in order."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from megatron_mm.data.image_formats import is_image_name
from megatron_mm.data.prepare.notes import DATASETS_NOTES, is_note
from megatron_mm.data.prepare.published.files import ending

logger = logging.getLogger(__name__)


def expand(inputs: Iterable[str], *, images: bool = False) -> list[str]:
    """Files of paths, patterns and folders, in order. Raises ValueError if one of them is nothing, or cannot be looked at.

    Args:
        images: images in folders are inputs, too.
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
        except Exception as error:  # each store has exceptions of its own, for missing credentials for example
            raise ValueError(f"input {pattern} cannot be accessed: {error!r}") from None
        if not files:
            raise ValueError(f"input {pattern} does not exist")
        found += [system.unstrip_protocol(name) if remote else name for inside in listed for name in inside]
    return found


def walk_files(root: Path) -> Iterator[Path]:
    """The files below a folder and the folders that it has links to, in order; each folder once, so that a link to one above ends.

    Raises OSError if a folder may not be read.
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
    """The files of a folder that hold records, or images where these are wanted; how many others there are is said."""
    kept = [file for file in files if ending(file) in _READ or (images and _is_of_images(file))]
    kept = [file for file in kept if not is_note(file.removeprefix(folder))]
    by_datasets = {os.path.dirname(file) for file in files if os.path.basename(file) in DATASETS_NOTES}
    kept = [file for file in kept if not (os.path.dirname(file) in by_datasets and _is_cached(file))]
    if len(kept) < len(files):
        others = Counter("cache-*.arrow" if _is_cached(file) else ending(file) or "without ending" for file in set(files) - set(kept))
        logger.warning(
            "%s: %d files are not read: %s", folder, others.total(), ", ".join(f"{n} {name}" for name, n in others.most_common(5))
        )
    return kept


def _is_of_images(file: str) -> bool:
    """Whether a file is an image, or Hugging Face's table of the images in a folder in its one form that otherwise is not read."""
    return is_image_name(ending(file).lstrip(".")) or os.path.basename(file) == "metadata.csv"


def _is_cached(file: str) -> bool:
    """Whether `datasets` wrote a file as the result of a `map` or `filter`: its records are in the data set's own files already."""
    name = PurePosixPath(file).name
    return name.startswith("cache-") and name.endswith(".arrow")

"""Reads image-text pairs from the files of folders.

NAME.jpg with NAME.txt or NAME.json (`caption` or `text`): the usual layout, also written by img2dataset as `files`
metadata.jsonl, .csv or .parquet with a `file_name` in each row, for images in its folder and below: Hugging Face's `imagefolder`. The field
may also be called `image_file_name`, or be a list of one image in `file_names`
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from megatron_mm.data.image_formats import MAX_FILE_BYTES, is_image_name
from megatron_mm.data.prepare.notes import is_note
from megatron_mm.data.prepare.published.inputs import walk_files
from megatron_mm.data.prepare.published.json_files import parsed
from megatron_mm.data.prepare.published.layouts import CAPTION_KEYS
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile, Record
from megatron_mm.data.prepare.published.records import iterate_records

DESCRIPTIONS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NAME = "file_name"
_NAMES = (_NAME, "image_file_name", "file_names", "image_file_names", "images_file_names")


def describes(folder: Path) -> bool:
    """Return whether a folder has a table that names its images."""
    for path in (folder / name for name in DESCRIPTIONS if (folder / name).is_file()):
        try:
            first = next(islice(iterate_records(str(path)), 1), None)
        except (DamagedFile, ValueError):  # reported when the table is read
            continue
        if isinstance(first, dict) and _name_in(first) is not None:
            return True
    return False


def described_folder(folder: Path) -> Iterator[Record | BadRecord]:
    """Yield the pairs that a folder's table names, in and below the folder; then pairs of the other images with their own text files."""
    named = set[str]()
    for path in (folder / name for name in DESCRIPTIONS if (folder / name).is_file()):
        for row in iterate_records(str(path)):
            if isinstance(row, BadRecord):
                yield row
                continue
            if (name := _name_in(row)) is None:
                yield BadRecord("no image")
                continue
            named.add(os.path.normpath(name))
            yield _with_image(row, folder, name)
    yield from folder_pairs(folder, files=[f for f in walk_files(folder) if os.path.relpath(f, folder) not in named])


def _name_in(row: Record) -> str | None:
    """Return the image's path in a row; None if it names none, or several."""
    for key in _NAMES:
        value = row.get(key)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, str):
            return value
    return None


def listing(folder: Path) -> list[str]:
    """List the files of a folder with sizes and times, to detect changes. For a folder with a table, includes files below it."""
    files = walk_files(folder) if describes(folder) else sorted(folder.iterdir())
    found = []
    for path in files:
        try:
            stat = path.stat()
        except OSError:  # a dangling link
            continue
        found.append(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return found


def _with_image(row: Record, folder: Path, name: str) -> Record | BadRecord:
    image = Path(os.path.normpath(folder / name))
    try:
        if not image.is_relative_to(folder) or not image.is_file():
            return BadRecord("image not found", what=name)
        if image.stat().st_size > MAX_FILE_BYTES:
            return BadRecord(_TOO_LARGE, what=name)
        return {**row, "image": image.read_bytes()}
    except (OSError, ValueError):  # no permission, or an invalid name
        return BadRecord(_UNREADABLE, what=name)


_TOO_LARGE = f"image file larger than {MAX_FILE_BYTES // 2**20} MiB"
_UNREADABLE = "image file cannot be read"


def folder_pairs(folder: Path, *, files: Iterable[Path] | None = None) -> Iterator[Record | BadRecord]:
    """Yield the pairs among the files of a folder: NAME.jpg with NAME.txt, or with the `caption` or `text` of NAME.json.

    Args:
        files: files to use, possibly from subfolders; None for all files directly in the folder.
    """
    present = sorted(f for f in (folder.iterdir() if files is None else files) if not is_note(f.name) and not f.is_dir())
    images = [file for file in present if is_image_name(file.suffix.lower().lstrip("."))]
    for image in images:
        yield _pair_of(image)
    with_image = {image.with_suffix("") for image in images}
    alone = sum(1 for file in present if file.suffix == ".txt" and file.with_suffix("") not in with_image)
    if alone:
        yield BadRecord("no image", alone)


def _pair_of(image: Path) -> Record | BadRecord:
    text, described = image.with_suffix(".txt"), image.with_suffix(".json")
    try:
        if not image.is_file():  # reading a pipe might block
            return BadRecord(_UNREADABLE, what=str(image))
        if image.stat().st_size > MAX_FILE_BYTES:
            return BadRecord(_TOO_LARGE, what=str(image))
        if any(file.is_file() and file.stat().st_size > MAX_FILE_BYTES for file in (text, described)):
            return BadRecord(f"text file larger than {MAX_FILE_BYTES // 2**20} MiB", what=str(image))
        fields: Record = {"image": image.read_bytes(), _NAME: image.name}
        if text.is_file():
            return {**fields, "caption": text.read_bytes()}
        if described.is_file():
            loaded = parsed(described.read_bytes())
            if isinstance(loaded, BadRecord):
                return replace(loaded, what=str(described))
            return {**{key: loaded.get(key) for key in CAPTION_KEYS}, **fields}
    except OSError:  # a dangling link, or no permission
        return BadRecord(_UNREADABLE, what=str(image))
    return fields

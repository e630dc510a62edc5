"""Recognises files next to or inside of data that are not data: hidden ones, READMEs, licences, and files that macOS and `datasets` add."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

DATASETS_NOTES = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
"""Files that `datasets.save_to_disk` writes next to its .arrow files."""
_ABOUT = re.compile(r"(readme|licen[cs]e)([-.].*)?(_[a-z]{2})?(\.(txt|md|rst|html|json))?", re.IGNORECASE)
"""Matches README, README.first.txt, README_zh.md, LICENSE-2.0.txt, but not license_plates.jsonl."""
_NOT_ABOUT = re.compile(r"\.(jsonl|ndjson|parquet|arrow|feather|tar|gz|zst|bz2|xz|zip)$", re.IGNORECASE)
"""Endings of files that are data, whatever their name."""


def is_note(name: str) -> bool:
    """Return whether a file is not data, judging by its path within its folder or archive."""
    path = PurePosixPath(name)
    if any(part == "__MACOSX" or part.startswith(".") for part in path.parts):
        return True
    return path.name in DATASETS_NOTES or (_ABOUT.fullmatch(path.name) is not None and _NOT_ABOUT.search(path.name) is None)

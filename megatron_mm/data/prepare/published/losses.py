"""Records, images and files that are lost in conversion, and the lists of them for the user.

OUT/.prepared/00000.rejected.jsonl    of input 0, a line for each rejected record and each image that a document loses:
{"record": 14, "reason": "image not found", "what": "coco/train2017/missing.jpg", "id": "000000000013"}
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Record = dict[str, Any]

_EXAMPLES = 3
"""Losses of each reason and input that a summary names."""
_LONGEST = 120
"""Characters of a field that are shown."""
_IDENTITIES = ("id", "key", "question_id", "__key__", "uid", "image_id", "url", "image", "image_path", "file_name")
"""Fields that tell one record from another, best first."""


EMPTY = "empty entry"
UNANSWERED = "turn without its question or answer"
NO_IMAGES = (EMPTY, UNANSWERED)
"""Reasons to leave out a part of a document that is no image."""


class DamagedFile(ValueError):
    """A file that cannot be read to its end."""


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read, where the next one can."""

    reason: str
    count: int = 1
    what: str = ""
    """What tells it from others, where that is known."""


@dataclass
class Dropped:
    """Images and entries that documents lose while the rest of them is used."""

    counts: Counter[str] = field(default_factory=Counter)
    """By reason."""
    named: list[tuple[str, str]] = field(default_factory=list)
    """(reason, name) of the images of the document at hand; whoever writes the list takes them out."""

    def add(self, reason: str, name: str | None = None) -> None:
        """Count one; without a name it is an entry of no contents, which is not listed."""
        self.counts[reason] += 1
        if name is not None:
            self.named.append((reason, name))

    def taken(self) -> list[tuple[str, str]]:
        """`named`, which is empty then."""
        found, self.named = self.named, []
        return found


class LossList:
    """Writes the losses of one input into a file, all of them, and keeps the first few of each reason."""

    def __init__(self, path: Path, *, of: str) -> None:
        """
        Args:
            path: of the file, which is written aside until `close`; without a loss there is none.
            of: the input, as messages name it.
        """
        self._path, self._of = path, of
        self._file: TextIO | None = None
        self._seen = Counter[str]()
        self.examples: list[str] = []
        """Lines for people."""

    def add(self, number: int, reason: str, *, what: str = "", record: Record | None = None, count: int = 1) -> None:
        """Write one down.

        Args:
            number: of the record in its input, counted from 1.
            what: the image or file that is meant, where it is a part of the record.
            count: records that are lost at this place.
        """
        named = _identity(record) if record is not None else {}
        line = {"record": number, "reason": reason, **({"what": what} if what else {}), **({"count": count} if count > 1 else {}), **named}
        if self._file is None:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("w")
        self._file.write(json.dumps(line) + "\n")
        self._seen[reason] += 1
        if self._seen[reason] <= _EXAMPLES:
            shown = [what] if what else [f"{key} {value}" for key, value in list(named.items())[:1]]
            self.examples.append(f"{reason}: {self._of}, record {number:,}{''.join(f' ({text})' for text in shown)}")

    def close(self) -> None:
        """Name the file, or remove that of an earlier attempt."""
        if self._file is None:
            self._path.unlink(missing_ok=True)
            return
        self._file.close()
        self._partial.replace(self._path)

    @property
    def _partial(self) -> Path:
        return self._path.with_name(f"{self._path.name}.partial")


def _identity(record: Record) -> dict[str, str]:
    """The first two fields that tell a record from others."""
    found: dict[str, str] = {}
    for key in _IDENTITIES:
        value = record.get(key)
        if isinstance(value, dict):  # Hugging Face's image feature
            value = value.get("path")
        if isinstance(value, str | int) and str(value).strip() and len(found) < 2:
            found[key] = str(value)[:_LONGEST]
    return found

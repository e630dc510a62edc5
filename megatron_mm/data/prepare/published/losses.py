"""Records, images and files that are lost in conversion, and the lists of them for the user.

OUT/.prepared/00000.rejected.jsonl    for input 0, a line for each rejected record and each image that is dropped from a document:
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
"""Number of losses per reason and input that a summary names."""
_LONGEST = 120
"""Maximum number of characters of a field that are shown."""
_IDENTITIES = ("id", "key", "question_id", "__key__", "uid", "image_id", "url", "URL", "image", "image_path", "image_url", "file_name")
"""Fields that identify a record, in order of preference."""


ORIGIN = "\0origin"
"""Field of a record that is removed before the record is converted: its number in its file ("record", counted from 1), for files whose
records are sorted, and its "question_id", if it has one."""
EMPTY = "empty entry"
UNANSWERED = "turn without a question or an answer"
NO_IMAGES = (EMPTY, UNANSWERED)
"""Reasons for dropping parts of a document that are not images."""


class DamagedFile(ValueError):
    """A file that cannot be read to the end."""


@dataclass(frozen=True)
class BadRecord:
    """One or more records that cannot be read, while later ones can."""

    reason: str
    count: int = 1
    what: str = ""
    """Text that identifies the record, if known."""
    number: int | None = None
    """Number of the record in its file, counted from 1; None if records come in the order of the file."""
    file: str | None = None
    """Name of the file that contains it; None for the input."""


@dataclass
class Dropped:
    """Images and entries that are dropped from documents whose other parts are used."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number of dropped images and entries, by reason."""
    named: list[tuple[str, str]] = field(default_factory=list)
    """(reason, name) of each image dropped from the current document, until `taken` removes them."""

    def add(self, reason: str, name: str | None = None) -> None:
        """Count a dropped part. Without a name it is not listed, as for empty entries."""
        self.counts[reason] += 1
        if name is not None:
            self.named.append((reason, name))

    def taken(self) -> list[tuple[str, str]]:
        """Return `named` and empty it."""
        found, self.named = self.named, []
        return found


class LossList:
    """Writes all losses of one input to a file, and keeps the first few for each reason."""

    def __init__(self, path: Path, *, of: str) -> None:
        """
        Args:
            path: path of the file, which has another name until `close`. If nothing is lost, no file is written.
            of: name of the input in messages.
        """
        self._path, self._of = path, of
        self._file: TextIO | None = None
        self._seen = Counter[str]()
        self.examples: list[str] = []
        """Lines about the first few losses for each reason."""

    def add(
        self, number: int, reason: str, *, what: str = "", record: Record | None = None, count: int = 1, file: str | None = None
    ) -> None:
        """Write a loss to the file.

        Args:
            number: number of the record in its input, counted from 1.
            what: name of the lost image or file, or text that identifies the record.
            count: number of records that are lost here.
            file: file that contains the record, if it is not the input.
        """
        named = _identity(record) if record is not None else {}
        line = {"record": number, "reason": reason, **({"what": what} if what else {}), **({"count": count} if count > 1 else {}), **named}
        line |= {"file": file} if file is not None else {}
        if self._file is None:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("w")
        self._file.write(json.dumps(line) + "\n")
        self._seen[reason] += 1
        if self._seen[reason] <= _EXAMPLES:
            shown = what or ", ".join(f"{key} {value}" for key, value in named.items())
            self.examples.append(f"{reason}: {file or self._of}, record {number:,}{f' ({shown})' if shown else ''}")

    def close(self) -> None:
        """Rename the file to its final name. If nothing was lost, remove the file of an earlier attempt."""
        if self._file is None:
            self._path.unlink(missing_ok=True)
            return
        self._file.close()
        self._partial.replace(self._path)

    @property
    def _partial(self) -> Path:
        return self._path.with_name(f"{self._path.name}.partial")


def _identity(record: Record) -> dict[str, str]:
    """Return the first two fields that identify a record."""
    found: dict[str, str] = {}
    for key in _IDENTITIES:
        value = record.get(key)
        if isinstance(value, dict):  # Hugging Face's image feature
            value = value.get("path")
        if isinstance(value, str | int) and str(value).strip() and len(found) < 2:
            found[key] = str(value)[:_LONGEST]
    return found

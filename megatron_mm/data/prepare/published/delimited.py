"""Records of .csv and .tsv files, of which the first line names the fields. All values are texts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

from megatron_mm.data.image_formats import MAX_FILE_BYTES
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile, Record
from megatron_mm.data.prepare.published.tables import check_names

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""What stands between fields, by the ending of the file."""


def delimited_records(stream: BinaryIO, *, separator: str) -> Iterator[Record | BadRecord]:
    """The rows of a file; one that has more or fewer fields than the first line costs itself. Raises DamagedFile after the last row that
    can be read. A byte that is no UTF-8 stays in its text as half of a surrogate pair, which costs the record that needs it."""
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(MAX_FILE_BYTES)
    rows = csv.reader(text, delimiter=separator, strict=True)
    try:
        names = next(rows, [])
        check_names("the file", names)
        for row in rows:
            if len(row) == len(names):
                yield dict(zip(names, row, strict=True))
            elif row:
                yield BadRecord("row of another number of fields than the first line")
    except csv.Error as error:
        raise DamagedFile(f"it cannot be read behind line {rows.line_num}: {error}") from None

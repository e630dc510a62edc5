"""Reads records from .csv and .tsv files, whose first line names the fields. All values are text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import BinaryIO

from megatron_mm.data.image_formats import MAX_FILE_BYTES
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile, Record
from megatron_mm.data.prepare.published.tables import check_names

SEPARATORS = {".csv": ",", ".tsv": "\t"}
"""Field separator, by the file's ending."""


def delimited_records(stream: BinaryIO, *, separator: str) -> Iterator[Record | BadRecord]:
    """Yield the rows of a file. Raises DamagedFile after the last row that can be read.

    A row with more or fewer fields than the first line becomes a BadRecord. A byte that is not UTF-8 becomes half of a surrogate pair, so a
    record that needs this text is rejected later.
    """
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
                yield BadRecord("row with a different number of fields than the first line")
    except csv.Error as error:
        raise DamagedFile(f"it cannot be read beyond line {rows.line_num}: {error}") from None

"""Rows of parquet and arrow files as records.

A value that cannot be converted to a Python object affects at most its own row. Text that is not UTF-8 is returned as bytes, so that only
records that need it are lost. Times outside Python's range, which no sample needs, are returned as None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_mm.data.image_formats import MAX_FILE_BYTES
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile, Record

ROWS = 256
"""Maximum number of rows that are converted at once."""
_BYTES = 2**27
"""Rows that are converted at once have about this many bytes, if they are more than one."""


def parquet_records(path: str) -> Iterator[Record | BadRecord]:
    """Yield the rows of a parquet file. If a row group is damaged, its remaining rows are counted and the next group is read.

    Raises DamagedFile if the file is not a readable parquet file.
    """
    import fsspec
    import pyarrow
    import pyarrow.parquet

    with fsspec.open(path, "rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DamagedFile(f"{path} is not a parquet file that can be read: {error}") from None
        check_names(path, table.schema_arrow.names)
        for group in range(table.num_row_groups):
            facts, given = table.metadata.row_group(group), 0
            size = sum(facts.column(number).total_uncompressed_size for number in range(facts.num_columns))
            if facts.num_rows and size > MAX_FILE_BYTES * facts.num_rows:  # packed, it may be tiny
                yield BadRecord(_LARGE_ROW, facts.num_rows)
                continue
            try:
                for batch in table.iter_batches(batch_size=_at_once(size, facts.num_rows), row_groups=[group]):
                    given += batch.num_rows
                    yield from rows_of(batch)
            except (pyarrow.ArrowException, OSError, ValueError):
                given = min(given, facts.num_rows - 1)
            if given < facts.num_rows:
                yield BadRecord("damaged parquet row group", facts.num_rows - given)


def arrow_records(path: str) -> Iterator[Record | BadRecord]:
    """Yield the rows of an arrow file in the file format or in the stream format, which Hugging Face's `datasets` writes. Raises
    DamagedFile."""
    import fsspec
    import pyarrow
    import pyarrow.ipc

    with fsspec.open(path, "rb") as file:
        begin = file.read(6)
        file.seek(0)
        try:
            reader = pyarrow.ipc.open_file(file) if begin == b"ARROW1" else pyarrow.ipc.open_stream(file)
            check_names(path, reader.schema.names)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if begin == b"ARROW1" else iter(reader)
            for batch in batches:
                rows = _at_once(batch.nbytes, batch.num_rows)
                for start in range(0, batch.num_rows, rows):
                    yield from rows_of(batch.slice(start, rows))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DamagedFile(f"{path} cannot be read to the end: {error}") from None


_LARGE_ROW = f"row larger than {MAX_FILE_BYTES // 2**20} MiB"


def _at_once(size: int, rows: int) -> int:
    """Return how many rows to convert at once, if all have this size together."""
    return max(1, min(ROWS, _BYTES * rows // max(1, size)))


def rows_in(value: Any) -> Any:
    """Return a list of objects that `datasets` has stored as an object of lists, because its feature was a `Sequence` of a dictionary:
    {"from": ["human", "gpt"], "value": ["Hi", "Yes?"]}. Any other value is returned unchanged."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) > 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def check_names(path: str, names: Sequence[str]) -> None:
    """Raise DamagedFile if two columns have the same name, because one of them would be lost silently."""
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise DamagedFile(f"{path} has several columns named {twice[0]!r}: rename them")


def rows_of(batch: Any) -> Iterator[Record | BadRecord]:
    """Yield the rows of a record batch."""
    try:
        found: list[Record] = batch.to_pylist()
    except Exception:  # pyarrow, datetime and codecs each raise their own
        yield from (_row(batch, number) for number in range(batch.num_rows))
        return
    yield from found


def _row(batch: Any, number: int) -> Record | BadRecord:
    import pyarrow

    record: Record = {}
    for place, name in enumerate(batch.schema.names):
        try:
            column = batch.column(place)
            record[name] = column[number].as_py()
        except UnicodeDecodeError:
            if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
                return BadRecord(NOT_UTF8)
            record[name] = column[number].as_buffer().to_pybytes()
        except (
            Exception
        ):  # for example a time outside Python's range, or a type of intervals; a record that needs the field is rejected later
            record[name] = None
    return record


NOT_UTF8 = "text is not UTF-8"

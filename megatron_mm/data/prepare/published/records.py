"""Reads the records of published files: JSON lines, JSON lists, .csv, parquet, arrow, tars and plain text, from any place that fsspec
supports. Text formats may be compressed.

If a file is damaged in the middle, the records before the damage are returned, followed by `DamagedFile`.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from megatron_mm.data.image_formats import MAX_FILE_BYTES, is_image_name
from megatron_mm.data.prepare.published.delimited import SEPARATORS, delimited_records
from megatron_mm.data.prepare.published.files import check_is_file, ending, open_streams, reading
from megatron_mm.data.prepare.published.json_files import is_cut, json_records, parsed
from megatron_mm.data.prepare.published.losses import BadRecord, Record
from megatron_mm.data.prepare.published.tables import NOT_UTF8, arrow_records, parquet_records
from megatron_mm.data.sources.shards import WebSample, iterate_tar
from megatron_mm.data.text.items import BadDocument
from megatron_mm.data.text.keys import field_of

TextDocuments = Literal["file", "line", "paragraph"]
"""Unit that becomes one text of a .txt: the whole file, a line, or a paragraph between empty lines."""
TABLES = (".parquet", ".arrow", ".feather")
"""Endings of files that store tables."""


def iterate_records(path: str, *, texts: TextDocuments = "file") -> Iterator[Record | BadRecord]:
    """Yield the records of a file.

    Raises DamagedFile after the last record that can be read, ValueError if the format is not supported.

    Args:
        texts: unit of a .txt that becomes a record, with the field `text`.
    """
    kind = ending(path)
    if kind in (".tar", ".tgz") and ("://" in path or not path.lower().endswith(".tar")):
        raise ValueError(f"{path}: only uncompressed tars on a local disk can be read: copy or unpack it first")
    with reading(path):
        check_is_file(path)
        if kind == ".parquet":
            yield from parquet_records(path)
        elif kind in TABLES:
            yield from arrow_records(path)
        elif kind in (".jsonl", ".json", ".ndjson", ""):
            for stream in open_streams(path):
                yield from json_records(stream)
        elif kind in SEPARATORS:
            for stream in open_streams(path):
                yield from delimited_records(stream, separator=SEPARATORS[kind])
        elif kind == ".tar":
            yield from _tar(path)
        elif kind == ".txt":
            for stream in open_streams(path):
                yield from _text_records(stream, texts)
        else:
            raise ValueError(
                f"{path} is in an unsupported format; supported are .jsonl, .json, .csv, .tsv, .txt (.gz, .zst, .zip, .bz2, .xz), "
                ".parquet, .arrow or .tar"
            )


def _text_records(stream: BinaryIO, texts: TextDocuments) -> Iterator[Record | BadRecord]:
    if texts == "file":
        data = stream.read(MAX_FILE_BYTES + 1)
        yield _decoded(data) if len(data) <= MAX_FILE_BYTES else BadRecord(f"text file larger than {MAX_FILE_BYTES // 2**20} MiB")
        return
    parts: list[bytes] = []
    size = 0
    while line := stream.readline(MAX_FILE_BYTES + 1):
        if line.strip() or is_cut(line):
            size += len(line)
            if size <= MAX_FILE_BYTES + 2:  # with a line break
                parts.append(line)
        if size and line.endswith(b"\n") and (texts == "line" or not line.strip()):
            yield _joined(parts, size)
            parts, size = [], 0
    if size:
        yield _joined(parts, size)


def _joined(parts: list[bytes], size: int) -> Record | BadRecord:
    """Return the text of some lines, of which the last are missing if there are too many bytes."""
    data = b"".join(parts).strip(b"\r\n")
    too_long = size > MAX_FILE_BYTES + 2 or len(data) > MAX_FILE_BYTES
    return BadRecord(f"text longer than {MAX_FILE_BYTES // 2**20} MiB") if too_long else _decoded(data)


def _decoded(data: bytes) -> Record | BadRecord:
    try:
        return {"text": data.decode("utf-8-sig")}
    except UnicodeDecodeError:
        return BadRecord(NOT_UTF8)


def _tar(path: str) -> Iterator[Record | BadRecord]:
    """Yield the samples of a webdataset tar: a field for each member, named by its extension, and the fields of its .json."""
    lost: list[BadRecord] = []
    noticed = lost.append
    for sample in iterate_tar(Path(path), skipped=lambda what: noticed(BadRecord(what.reason)) if what.is_damage else None):
        yield from lost
        lost.clear()
        if any(member.size > MAX_FILE_BYTES for member in sample.members.values()):
            yield BadRecord(_TOO_LARGE)
            continue
        yield _fields_of(sample)
    yield from lost


_TOO_LARGE = f"file of more than {MAX_FILE_BYTES // 2**20} MiB"


def _fields_of(sample: WebSample) -> Record | BadRecord:
    fields: Record = {}
    for name, member in sample.members.items():
        extension, data = name.removesuffix(".gz"), member.data
        if extension != name:  # webdataset unpacks such members
            try:
                data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_FILE_BYTES + 1)
            except (OSError, EOFError, zlib.error):
                return BadRecord("damaged .gz file in a tar")
            if len(data) > MAX_FILE_BYTES:
                return BadRecord(_TOO_LARGE)
        if extension == "json" or extension.endswith(".json"):
            if data.lstrip()[:1] == b"[":  # only the turns of a conversation, as in Megatron-LM's example
                data = b'{"conversations": %s}' % data
            found = parsed(data)
            if isinstance(found, BadRecord):
                return found
            fields = {**found, extension: found, **fields}
        elif is_image_name(extension):
            fields[extension] = data
        else:
            try:
                fields[extension] = data.decode("utf-8-sig")
            except UnicodeDecodeError:
                fields[extension] = data
    return fields


def text_of(record: Record, keys: Iterable[str]) -> str:
    """Return the first of some fields that is a text. Raises BadDocument if none is."""
    keys, reason = tuple(keys), "no text"
    for key in keys:
        value = field_of(record, key)
        if isinstance(value, bytes | bytearray):  # parquet's binary columns, and text that is not UTF-8
            try:
                value = bytes(value).decode("utf-8-sig")
            except UnicodeDecodeError:
                reason = NOT_UTF8
                continue
        if isinstance(value, str) and value.strip():
            return _encodable(value)
        if value is not None and not isinstance(value, str) and reason == "no text":
            reason = f"{key} is not text"
    raise BadDocument(reason)


def _encodable(text: str) -> str:
    """Return the text unchanged. Raises BadDocument if it contains half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadDocument(NOT_UTF8) from None
    return text

"""Reads the records of published files: JSON lines, JSON lists, .csv, parquet, arrow, tars and plain text, from any place that fsspec
supports. Text formats may be compressed.

If a file is damaged in the middle, the records before the damage are returned, followed by `DamagedFile`.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_mm.data.image_formats import MAX_FILE_BYTES, is_image_name
from megatron_mm.data.prepare.published.delimited import SEPARATORS, delimited_records
from megatron_mm.data.prepare.published.files import check_is_file, ending, open_streams
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile, Record
from megatron_mm.data.prepare.published.tables import NOT_UTF8, arrow_records, parquet_records
from megatron_mm.data.sources.shards import WebSample, iterate_tar
from megatron_mm.data.text.documents import object_of
from megatron_mm.data.text.items import BadDocument
from megatron_mm.data.text.keys import field_of

TextDocuments = Literal["file", "line", "paragraph"]
"""Unit that becomes one text of a .txt: the whole file, a line, or a paragraph between empty lines."""
TABLES = (".parquet", ".arrow", ".feather")
"""Endings of files that store tables."""
_BOM = b"\xef\xbb\xbf"
_UTF16, _UTF32 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"), (b"\xff\xfe\0\0", b"\0\0\xfe\xff")


def iterate_records(path: str, *, texts: TextDocuments = "file") -> Iterator[Record | BadRecord]:
    """Yield the records of a file.

    Raises DamagedFile after the last record that can be read, ValueError if the format is not supported.

    Args:
        texts: unit of a .txt that becomes a record, with the field `text`.
    """
    kind = ending(path)
    if kind in (".tar", ".tgz") and ("://" in path or not path.lower().endswith(".tar")):
        raise ValueError(f"{path}: only uncompressed tars on a local disk can be read: copy or unpack it first")
    try:
        check_is_file(path)
        if kind == ".parquet":
            yield from parquet_records(path)
        elif kind in TABLES:
            yield from arrow_records(path)
        elif kind in (".jsonl", ".json", ".ndjson", ""):
            for stream in open_streams(path):
                yield from _json_records(stream)
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
    except DamagedFile as error:
        raise DamagedFile(f"{path}: {error}" if path not in str(error) else str(error)) from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{path} cannot be read to the end: {error}") from None


def load_json(path: str) -> Any:
    """Load a JSON file that contains one value. Raises ValueError, naming the file, if it is not JSON."""
    check_is_file(path)
    parts = [stream.read() for stream in open_streams(path)]
    try:
        return json.loads(_text_of(b"".join(parts)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _text_of(data: bytes) -> str:
    """Decode JSON. A byte that is not UTF-8 becomes half of a surrogate pair, so that only the record that contains it is rejected."""
    return data.decode(json.detect_encoding(data), "surrogateescape")


def _json_records(stream: BinaryIO) -> Iterator[Record | BadRecord]:
    """Yield the records of a JSON file: lines, one list of objects, or one object."""
    first = stream.readline(MAX_FILE_BYTES)
    if first.startswith(_UTF16):
        coding = "utf-32" if first.startswith(_UTF32) else "utf-16"
        raise DamagedFile(f"it is {coding.upper()}, but must be UTF-8: convert it with iconv -f {coding} -t utf-8")
    first = first.removeprefix(_BOM)
    begin = first.lstrip()[:1]
    if begin == b"[" or (begin == b"{" and not _is_json(first) and first.rstrip().endswith((b"{", b"[", b","))):
        yield from _whole(first, stream)
        return
    line = first
    while line:
        if len(line) >= MAX_FILE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_FILE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield BadRecord(f"line longer than {MAX_FILE_BYTES // 2**20} MiB")
        elif line.strip():
            yield _parsed(line)
        line = stream.readline(MAX_FILE_BYTES)


def _whole(first: bytes, stream: BinaryIO) -> Iterator[Record | BadRecord]:
    """Yield the objects of a file that is one JSON value. Raises DamagedFile after the objects before the damage."""
    text = _text_of(first + stream.read())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield from _before_damage(text)
        return
    for entry in value if isinstance(value, list) else [value]:
        yield entry if isinstance(entry, dict) else BadRecord(NO_OBJECT)


def _before_damage(text: str) -> Iterator[Record | BadRecord]:
    """Yield the entries of a damaged JSON list up to the damage, then raise DamagedFile."""
    decoder, position, count = json.JSONDecoder(), len(text) - len(text.lstrip()) + 1, 0
    while text.lstrip().startswith("["):
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        try:
            entry, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        count += 1
        yield entry if isinstance(entry, dict) else BadRecord(NO_OBJECT)
    raise DamagedFile(f"its JSON is damaged after {count} records, at character {position} of {len(text)}" if count else "it is not JSON")


NO_OBJECT = "record is not an object"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(line: bytes) -> Record | BadRecord:
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=object_of)
    except UnicodeDecodeError:
        return BadRecord(NOT_UTF8)
    except BadDocument as reason:
        return BadRecord(str(reason))
    except (ValueError, RecursionError):
        return BadRecord("malformed JSON")
    return value if isinstance(value, dict) else BadRecord(NO_OBJECT)


def _text_records(stream: BinaryIO, texts: TextDocuments) -> Iterator[Record | BadRecord]:
    if texts == "file":
        data = stream.read(MAX_FILE_BYTES)
        yield _decoded(data) if len(data) < MAX_FILE_BYTES else BadRecord(f"text file larger than {MAX_FILE_BYTES // 2**20} MiB")
        return
    paragraph: list[bytes] = []
    while line := stream.readline(MAX_FILE_BYTES):
        if line.strip():
            paragraph.append(line)
        if paragraph and (texts == "line" or not line.strip()):
            yield _decoded(b"".join(paragraph).strip(b"\r\n"))
            paragraph = []
    if paragraph:
        yield _decoded(b"".join(paragraph).strip(b"\r\n"))


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
            parsed = _parsed(data)
            if isinstance(parsed, BadRecord):
                return parsed
            fields = {**parsed, extension: parsed, **fields}
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

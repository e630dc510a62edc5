"""Records of published files: JSON lines, JSON lists, parquet, arrow and plain text, compressed or not, wherever fsspec reads.

A file that is damaged in the middle gives the records before it, and `DamagedFile` says that there were more. Truncated archives are such
files: a zstd stream that is cut off looks to its usual readers like one that ends.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, cast

from megatron_mm.data.image_formats import MAX_FILE_BYTES, is_image_name
from megatron_mm.data.sources.shards import WebSample, iterate_tar
from megatron_mm.data.text.documents import object_of
from megatron_mm.data.text.items import BadDocument
from megatron_mm.data.text.keys import field_of

logger = logging.getLogger(__name__)

Record = dict[str, Any]
TextDocuments = Literal["file", "line", "paragraph"]
"""What one text of a .txt is: the whole file, a line, or what stands between empty lines."""

COMPRESSIONS = (".gz", ".zst", ".zip", ".bz2", ".xz")
_ROWS = 256


class DamagedFile(ValueError):
    """A file that cannot be read to its end."""


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be read, where the next one can."""

    reason: str
    count: int = 1


def expand(inputs: Iterable[str], *, images: bool = False) -> list[str]:
    """Files of paths, patterns and folders, in order. Raises ValueError where one of them is nothing, or cannot be looked at.

    Args:
        images: images in folders are inputs, too.
    """
    import fsspec

    found: list[str] = []
    for pattern in inputs:
        try:
            system, path = fsspec.core.url_to_fs(pattern.removeprefix("file://"))
            files = sorted(system.glob(path)) if any(mark in path for mark in "*?[") else [path] if system.exists(path) else []
            listed = [_readable(sorted(system.find(file)), file, images) if system.isdir(file) else [file] for file in files]
        except Exception as error:  # each store has exceptions of its own, for missing credentials for example
            raise ValueError(f"input {pattern} cannot be looked at: {error!r}") from None
        if not files:
            raise ValueError(f"input {pattern} does not exist")
        remote = "://" in pattern and not pattern.startswith("file://")
        found += [system.unstrip_protocol(name) if remote else name for inside in listed for name in inside]
    return found


_READ = (".parquet", ".arrow", ".feather", ".jsonl", ".json", ".ndjson", ".txt", ".tar")


def _readable(files: list[str], folder: str, images: bool) -> list[str]:
    """The files of a folder that hold records, or images where these are wanted; how many others there are is said."""
    kept = [file for file in files if ending(file) in _READ or (images and is_image_name(ending(file).lstrip(".")))]
    kept = [file for file in kept if not _is_note(file.removeprefix(folder))]
    if len(kept) < len(files):
        others = Counter(ending(file) or "without ending" for file in set(files) - set(kept))
        logger.warning(
            "%s: %d files are not read: %s", folder, others.total(), ", ".join(f"{n} {name}" for name, n in others.most_common(5))
        )
    return kept


def ending(path: str) -> str:
    """How a file ends, compression left out: ".jsonl" of "a.jsonl.zst"."""
    name = PurePosixPath(path).name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return PurePosixPath(name).suffix


def iterate_records(path: str, *, texts: TextDocuments = "file") -> Iterator[Record | BadRecord]:
    """The records of a file.

    Raises DamagedFile after the last record that can be read, ValueError where the format is none that is read.

    Args:
        texts: what a record of a .txt is; it has the field `text`.
    """
    kind = ending(path)
    if kind in (".tar", ".tgz") and ("://" in path or not path.lower().endswith(".tar")):
        raise ValueError(f"{path}: tars are read where they lie on a disk and are not compressed: copy or unpack it first")
    try:
        if kind == ".parquet":
            yield from _parquet(path)
        elif kind in (".arrow", ".feather"):
            yield from _arrow(path)
        elif kind in (".jsonl", ".json", ".ndjson", ""):
            for stream in open_streams(path):
                yield from _json_records(stream)
        elif kind == ".tar":
            yield from _tar(path)
        elif kind == ".txt":
            for stream in open_streams(path):
                yield from _text_records(stream, texts)
        else:
            raise ValueError(
                f"{path} is of no format that is read: .jsonl, .json, .txt (.gz, .zst, .zip, .bz2, .xz), .parquet, .arrow or .tar"
            )
    except DamagedFile as error:
        raise DamagedFile(f"{path}: {error}" if path not in str(error) else str(error)) from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{path} cannot be read to its end: {error}") from None


def load_json(path: str) -> Any:
    """A JSON file that is one value. Raises ValueError that names it where it is none."""
    parts = [stream.read() for stream in open_streams(path)]
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PK\x03\x04": ".zip", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}


def open_streams(path: str) -> Iterator[BinaryIO]:
    """The contents of a file, unpacked, by its first bytes and not by its name; of a .zip each of its files. Raises DamagedFile where the
    name promises an archive and there is none."""
    import fsspec

    with fsspec.open(path, "rb") as raw:
        file = cast(BinaryIO, raw)
        begin = file.read(6)
        file.seek(0)
        form = next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), "")
        if form == ".zip":
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.is_dir() and not _is_note(info.filename):
                        with archive.open(info) as member:
                            yield cast(BinaryIO, member)
        elif form == ".gz":
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif form == ".zst":
            yield cast(BinaryIO, io.BufferedReader(_ZstdStream(file), 2**20))
        elif form in (".bz2", ".xz"):
            yield cast(BinaryIO, bz2.BZ2File(file) if form == ".bz2" else lzma.LZMAFile(file))  # noqa: SIM115
        elif path.lower().endswith(".zip") or (not begin and path.lower().endswith(COMPRESSIONS)):
            raise DamagedFile("it is empty" if not begin else "it is not a zip file")
        else:
            yield file


def _is_note(name: str) -> bool:
    """Whether a file below a folder or in an archive is no data: what macOS adds, hidden files, a README."""
    path = PurePosixPath(name)
    return any(part == "__MACOSX" or part.startswith(".") for part in path.parts) or path.name.upper().startswith(("README", "LICENSE"))


class _ZstdStream(io.RawIOBase):
    """All frames of a zstd file. Raises EOFError where the last one is cut off."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._left, self._pending = file, b"", b""
        self._frames = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._error = zstandard.ZstdError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = self._left or self._file.read(2**18)
            self._left = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("its last zstd frame is cut off")
                return 0
            self._frame = self._frame or self._frames.decompressobj()
            try:
                self._pending = self._frame.decompress(data)
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count


def _json_records(stream: BinaryIO) -> Iterator[Record | BadRecord]:
    """Lines, or one list of objects, or one object."""
    first = stream.readline(MAX_FILE_BYTES)
    if first.lstrip()[:1] == b"[" or (first.lstrip()[:1] == b"{" and not _is_json(first)):
        yield from _whole(first, stream)
        return
    line = first
    while line:
        if len(line) >= MAX_FILE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_FILE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield BadRecord(f"line of more than {MAX_FILE_BYTES // 2**20} MiB")
        elif line.strip():
            yield _parsed(line)
        line = stream.readline(MAX_FILE_BYTES)


def _whole(first: bytes, stream: BinaryIO) -> Iterator[Record | BadRecord]:
    """A file that is one JSON value, unless it is lines of which the first is no JSON."""
    second = stream.readline(MAX_FILE_BYTES)
    if second and _is_json(second) and second.lstrip()[:1] == b"{" and not first.rstrip().endswith((b"[", b",")):
        yield BadRecord("malformed JSON")
        while second:
            if second.strip():
                yield _parsed(second)
            second = stream.readline(MAX_FILE_BYTES)
        return
    try:
        value = json.loads(first + second + stream.read())
    except (ValueError, RecursionError):
        raise DamagedFile("it is neither JSON lines nor a JSON list") from None
    for entry in value if isinstance(value, list) else [value]:
        yield entry if isinstance(entry, dict) else BadRecord("record is not an object")


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
        return BadRecord("text is not UTF-8")
    except BadDocument as reason:
        return BadRecord(str(reason))
    except (ValueError, RecursionError):
        return BadRecord("malformed JSON")
    return value if isinstance(value, dict) else BadRecord("record is not an object")


def _text_records(stream: BinaryIO, texts: TextDocuments) -> Iterator[Record | BadRecord]:
    if texts == "file":
        data = stream.read(MAX_FILE_BYTES)
        yield _decoded(data) if len(data) < MAX_FILE_BYTES else BadRecord(f"text file of more than {MAX_FILE_BYTES // 2**20} MiB")
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
        return BadRecord("text is not UTF-8")


def _parquet(path: str) -> Iterator[Record | BadRecord]:
    """Rows; those of a row group that is damaged are counted, and the next group is read."""
    import fsspec
    import pyarrow
    import pyarrow.parquet

    with fsspec.open(path, "rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DamagedFile(f"{path} is not a parquet file that can be read: {error}") from None
        for group in range(table.num_row_groups):
            rows, given = table.metadata.row_group(group).num_rows, 0
            try:
                for batch in table.iter_batches(batch_size=_ROWS, row_groups=[group]):
                    found = batch.to_pylist()
                    given += len(found)
                    yield from found
            except (pyarrow.ArrowException, OSError, ValueError):  # UnicodeDecodeError among them
                yield BadRecord("damaged parquet row group", max(1, rows - given))


def _arrow(path: str) -> Iterator[Record | BadRecord]:
    import fsspec
    import pyarrow
    import pyarrow.ipc

    with fsspec.open(path, "rb") as file:
        begin = file.read(6)
        file.seek(0)
        try:
            reader = pyarrow.ipc.open_file(file) if begin == b"ARROW1" else pyarrow.ipc.open_stream(file)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if begin == b"ARROW1" else iter(reader)
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    yield from batch.slice(start, _ROWS).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DamagedFile(f"{path} cannot be read to its end: {error}") from None


def _tar(path: str) -> Iterator[Record | BadRecord]:
    """Samples of a webdataset tar: a field for each member, called by its extension, and the fields of its .json."""
    lost: list[BadRecord] = []
    noticed = lost.append
    for sample in iterate_tar(Path(path), skipped=lambda what: noticed(BadRecord(what.reason)) if what.is_damage else None):
        yield from lost
        lost.clear()
        if any(member.size > MAX_FILE_BYTES for member in sample.members.values()):
            yield BadRecord(f"file of more than {MAX_FILE_BYTES // 2**20} MiB")
            continue
        yield _fields_of(sample)
    yield from lost


def _fields_of(sample: WebSample) -> Record | BadRecord:
    fields: Record = {}
    for extension, member in sample.members.items():
        if extension == "json" or extension.endswith(".json"):
            parsed = _parsed(member.data)
            if isinstance(parsed, BadRecord):
                return parsed
            fields = {**parsed, extension: parsed, **fields}
        elif is_image_name(extension):
            fields[extension] = member.data
        else:
            try:
                fields[extension] = member.data.decode("utf-8-sig")
            except UnicodeDecodeError:
                fields[extension] = member.data
    return fields


def text_of(record: Record, keys: Iterable[str]) -> str:
    """The first of some fields that is a text. Raises BadDocument."""
    keys = tuple(keys)
    for key in keys:
        value = field_of(record, key)
        if isinstance(value, str) and value.strip():
            return value
    present = [key for key in keys if field_of(record, key) is not None]
    raise BadDocument(f"{present[0]} is not a text" if present and not isinstance(field_of(record, present[0]), str) else "no text")

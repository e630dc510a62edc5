"""Reads JSON from published files: lines, one list of objects, one object, or, for annotations, any single value.

A list is read piece by piece, so its size does not matter; one object of it, like one line, may have up to 256 MiB. If a key occurs twice
in an object with different values, the object is rejected, because one of them would be lost silently.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_mm.data.image_formats import MAX_FILE_BYTES
from megatron_mm.data.prepare.published.files import check_is_file, open_streams, reading
from megatron_mm.data.prepare.published.losses import BadRecord, DamagedFile, Record
from megatron_mm.data.prepare.published.tables import NOT_UTF8
from megatron_mm.data.text.documents import object_of
from megatron_mm.data.text.items import BadDocument

NO_OBJECT = "record is not an object"
LONG_LINE = f"line longer than {MAX_FILE_BYTES // 2**20} MiB"
_MAX_VALUE_BYTES = 4 * 2**30
"""Maximum size of a JSON file that is loaded whole, unpacked. The largest published annotations have about 1 GiB."""
_PIECE = 2**20
"""Bytes of a list that are read at once; more if an object is longer."""
_BOM = b"\xef\xbb\xbf"
_UTF16, _UTF32 = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"), (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_SPACES = (" ", "\t", "\r", "\n")


def load_json(path: str) -> Any:
    """Load a JSON file that contains one value. Raises ValueError, naming the file, if it is damaged, too large, or not JSON."""
    data = b""
    with reading(path):
        check_is_file(path)
        for stream in open_streams(path):
            data += stream.read(_MAX_VALUE_BYTES + 1 - len(data))
    if len(data) > _MAX_VALUE_BYTES:
        raise ValueError(f"{path} has more than {_MAX_VALUE_BYTES // 2**30} GiB when it is unpacked: split it into several files")
    try:
        return json.loads(data.decode(json.detect_encoding(data), _ESCAPE), object_pairs_hook=object_of)
    except BadDocument as error:
        raise ValueError(f"{path}: {error} with different values: correct it, because one of them would be lost") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


_ESCAPE = "surrogateescape"
"""A byte that is not UTF-8 becomes half of a surrogate pair, so that only the record that contains it is rejected."""


def json_records(stream: BinaryIO) -> Iterator[Record | BadRecord]:
    """Yield the records of a JSON file: lines, one list of objects, or one object. Raises DamagedFile after the last one before damage."""
    first = stream.readline(_PIECE)
    unmarked = json.detect_encoding(first) if first[:1] in (b"[", b"{") else "utf-8"
    if first.startswith(_UTF16) or unmarked != "utf-8":
        coding = "utf-32" if first.startswith(_UTF32) or unmarked.startswith("utf-32") else "utf-16"
        raise DamagedFile(f"it is {coding.upper()}, but must be UTF-8: convert it with iconv -f {coding} -t utf-8")
    first = first.removeprefix(_BOM)
    begin = first.lstrip()[:1]
    if begin == b"[":
        yield from _entries(first, stream)
        return
    if not first.endswith(b"\n"):
        first += stream.readline(MAX_FILE_BYTES + 1 - len(first))
    if begin == b"{" and not _is_json(first) and first.rstrip().endswith((b"{", b"[", b",")):
        yield _object(first + stream.read(MAX_FILE_BYTES + 1 - len(first)))
    else:
        yield from _lines(first, stream)


def _lines(line: bytes, stream: BinaryIO) -> Iterator[Record | BadRecord]:
    while line:
        if is_cut(line):
            while is_cut(stream.readline(MAX_FILE_BYTES + 1)):
                pass
            yield BadRecord(LONG_LINE)
        elif line.strip():
            yield parsed(line)
        line = stream.readline(MAX_FILE_BYTES + 1)


def is_cut(line: bytes) -> bool:
    """Return whether a line that was read with a limit of `MAX_FILE_BYTES` + 1 bytes continues beyond it."""
    return len(line) > MAX_FILE_BYTES and not line.endswith(b"\n")


def parsed(line: bytes) -> Record | BadRecord:
    """Return the object in a line, or the reason why there is none."""
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=object_of)
    except UnicodeDecodeError:
        return BadRecord(NOT_UTF8)
    except BadDocument as reason:
        return BadRecord(str(reason))
    except (ValueError, RecursionError):
        return BadRecord("malformed JSON")
    return value if isinstance(value, dict) else BadRecord(NO_OBJECT)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _object(data: bytes) -> Record | BadRecord:
    """Return the object that is a whole file. Raises DamagedFile."""
    if len(data) > MAX_FILE_BYTES:
        raise DamagedFile(f"it is one JSON object of more than {MAX_FILE_BYTES // 2**20} MiB: write one object per line, or a list")
    try:
        value = json.loads(data.decode("utf-8", _ESCAPE), object_pairs_hook=object_of)
    except BadDocument as reason:
        return BadRecord(str(reason))
    except json.JSONDecodeError as error:
        raise DamagedFile(f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):
        raise DamagedFile("it is not JSON") from None
    return value if isinstance(value, dict) else BadRecord(NO_OBJECT)


def _entries(first: bytes, stream: BinaryIO) -> Iterator[Record | BadRecord]:
    """Yield the objects of a list. Raises DamagedFile after the last one before damage."""
    text, count = _Text(first, stream), 0
    text.skip("[")
    separator = "]" if text.peek() == "]" else ","
    if separator == "]":
        text.skip("]")
    while separator == ",":
        entry = text.value()
        if entry is not None:
            count += 1
            yield entry
        separator = text.peek()
        if entry is None or separator not in (",", "]"):
            problem = f"its JSON is damaged after {count} records" if count else "it is not JSON"
            raise DamagedFile(f"{problem}, at character {text.place}")
        text.skip(separator)
    if text.peek():
        raise DamagedFile(f"it continues after the end of its list of {count} records, at character {text.place}")


class _Text:
    """The text of a JSON list, of which only a piece is in memory."""

    def __init__(self, first: bytes, stream: BinaryIO) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")(_ESCAPE).decode
        self._checked, self._plain = json.JSONDecoder(object_pairs_hook=object_of), json.JSONDecoder()
        self._stream, self._ended = stream, False
        self._text, self._position, self._before = self._decode(first), 0, 0

    @property
    def place(self) -> int:
        """Number of characters before the current one."""
        return self._before + self._position

    def peek(self) -> str:
        """Return the next character that is not a space; empty at the end."""
        while True:
            while self._text[self._position : self._position + 1] in _SPACES:
                self._position += 1
            if self._position < len(self._text) or not self._more():
                return self._text[self._position : self._position + 1]

    def skip(self, character: str) -> None:
        """Go past a character, and spaces before it."""
        assert self.peek() == character, "the caller has looked"
        self._position += 1

    def value(self) -> Record | BadRecord | None:
        """Return the object that begins here, or why it cannot be used, and go past it. None if there is no value of up to 256 MiB."""
        self.peek()
        found = self._parsed()
        # A value that cannot be parsed may continue in the next piece, and so may a number before ".", "e" or "e-" at the end of this one.
        while (found is None or found[1] > len(self._text) - 3) and len(self._text) - self._position <= MAX_FILE_BYTES and self._more():
            found = self._parsed()
        if found is None:
            return None
        entry, self._position = found
        return entry

    def _parsed(self) -> tuple[Record | BadRecord, int] | None:
        """Return the value that begins here, and the position after it."""
        try:
            value, end = self._checked.raw_decode(self._text, self._position)
        except BadDocument as reason:
            try:
                return BadRecord(str(reason)), self._plain.raw_decode(self._text, self._position)[1]
            except (ValueError, RecursionError):
                return None
        except (ValueError, RecursionError):
            return None
        return (value if isinstance(value, dict) else BadRecord(NO_OBJECT)), end

    def _more(self) -> bool:
        """Read the next piece and forget everything before the current character. False at the end of the file."""
        if self._ended:
            return False
        left = self._text[self._position :]
        data = self._stream.read(max(_PIECE, len(left)))
        self._ended = not data
        self._text, self._position, self._before = left + self._decode(data, self._ended), 0, self.place
        return True

"""Reads tar files so that nothing in them is lost without being reported.

Python's `tarfile` stops at the first end marker and at the first damaged header. But a shard may consist of several concatenated tars, and
a flipped bit must not lose the gigabyte after it. So this module reads the headers itself: it continues after an end marker, and after a
damaged header it searches for the next valid one. Everything that it skips is returned as a `Skipped` with the reason.

A header that claims more bytes than the file has, such as 2^62, counts as damaged.

Limits: if a tar is stored inside a file whose header is damaged, it is read as if it were part of the shard. Files after damage may be the
second half of a sample.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_NAME_BYTES = 2**20
"""Maximum size of a long name or a PAX header, in bytes. A longer one counts as damage."""

DAMAGED, TRUNCATED, NO_TAR = "damaged tar header", "truncated tar", "not a tar"
DAMAGES = (DAMAGED, TRUNCATED, NO_TAR)
"""Reasons which mean that bytes of the shard itself are lost."""


@dataclass(frozen=True)
class TarFile:
    """A regular file in a tar, or a link to one before it."""

    name: str
    offset: int
    """Position in the shard of the first byte of its contents."""
    size: int
    """Size in bytes."""


@dataclass(frozen=True)
class Skipped:
    """A part of a shard that was left out."""

    reason: str
    name: str
    """Name of the file; empty if unknown."""
    offset: int
    """Position in the shard at which it begins."""
    size: int = 0
    """Bytes of the shard that could not be read as a tar; 0 if the file was left out on purpose."""

    @property
    def is_damage(self) -> bool:
        return self.reason in DAMAGES


@dataclass(frozen=True)
class EndMarker:
    """The end of a tar; another may follow."""


@dataclass
class _Extended:
    """Properties of a file from the extension headers before it."""

    name: str | None = None
    link: str | None = None
    size: int | None = None
    sparse: bool = False
    begin: int | None = None
    """Position in the shard of the first extension header; None if there is none."""
    malformed: bool = False
    """A PAX header breaks its format, so the file's name or size may be missing."""


def walk_tar(file: BinaryIO, size: int) -> Iterator[TarFile | Skipped | EndMarker]:
    """Yield everything in a tar, in order.

    Args:
        file: the shard; must be seekable.
        size: size of the shard, in bytes.
    """
    position, extended, at_end, found_any = 0, _Extended(), False, False
    seen: dict[str, tuple[int, int]] = {}
    while position + BLOCK <= size:
        block = _read(file, position, BLOCK)
        if block == _ZEROS:
            if not at_end:
                yield EndMarker()
            position, at_end, extended = position + BLOCK, True, _Extended()
            continue
        header = parse_header(block)
        stop = None if header is None else _contents_end(header, extended, position, size)
        if header is None or stop is None:
            found = _next_header(file, position + BLOCK, size)
            reason = DAMAGED if found is not None else TRUNCATED if found_any or header is not None else NO_TAR
            yield Skipped(reason, "" if header is None else header.name, position, (found or size) - position)
            position, extended = found or size, _Extended()
            at_end = found is None
            continue
        at_end, found_any = False, True
        contents = position + BLOCK
        if header.type in _EXTENSIONS:
            extended.begin = position if extended.begin is None else extended.begin
            _extend(extended, header.type, _read(file, contents, header.size))
        elif extended.malformed:
            assert extended.begin is not None, "only an extension header can be malformed"
            yield Skipped(DAMAGED, header.name, extended.begin, stop - extended.begin)
            extended = _Extended()
        else:
            if header.type == tarfile.GNUTYPE_SPARSE:
                contents = _after_sparse_headers(file, block, contents)
                stop = contents + header.size  # if that is beyond the shard, the tar is truncated
            named = _named(header, extended, contents, seen)
            if named is not None:
                yield named
            extended = _Extended()
        position = _round_up(stop)
    if not at_end and size:
        yield Skipped(TRUNCATED if found_any else NO_TAR, "", min(position, size), max(size - position, 0))
    elif not size:
        yield Skipped(NO_TAR, "", 0, 0)


_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


def parse_header(block: bytes) -> tarfile.TarInfo | None:
    """Parse a block of 512 bytes as a header; None if it is not a header or its checksum is wrong."""
    try:
        stored = int(block[148:156].split(b"\0")[0].strip() or b"0", 8)
        if stored != _checksum(block) and stored != _signed_checksum(block):
            return None
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (ValueError, tarfile.TarError, OverflowError):
        return None
    return header if header.size >= 0 else None


def _checksum(block: bytes) -> int:
    """Return the sum of a header's bytes, with the checksum field taken as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * 32


def _signed_checksum(block: bytes) -> int:
    """Return the checksum over signed bytes, which some old programs wrote."""
    return _checksum(block) - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _contents_end(header: tarfile.TarInfo, extended: _Extended, position: int, size: int) -> int | None:
    """Return where a file's contents end; None if that is beyond the shard, or if an extension header is too large."""
    if header.type in _EXTENSIONS:
        length = header.size
        if length > _MAX_NAME_BYTES:
            return None
    elif header.isreg() or header.type not in tarfile.SUPPORTED_TYPES:
        length = header.size if extended.size is None else extended.size
    else:
        length = 0  # folders and links have no contents, whatever their size field
    end = position + BLOCK + length
    return end if end <= size else None


def _extend(extended: _Extended, kind: bytes, data: bytes) -> None:
    """Add a long name, a long link or a PAX header to the properties of the next file."""
    text = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    if kind == tarfile.GNUTYPE_LONGNAME:
        extended.name = text
    elif kind == tarfile.GNUTYPE_LONGLINK:
        extended.link = text
    elif kind != tarfile.XGLTYPE:
        try:
            _add_records(extended, data)
        except ValueError:
            extended.malformed = True


def _add_records(extended: _Extended, data: bytes) -> None:
    """Add the records of a PAX header. Raises ValueError if it breaks its format."""
    for key, value in _pax_records(data):
        if key in ("path", "GNU.sparse.name"):
            extended.name = value
        elif key == "linkpath":
            extended.link = value
        elif key == "size" and value:
            digits = value.lstrip("0") or "0"
            if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
                raise ValueError(f"PAX size {value!r} is not a number of bytes")
            extended.size = int(digits)
        extended.sparse |= key.startswith("GNU.sparse.")


def _pax_records(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield the records "LENGTH KEY=VALUE\\n". Raises ValueError at the first malformed one."""
    position = 0
    while data[position : position + 1].strip(b"\0"):
        digits, space, _ = data[position : position + 20].partition(b" ")
        if not space or not digits.isdigit():
            raise ValueError(f"a PAX record begins with {digits!r}, expected its length and a space")
        length = int(digits)
        record = data[position + len(digits) + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if not equals or len(record) != length - len(digits) - 1 or not value.endswith(b"\n"):
            raise ValueError(f"PAX record {key!r} has no value, or does not end after its {length} bytes")
        yield key.decode("utf-8", "surrogateescape"), value[:-1].decode("utf-8", "surrogateescape")
        position += length


def _named(header: tarfile.TarInfo, extended: _Extended, contents: int, seen: dict[str, tuple[int, int]]) -> TarFile | Skipped | None:
    """Return the entry that a header describes; None for a folder."""
    name = extended.name or header.name
    base = name.rpartition("/")[2]
    if header.isdir():
        return None
    size = header.size if extended.size is None else extended.size
    if base.startswith("._"):
        return Skipped("AppleDouble file", name, contents)
    if base.startswith("."):
        return Skipped("hidden file", name, contents)
    if header.type == tarfile.GNUTYPE_SPARSE or extended.sparse:
        return Skipped("sparse file in the tar", name, contents)
    if header.islnk() or header.issym():
        target = extended.link or header.linkname
        place = seen.get(posixpath.normpath(posixpath.join(posixpath.dirname(name), target) if header.issym() else target))
        if place is None:
            return Skipped("link to a file that does not precede it in the tar", name, contents)
        seen[_plain(name)] = place
        return TarFile(name, *place)
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        return Skipped("neither a file nor a folder", name, contents)
    seen[_plain(name)] = contents, size
    return TarFile(name, contents, size)


def _plain(name: str) -> str:
    """Normalise a path ("./" and the like), because links may spell it differently from the file."""
    return posixpath.normpath(name) if name.startswith(".") or "/." in name or "//" in name else name


def _after_sparse_headers(file: BinaryIO, block: bytes, contents: int) -> int:
    """Return where the contents of an old GNU sparse file begin: after the headers that extend its map."""
    more, offset = block[482], 504
    while more:
        extension = _read(file, contents, BLOCK)
        if len(extension) < BLOCK:
            break
        more, contents = extension[offset], contents + BLOCK
    return contents


def _next_header(file: BinaryIO, position: int, size: int) -> int | None:
    """Return the position of the first valid header at or after a position; None if there is none."""
    while position + BLOCK <= size:
        chunk = _read(file, position, 2**20)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            block = chunk[start : start + BLOCK]
            header = parse_header(block)
            if header is not None and header.name and position + start + BLOCK + header.size <= size:
                return position + start
        position += len(chunk) // BLOCK * BLOCK or BLOCK
    return None


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _round_up(position: int) -> int:
    return -(-position // BLOCK) * BLOCK

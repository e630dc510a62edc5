"""Finds the images of a published data set in a folder of files, or of tars such as img2dataset writes. Never on the web.

Documents name an image by a path, by a file name alone or by its URL. A path below the folder is opened directly. For all other names
the folder is walked once, following links, and a table of names is written (SQLite, so that it takes disk space instead of memory: about
40 bytes per name). An image is found by

    its path, or the end of it: "train2017/1.jpg" finds "coco/train2017/1.jpg"; or its file name without extension
    a path that begins with folders that do not exist here: "coco/train2017/1.jpg" finds "train2017/1.jpg"
    the URL in the .json next to it (img2dataset)
    the SHA-256, SHA-1 or MD5 of its URL, in hexadecimal, as file name
    COCO's name since 2017: "COCO_train2014_000000000009.jpg" finds "000000000009.jpg"

There are no other matches. A name that two files share finds neither, because one of them would be the wrong picture. And "vg/1.jpg" does
not find "coco/1.jpg".
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megatron_mm.data.image_formats import MAX_FILE_BYTES, is_image_name
from megatron_mm.data.prepare.published.inputs import walk_files
from megatron_mm.data.sources.shards import BrokenShard, iterate_tar, read_range
from megatron_mm.data.text.items import BadDocument

logger = logging.getLogger(__name__)

_AMBIGUOUS = -1
_COCO_2014 = re.compile(r"COCO_(?:train|val|test)20\d\d_(?P<rest>\d{12}\.jpg)")
"""COCO's file names until 2014. Since 2017 a name is only the number, which is unique within COCO."""


class ImageStore:
    """Looks up images by the names that documents use. Any number of processes may open the same table."""

    def __init__(self, root: Path, *, table: Path | None) -> None:
        """
        Args:
            table: table written by `build_table`; None to look up only paths.
        """
        self.root = root
        self._table = sqlite3.connect(f"file:{table}?mode=ro", uri=True) if table is not None else None
        self._files: dict[int, str] = {}

    def read(self, name: str) -> bytes:
        """Return an encoded image. Raises BadDocument if no image or more than one has this name, or if it cannot be read."""
        data = self._below(name)
        if data is None and self._table is not None:
            data = self._from_table(name)
        if data is None:
            raise BadDocument("image not found")
        return data

    def _below(self, name: str) -> bytes | None:
        """Read a file by its path below the root; None if there is none, or if the path leads outside."""
        if "://" in name or "\0" in name:
            return None
        path = Path(os.path.normpath(self.root / name.lstrip("/")))
        try:
            if not path.is_relative_to(self.root) or not path.is_file():
                return None
            if path.stat().st_size > MAX_FILE_BYTES:
                raise BadDocument(f"image file larger than {MAX_FILE_BYTES // 2**20} MiB")
            return path.read_bytes()
        except OSError:  # a name too long for a file, or a file that cannot be read
            return None

    def _from_table(self, name: str) -> bytes | None:
        assert self._table is not None
        elsewhere = False
        for key, is_rest in _lookups(name):
            row = self._table.execute("SELECT file, offset, size, is_whole FROM images WHERE key = ?", (_digest(key),)).fetchone()
            if row is None:
                continue
            file, offset, size, is_whole = row
            if is_rest and not is_whole:
                elsewhere = True
                continue
            if file == _AMBIGUOUS:
                raise BadDocument("several images with that name")
            if size > MAX_FILE_BYTES:
                raise BadDocument(f"image file larger than {MAX_FILE_BYTES // 2**20} MiB")
            try:
                return read_range(self.root / self._path(file), offset, size)
            except (OSError, ValueError):
                raise BadDocument("image file cannot be read") from None
        if elsewhere:
            raise BadDocument("image with that name is in another folder")
        return None

    def _path(self, file: int) -> str:
        if file not in self._files:
            assert self._table is not None
            (path,) = self._table.execute("SELECT path FROM files WHERE number = ?", (file,)).fetchone()
            self._files[file] = os.fsdecode(path)
        return self._files[file]


def _lookups(name: str) -> Iterator[tuple[str, bool]]:
    """Yield keys under which an image may be stored. The flag is True for a tail of the name, which must be the image's whole path."""
    yield name, False
    if "://" in name:
        data = name.encode("utf-8", "surrogateescape")
        yield from ((hashlib.new(kind, data, usedforsecurity=False).hexdigest(), False) for kind in ("sha256", "sha1", "md5"))
        return
    tails = _tails(os.path.normpath(name).lstrip("/"))
    yield from ((tail, tail != whole) for tail in tails for whole in tails[:1])
    if found := _COCO_2014.fullmatch(tails[-1]):
        yield found["rest"], False


def _tails(path: str) -> list[str]:
    """Return a path and its tails, longest first: a/b/c, b/c, c."""
    parts = path.split("/")
    return ["/".join(parts[number:]) for number in range(len(parts))]


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).digest()


def build_table(root: Path, table: Path) -> int:
    """Write the table of a folder's images, unless it exists and no folder or tar has changed since. Returns the number of images in it.

    Warns of archives in the folder other than tars. Raises ValueError if the folder does not exist or is a file.
    """
    if root.is_file():
        raise ValueError(f"{root} is a file, but --images takes a folder: {_unpacked(root)}")
    if not root.is_dir():
        raise ValueError(f"folder of images {root} does not exist")
    stamp = listing_stamp(root)
    if is_new := table_stamp(table) != stamp:
        table.parent.mkdir(parents=True, exist_ok=True)
        partial = table.with_name(f"{table.name}.partial")
        partial.unlink(missing_ok=True)
        connection = sqlite3.connect(partial)
        connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE images (key BLOB PRIMARY KEY, file INT, offset INT, size INT, is_whole INT) WITHOUT ROWID;"
            "CREATE TABLE files (number INT PRIMARY KEY, path BLOB);"
            "CREATE TABLE stamp (value TEXT);"
        )
        connection.execute("INSERT INTO stamp VALUES (?)", (stamp,))
        logger.info("%s: searching for images; this is done only once", root)
        for number, path in enumerate(walk_files(root)):
            _add_file(connection, root, path, number)
            if number % 10_000 == 9_999:
                connection.commit()
                logger.info("%s: %d files", root, number + 1)
        connection.commit()
        connection.close()
        partial.replace(table)
    with sqlite3.connect(f"file:{table}?mode=ro", uri=True) as connection:
        (count,) = connection.execute("SELECT count(*) FROM (SELECT DISTINCT file, offset FROM images WHERE is_whole)").fetchone()
    archives = [path for path in walk_files(root) if path.name.lower().endswith(_ARCHIVES)] if is_new or not count else []
    if archives:
        logger.warning(
            "%s contains archives, whose images are not found (%d, such as %s): %s",
            *(root, len(archives), archives[0].relative_to(root), _unpacked(archives[0])),
        )
    return int(count)


_ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
"""Endings of archives whose files cannot be read at random positions."""


def _unpacked(file: Path) -> str:
    """Return what to do with a file that is not a folder of images."""
    if file.name.lower().endswith(_ARCHIVES):
        return "unpack it into a folder"
    return (
        "give the folder that contains it" if file.suffix.lower() == ".tar" or is_image_name(file.suffix[1:]) else "give the images' folder"
    )


_TABLE_VERSION = "2"


def listing_stamp(root: Path) -> str:
    """Return a digest that changes if a file is added or removed anywhere in a folder, or if a tar changes."""
    digest = hashlib.sha256(_TABLE_VERSION.encode())
    folder = None
    for path in walk_files(root):
        if path.parent != folder:
            folder = path.parent
            digest.update(f"{folder} {os.stat(folder).st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        if path.name.endswith(".tar") and path.is_file():
            found = path.stat()
            digest.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def table_stamp(table: Path) -> str | None:
    """Return the `listing_stamp` with which a table was written; None if there is no valid table."""
    if not table.is_file():
        return None
    try:
        with sqlite3.connect(f"file:{table}?mode=ro", uri=True) as connection:
            return str(connection.execute("SELECT value FROM stamp").fetchone()[0])
    except (sqlite3.Error, TypeError):
        return None


def _add_file(connection: sqlite3.Connection, root: Path, path: Path, number: int) -> None:
    """Add the image or images of a file. A file that cannot be read is skipped with a warning."""
    ending = path.suffix.lower().lstrip(".")
    if path.name.startswith(".") or not (ending == "tar" or is_image_name(ending)):
        return
    try:
        if path.exists() and not path.is_file():  # reading a pipe might block
            logger.warning("%s is not a file but a pipe or a device; it is skipped", path)
            return
        if ending == "tar":
            _add_tar(connection, path, number)
        else:
            described_by = path.with_suffix(".json")
            url = _url(described_by.read_bytes()) if described_by.is_file() else None
            _insert(connection, path.relative_to(root).as_posix(), url, (number, 0, path.stat().st_size))
    except (OSError, BrokenShard) as error:  # a dangling link, or no permission
        logger.warning("%s", error)
        return
    connection.execute("INSERT INTO files VALUES (?, ?)", (number, os.fsencode(path.relative_to(root))))


def _add_tar(connection: sqlite3.Connection, path: Path, number: int) -> None:
    for sample in iterate_tar(path, skipped=lambda skipped: logger.warning("%s: %s at byte %d", path, skipped.reason, skipped.offset)):
        images = [member for extension, member in sample.members.items() if is_image_name(extension)]
        described = sample.members.get("json")
        url = _url(described.data) if described is not None and described.size <= MAX_FILE_BYTES and len(images) == 1 else None
        for image in images:
            _insert(connection, image.name, url, (number, image.offset, image.size))


# A whole path takes precedence over the tail of another. If two of the same rank collide, the key becomes ambiguous.
_INSERT = f"""
INSERT INTO images VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET
    file = CASE WHEN excluded.is_whole > is_whole THEN excluded.file WHEN excluded.is_whole = is_whole THEN {_AMBIGUOUS} ELSE file END,
    offset = CASE WHEN excluded.is_whole > is_whole THEN excluded.offset ELSE offset END,
    size = CASE WHEN excluded.is_whole > is_whole THEN excluded.size ELSE size END,
    is_whole = max(is_whole, excluded.is_whole)
"""


def _insert(connection: sqlite3.Connection, path: str, url: str | None, place: tuple[int, int, int]) -> None:
    tails = _tails(os.path.normpath(path).lstrip("/"))
    for key in {*tails, PurePosixPath(path).stem}:
        connection.execute(_INSERT, (_digest(key), *place, key == tails[0]))
    if url:  # if it was fetched twice, both are the same picture
        connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, 1) ON CONFLICT (key) DO NOTHING", (_digest(url), *place))


def _url(data: bytes) -> str | None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields["url"] if isinstance(fields, dict) and isinstance(fields.get("url"), str) else None


_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"II+\0", "tif"),
    (b"MM\0+", "tif"),
)
_OTHER_MAGIC = (
    *(b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\xff\x0a", b"\0\0\0\x0cJXL "),  # JPEG 2000, JPEG XL
    *(b"<svg", b"<?xml", b"%!PS", b"8BPS", b"\0\0\1\0", b"P5", b"P6", b"v/1\1"),  # SVG, EPS, PSD, ICO, PGM, PPM, EXR
)
"""Beginnings of files in formats that are not read. HEIC is found by its box, like AVIF."""


def image_extension(data: bytes) -> str:
    """Return the file extension of an image, judging by its first bytes. Raises BadDocument if its format is not supported, or if the bytes
    are not those of an image, as those of a damaged file."""
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp" and {data[at : at + 4] for at in range(8, min(len(data), 64), 4)} & {b"avif", b"avis"}:
        return "avif"
    if not data:
        raise BadDocument("image is empty")
    is_other = data.startswith(_OTHER_MAGIC) or data[4:8] == b"ftyp"
    raise BadDocument("image in an unsupported format" if is_other else "image does not decode")

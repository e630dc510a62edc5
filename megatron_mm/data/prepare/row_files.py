"""Row files: the results of `prepare index` for one shard, kept with the index so that no shard is read twice.

    <home>/index/shards/<shard>.rows        a line of JSON (`RowHeader`), then the shard's SAMPLE rows, then its ITEM rows

A row file is written under another name and then renamed, so it is complete or absent, even if the process is killed. It is used again if
the shard is unchanged (size and modification time, or size and a digest of parts of it) and would be read in the same way (kind, tokenizer,
chat template), with images checked at least as thoroughly.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.data.prepare.samples import Losses, Reading, ShardRows
from megatron_mm.data.sources.index_files import sampled_digest
from megatron_mm.data.sources.rows import ITEM, SAMPLE

READER_VERSION = 2
"""Version of the code that reads shards. Raise it if the same shard would result in other rows: all shards are then read again."""


@dataclass(frozen=True)
class RowHeader:
    """The first line of a row file."""

    recipe: str
    """Digest of the way in which the shard was read (`recipe_of`)."""
    size: int
    """Size of the shard, in bytes."""
    modified: int
    """Time of the shard's last modification, in nanoseconds."""
    digest: str
    """Digest of parts of the shard's contents (`sampled_digest`)."""
    samples: int
    items: int
    images: int
    text_tokens: int
    losses: dict[str, Any]
    checksum: int
    """CRC-32 of the rows."""


def recipe_of(reading: Reading, *, tokenizer: str) -> str:
    """Return a digest of everything besides the shard that determines its rows.

    Args:
        tokenizer: the tokenizer's fingerprint.
    """
    return hashlib.sha256(f"{READER_VERSION} {tokenizer} {reading!r}".encode()).hexdigest()[:16]


def row_file_of(source: Path, shard: Path, *, home: Path | None = None) -> Path:
    """Return the path of a shard's row file.

    Args:
        home: folder that contains the source's `index` folder; None for the source's own folder.
    """
    return (home or source) / "index" / "shards" / f"{shard.relative_to(source).as_posix()}.rows"


def write_row_file(path: Path, shard: Path, rows: ShardRows, *, recipe: str, before: os.stat_result) -> RowHeader:
    """Write a shard's rows, with `shard` and `first_item` counted from 0.

    Raises OSError if the disk is full, and ValueError if the shard changed while it was read. No new row file is left in either case.

    Args:
        before: the shard's `stat` before it was read.
    """
    stat, data = shard.stat(), rows.samples.tobytes() + rows.items.tobytes()
    if (stat.st_size, stat.st_mtime_ns, stat.st_ino) != (before.st_size, before.st_mtime_ns, before.st_ino):
        raise ValueError(f"shard {shard} changed while it was read: run this again when it is complete. Finished shards are kept")
    header = RowHeader(
        recipe=recipe,
        size=stat.st_size,
        modified=stat.st_mtime_ns,
        digest=sampled_digest(shard),
        samples=len(rows.samples),
        items=len(rows.items),
        images=int(rows.samples["num_images"].sum()),
        text_tokens=int(rows.samples["text_tokens"].sum()),
        losses={**asdict(rows.losses), **{name: dict(getattr(rows.losses, name)) for name in ("rejected", "dropped", "skipped")}},
        checksum=zlib.crc32(data),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(json.dumps(asdict(header)).encode() + b"\n")
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return header


def read_header(path: Path) -> RowHeader | None:
    """Return the header of a row file; None if the file is missing or incomplete."""
    try:
        with path.open("rb") as file:
            header = RowHeader(**json.loads(file.readline()))
            whole = file.tell() + header.samples * SAMPLE.itemsize + header.items * ITEM.itemsize
            return header if os.fstat(file.fileno()).st_size == whole else None
    except (OSError, ValueError, TypeError):
        return None


def current_header(path: Path, shard: Path, *, recipes: Sequence[str]) -> RowHeader | None:
    """Return the header of a shard's row file if it can be used again; None if the shard must be read.

    Args:
        recipes: digests of the ways in which the shard may have been read.
    """
    header = read_header(path)
    if header is None or header.recipe not in recipes:
        return None
    stat = shard.stat()
    if stat.st_size != header.size or (stat.st_mtime_ns != header.modified and sampled_digest(shard) != header.digest):
        return None
    return header


def read_rows(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the SAMPLE and ITEM rows of a row file. Raises ValueError if they are damaged."""
    header = read_header(path)
    with path.open("rb") as file:
        file.readline()
        data = file.read()
    if header is None or zlib.crc32(data) != header.checksum:
        raise ValueError(f"{path} is damaged: remove it and run `megatron-mm prepare index` again")
    cut = header.samples * SAMPLE.itemsize
    return np.frombuffer(data[:cut], SAMPLE), np.frombuffer(data[cut:], ITEM)


def losses_of(header: RowHeader) -> Losses:
    """Return the losses of a shard."""
    counts = {name: Counter(header.losses[name]) for name in ("rejected", "dropped", "skipped")}
    return Losses(**{**header.losses, **counts})

"""The table of shards in an index: names, sizes, and digests that distinguish shards of the same size.

    shards.npy   one SHARD row for each shard
    names.npy    names of the shards, relative to the source, one after another in UTF-8

Both are memory-mapped like the other arrays of an index: a process that reads three of a hundred thousand shards reads three rows. Indexes
before version 4 list shards in meta.json; `of_meta` makes the same table from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from megatron_mm.data.sources.rows import SHARD


@dataclass(frozen=True)
class Shard:
    """A shard as it was when it was indexed."""

    name: str
    size: int
    """Size in bytes."""
    modified: int | None = None
    """Time of last modification, in nanoseconds; None if unknown."""
    digest: str = ""
    """Digest of parts of its contents (`index_files.sampled_digest`); empty if unknown."""


class ShardTable(Sequence[str]):
    """The names of shards, by number."""

    def __init__(self, rows: np.ndarray, names: np.ndarray) -> None:
        """
        Args:
            rows: [shards] SHARD rows.
            names: [bytes] uint8.
        """
        self.rows, self.names = rows, names

    @classmethod
    def of(cls, shards: Iterable[Shard]) -> ShardTable:
        """Make a table of these shards."""
        rows, names = [], bytearray()
        for shard in shards:
            names += shard.name.encode("utf-8", "surrogateescape")
            rows.append((len(names), shard.size, -1 if shard.modified is None else shard.modified, shard.digest.encode()))
        return cls(np.array(rows, SHARD), np.frombuffer(bytes(names), np.uint8))

    @classmethod
    def of_meta(cls, meta: dict[str, Any]) -> ShardTable:
        """Make the table from meta.json of an index before version 4."""
        stamps = meta.get("stamps", {})
        return cls.of(Shard(name, size, *stamps.get(name, (None, ""))) for name, size in meta["shards"].items())

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        """Return the name of a shard. Raises ValueError if it leads outside the source."""
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        begin, end = int(self.rows["name_end"][number - 1]) if number else 0, int(self.rows["name_end"][number])
        name = self.names[begin:end].tobytes().decode("utf-8", "surrogateescape")
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"the index names the shard {name!r}, which is outside its source: run `megatron-mm prepare index` again")
        return name

    def shards(self) -> Iterator[Shard]:
        """Yield all shards with their sizes and digests. Raises ValueError as `__getitem__` does."""
        for number, name in enumerate(self):
            row = self.rows[number]
            modified = int(row["modified"])
            yield Shard(name, int(row["size"]), None if modified < 0 else modified, row["digest"].decode())

    @property
    def bytes(self) -> int:
        """Total size of all shards, in bytes."""
        return int(self.rows["size"].sum())

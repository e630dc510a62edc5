"""The index of a source: where the bytes of every sample are, and what the plan needs to know about it.

A source is a folder of shards of one kind. `prepare index` reads every sample once and writes, next to the shards,

    <source>/index/meta.json            kind, tokenizer fingerprint, chat template and caption prompt, counts of rejected samples by reason
    <source>/index/arrays-*/samples.npy one SAMPLE row for each valid sample, in shard order
                            items.npy   one ITEM row for each text, control token or image of each sample, in reading order
                            sizes.npy   one SIZES row for each sample: what planning reads
                            shards.npy, names.npy   the shards (`shard_table`)

The arrays are memory-mapped, so opening an index of a hundred million samples in a hundred thousand shards takes a rank almost no time or
memory. They contain all that planning needs: the plan never opens a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_mm.config.checks import nearest
from megatron_mm.data.ranges import ranges
from megatron_mm.data.sources.index_files import FORMAT_VERSION, META, NAMES, SHARDS, map_arrays, sampled_digest, write_json
from megatron_mm.data.sources.rows import ITEM as ITEM
from megatron_mm.data.sources.rows import SAMPLE as SAMPLE
from megatron_mm.data.sources.shard_table import Shard, ShardTable
from megatron_mm.data.sources.source import SOURCE_FORMATS, DocumentSizes, ImageSizes, Items, Kind, Source
from megatron_mm.data.sources.stores import ObjectStore, Store, check_local, store_of
from megatron_mm.data.text.keys import USUAL, Keys
from megatron_mm.platform.local_copies import COPY_INDEX

SHARDS_CHECKED_AT_ONCE = 32
"""Number of threads that check shards. The file system answers a hundred requests about as fast as one."""
_SHARDS_A_TURN = 64
"""Number of shards that a thread checks in one task."""


@dataclass(frozen=True)
class SourceIndex:
    """An opened source of shards: memory-mapped rows and the files that they point into. See `data.sources.source.Source`."""

    name: str
    """Folder name of the source."""
    kind: Kind
    root: Path
    """Folder of the shards: the source's folder, unless the index was written elsewhere by `prepare index --index-dir`."""
    shards: Sequence[str]
    """Names of the shards, relative to `root`."""
    tokenizer: str
    """Fingerprint of the tokenizer that counted the tokens."""
    rejected: dict[str, int]
    """Number of samples that `prepare index` found unusable, by reason."""
    sample_rows: np.ndarray
    """[num_samples] SAMPLE rows."""
    item_rows: np.ndarray
    """[num_items] ITEM rows."""
    chat_template: str | None = None
    """Name of the template that renders the samples; None if they are not chats."""
    caption_prompt: str | None = None
    """Question to which the captions of pairs are the answers; None if pairs are not rendered as chats."""
    size_rows: np.ndarray | None = None
    """[num_samples] SIZES rows; None in indexes of version 2."""
    keys: Keys = USUAL
    """Names of the fields of the samples."""
    store: str | None = None
    """Address of the object store that holds the shards; None if they are in `root`."""

    @property
    def answers_only(self) -> bool:
        """Some items are not supervised."""
        return self.chat_template is not None

    def __len__(self) -> int:
        return len(self.sample_rows)

    @property
    def location(self) -> str:
        return str(self.root)

    def sizes(self, rows: np.ndarray | slice) -> DocumentSizes:
        """See `Source.sizes`."""
        found = (self.sample_rows if self.size_rows is None else self.size_rows)[rows]
        return DocumentSizes(found["text_tokens"].astype(np.int64), found["num_images"].astype(np.int64))

    def image_sizes(self, rows: np.ndarray | slice) -> ImageSizes:
        """See `Source.image_sizes`."""
        found = self.sample_rows[rows]
        if isinstance(rows, slice) and len(found):  # neighbouring samples have neighbouring items
            items = self.item_rows[found[0]["first_item"] : found[-1]["first_item"] + found[-1]["num_items"]]
        else:
            items = self.item_rows[ranges(found["first_item"], found["num_items"])]
        is_image = items["is_image"] == 1
        document = np.repeat(np.arange(len(found)), found["num_items"])[is_image]
        return ImageSizes(document, *(items[side][is_image].astype(np.int64) for side in ("width", "height")))

    def items(self, row: int) -> Items:
        """See `Source.items`."""
        items = self._item_rows(row)
        is_image = items["is_image"] == 1
        return Items(
            is_image=is_image,
            supervised=items["counted"] == 1,
            tokens=items["tokens"].astype(np.int64),
            widths=items["width"][is_image].astype(np.int64),
            heights=items["height"][is_image].astype(np.int64),
        )

    def document(self, row: int) -> bytes:
        """See `Source.document`."""
        sample = self.sample_rows[row]
        return self._store.read(self._shard_name(row), int(sample["offset"]), int(sample["size"]))

    def image(self, row: int, number: int) -> bytes:
        """See `Source.image`."""
        items = self._item_rows(row)
        image = items[items["is_image"] == 1][number]
        return self._store.read(self._shard_name(row), int(image["offset"]), int(image["size"]))

    def shard_of(self, row: int) -> Path:
        """Return the path of the shard that contains a sample, if shards are in a folder."""
        return self.root / self._shard_name(row)

    def _shard_name(self, row: int) -> str:
        return self.shards[int(self.sample_rows[row]["shard"])]

    @cached_property
    def _store(self) -> Store:
        return store_of(self.root, self.store)

    def _item_rows(self, row: int) -> np.ndarray:
        sample = self.sample_rows[row]
        return self.item_rows[sample["first_item"] : sample["first_item"] + sample["num_items"]]


def open_index(source: Path, *, check: bool = True) -> SourceIndex:
    """Open the index of a source folder.

    Raises ValueError, naming the folder and the command to run, if the index is missing, damaged or of an unsupported version, or if a
    shard has changed since it was indexed.

    Args:
        check: also check every shard and the contents of the arrays. In a run, one process does this (`run.data`).
    """
    check_local(source, instead=MAPPED)
    meta_path = source / "index" / META
    again = f"run `megatron-mm prepare index {source.parent.parent}`"
    if not meta_path.is_file():
        raise ValueError(f"{source} has no index: {again} first")
    try:
        meta = json.loads(meta_path.read_text())
        version = meta.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{meta_path} is damaged ({error}): {again} again") from None
    if version not in READ_VERSIONS:
        raise ValueError(
            f"{meta_path} has version {version}, but this program reads {' and '.join(map(str, READ_VERSIONS))}: {again} again"
        )
    lacking = [name for name in (*_FIELDS, *(["shards"] if version < 4 else [])) if name not in meta]
    if lacking or not isinstance(meta.get("shards", {}), dict):
        raise ValueError(f"{meta_path} lacks {', '.join(lacking) or 'a table of shards'}: {again} again")
    root = Path(meta.get("root", source))
    arrays = map_arrays(source / "index", meta, check=check)
    shards = ShardTable.of_meta(meta) if version < 4 else ShardTable(arrays[SHARDS], arrays[NAMES])
    if check:
        _check_shards(root, shards, store=meta.get("store"))
    return SourceIndex(
        name=source.name,
        kind=meta["kind"],
        root=root,
        shards=shards,
        tokenizer=meta["tokenizer"],
        rejected=meta["rejected"],
        sample_rows=arrays["samples.npy"],
        item_rows=arrays["items.npy"],
        size_rows=arrays.get("sizes.npy"),
        chat_template=meta["chat_template"],
        caption_prompt=meta.get("caption_prompt"),
        keys=Keys(**meta.get("keys", {})),
        store=meta.get("store"),
    )


READ_VERSIONS = (2, 3, FORMAT_VERSION)
_FIELDS = ("kind", "tokenizer", "rejected", "chat_template")


def _check_shards(source: Path, shards: ShardTable, *, store: str | None) -> None:
    """Raise ValueError if a shard is missing, has another size, or was rewritten with other contents."""
    remote = store_of(source, store)

    def problem(shard: Shard) -> str | None:
        path, size = f"{source}/{shard.name}", shard.size
        if isinstance(remote, ObjectStore):
            return remote.problem(shard.name, size)
        try:
            found = os.stat(path)
        except OSError:
            return f"shard {path} is missing, but had {size} bytes when it was indexed"
        if found.st_size != size:
            return f"shard {path} has {found.st_size} bytes, but had {size} when it was indexed"
        if shard.modified not in (None, found.st_mtime_ns) and sampled_digest(Path(path)) != shard.digest:
            return f"shard {path} has the same size as when it was indexed, but other contents"
        return None

    def problems_of(some: list[Shard]) -> list[str]:
        return [text for shard in some if (text := problem(shard)) is not None]

    listed, problems = shards.shards(), list[str]()
    parts = iter(lambda: list(islice(listed, _SHARDS_A_TURN)), [])
    with ThreadPoolExecutor(SHARDS_CHECKED_AT_ONCE) as threads:
        while some := list(islice(parts, SHARDS_CHECKED_AT_ONCE)):
            for found in threads.map(problems_of, some):
                problems += found
    if problems:
        more = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}: restore it or index {source} again")


MAPPED = f"an index must be on a local disk: {COPY_INDEX}"
GIVE_DATA = "use --data.path DIR, a folder that `megatron-mm prepare` made or indexed"


def check_folder(root: Path) -> None:
    """Raise ValueError if the folder does not exist."""
    check_local(root, instead=MAPPED)
    if not root.is_dir():
        where = "" if root.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(f"data.path {root} is not a directory{where}: {GIVE_DATA}")


def open_split(root: Path, split: str, *, sources: list[str], check: bool = True) -> list[Source]:
    """Open the given sources of `root/split`, each in its format. Raises ValueError if the split or a source is missing or empty."""
    folder = root / split
    check_folder(root)
    if not folder.is_dir():
        raise ValueError(f"data path {root} has no folder {split!r}; it has {sorted(p.name for p in root.iterdir())}")
    present = sorted(p.name for p in folder.iterdir() if p.is_dir())
    missing = [name for name in sources if name not in present]
    if missing:
        raise ValueError(f"{folder} lacks the sources {missing} of data.mixture; it has {present}{_instead(missing, present, root)}")
    opened = [open_source(folder / name, check=check) for name in sources]
    for source in opened:
        if len(source) == 0:
            rejected = f" (rejected: {source.rejected})" if isinstance(source, SourceIndex) else ""
            raise ValueError(f"source {source.location} has no usable sample{rejected}: add data or drop it from data.mixture")
    return opened


def _instead(missing: list[str], present: list[str], root: Path) -> str:
    """What to do if a mixture names sources that do not exist."""
    if not present:
        return f": make its sources with `megatron-mm prepare` (docs/data.md), then run `megatron-mm prepare index {root}`"
    if len(missing) == 1 and (meant := nearest(missing[0], present)):
        return meant
    return f": choose from these, for example --data.mixture {' '.join(f'{name}={1 / len(present):.3g}' for name in present)}"


def open_source(folder: Path, *, check: bool = True) -> Source:
    """Open a source folder with the first registered format that matches it, or else as indexed shards (see `open_index`)."""
    for known in SOURCE_FORMATS.values():
        if known.matches(folder):
            return known.open(folder)
    return open_index(folder, check=check)


def sample_name(source: Source, row: int) -> str:
    """Name a sample for the log, with its shard if the source consists of shards."""
    return f"sample {row} of {source.name}" + (f" ({source.shard_of(row)})" if isinstance(source, SourceIndex) else "")


def move_to_store(source: Path, url: str) -> int:
    """Record in the index of a source that its shards are now in an object store. Returns the number of shards.

    Raises ValueError if a shard is missing there, or has another size than when it was indexed.
    """
    path = source / "index" / META
    shards = open_index(source, check=False).shards
    assert isinstance(shards, ShardTable), "the shards of an opened index"
    meta = json.loads(path.read_text())
    meta["store"] = url.rstrip("/")
    _check_shards(source, shards, store=meta["store"])
    write_json(path, meta)
    return len(shards)

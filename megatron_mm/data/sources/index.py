"""The index of a source: where the bytes of every sample are, and what the plan must know of it.

A source is a folder of shards of one kind. `prepare index` reads every sample once and writes, beside the shards,

    <source>/index/meta.json     kind, tokenizer fingerprint, chat template and caption prompt, shard files with their sizes, counts of
                                 rejected samples by reason
    <source>/index/samples.npy   one SAMPLE row for each valid sample, in shard order
    <source>/index/items.npy     one ITEM row for each text, control token or image of each sample, in reading order

The arrays are memory-mapped, so an index of a hundred million samples costs a rank no memory to open. Together they hold
all that planning needs: the plan never opens a shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm.data.ranges import ranges
from megatron_mm.data.sources.shards import read_range
from megatron_mm.data.sources.source import DocumentSizes, ImageSizes, Items, Kind

FORMAT_VERSION = 2

SAMPLE = np.dtype(
    [
        ("shard", "<i4"),  # row of meta.json's `shards`
        ("offset", "<i8"),  # where the bytes of the document (.txt, .json or a .jsonl line) begin in the shard
        ("size", "<i4"),  # how many bytes it has
        ("first_item", "<i8"),  # row of items.npy
        ("num_items", "<i4"),
        ("text_tokens", "<i4"),  # tokens of all items that are not images
        ("num_images", "<i4"),
    ]
)
"""One sample. Its text is read from [offset, offset + size) of its shard."""

ITEM = np.dtype(
    [
        ("is_image", "u1"),
        ("counted", "u1"),  # its tokens count in the loss; image: what stands before it may (the model says whether)
        ("tokens", "<i4"),  # text: its tokens; control token: 1; image: 0 (the model says how many tokens an image is)
        ("offset", "<i8"),  # image: where its bytes begin in the shard
        ("size", "<i4"),  # image: how many bytes it has
        ("width", "<i4"),  # image: pixels
        ("height", "<i4"),
    ]
)
"""One text, control token or image of a sample, in reading order."""


@dataclass(frozen=True)
class SourceIndex:
    """A source of shards, opened: memory-mapped rows and the files that they point into. See `data.sources.source.Source`."""

    name: str
    """Folder name of the source."""
    kind: Kind
    root: Path
    """The source's folder; shard names are relative to it."""
    shards: tuple[str, ...]
    tokenizer: str
    """Fingerprint of the tokenizer that counted the tokens."""
    rejected: dict[str, int]
    """Samples that `prepare index` found unusable, by reason."""
    sample_rows: np.ndarray
    """[num_samples] of SAMPLE."""
    item_rows: np.ndarray
    """[num_items] of ITEM."""
    chat_template: str | None = None
    """Name of the template that renders the samples; None where they are no chats."""
    caption_prompt: str | None = None
    """What asks for the captions of pairs; None where they are no chats."""

    @property
    def answers_only(self) -> bool:
        """Some items do not count in the loss."""
        return self.chat_template is not None

    def __len__(self) -> int:
        return len(self.sample_rows)

    @property
    def location(self) -> str:
        return str(self.root)

    def sizes(self, rows: np.ndarray | slice) -> DocumentSizes:
        """See `Source.sizes`."""
        found = self.sample_rows[rows]
        return DocumentSizes(found["text_tokens"].astype(np.int64), found["num_images"].astype(np.int64))

    def image_sizes(self, rows: np.ndarray | slice) -> ImageSizes:
        """See `Source.image_sizes`."""
        found = self.sample_rows[rows]
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
        return read_range(self.shard_of(row), int(sample["offset"]), int(sample["size"]))

    def image(self, row: int, number: int) -> bytes:
        """See `Source.image`."""
        items = self._item_rows(row)
        image = items[items["is_image"] == 1][number]
        return read_range(self.shard_of(row), int(image["offset"]), int(image["size"]))

    def shard_of(self, row: int) -> Path:
        """The file that holds a sample."""
        return self.root / self.shards[int(self.sample_rows[row]["shard"])]

    def _item_rows(self, row: int) -> np.ndarray:
        sample = self.sample_rows[row]
        return self.item_rows[sample["first_item"] : sample["first_item"] + sample["num_items"]]


def write_index(source: Path, *, meta: dict, samples: np.ndarray, items: np.ndarray) -> None:
    """Write the three files into `<source>/index`, meta.json last and by rename, so that an index is whole or absent."""
    folder = source / "index"
    folder.mkdir(exist_ok=True)
    np.save(folder / "samples.npy", samples)
    np.save(folder / "items.npy", items)
    partial = folder / "meta.json.partial"
    partial.write_text(json.dumps({"version": FORMAT_VERSION, **meta}, indent=2) + "\n")
    partial.replace(folder / "meta.json")


def open_index(source: Path) -> SourceIndex:
    """Open the index of a source folder.

    Raises ValueError that names the folder and the command to run where there is no index, where it is of another
    version, or where a shard has changed its size since it was indexed.
    """
    meta_path = source / "index" / "meta.json"
    if not meta_path.is_file():
        raise ValueError(f"{source} has no index: run `megatron-mm prepare index {source.parent.parent}` first")
    meta = json.loads(meta_path.read_text())
    if meta.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{meta_path} has version {meta.get('version')}, this program reads {FORMAT_VERSION}: "
            f"run `megatron-mm prepare index {source.parent.parent}` again"
        )
    for shard, size in meta["shards"].items():
        path = source / shard
        actual = path.stat().st_size if path.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise ValueError(f"shard {path} {found}, but had {size} when it was indexed: restore it or index {source} again")
    return SourceIndex(
        name=source.name,
        kind=meta["kind"],
        root=source,
        shards=tuple(meta["shards"]),
        tokenizer=meta["tokenizer"],
        rejected=meta["rejected"],
        # As plain arrays over the mapped files: numpy's memmap class makes every row several times slower to read.
        sample_rows=np.asarray(np.load(source / "index" / "samples.npy", mmap_mode="r")),
        item_rows=np.asarray(np.load(source / "index" / "items.npy", mmap_mode="r")),
        chat_template=meta["chat_template"],
        caption_prompt=meta.get("caption_prompt"),
    )


def open_split(root: Path, split: str, *, sources: list[str]) -> list[SourceIndex]:
    """Open the named sources of `root/split`. Raises ValueError where the split or a source is missing or empty."""
    folder = root / split
    if not root.is_dir():
        raise ValueError(f"data path {root} does not exist: give --data.path the folder that `megatron-mm prepare` wrote")
    if not folder.is_dir():
        raise ValueError(f"data path {root} has no folder {split!r}; it has {sorted(p.name for p in root.iterdir())}")
    present = sorted(p.name for p in folder.iterdir() if p.is_dir())
    missing = [name for name in sources if name not in present]
    if missing:
        raise ValueError(f"{folder} lacks the sources {missing} of data.mixture; it has {present}")
    indexes = [open_index(folder / name) for name in sources]
    for index in indexes:
        if len(index) == 0:
            raise ValueError(
                f"source {index.root} has no usable sample (rejected: {index.rejected}): add data or drop it from data.mixture"
            )
    return indexes

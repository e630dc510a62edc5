"""Checks the samples of a shard: makes rows for those that can be used, and counts every loss.

There are three counts of losses:

    rejected   samples that are left out
    dropped    images and entries that are left out of documents, of which the rest is used
    skipped    files in a tar that belong to no sample: AppleDouble files, dangling links
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from megatron_mm.data.image_formats import IMAGE_EXTENSIONS, MAX_FILE_BYTES, MAX_PIXELS, is_image_name, open_image
from megatron_mm.data.image_transform import can_become_rgb
from megatron_mm.data.sources.rows import ITEM, SAMPLE
from megatron_mm.data.sources.shards import (
    BESIDE_DAMAGE,
    LONG_LINE,
    KeyEnds,
    Line,
    Member,
    WebSample,
    describe_damage,
    iterate_jsonl,
    iterate_tar,
)
from megatron_mm.data.sources.source import CHAT_KINDS, Kind
from megatron_mm.data.sources.tar import DAMAGED, NO_TAR, TRUNCATED, Skipped
from megatron_mm.data.text.chat import Rendering
from megatron_mm.data.text.documents import OWN_IMAGE, names_images, parse_document
from megatron_mm.data.text.items import BadDocument, ImageReference, Item, encode_items
from megatron_mm.data.text.keys import USUAL, Keys
from megatron_mm.data.text.tokenizer import Tokenizer

Verify = Literal["full", "header", "sample"]
VERIFY: tuple[Verify, ...] = ("header", "sample", "full")
"""How much of an image is decoded, from the weakest check to the strictest."""
_DECODED_OF_A_SAMPLE = 16
"""With `verify="sample"`, one image in this many is decoded."""
_NAMED = 3
"""Number of rejected samples, and of dropped images, per reason and shard that are named in the log."""


@dataclass(frozen=True)
class Reading:
    """How the samples of a source are read."""

    kind: Kind
    rendering: Rendering
    key_ends: KeyEnds = "first"
    keys: Keys = USUAL
    """Names of fields and files."""
    images_may_be_left_out: bool = False
    """The user has declared the source as text, so images next to the texts are ignored, not an error."""
    verify: Verify = "full"
    """How much of an image is decoded: all of it, its header, or all of one image in 16 and the header of the others."""


@dataclass
class ShardRows:
    """Rows of a shard's samples, and its losses."""

    samples: np.ndarray
    """[samples] SAMPLE rows; `first_item` counts from the shard's first item."""
    items: np.ndarray
    """[items] ITEM rows."""
    losses: Losses


@dataclass
class Losses:
    """Parts of a shard, or of a source, that are not used."""

    rejected: Counter[str] = field(default_factory=Counter)
    """Number of rejected samples, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of images and entries that are left out of used samples, by reason."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of files that belong to no sample, by reason."""
    damaged_bytes: int = 0
    """Bytes of shards that could not be read as a tar or as lines."""
    named: list[str] = field(default_factory=list)
    """Log lines about damage, and about the first few rejected samples and dropped images of each reason."""

    def add(self, other: Losses) -> None:
        """Add the losses of another shard."""
        self.rejected.update(other.rejected)
        self.dropped.update(other.dropped)
        self.skipped.update(other.skipped)
        self.damaged_bytes += other.damaged_bytes
        self.named += other.named


@dataclass(frozen=True)
class CheckedSample:
    """A sample that can be used."""

    document: Member
    items: list[tuple[int, ...]]
    """ITEM rows."""
    dropped: Counter[str]
    """Number of images and entries that the document loses, by reason."""
    dropped_images: list[tuple[str, str]]
    """(reason, name) of each image among them."""


def read_shard(shard: Path, *, number: int, reading: Reading, tokenizer: Tokenizer) -> ShardRows:
    """Check every sample of a shard.

    Args:
        number: number of the shard in its source.
    """
    samples: list[tuple[int, ...]] = []
    items: list[tuple[int, ...]] = []
    losses = Losses()
    try:
        for sample in iterate_shard(shard, losses, reading.key_ends):
            try:
                found = check_sample(sample, reading, tokenizer)
            except BadDocument as reason:
                _reject(losses, shard, sample.key.lstrip("/"), str(reason))
                continue
            _name_dropped(losses, shard, sample.key.lstrip("/"), found)
            losses.dropped.update(found.dropped)
            num_images, tokens = sum(item[0] for item in found.items), sum(item[2] for item in found.items)
            samples.append((number, found.document.offset, found.document.size, len(items), len(found.items), tokens, num_images))
            items += found.items
    except (OSError, ValueError) as error:  # includes BrokenShard
        losses.rejected["broken shard"] += 1
        losses.named.append(f"{error}; the {len(samples)} samples before it are used")
    return ShardRows(np.array(samples, SAMPLE), np.array(items, ITEM), losses)


def iterate_shard(shard: Path, losses: Losses, key_ends: KeyEnds) -> Iterator[WebSample]:
    """Yield the samples of a tar or .jsonl shard. Everything that is skipped is counted in `losses`."""

    def skipped(what: Skipped) -> None:
        losses.damaged_bytes += what.size
        if what.is_damage:
            losses.rejected[what.reason if what.reason == DAMAGED else "broken shard"] += 1
            losses.named.append(f"{describe_damage(shard, what)}; {_USED[what.reason]}")
        elif what.reason in (BESIDE_DAMAGE, LONG_LINE):
            _reject(losses, shard, what.name.lstrip("/"), what.reason)
        else:
            losses.skipped[what.reason] += 1

    if shard.suffix.lower() == ".jsonl":
        return (WebSample(key=line.name, members={"json": line}) for line in iterate_jsonl(shard, skipped=skipped))
    return iterate_tar(shard, skipped=skipped, key_ends=key_ends)


_USED = {
    DAMAGED: "the samples before and after the damage are used, except the one before it, some of whose files may be missing",
    TRUNCATED: "the samples before its end are used, except the last, some of whose files may be missing",
    NO_TAR: "it is not used",
}
"""What becomes of a damaged shard, by the kind of damage."""


def _reject(losses: Losses, shard: Path, key: str, reason: str) -> None:
    losses.rejected[reason] += 1
    if losses.rejected[reason] <= _NAMED:
        losses.named.append(f"rejected {shard}: {key}: {reason}")


def _name_dropped(losses: Losses, shard: Path, key: str, sample: CheckedSample) -> None:
    """Name the first few images per reason that a document loses."""
    before = Counter(losses.dropped)
    for reason, image in sample.dropped_images:
        before[reason] += 1
        if before[reason] <= _NAMED:
            losses.named.append(f"dropped from {shard}: {key}: image {image}: {reason}")


def check_sample(sample: WebSample, reading: Reading, tokenizer: Tokenizer) -> CheckedSample:
    """Return the document of a sample and the rows of its items. Raises BadDocument with the reason to reject the sample.

    An interleaved document loses only the images that are missing or damaged. A pair, a conversation or a task with such an image is
    rejected.
    """
    if reading.kind == "text" and not reading.images_may_be_left_out and any(is_image_name(e) for e in sample.members):
        raise BadDocument("text with images next to it")
    document, dropped = document_of(reading.kind, sample, reading.keys), Counter[str]()
    items = parse_member(reading.kind, document, reading.rendering, keys=reading.keys, dropped=dropped)
    if reading.kind == "text" and not reading.images_may_be_left_out and names_images(document.data, reading.keys):
        raise BadDocument("text that names images")
    first = [_pair_image(sample, reading.keys)] if reading.kind == "pairs" and reading.rendering.caption_prompt is None else []
    written = iter(encode_items(items, tokenizer))
    alone = sum(isinstance(item, ImageReference) for item in items) == 1
    rows = [_image_row(image, counted=True, verify=reading.verify) for image in first]
    lost: list[tuple[str, str]] = []
    for item in items:
        if not isinstance(item, ImageReference):
            rows.append((0, int(item.counted), len(next(written)), 0, 0, 0, 0))
            continue
        try:
            rows.append(_image_row(_referenced(sample, item, reading, alone=alone), counted=item.counted, verify=reading.verify))
        except BadDocument as reason:
            if reading.kind != "interleaved":
                raise
            dropped[str(reason)] += 1
            lost.append((str(reason), item.extension))
    return CheckedSample(document, rows, dropped, lost)


def _image_row(image: Member, *, counted: bool, verify: Verify) -> tuple[int, ...]:
    if image.size > MAX_FILE_BYTES:
        raise BadDocument(f"image file larger than {MAX_FILE_BYTES // 2**20} MiB")
    whole = verify == "full" or (verify == "sample" and zlib.crc32(image.name.encode()) % _DECODED_OF_A_SAMPLE == 0)
    width, height = check_image(_read(image), whole=whole)
    return 1, int(counted), 0, image.offset, image.size, width, height


def _read(member: Member) -> bytes:
    try:
        return member.data
    except (OSError, ValueError):
        raise BadDocument("file cannot be read") from None


def document_of(kind: Kind, sample: WebSample, keys: Keys) -> Member:
    """Return the member that contains a sample's text. Raises BadDocument if there is none, or if it is too large."""
    named = "txt" if keys.text is None else keys.text.lower()
    for extension in (named, "json") if kind in ("pairs", "text") else ("json",):
        if extension in sample.members:
            document = sample.members[extension]
            if document.size > MAX_FILE_BYTES:
                raise BadDocument(f"text file larger than {MAX_FILE_BYTES // 2**20} MiB")
            return document
    raise BadDocument("no text file")


def parse_member(kind: Kind, document: Member, rendering: Rendering, *, keys: Keys, dropped: Counter[str] | None = None) -> list[Item]:
    """Return the items of a document (see `parse_document`)."""
    is_json = isinstance(document, Line) or document.name.lower().endswith(".json")
    return parse_document(kind, _read(document), is_json=is_json, rendering=rendering, keys=keys, dropped=dropped)


def _pair_image(sample: WebSample, keys: Keys) -> Member:
    if keys.image is not None:
        if keys.image.lower() not in sample.members:
            raise BadDocument("no image file")
        return sample.members[keys.image.lower()]
    for extension in IMAGE_EXTENSIONS:
        if extension in sample.members:
            return sample.members[extension]
    for extension in sample.members:
        if is_image_name(extension) and "." not in extension:
            raise BadDocument(f"image in an unsupported format: {extension}")
    raise BadDocument("no image file")


def _referenced(sample: WebSample, reference: ImageReference, reading: Reading, *, alone: bool) -> Member:
    """Return the file of an image. The only image of a conversation or a task may lie next to it under any name, as when LLaVA's records,
    with their paths, are written to shards by energon's users."""
    if reference.extension == OWN_IMAGE:
        return _pair_image(sample, reading.keys)
    named = sample.members.get(reference.extension) or next(
        # A document may also contain the full names of its files.
        (member for member in sample.members.values() if f"/{member.name}".lower().endswith(f"/{reference.extension}")),
        None,
    )
    if named is None and alone and reading.kind in CHAT_KINDS:
        images = [member for extension, member in sample.members.items() if is_image_name(extension)]
        named = images[0] if len(images) == 1 else None
    if named is None:
        raise BadDocument("image is not in the shard")
    return named


def check_image(data: bytes, *, whole: bool = True) -> tuple[int, int]:
    """Return the width and height of an image. Raises BadDocument if it does not decode or is too large.

    Args:
        whole: decode the whole image; if False, read only its header.
    """
    try:
        with open_image(data) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadDocument(f"image larger than {MAX_PIXELS // 10**6} megapixels")
            if whole:
                image.load()
            if not can_become_rgb(image.mode):
                raise BadDocument("image with unsupported pixels")
    except BadDocument:
        raise
    except Image.DecompressionBombError:
        raise BadDocument(f"image larger than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception:
        raise BadDocument("image does not decode") from None
    return width, height

"""Detects the kind of a source from many of its samples.

A single sample is not enough: a README.txt at the beginning of the first tar would turn a source of pictures into a source of texts. So the
first samples of several shards vote. If texts win although there are images, it is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_mm.data.image_formats import MAX_FILE_BYTES, is_image_name
from megatron_mm.data.sources.shards import BrokenShard, KeyEnds, Member, WebSample, iterate_jsonl, iterate_tar
from megatron_mm.data.sources.source import Kind
from megatron_mm.data.text.documents import document_kind, names_images
from megatron_mm.data.text.keys import USUAL, Keys

_SHARDS, _SAMPLES = 8, 64
"""How many shards are looked into, and how many samples of each."""


@dataclass(frozen=True)
class Detected:
    """What a source holds and how its files are named."""

    kind: Kind
    key_ends: KeyEnds


def detect_kind(shards: Sequence[Path], *, kind: Kind | None = None, key_ends: KeyEnds | None = None, keys: Keys = USUAL) -> Detected:
    """What a source holds.

    Raises ValueError if most samples are texts but some have images, so that these would be lost.

    Args:
        kind, key_ends: what the user says, which nothing overrules.
        keys: what fields and files are called.
    """
    looked_at = [shard for shard in first_shards(shards) if shard.is_file()]
    if key_ends is None:
        key_ends = "last" if _has_dotted_keys(looked_at, keys) else "first"
    if kind is not None:
        return Detected(kind, key_ends)
    votes, with_images = Counter[Kind](), 0
    for sample in _first_samples(looked_at, key_ends):
        found = _kind_of(sample, keys)
        if found is not None:
            votes[found] += 1
            with_images += (found == "text" and _names_images(sample, keys)) or (found in ("pairs", "interleaved") and _has_images(sample))
    winner: Kind = votes.most_common(1)[0][0] if votes else "text"
    if winner == "text" and with_images:
        raise ValueError(
            f"source {shards[0].parent} looks like texts, but {with_images} of {votes.total()} samples have images, which would be lost: "
            "give --kind pairs|interleaved|conversations|tasks|text, or put them into sources of their own"
        )
    return Detected(winner, key_ends)


def first_shards(shards: Sequence[Path]) -> Sequence[Path]:
    """The shards of a source whose first samples tell what it holds."""
    return shards[:: max(1, len(shards) // _SHARDS)][:_SHARDS]


def _first_samples(shards: Sequence[Path], key_ends: KeyEnds) -> Iterator[WebSample]:
    for shard in shards:
        try:
            yield from islice(iterate_samples(shard, key_ends=key_ends), _SAMPLES)
        except (BrokenShard, OSError):
            continue  # counted when it is indexed


def iterate_samples(shard: Path, *, key_ends: KeyEnds = "first") -> Iterator[WebSample]:
    """The samples of a shard of either form, damage passed over."""
    if shard.suffix.lower() == ".jsonl":
        return (WebSample(key=line.name, members={"json": line}) for line in iterate_jsonl(shard))
    return iterate_tar(shard, skipped=lambda _: None, key_ends=key_ends)


def file_endings(shards: Sequence[Path]) -> Counter[str]:
    """How the names of the first files of a source's first shards end, from the first dot on."""
    return Counter(extension for sample in _first_samples(first_shards(shards), "first") for extension in sample.members)


def _has_dotted_keys(shards: Sequence[Path], keys: Keys) -> bool:
    """Whether most samples would have neither text nor image at the first dot, but have both at the last: "v1.2_003.jpg"."""
    dotted = total = 0
    named = {"json", "txt", *(key.lower() for key in (keys.text, keys.image) if key is not None)}
    for shard in shards:
        if shard.suffix.lower() == ".jsonl":
            continue
        for sample in _first_samples([shard], "first"):
            plain = any(extension in named or (is_image_name(extension) and "." not in extension) for extension in sample.members)
            endings = {extension.rpartition(".")[2] for extension in sample.members}
            total += 1
            dotted += not plain and bool(endings & {"json", "txt"})
    return dotted > total / 2


def _kind_of(sample: WebSample, keys: Keys) -> Kind | None:
    """What a sample would be by itself; None if it says nothing."""
    document = _json_bytes(sample.members.get("json"))
    found = document_kind(document, keys) if document is not None else None
    if found in ("conversations", "tasks"):
        return found
    if keys.image is not None and keys.image.lower() in sample.members:
        return "pairs"
    if any(is_image_name(extension) and "." not in extension for extension in sample.members):
        return "pairs"
    if found == "interleaved" or any(is_image_name(extension) for extension in sample.members):
        return "interleaved"
    return "text" if {"txt", "json", (keys.text or "txt").lower()} & set(sample.members) else None


def _json_bytes(member: Member | None) -> bytes | None:
    if member is None or member.size > MAX_FILE_BYTES:
        return None
    try:
        return member.data
    except (OSError, ValueError):
        return None


def _has_images(sample: WebSample) -> bool:
    return any(is_image_name(extension) for extension in sample.members)


def _names_images(sample: WebSample, keys: Keys) -> bool:
    document = _json_bytes(sample.members.get("json"))
    return document is not None and names_images(document, keys)

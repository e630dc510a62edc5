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
"""Number of shards to examine, and number of samples of each."""


@dataclass(frozen=True)
class Detected:
    """The kind of a source, and how its files are named."""

    kind: Kind
    key_ends: KeyEnds


def detect_kind(shards: Sequence[Path], *, kind: Kind | None = None, key_ends: KeyEnds | None = None, keys: Keys = USUAL) -> Detected:
    """Detect the kind of a source.

    Raises ValueError if most samples are texts but some have images, which would be lost.

    Args:
        kind, key_ends: the user's choice, which is returned unchanged; None to detect it.
        keys: names of fields and files.
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
            "use --kind pairs|interleaved|conversations|tasks|text, move them to separate sources, or convert published files "
            "and their images with `prepare pairs|llava|mmc4|obelics`"
        )
    return Detected(winner, key_ends)


def first_shards(shards: Sequence[Path]) -> Sequence[Path]:
    """Return the shards of a source whose first samples are used to detect its kind."""
    return shards[:: max(1, len(shards) // _SHARDS)][:_SHARDS]


def _first_samples(shards: Sequence[Path], key_ends: KeyEnds) -> Iterator[WebSample]:
    for shard in shards:
        try:
            yield from islice(iterate_samples(shard, key_ends=key_ends), _SAMPLES)
        except (BrokenShard, OSError):
            continue  # counted when it is indexed


def iterate_samples(shard: Path, *, key_ends: KeyEnds = "first") -> Iterator[WebSample]:
    """Yield the samples of a tar or .jsonl shard, skipping damage."""
    if shard.suffix.lower() == ".jsonl":
        return (WebSample(key=line.name, members={"json": line}) for line in iterate_jsonl(shard))
    return iterate_tar(shard, skipped=lambda _: None, key_ends=key_ends)


def file_endings(shards: Sequence[Path]) -> Counter[str]:
    """Count the extensions, after the first dot, of the first files in some shards of a source."""
    return Counter(extension for sample in _first_samples(first_shards(shards), "first") for extension in sample.members)


def _has_dotted_keys(shards: Sequence[Path], keys: Keys) -> bool:
    """Return whether keys end at the last dot, as in "v1.2_003.jpg": most samples have no usual extension after the first dot, but a text
    after the last one."""
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
    """Return the kind that a single sample suggests; None if it suggests none."""
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

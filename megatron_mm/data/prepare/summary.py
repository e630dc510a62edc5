"""Summary of what `prepare index` found in the sources of a data set, and the check that not too much of any source is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mm.data.prepare.kinds import file_endings


@dataclass
class SourceSummary:
    """Totals of a source after `prepare index`."""

    samples: int = 0
    images: int = 0
    text_tokens: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Number of rejected samples, by reason."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of images and entries that are left out of used samples, by reason."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of files that belong to no sample, by reason."""


@dataclass
class Summary:
    """Totals of every source."""

    sources: dict[str, SourceSummary]
    seconds: float

    def __str__(self) -> str:
        lines = [f"{'source':24} {'samples':>9} {'images':>9} {'text tokens':>12}  rejected"]
        for name, source in self.sources.items():
            lines.append(f"{name:24} {source.samples:9,} {source.images:9,} {source.text_tokens:12,}  {_listed(source.rejected) or 'none'}")
            for what, counts in (("dropped from samples", source.dropped), ("files skipped", source.skipped)):
                if counts:
                    lines.append(f"{'':56}  {what}: {_listed(counts)}")
        return "\n".join([*lines, f"in {self.seconds:.1f} s"])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))


_NO_FILE = ("no image file", "no text file")
_HINTS = {
    "JSON is not an object": "each line of a .jsonl is one object; `megatron-mm prepare text` and `llava` convert a list of objects",
    "JSON has no text or caption": "--text-key FIELD names the field",
    "JSON has no items, texts or text_list": "--text-key, --image-key and --messages-key give the names of fields and files",
    "JSON has no conversations": "--messages-key FIELD names the field",
    "image is not in the shard": "images that a document names must be in the same tar, as KEY.NAME; `prepare llava`, `mmc4` and `obelics` "
    "make such tars of published files and a folder of images",
    "malformed conversations list": "`prepare llava` converts the forms of other tools",
}
"""Advice for frequent reasons, by reason."""


def _hints(lost: Mapping[str, int], shards: Sequence[Path]) -> str:
    """Return advice about each reason that applies to most of the lost samples or images."""
    most = sum(lost.values()) / 2
    hints = [f"{reason}: {hint}" for reason, hint in _HINTS.items() if lost.get(reason, 0) > most]
    if sum(lost.get(reason, 0) for reason in _NO_FILE) > most:
        found = ", ".join(f".{name} ({count})" for name, count in file_endings(shards).most_common(6))
        hints.append(
            "a sample lacks its image or its text: its files must follow one another in the tar (tar --sort=name), and --text-key and "
            "--image-key give the ends of their names" + (f". The first files end with {found}" if found else "")
        )
    return "".join(f". {hint}" for hint in hints)


def check_losses(
    source: Path, summary: SourceSummary, *, damage: float, max_rejected: float, max_dropped_images: float, shards: Sequence[Path] = ()
) -> None:
    """Raise ValueError if no sample of a source is usable, or if more is lost than the user allows.

    Args:
        damage: fraction of the shards' bytes that is damaged.
        shards: shards of the source, from which the error message lists file names.
    """
    rejected = sum(summary.rejected.values())
    if not summary.samples:
        found = f"rejected: {_listed(summary.rejected)}" if summary.rejected else "it is empty"
        raise ValueError(f"source {source} has no usable sample ({found}): repair or remove it{_hints(summary.rejected, shards)}")
    share = max(rejected / (rejected + summary.samples), damage)
    if share > max_rejected:
        raise ValueError(
            f"{share:.1%} of source {source} would be lost, more than --max-rejected {max_rejected:g}: {rejected} samples rejected "
            f"({_listed(summary.rejected)}), {summary.samples} usable, {damage:.1%} of its bytes damaged. "
            f"Repair it or allow more with --max-rejected{_hints(summary.rejected, shards)}"
        )
    lost = sum(count for reason, count in summary.dropped.items() if reason != "empty entry")
    if lost > max_dropped_images * (lost + summary.images):
        raise ValueError(
            f"{lost} of {lost + summary.images} images of source {source} are missing or bad, more than --max-dropped-images "
            f"{max_dropped_images:g} ({_listed(summary.dropped)}): add them, or allow more with --max-dropped-images"
            f"{_hints(summary.dropped, shards)}"
        )

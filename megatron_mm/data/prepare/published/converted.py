"""What a conversion of published files made and lost, and whether that is too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from megatron_mm.data.prepare.published.losses import NO_IMAGES


@dataclass
class Converted:
    """Result of converting inputs."""

    samples: int = 0
    images: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    fields: str = ""
    """Names of the fields of the first record that was rejected."""
    examples: list[str] = field(default_factory=list)
    """Lines about rejected records and dropped images, the first few for each reason and input."""
    damaged: list[str] = field(default_factory=list)
    """Inputs that could not be read to the end, with the reason."""
    shards: list[str] = field(default_factory=list)
    held_out: int = 0
    """Samples, among those above, that are held out."""
    held_out_shards: list[str] = field(default_factory=list)

    def add(self, other: Converted) -> None:
        """Add the result of another input."""
        self.samples += other.samples
        self.images += other.images
        for mine, more in ((self.rejected, other.rejected), (self.dropped, other.dropped), (self.left_out, other.left_out)):
            for reason, count in more.items():
                mine[reason] = mine.get(reason, 0) + count
        self.fields = self.fields or other.fields
        self.examples += other.examples
        self.damaged += other.damaged
        self.shards += other.shards
        self.held_out += other.held_out
        self.held_out_shards += other.held_out_shards

    def __str__(self) -> str:
        shards = len(self.shards) + len(self.held_out_shards)
        lines = [f"{self.samples:,} samples with {self.images:,} images in {shards} {'shard' if shards == 1 else 'shards'}"]
        if self.held_out_shards:
            lines.append(f"held out: {self.held_out:,} of these samples")
        for what, counts in (("rejected", self.rejected), ("dropped from samples", self.dropped), ("left out", self.left_out)):
            if counts:
                lines.append(f"{what}: {_listed(counts)}")
        return "\n".join([*lines, *(f"damaged: {line}" for line in self.damaged), *self.named()])

    def named(self) -> list[str]:
        """Return lines about some of the losses: the first few for each reason."""
        chosen, seen = list[str](), Counter[str]()
        for example in self.examples:
            reason = example.partition(": ")[0]
            seen[reason] += 1
            if seen[reason] <= _EXAMPLES:
                chosen.append(example)
        return [f"  {line}" for line in sorted(chosen, key=lambda line: line.partition(": ")[0])]


_EXAMPLES = 3
"""Number of losses per reason that the summary names."""


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in sorted(counts.items(), key=lambda entry: -entry[1]))


def check_losses(total: Converted, inputs: int, out: Path, max_rejected: float, max_dropped_images: float) -> None:
    """Raise ValueError if more is lost than allowed, or nothing is left.

    Args:
        inputs: number of inputs.
        max_rejected: largest fraction of the records that may be lost, and of the inputs that may be damaged.
        max_dropped_images: largest fraction of the images that may be lost from samples.
    """
    rejected = sum(total.rejected.values())
    again = f"The shards are in {out}; repair the inputs, or allow more with"
    share, damaged = rejected / max(1, rejected + total.samples), len(total.damaged)
    if not total.samples and not rejected:
        raise ValueError(f"no samples in {inputs} inputs: {_listed(total.left_out) or 'they are empty'}")
    examples = "".join(f"\n{line}" for line in total.named())
    usual = max(total.rejected, key=lambda reason: total.rejected[reason], default="")
    fields = f". The fields of the first one are {total.fields}: {_FIELDS.get(usual)}"
    too_many = not total.samples or share > max_rejected
    limit = f"more than --max-rejected {max_rejected:g}" if share > max_rejected else "and nothing is left"
    fields = fields if too_many and total.fields and usual in _FIELDS else ""
    if not too_many and damaged > max_rejected * inputs:
        raise ValueError(
            f"{damaged:,} of {inputs:,} inputs are damaged, more than --max-rejected {max_rejected:g}: {total.damaged[0].rstrip('.')}. "
            f"{again} --max-rejected{examples}"
        )
    if too_many:
        raise ValueError(
            f"{rejected:,} of {rejected + total.samples:,} records ({share:.1%}) are rejected, {limit}: "
            f"{_listed(total.rejected)}{_first(total.damaged)}{fields}. {again} --max-rejected{examples}"
        )
    lost = sum(count for reason, count in total.dropped.items() if reason not in NO_IMAGES)
    if lost > max_dropped_images * (lost + total.images):
        raise ValueError(
            f"{lost:,} of {lost + total.images:,} images are missing or bad, more than --max-dropped-images {max_dropped_images:g}: "
            f"{_listed(total.dropped)}. {again} --max-dropped-images{examples}"
        )


_FIELDS = {
    "no text": "choose with --text-key",
    "no image": "choose with --image-key",
    "JSON has no conversations": "choose with --messages-key",
    "malformed texts list": "a document needs `texts` and `images`, two lists of the same length",
    "malformed text_list list": "a document needs `text_list` and `image_info`, two lists",
}
"""What to do about fields, by the reason that a record lacks one."""


def _first(damaged: Sequence[str]) -> str:
    return "".join(chain(["; "], damaged[:1])) if damaged else ""

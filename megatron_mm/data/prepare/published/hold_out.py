"""Holds out a fraction of a source's samples for evaluation while they are written (`--hold-out`).

    DATA/train/NAME/00000-00000.tar ...      samples to train on
    DATA/heldout/NAME/00000-00000.tar ...    samples that are held out

Which samples are held out depends only on their contents: on the first image, otherwise on the text. So all questions about an image are
on the same side, as are repeated samples, and an input that grows moves none from one side to the other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_mm.data.prepare.published.layouts import OutSample
from megatron_mm.data.prepare.published.write import ShardWriter


def heldout_folder(out: Path) -> Path:
    """Return the folder for the held-out samples of the source that is written to `out`.

    Raises ValueError if `out` is not in the train split of a data set.
    """
    if not _is_in_train(out):
        raise ValueError(f"--hold-out needs a source of a train split, but --out is {out}: use --out DATA/train/NAME")
    return out.resolve().parents[1] / "heldout" / out.resolve().name


def _is_in_train(out: Path) -> bool:
    return out.resolve().parent.name == "train"


def make_heldout_folder(out: Path) -> None:
    """Make the folder for the held-out samples of `out`, or take it over from an earlier call.

    Raises ValueError if shards that were not held out of `out` are in it, or if `out` is not in the train split of a data set.
    """
    folder = heldout_folder(out)
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".tar", ".jsonl"))
    if others and not (folder / _OURS).is_file():
        raise ValueError(
            f"{folder} has {len(others)} shards that --hold-out did not write ({others[0]} ...): leave it out, or choose another --out"
        )
    (folder / _OURS).parent.mkdir(parents=True, exist_ok=True)
    (folder / _OURS).touch()


_OURS = Path(".prepared", "held_out")
"""File that says that the shards of a folder were held out of the source of the same name."""


def held_out_shards(out: Path, prefix: str) -> list[Path]:
    """Return the shards with a prefix that were held out of `out` before."""
    if not _is_in_train(out):
        return []
    folder = heldout_folder(out)
    return sorted(folder.glob(f"{prefix}-*")) if (folder / _OURS).is_file() else []


def is_held_out(sample: OutSample, fraction: float) -> bool:
    """Whether a sample is among the fraction that is held out."""
    contents = sample.images[0][1] if sample.images else sample.document
    digest = hashlib.blake2b(contents, digest_size=8, person=b"hold out").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class SplitWriter:
    """Writes samples to shards of a source, and a fraction of them to shards of its held-out part."""

    def __init__(self, out: Path, *, fraction: float, prefix: str, lines: bool, shard_bytes: int) -> None:
        """
        Args:
            fraction: of the samples, to hold out; 0 for none.
            prefix, lines, shard_bytes: of both parts (`ShardWriter`).
        """
        self._fraction = fraction
        self._train = ShardWriter(out, prefix=prefix, lines=lines, shard_bytes=shard_bytes)
        self._heldout = None
        if fraction > 0:
            self._heldout = ShardWriter(heldout_folder(out), prefix=prefix, lines=lines, shard_bytes=shard_bytes)
        self.held_out = 0
        """Samples that were held out."""

    def add(self, sample: OutSample) -> None:
        if self._heldout is not None and is_held_out(sample, self._fraction):
            self._heldout.add(sample)
            self.held_out += 1
        else:
            self._train.add(sample)

    def close(self) -> tuple[list[str], list[str]]:
        """Finish the last shards. Returns the names of all shards: of those to train on, and of those held out."""
        return self._train.close(), [] if self._heldout is None else self._heldout.close()

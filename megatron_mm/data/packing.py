"""Packing of documents into sequences of a fixed number of tokens and at most so many images (`data.filling` chooses which).

A document is the token stream BOS, items, EOS, where an image is as many places as `ImageInput` says. A piece is a range [begin, end) of
that stream: the whole of it, or, where a document is longer than a sequence or has too many images, a part; an image is never
cut, and nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_mm.data.filling import Limits, fill_sequences
from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.index import SourceIndex

BEGIN_AND_END = 2
"""BOS and EOS."""


@dataclass(frozen=True)
class Window:
    """The packed pieces of one window of a source, sequence by sequence."""

    sample: np.ndarray
    """[pieces] row of the source's samples."""
    begin: np.ndarray
    """[pieces] first place of the piece in its document's stream."""
    end: np.ndarray
    """[pieces] place after the last one."""
    images: np.ndarray
    """[pieces] images of the piece."""
    starts: np.ndarray
    """[sequences + 1] first piece of each sequence."""

    @property
    def num_sequences(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def first_pieces(self) -> list[int]:
        """`starts` as plain integers."""
        return self.starts.tolist()

    @cached_property
    def tokens(self) -> list[int]:
        """Tokens of each sequence."""
        return np.add.reduceat(self.end - self.begin, self.starts[:-1]).tolist()

    @cached_property
    def images_of(self) -> list[int]:
        """Images of each sequence."""
        return np.add.reduceat(self.images, self.starts[:-1]).tolist()


def document_lengths(index: SourceIndex, samples: np.ndarray, image: ImageInput) -> np.ndarray:
    """Places of the documents' streams: [samples] int64."""
    rows = index.samples[samples]
    return BEGIN_AND_END + rows["text_tokens"].astype(np.int64) + image.places * rows["num_images"].astype(np.int64)


def pack_window(index: SourceIndex, samples: np.ndarray, limits: Limits, image: ImageInput, *, seed: int) -> Window:
    """Pack samples into few, full sequences, which come out in a random order.

    Args:
        samples: [n] rows of the source, possibly repeated.
    """
    if image.places > limits.sequence_length:
        raise ValueError(f"an image takes {image.places} tokens, more than data.sequence_length {limits.sequence_length}")
    lengths = document_lengths(index, samples, image)
    images = index.samples[samples]["num_images"].astype(np.int64)
    fits = (lengths <= limits.sequence_length) & (images <= limits.images_of_a_piece)
    whole = samples[fits]
    sample, begin, end, count = [whole], [np.zeros_like(whole)], [lengths[fits]], [images[fits]]
    for row in samples[~fits]:
        cuts, held = _split(index, int(row), limits, image)
        sample.append(np.full(len(held), row))
        begin.append(cuts[:-1])
        end.append(cuts[1:])
        count.append(held)
    sample_p, begin_p, end_p, images_p = (np.concatenate(parts) for parts in (sample, begin, end, count))
    rng = np.random.default_rng(seed)
    bins = fill_sequences(end_p - begin_p, images_p, limits, rng=rng)
    num_bins = int(bins.max()) + 1 if len(bins) else 0
    bins = rng.permutation(num_bins)[bins]
    order = np.argsort(bins, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=num_bins))])
    return Window(sample=sample_p[order], begin=begin_p[order], end=end_p[order], images=images_p[order], starts=starts)


def _split(index: SourceIndex, row: int, limits: Limits, image: ImageInput) -> tuple[np.ndarray, np.ndarray]:
    """Where a long document is cut ([pieces + 1] places) and how many images each piece has."""
    starts, length = image_places(index, row, image)
    cuts = [0]
    held = []
    while cuts[-1] < length:
        begin = cuts[-1]
        end = min(begin + limits.sequence_length, length)
        inside = starts[(starts >= begin) & (starts < end)]
        if len(inside) > limits.images_of_a_piece:
            end = int(inside[limits.images_of_a_piece])
        elif len(inside) and inside[-1] + image.places > end:
            end = int(inside[-1])
        held.append(int(((starts >= begin) & (starts < end)).sum()))
        cuts.append(end)
    return np.array(cuts, dtype=np.int64), np.array(held, dtype=np.int64)


def counted_places(index: SourceIndex, row: int, image: ImageInput) -> np.ndarray:
    """Which places of a document's stream count as labels, as far as its items say: [places] bool. BOS never does, EOS does where the
    last item does; that images themselves do not is `ImageInput.silent`'s matter."""
    items = _items(index, row)
    counted = items["counted"].astype(bool)
    return np.concatenate([[False], np.repeat(counted, _sizes(items, image)), counted[-1:]])


def _items(index: SourceIndex, row: int) -> np.ndarray:
    sample = index.samples[row]
    return index.items[sample["first_item"] : sample["first_item"] + sample["num_items"]]


def _sizes(items: np.ndarray, image: ImageInput) -> np.ndarray:
    """Places of each item: [items] int64."""
    return np.where(items["is_image"], image.places, items["tokens"]).astype(np.int64)


def image_places(index: SourceIndex, row: int, image: ImageInput) -> tuple[np.ndarray, int]:
    """First place of each image (of what stands before its features) in a document's stream ([images] int64), and the length of the
    stream."""
    items = _items(index, row)
    sizes = _sizes(items, image)
    ends = 1 + np.cumsum(sizes)
    return (ends - sizes)[items["is_image"] == 1], int(ends[-1]) + 1

"""Packs documents into sequences with limited numbers of tokens and images (`data.plan.filling` chooses which documents go together).

A document is the token stream BOS, items, EOS, in which `ImageInput` says how many positions an image takes. A piece is a range [begin,
end) of that stream: all of it, or a part if the document is longer than a sequence or has too many images. An image is never split, and
nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan.filling import Limits, fill_sequences
from megatron_mm.data.plan.stream import Samples
from megatron_mm.data.sources.source import Items, Source
from megatron_mm.data.text.chat import chat_template

BEGIN_AND_END = 2
"""BOS and EOS."""


@dataclass(frozen=True)
class Window:
    """The packed pieces of one window of a source, sequence by sequence."""

    sample: np.ndarray
    """[pieces] row of the piece's sample in the source."""
    begin: np.ndarray
    """[pieces] first position of the piece in its document's stream."""
    end: np.ndarray
    """[pieces] position after the last one."""
    images: np.ndarray
    """[pieces] images of the piece, or tiles if images are cut into tiles."""
    position: np.ndarray
    """[pieces] position of the piece's document in the source's endless stream; different in every epoch."""
    is_whole: np.ndarray
    """[pieces] bool: the piece is a whole document."""
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


@dataclass(frozen=True)
class DocumentImages:
    """Positions of the images in a document's stream."""

    starts: np.ndarray
    """[images] int64: first position of each image, including the tokens before its features."""
    tiles: np.ndarray
    """[images] int64."""
    ends: np.ndarray
    """[images] int64: position after the last one of each image."""
    length: int
    """Tokens of the whole stream."""


def pack_window(source: Source, samples: Samples, limits: Limits, image: ImageInput, *, seed: int, first_position: int = 0) -> Window:
    """Pack samples of a source into few, full sequences, in random order.

    Args:
        first_position: position of the first sample in the source's stream.

    Raises ValueError if an image may be too large for a sequence.
    """
    check_largest_image(limits, image)
    lengths, tiles = document_lengths(samples, image), samples.num_tiles
    images = samples.num_images
    fits = (lengths <= limits.sequence_length) & (tiles <= limits.max_images) & (images <= limits.images_of_a_document)
    position = np.arange(first_position, first_position + len(samples))
    whole = samples.rows[fits]
    sample, begin, end, count, where = [whole], [np.zeros_like(whole)], [lengths[fits]], [tiles[fits]], [position[fits]]
    for number in np.flatnonzero(~fits).tolist():
        row = int(samples.rows[number])
        document = document_images(source, row, image) if images[number] else _without_images(int(lengths[number]))
        cuts, held = _split(document, limits)
        sample.append(np.full(len(held), row))
        begin.append(cuts[:-1])
        end.append(cuts[1:])
        count.append(held)
        where.append(np.full(len(held), position[number]))
    sample_p, begin_p, end_p, tiles_p, position_p = (np.concatenate(parts) for parts in (sample, begin, end, count, where))
    rng = np.random.default_rng(seed)
    bins = fill_sequences(end_p - begin_p, tiles_p, limits, rng=rng)
    num_bins = int(bins.max()) + 1 if len(bins) else 0
    bins = rng.permutation(num_bins)[bins]
    order = np.argsort(bins, kind="stable")
    return Window(
        sample=sample_p[order],
        begin=begin_p[order],
        end=end_p[order],
        images=tiles_p[order],
        position=position_p[order],
        is_whole=order < len(whole),
        starts=np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=num_bins))]),
    )


def check_largest_image(limits: Limits, image: ImageInput) -> None:
    """Raise ValueError if an image may be too large for any sequence."""
    largest = image.places_around + image.tokens * image.max_tiles
    if largest > limits.sequence_length:
        of_tiles = f" of {image.max_tiles} {image.squares}" if image.max_tiles > 1 else ""
        fewer = f", or lower {_fewer_tiles(image)}" if of_tiles else ""
        raise ValueError(
            f"an image{of_tiles} takes {largest} tokens, more than data.sequence_length {limits.sequence_length}: raise that limit{fewer}"
        )
    if image.max_tiles > limits.max_images:
        raise ValueError(
            f"an image becomes up to {image.max_tiles} {image.squares}, more than data.max_images_per_sequence {limits.max_images}: "
            f"raise it, or lower {_fewer_tiles(image)}"
        )


def _fewer_tiles(image: ImageInput) -> str:
    """Name of the configuration field that limits the tiles of an image."""
    return "data.max_tiles" if image.sub_images is None else "model.sub_images.grid"


def _split(images: DocumentImages, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Cut a long document into pieces: returns their boundaries, [pieces + 1] positions, and the number of tiles of each piece."""
    cuts = [0]
    held = []
    while cuts[-1] < images.length:
        begin = cuts[-1]
        end = min(begin + limits.sequence_length, images.length)
        first, after = np.searchsorted(images.starts, [begin, end]).tolist()
        fits = (images.ends[first:after] <= end) & (np.cumsum(images.tiles[first:after]) <= limits.max_images)
        fitting = min(int(fits.sum()), limits.images_of_a_document)  # images that fit come before those that do not
        if fitting < after - first:
            end = int(images.starts[first + fitting])
        held.append(int(images.tiles[first : first + fitting].sum()))
        cuts.append(end)
    return np.array(cuts, dtype=np.int64), np.array(held, dtype=np.int64)


def document_lengths(samples: Samples, image: ImageInput) -> np.ndarray:
    """Return the number of tokens in each document's stream: [samples] int64."""
    return BEGIN_AND_END + samples.text_tokens + image.places_around * samples.num_images + image.tokens * samples.num_tiles


def _without_images(length: int) -> DocumentImages:
    none = np.zeros(0, dtype=np.int64)
    return DocumentImages(starts=none, tiles=none, ends=none, length=length)


def document_images(source: Source, row: int, image: ImageInput) -> DocumentImages:
    """Return the positions of the images in one document."""
    items = source.items(row)
    sizes = _sizes(items, image, row)
    ends = 1 + np.cumsum(sizes)
    return DocumentImages(
        starts=(ends - sizes)[items.is_image],
        tiles=image.num_tiles(items.widths, items.heights, row=row),
        ends=ends[items.is_image],
        length=int(ends[-1]) + 1,
    )


def supervised_tokens(source: Source, row: int, image: ImageInput) -> np.ndarray:
    """Return which tokens of a document's stream are supervised according to its items: [tokens] bool.

    BOS never is. EOS is if the last item is, unless the chat template ends answers with another token (`ChatTemplate.supervises_eos`).
    Image tokens are not masked here (see `ImageInput.silent_from`).
    """
    items = source.items(row)
    supervises_eos = source.chat_template is None or chat_template(source.chat_template).supervises_eos
    return np.concatenate([[False], np.repeat(items.supervised, _sizes(items, image, row)), items.supervised[-1:] & supervises_eos])


def _sizes(items: Items, image: ImageInput, row: int) -> np.ndarray:
    """Tokens of each item: [items] int64."""
    sizes = items.tokens.copy()
    sizes[items.is_image] = image.num_places(image.num_tiles(items.widths, items.heights, row=row))
    return sizes

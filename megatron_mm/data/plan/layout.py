"""The integers of a micro-batch that follow from the plan: positions of documents and images, the loss mask, which process encodes which
image.

Every process can compute them without reading any data, so they are the same on every pipeline stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_mm.data.plan.packing import document_images, supervised_tokens
from megatron_mm.data.plan.plan import GlobalBatch, PackedSequence, Plan, image_owners, tile_owners
from megatron_mm.data.ranges import ranges


@dataclass(frozen=True)
class SourceImage:
    """An image of a document."""

    source: int
    sample: int
    number: int
    """Number of the image within its document, from 0."""
    width: int
    height: int
    """Size in pixels, from the index."""
    tiles: int
    """Number of tiles that the image is cut into."""

    @property
    def key(self) -> tuple[int, int, int]:
        return self.source, self.sample, self.number


@dataclass(frozen=True)
class PlacedImage:
    """An image and its position in a micro-batch."""

    image: SourceImage
    first: int
    """Position of the image's first token, including the tokens before its features."""
    seed: tuple[int, ...]
    """Seed of everything random about its pixels: seed of the run, source, position of its document in the source's stream, number within
    the document. It differs between epochs, and does not depend on batches, processes or resumes."""


@dataclass(frozen=True)
class PlacedPiece:
    """A piece of a document and its position in a micro-batch."""

    source: int
    sample: int
    begin: int
    end: int
    """The piece is the range [begin, end) of the document's stream."""
    place: int
    """Position of the piece's first token in the micro-batch."""

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.place + self.end - self.begin


@dataclass(frozen=True)
class Layout:
    """Integers of a micro-batch. `PackedBatch` documents the fields that both have."""

    pieces: list[PlacedPiece]
    images: list[PlacedImage]
    position_ids: np.ndarray
    source_ids: np.ndarray
    is_token: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray
    image_starts: np.ndarray
    """[tiles]."""
    image_owners: np.ndarray
    """[tiles]."""


def lay_out(plan: Plan, sequences: list[PackedSequence], *, tensor_size: int) -> Layout:
    """Return the layout of a micro-batch.

    Args:
        tensor_size: number of processes that share the encoding of its images.
    """
    tokens = sum(sequence.num_tokens for sequence in sequences)
    total = plan.batching.padded(tokens)
    positions, sources = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    is_token, mask = np.zeros(total, dtype=bool), np.zeros(total, dtype=np.float32)
    pieces, images, bounds, place = [], [], [0], 0
    for sequence in sequences:
        sources[place : place + sequence.num_tokens] = sequence.source
        for row in range(sequence.first, sequence.last):
            piece = _place_piece(sequence, row, place)
            pieces.append(piece)
            images += _place_images(plan, sequence, row, piece)
            positions[place : piece.stop] = np.arange(piece.stop - place)
            is_token[place : piece.stop] = True
            mask[place : piece.stop - 1] = _counted(plan, piece)
            bounds.append(piece.stop)
            place = piece.stop
    assert place == tokens, f"the pieces of a micro-batch have {place} tokens, its sequences {tokens}"
    if tokens < total:
        positions[tokens:] = np.arange(total - tokens)
        bounds.append(total)
    firsts = np.array([placed.first for placed in images], dtype=np.int64)
    tiles = np.array([placed.image.tiles for placed in images], dtype=np.int64)
    image = plan.image
    silent = ranges(firsts + image.silent_from, image.num_places(tiles) - image.silent_from)
    mask[silent - 1] = 0  # the next token belongs to an image
    deal = image_owners if image.is_one_square else tile_owners
    return Layout(
        pieces=pieces,
        images=images,
        position_ids=positions,
        source_ids=sources,
        is_token=is_token,
        loss_mask=mask,
        cu_seqlens=np.array(bounds, dtype=np.int32),
        image_starts=np.repeat(firsts + len(image.before), tiles) + image.tokens * ranges(np.zeros_like(tiles), tiles),
        image_owners=deal(int(tiles.sum()), tensor_size),
    )


def _place_piece(sequence: PackedSequence, row: int, place: int) -> PlacedPiece:
    window = sequence.window
    return PlacedPiece(sequence.source, int(window.sample[row]), int(window.begin[row]), int(window.end[row]), place)


def _place_images(plan: Plan, sequence: PackedSequence, row: int, piece: PlacedPiece) -> list[PlacedImage]:
    if not sequence.window.images[row]:
        return []
    seed = (plan.seed, piece.source, int(sequence.window.position[row]))
    starts, images = source_images(plan, piece.source, piece.sample)
    return [
        PlacedImage(image, first=piece.place + start - piece.begin, seed=(*seed, number))
        for number, (start, image) in enumerate(zip(starts, images, strict=True))
        if piece.begin <= start < piece.end
    ]


def _counted(plan: Plan, piece: PlacedPiece) -> np.ndarray | bool:
    """Return which labels of a piece are supervised, without its last position: True for all, or [positions - 1] bool."""
    index = plan.indexes[piece.source]
    if not index.answers_only:
        return True
    return supervised_tokens(index, piece.sample, plan.image)[piece.begin + 1 : piece.end]


def source_images(plan: Plan, source: int, sample: int) -> tuple[list[int], list[SourceImage]]:
    """Return the first position of each of a document's images in its stream, and the images."""
    found = document_images(plan.indexes[source], sample, plan.image)
    items = plan.indexes[source].items(sample)
    pixels = zip(items.widths.tolist(), items.heights.tolist(), found.tiles.tolist(), strict=True)
    images = [SourceImage(source, sample, number, width, height, tiles) for number, (width, height, tiles) in enumerate(pixels)]
    return found.starts.tolist(), images


def shuffled_images(plan: Plan, batch: GlobalBatch) -> dict[tuple[int, int, int], SourceImage]:
    """Map the key of each image of a global batch to another sample's image: all images in order, rotated by half their number.

    The images of a sample are next to each other, so each gets an image of another sample, unless one sample has more than half of all
    images.
    """
    distinct: dict[tuple[int, int, int], SourceImage] = {}
    for sequence in batch.sequences:
        for sample in sequence.window.sample[sequence.first : sequence.last].tolist():
            for image in source_images(plan, sequence.source, sample)[1]:
                distinct[image.key] = image
    images = list(distinct.values())
    half = len(images) // 2
    return {key: images[(number + half) % len(images)] for number, key in enumerate(distinct)}

"""Chooses the pieces of documents for a sequence: random ones, as long as the sequence can still be filled completely.

Best fit with the longest piece first puts similar pieces together: captions of four lengths in sequences of 256 tokens leave 3% empty.
Here, a sequence begins with the costliest remaining piece, if that is a long one, and continues with pieces in random order. A piece is
taken if the room that it leaves is a sum of common lengths. One integer records which rooms are such sums: bit r represents room r. If
there is no such piece, the one that wastes least is taken. Both unused tokens and unused images count, weighted by how scarce they are,
because filling some sequences with tokens and leaving images over would lead to other sequences that are full of images but have only half
their tokens.

Worked example: lengths 24 and 25 are common, and there is room for 99 tokens. The sums up to 99 are 24 25 48 49 50 72 .. 75 96 .. 99. A
piece of 26 would leave 73 = 24 + 24 + 25 and is taken; a piece of 30 would leave 69, which is not a sum, and waits.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np

_COMMON = 24
"""Number of different lengths, the most frequent ones, from which sums are formed."""
_TRIES = 4
"""Number of random pieces to try before searching for a fitting length."""
_SHARPNESS = 4
"""How fast the price of tokens, or of images, falls if they are not scarce: if only three quarters of the room is needed, the price falls
to a third."""
_PLENTY = 0.9
"""The number of images alone limits the sequences if tokens would fill at most this fraction of them."""


@dataclass(frozen=True)
class Limits:
    """Capacity of a sequence."""

    sequence_length: int
    max_images: int
    """Maximum number of images, or of tiles if images are cut into tiles."""
    max_images_per_document: int | None = None
    """Maximum number of whole images in a document; a document with more is cut. None for no separate limit."""

    @property
    def images_of_a_document(self) -> int:
        """Number of images that a document may have without being cut."""
        return sys.maxsize if self.max_images_per_document is None else self.max_images_per_document


def fill_sequences(sizes: np.ndarray, images: np.ndarray, limits: Limits, *, rng: np.random.Generator) -> np.ndarray:
    """Return the number of each piece's sequence, from 0: [pieces].

    Args:
        sizes, images: [pieces] tokens and images of each piece; no piece exceeds the limits.
    """
    if not len(sizes):
        return np.zeros(0, dtype=np.int64)
    bins = _deal_hands(sizes, images, limits, rng=rng)
    rest = np.flatnonzero(bins < 0)
    if len(rest):
        bins[rest] = bins.max(initial=-1) + 1 + _Deck(sizes[rest], images[rest], limits, rng).deal()
    return bins


def _deal_hands(sizes: np.ndarray, images: np.ndarray, limits: Limits, *, rng: np.random.Generator) -> np.ndarray:
    """Group random pieces, if all have the same number of images and sequences run out of images before tokens, as with captions.

    Any set of pieces that uses up the images is then as good as any other. Returns the sequence of each piece: -1 if its group has too many
    tokens, or if the pieces are not of this kind.
    """
    bins = np.full(len(sizes), -1, dtype=np.int64)
    if images[0] == 0 or (images != images[0]).any():
        return bins
    hand = limits.max_images // int(images[0])
    if sizes.sum() / limits.sequence_length > _PLENTY * len(sizes) / hand:
        return bins
    hands = rng.permutation(len(sizes))[: len(sizes) // hand * hand].reshape(-1, hand)
    good = hands[sizes[hands].sum(axis=1) <= limits.sequence_length]
    bins[good] = np.arange(len(good))[:, None]
    return bins


class _Deck:
    """The remaining pieces, in random order and by length."""

    def __init__(self, sizes: np.ndarray, images: np.ndarray, limits: Limits, rng: np.random.Generator) -> None:
        self.sizes: list[int] = sizes.tolist()
        self.images: list[int] = images.tolist()
        self.limits = limits
        self.order: list[int] = rng.permutation(len(sizes)).tolist()
        self.hand: list[int] = []
        """The next few pieces of the order."""
        tokens_needed, images_needed = sizes.sum() / limits.sequence_length, images.sum() / limits.max_images
        needed = max(tokens_needed, images_needed)
        self.token_price = (tokens_needed / needed) ** _SHARPNESS / limits.sequence_length
        self.image_price = (images_needed / needed) ** _SHARPNESS / limits.max_images
        """Cost of one unused token or image, in sequences."""
        self.by_cost: list[int] = np.argsort(self.token_price * sizes + self.image_price * images, kind="stable").tolist()
        self.left = Counter(self.sizes)
        self.alike: dict[tuple[int, int], list[int]] = {}
        """Pieces by (tokens, images). A piece that was taken is removed when it reaches the top of its stack."""
        for piece in self.order:
            self.alike.setdefault((self.sizes[piece], self.images[piece]), []).append(piece)
        self.lengths = [0] * (int(images.max()) + 1)
        """For each number of images: bit s is set if a piece of s tokens may be left."""
        for size, held in self.alike:
            self.lengths[held] |= 1 << size
        self.bins = [-1] * len(self.sizes)
        self.common: list[int] = []
        self.sums = 1
        self.always_images = bool((images > 0).all())

    def deal(self) -> np.ndarray:
        """Fill one sequence after another."""
        number = 0
        while (first := self._costliest()) is not None:
            self._renew_sums()
            room, images = self.limits.sequence_length, self.limits.max_images
            if self.sizes[first] > room // 4:  # long pieces first, while there is enough to go with them
                self._take(first, number)
                room, images = room - self.sizes[first], images - self.images[first]
            self._fill(number, room=room, images=images)
            number += 1
        return np.array(self.bins, dtype=np.int64)

    def _fill(self, number: int, *, room: int, images: int) -> None:
        while room and not (images == 0 and self.always_images):
            piece = self._next(room, images)
            if piece is None:
                return
            self._take(piece, number)
            room -= self.sizes[piece]
            images -= self.images[piece]

    def _next(self, room: int, images: int) -> int | None:
        """Choose a piece for a sequence with the given remaining room for tokens and images; None if nothing fits."""
        sums, order, hand, bins = self.sums, self.order, self.hand, self.bins
        best = room if sums >> room & 1 else (sums & ((1 << room + 1) - 1)).bit_length() - 1  # the largest sum that fits
        hand[:] = [piece for piece in hand if bins[piece] < 0]
        while order and len(hand) < _TRIES:
            piece = order.pop()
            if bins[piece] < 0:
                hand.append(piece)
        for piece in hand:
            rest = best - self.sizes[piece]
            if rest >= 0 and self.images[piece] <= images and sums >> rest & 1:
                return piece
        for size in self.common:
            if size <= best and self.left[size] and self.sums >> (best - size) & 1 and (found := self._of_size(size, images)) is not None:
                return found
        return self._least_wasteful(room, images)

    def _least_wasteful(self, room: int, images: int) -> int | None:
        """Among the longest fitting pieces for each number of images, return the one that leaves the least unused."""
        mask = (2 << room) - 1
        least, best = math.inf, None
        for held in range(min(images + 1, len(self.lengths))):
            while fitting := self.lengths[held] & mask:
                size = fitting.bit_length() - 1
                if (found := self._of_kind(size, held)) is not None:
                    waste = self.token_price * (room - size) + self.image_price * (images - held)
                    if waste < least:
                        least, best = waste, found
                    break
        return best

    def _of_size(self, size: int, images: int) -> int | None:
        for held in range(min(images + 1, len(self.lengths))):
            if self.lengths[held] >> size & 1 and (found := self._of_kind(size, held)) is not None:
                return found
        return None

    def _of_kind(self, size: int, held: int) -> int | None:
        """Return a remaining piece with this many tokens and images. If none remains, clear its bit in `lengths`."""
        stack = self.alike[size, held]
        while stack and self.bins[stack[-1]] >= 0:
            stack.pop()
        if stack:
            return stack[-1]
        self.lengths[held] ^= 1 << size
        return None

    def _costliest(self) -> int | None:
        while self.by_cost and self.bins[self.by_cost[-1]] >= 0:
            self.by_cost.pop()
        return self.by_cost[-1] if self.by_cost else None

    def _take(self, piece: int, number: int) -> None:
        self.bins[piece] = number
        self.left[self.sizes[piece]] -= 1

    def _renew_sums(self) -> None:
        """Compute all sums, up to the sequence length, of any numbers of the most common lengths; repeated when these run out."""
        used_up = sum(not self.left[size] for size in self.common)
        few = len(self.common) < _COMMON  # all lengths are common, so losing one of them matters
        if self.common and not (used_up and few) and 2 * used_up < len(self.common):
            return
        self.common = [size for size, count in self.left.most_common(_COMMON) if count]
        self.sums = 1
        mask = (1 << self.limits.sequence_length + 1) - 1
        for size in self.common:
            step = size
            while step <= self.limits.sequence_length:  # 0 or 1, 0 to 3, 0 to 7 ... pieces of this length
                self.sums |= self.sums << step & mask
                step *= 2

"""Which pieces of documents share a sequence: random ones, as long as the sequence can still be filled to the brim.

Best fit, longest first, puts like with like: captions of four lengths in sequences of 256 tokens leave 3% empty. Here a
sequence begins with the longest piece that is left, if that is a long one, and goes on with pieces in random order; a piece is
taken if what room it leaves is a sum of common lengths. Which rooms are such sums is one integer, bit r standing for room r.

Worked example: lengths 24 and 25 are common, 99 tokens of room are left. The sums up to 99 are 24 25 48 49 50 72 .. 75 96 .. 99.
A piece of 26 would leave 73 = 24 + 24 + 25 and is taken; one of 30 would leave 69, which is no sum, and waits.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from dataclasses import dataclass

import numpy as np

_COMMON = 24
"""So many different lengths, the most frequent ones, make the sums."""
_TRIES = 4
"""Random pieces that are looked at before a fitting length is searched for."""


@dataclass(frozen=True)
class Limits:
    """What a sequence holds."""

    sequence_length: int
    max_images: int
    tokens_per_image: int


def fill_sequences(sizes: np.ndarray, images: np.ndarray, limits: Limits, *, rng: np.random.Generator) -> np.ndarray:
    """The sequence of each piece, [pieces], numbered from 0.

    Args:
        sizes, images: [pieces] tokens and images of each piece; none exceeds the limits.
    """
    return _Deck(sizes, images, limits, rng).deal()


class _Deck:
    """The pieces that are left: in random order, and by length."""

    def __init__(self, sizes: np.ndarray, images: np.ndarray, limits: Limits, rng: np.random.Generator) -> None:
        self.sizes: list[int] = sizes.tolist()
        self.images: list[int] = images.tolist()
        self.limits = limits
        self.order: list[int] = rng.permutation(len(sizes)).tolist()
        self.longest: list[int] = np.argsort(sizes, kind="stable").tolist()
        self.left = Counter(self.sizes)
        self.alike: dict[tuple[int, int], list[int]] = {}
        """Pieces by (tokens, images); those that are taken are dropped when they come up."""
        for piece in self.order:
            self.alike.setdefault((self.sizes[piece], self.images[piece]), []).append(piece)
        self.lengths = [0] * (limits.max_images + 1)
        """Of each number of images: bit s says that a piece of s tokens may be left."""
        for size, held in self.alike:
            self.lengths[held] |= 1 << size
        self.bins = [-1] * len(self.sizes)
        self.common: list[int] = []
        self.sums = 1
        self.always_images = bool((images > 0).all())

    def deal(self) -> np.ndarray:
        """Fill one sequence after another."""
        number = 0
        while (first := self._longest()) is not None:
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
        """A piece for a sequence with so much room and so many images to go; None where nothing fits."""
        sums, order, bins = self.sums, self.order, self.bins
        best = room if sums >> room & 1 else (sums & ((1 << room + 1) - 1)).bit_length() - 1  # the largest sum that fits
        while order and bins[order[-1]] >= 0:
            order.pop()
        looked_at = 0
        for piece in reversed(order):
            if bins[piece] >= 0:
                continue
            rest = best - self.sizes[piece]
            if rest >= 0 and self.images[piece] <= images and sums >> rest & 1:
                return piece
            looked_at += 1
            if looked_at == _TRIES:
                break
        for size in self.common:
            if size <= best and self.left[size] and self.sums >> (best - size) & 1 and (found := self._of_size(size, images)) is not None:
                return found
        return self._longest_that_fits(room, images)

    def _longest_that_fits(self, room: int, images: int) -> int | None:
        mask = (1 << room + 1) - 1
        while lengths := functools.reduce(operator.or_, self.lengths[: images + 1]) & mask:
            if (found := self._of_size(lengths.bit_length() - 1, images)) is not None:
                return found
        return None

    def _of_size(self, size: int, images: int) -> int | None:
        for held in range(images + 1):
            if self.lengths[held] >> size & 1:
                stack = self.alike[size, held]
                while stack and self.bins[stack[-1]] >= 0:
                    stack.pop()
                if stack:
                    return stack[-1]
                self.lengths[held] ^= 1 << size
        return None

    def _longest(self) -> int | None:
        while self.longest and self.bins[self.longest[-1]] >= 0:
            self.longest.pop()
        return self.longest[-1] if self.longest else None

    def _take(self, piece: int, number: int) -> None:
        self.bins[piece] = number
        self.left[self.sizes[piece]] -= 1

    def _renew_sums(self) -> None:
        """Every sum, up to a sequence's length, of any number of the most common lengths; found again when these run out."""
        used_up = sum(not self.left[size] for size in self.common)
        few = len(self.common) < _COMMON  # all lengths are common, and one that is gone will be missed
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

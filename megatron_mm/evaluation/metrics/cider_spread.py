"""Standard error of CIDEr-D, by the bootstrap over images.

CIDEr-D is no plain mean over images: the weights of n-grams follow from the references of all images, so a sample of images has weights of
its own. All n-grams of a data set are written into arrays once; the score of a sample is then a few sums over them, because every norm and
every product is linear in the squared weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Gram = tuple[str, ...]
Counts = Counter[Gram]
Array = npt.NDArray[np.float64]
_NUM_SAMPLES = 200
"""A standard error from so many samples is itself known to about 5%."""


class _Sums:
    """Sums over rows of `value x squared weight of the gram`."""

    def __init__(self, entries: Iterable[tuple[int, int, float]], *, num_rows: int) -> None:
        """
        Args:
            entries: (row, number of the gram, value).
        """
        table = np.array(list(entries), dtype=np.float64).reshape(-1, 3)
        self.rows, self.grams, self.values = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]
        self.num_rows = num_rows

    def of(self, weights: Array) -> Array:
        return np.asarray(np.bincount(self.rows, weights=self.values * weights[self.grams], minlength=self.num_rows), dtype=np.float64)


class ResampledCider:
    """CIDEr-D of samples of a data set's images."""

    def __init__(
        self, candidates: Sequence[Counts], references: Sequence[Sequence[Counts]], penalties: Sequence[Sequence[float]], *, longest: int
    ):
        """
        Args:
            candidates: n-grams of each image's generated caption.
            references: n-grams of each image's references.
            penalties: factor of each reference for the difference in length.
            longest: words of the longest n-gram.
        """
        numbers: dict[Gram, int] = {}
        for counts in (*candidates, *(one for of_image in references for one in of_image)):
            for gram in counts:
                numbers.setdefault(gram, len(numbers))
        self.num_grams, self.longest = len(numbers), longest
        self.image_of = np.repeat(np.arange(len(references)), [len(of_image) for of_image in references])
        self.penalties = np.array([factor for of_image in penalties for factor in of_image])
        flat = [(image, counts) for image, of_image in enumerate(references) for counts in of_image]

        def row(place: int, gram: Gram) -> int:
            return place * longest + len(gram) - 1

        self._candidates = _Sums(
            ((row(image, gram), numbers[gram], count**2) for image, counts in enumerate(candidates) for gram, count in counts.items()),
            num_rows=len(candidates) * longest,
        )
        self._references = _Sums(
            ((row(place, gram), numbers[gram], count**2) for place, (_, counts) in enumerate(flat) for gram, count in counts.items()),
            num_rows=len(flat) * longest,
        )
        self._products = _Sums(
            (
                (row(place, gram), numbers[gram], min(candidates[image][gram], count) * count)
                for place, (image, counts) in enumerate(flat)
                for gram, count in counts.items()
                if gram in candidates[image]
            ),
            num_rows=len(flat) * longest,
        )
        pairs = [(image, numbers[gram]) for image, of_image in enumerate(references) for gram in set().union(*of_image)]
        self._seen_in, self._seen = np.array(pairs, dtype=np.int64).reshape(-1, 2).T

    def score(self, times: npt.NDArray[np.int64]) -> float:
        """CIDEr-D of a sample, 0 to 10.

        Args:
            times: [images], how often the sample has each image.
        """
        images_with = np.bincount(self._seen, weights=times[self._seen_in].astype(float), minlength=self.num_grams)
        weights = (math.log(times.sum()) - np.log(np.maximum(1.0, images_with))) ** 2
        products = self._products.of(weights).reshape(-1, self.longest)
        norms = (
            self._references.of(weights).reshape(-1, self.longest) * self._candidates.of(weights).reshape(-1, self.longest)[self.image_of]
        )
        cosines = np.divide(products, np.sqrt(norms), out=products.copy(), where=norms > 0).mean(axis=1) * self.penalties
        of_image = np.bincount(self.image_of, weights=cosines) / np.bincount(self.image_of)
        return float(10 * (times * of_image).sum() / times.sum())


def cider_stderr(sampled: ResampledCider, *, num_images: int) -> float:
    """Standard error of the mean over images, 0 to 10."""
    drawn = np.random.default_rng(0).multinomial(num_images, np.full(num_images, 1 / num_images), size=_NUM_SAMPLES)
    return float(np.std([sampled.score(times) for times in drawn], ddof=1))

"""Sub-image decomposition: a tower sees a large image as an overview and crops (MM1, arXiv 2403.09611, section 4.1).

    1344 x 1344 px  ->  an overview, the whole image at 672 px, and 2 x 2 crops of 672 px: 5 x 144 = 720 tokens

Whatever its size, an image is transformed to a square whose side is `grid` times the tower's, which is cut into crops row by row; the
overview is made from the original image. Each of these counts as a separate image for tower, connector, batches and balance. So the number
of tokens follows from the number of images.

Low resolution: if a document shows several images, all but the last serve as demonstrations for the question about the last one. A fraction
of the demonstrations may be shown only as overviews, so that more of them fit into a sequence (144 tokens each instead of 720). Which ones
depends on the seed, the document's row in its source, and the number of the image. So a plan knows it before any data is read, and every
epoch, layout and resume chooses the same ones.

Shape legend: k squares of an image, n images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_mm.config.checks import require, require_positive
from megatron_mm.data.image_bytes import rgb_pixels
from megatron_mm.data.image_transform import ImageTransform
from megatron_mm.data.plan.mixture import mix


@dataclass(frozen=True)
class SubImages:
    """Shows an image as an overview and grid x grid crops, each of the tower's image size."""

    grid: int = 2
    """Number of crops along a side: 2 means 4 crops and an overview."""
    overview_first: bool = True
    """Place the overview before the crops; if false, after them."""

    def __post_init__(self) -> None:
        require_positive(self, "grid")
        require(self.grid > 1, "sub_images.grid is 1, which shows the whole image twice: use 2 or more, or no sub_images")

    @property
    def count(self) -> int:
        """Number of squares of an image, including the overview."""
        return self.grid**2 + 1


@dataclass(frozen=True)
class LowResolution:
    """Which images are shown only as their overviews."""

    share: float
    """Fraction shown at low resolution, of the images that are not the last of their document."""
    seed: int

    def chosen(self, rows: np.ndarray, num_images: np.ndarray) -> np.ndarray:
        """Return whether each image of some documents is shown at low resolution, one document after another: [images] bool.

        Args:
            rows: [documents] rows of the documents in their source.
            num_images: [documents] int64: number of images of each document.
        """
        total = int(num_images.sum())
        document = np.repeat(np.arange(len(rows)), num_images)
        number = np.arange(total) - np.repeat(np.cumsum(num_images) - num_images, num_images)
        seed = np.uint64((self.seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
        drawn = mix(mix(np.asarray(rows, dtype=np.uint64)[document] ^ mix(np.full(total, seed))) ^ number.astype(np.uint64))
        demonstration = number < num_images[document] - 1
        return demonstration & (drawn >> np.uint64(11) < np.uint64(round(self.share * 2**53)))


def cut_sub_images(image: Image.Image, sub_images: SubImages, transform: ImageTransform, *, wanted: range, count: int) -> np.ndarray:
    """Return some squares of an opened image of any mode: [len(wanted), 3, size, size] uint8.

    Args:
        transform: transform to one square.
        wanted: numbers of the squares to return.
        count: total number of squares of the image: `sub_images.count`, or 1 if only the overview is shown.
    """
    size, grid = transform.size, sub_images.grid
    overview = 0 if sub_images.overview_first or count == 1 else count - 1
    squares = np.empty((len(wanted), 3, size, size), dtype=np.uint8)
    large = None
    for place, number in zip(squares, wanted, strict=True):
        if number == overview:
            place[:] = rgb_pixels(transform.square(image)).transpose(2, 0, 1)
            continue
        if large is None:
            large = rgb_pixels(transform.enlarged(grid).square(image))
        row, column = divmod(number - sub_images.overview_first, grid)
        place[:] = large[row * size : (row + 1) * size, column * size : (column + 1) * size].transpose(2, 0, 1)
    return squares

"""How an image enters a model: its pixels, and its tokens in a document.

A model that sees large images as tiles gets the tiles of an image one after another, each as a separate image:

    <img> CTX CTX CTX CTX | CTX CTX CTX CTX </img>      two tiles of four tokens between a token before and one after

Tiles come from a grid whose shape is close to the image's (`data.tiling`), or are an overview and crops (`data.sub_images`).

Shape legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_mm.data.image_transform import ImageTransform, Resize, ToRgb
from megatron_mm.data.sub_images import LowResolution, SubImages
from megatron_mm.data.tiling import Tiling, tile_counts


@dataclass(frozen=True)
class ImageInput:
    """How images enter a model: their pixels, and the tokens that represent them.

    An image is written as `before`, then `token` repeated `tokens` times for each of its tiles (the positions of their features), then
    `after`. Without tiling, an image is a single tile.
    """

    size: int
    """Side of the square to which images, or tiles, are resized, in pixels."""
    fill: tuple[int, int, int]
    """Colour of a missing image: the tower's mean, which normalises to zero."""
    tokens: int
    """Number of feature positions of an image, or of a tile."""
    token: str = "<image>"
    """Control token at these positions."""
    before: tuple[str, ...] = ()
    """Control tokens before these positions."""
    after: tuple[str, ...] = ()
    """Control tokens after these positions."""
    learn_before: bool = False
    """The tokens in `before` are supervised; no other token of an image is."""
    tiling: Tiling | None = None
    """How images are cut into tiles according to their shape; None for no such tiles."""
    sub_images: SubImages | None = None
    """How images are shown as an overview and crops, which are treated as tiles here; None for no sub-images."""
    low_resolution: LowResolution | None = None
    """Which images are shown only as their overviews, if there are `sub_images`; None for none."""
    resize: Resize = "squash"
    """How an image that is not cut into tiles is resized to the square (`data.image_transform`)."""
    to_rgb: ToRgb = "white"
    """How transparent, 16-bit and other images are converted to 8-bit RGB."""
    resize_first: bool = False
    """Resize before converting to RGB, as the family's released processor does."""

    @property
    def transform(self) -> ImageTransform:
        """Transform from an opened image to the pixels of one square."""
        return ImageTransform(self.size, self.fill, resize=self.resize, to_rgb=self.to_rgb, resize_first=self.resize_first)

    @property
    def places(self) -> int:
        """Number of tokens in the decoder's sequence for an image of one tile."""
        return self.tokens + self.places_around

    @property
    def places_around(self) -> int:
        """Number of tokens before and after the feature positions."""
        return len(self.before) + len(self.after)

    @property
    def silent_from(self) -> int:
        """First of an image's positions that is not supervised; none of its later positions is, either."""
        return len(self.before) if self.learn_before else 0

    @property
    def squares(self) -> str:
        """Name of the squares into which an image is converted: images, tiles or sub-images."""
        return "sub-images" if self.sub_images is not None else "images" if self.is_one_square else "tiles"

    @property
    def is_one_square(self) -> bool:
        """Every image is one square, its only tile."""
        return self.tiling is None and self.sub_images is None

    @property
    def max_tiles(self) -> int:
        """Maximum number of tiles of an image."""
        if self.sub_images is not None:
            return self.sub_images.count
        return 1 if self.tiling is None else self.tiling.max_count

    @property
    def whole_tile(self) -> int:
        """Index of the tile that shows the whole image: 0 for the first, -1 for the last."""
        return 0 if self.sub_images is not None and self.sub_images.overview_first else -1

    def num_tiles(self, widths: np.ndarray, heights: np.ndarray, *, row: int | None = None) -> np.ndarray:
        """Return the number of tiles of images of these sizes: [n] int64.

        Args:
            widths, heights: [n] sizes of all images of one document, in pixels.
            row: row of that document in its source; None shows all images at full resolution.
        """
        if self.tiling is not None:
            return tile_counts(widths, heights, self.tiling, self.size)
        return self.num_sub_images(None if row is None else np.array([row]), np.array([len(widths)]))

    def num_sub_images(self, rows: np.ndarray | None, num_images: np.ndarray) -> np.ndarray:
        """Return the number of tiles of images that are not cut by their shape, one document after another: [images] int64.

        Args:
            rows: [documents] rows of the documents in their source; None shows all images at full resolution.
            num_images: [documents] int64: number of images of each document.
        """
        tiles = np.full(int(num_images.sum()), self.max_tiles, dtype=np.int64)
        if self.low_resolution is not None and rows is not None:
            tiles[self.low_resolution.chosen(rows, num_images)] = 1
        return tiles

    def num_places(self, tiles: np.ndarray) -> np.ndarray:
        """Return the number of tokens of images with these numbers of tiles: [n] int64."""
        return self.places_around + self.tokens * tiles

    def ids(self, special_id: Callable[[str], int], *, tiles: int) -> list[int]:
        """Return the token ids of one image.

        Args:
            special_id: returns the id of a control token (`Tokenizer.special_id`).
        """
        return [*map(special_id, self.before), *[special_id(self.token)] * (self.tokens * tiles), *map(special_id, self.after)]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Control tokens that the tokenizer must have, without duplicates."""
        return tuple(dict.fromkeys((*self.before, self.token, *self.after)))


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Convert a tower's mean to a colour."""
    red, green, blue = (round(255 * channel) for channel in mean)
    return red, green, blue

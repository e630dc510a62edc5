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
    """How images enter a model: which pixels, and which tokens stand for them.

    An image is written as `before`, then `tokens` times `token` for each of its tiles (the places of their features), then `after`. Without
    tiling an image is its only tile.
    """

    size: int
    """Side of the square that images, or tiles, are resized to, pixels."""
    fill: tuple[int, int, int]
    """Colour that stands for a missing image; the tower's mean, which normalises to zero."""
    tokens: int
    """Places of features of an image, or of a tile."""
    token: str = "<image>"
    """The control token of these places."""
    before: tuple[str, ...] = ()
    """Control tokens in front of them."""
    after: tuple[str, ...] = ()
    """Control tokens behind them."""
    learn_before: bool = False
    """The tokens `before` count in the loss; no other token of an image does."""
    tiling: Tiling | None = None
    """How images are cut into tiles by their shape; None does not."""
    sub_images: SubImages | None = None
    """How images are shown as an overview and crops, which are tiles like any other here; None shows one square of each."""
    low_resolution: LowResolution | None = None
    """Which images are shown as their overviews alone, where there are `sub_images`; None for none."""
    resize: Resize = "squash"
    """How an image that is not cut into tiles becomes the square (`data.image_transform`)."""
    to_rgb: ToRgb = "white"
    """How transparent, 16-bit and other images become 8-bit RGB."""
    resize_first: bool = False
    """Resize before the conversion to RGB, as the family's released processor does."""

    @property
    def transform(self) -> ImageTransform:
        """From an opened image to the pixels of one square."""
        return ImageTransform(self.size, self.fill, resize=self.resize, to_rgb=self.to_rgb, resize_first=self.resize_first)

    @property
    def places(self) -> int:
        """Tokens of the decoder's sequence that an image of one tile takes."""
        return self.tokens + self.places_around

    @property
    def places_around(self) -> int:
        """Tokens before and after those of the features."""
        return len(self.before) + len(self.after)

    @property
    def silent_from(self) -> int:
        """The first of an image's places that is not to be predicted, nor is any after it."""
        return len(self.before) if self.learn_before else 0

    @property
    def squares(self) -> str:
        """What the squares are called that an image becomes: images, tiles or sub-images."""
        return "sub-images" if self.sub_images is not None else "images" if self.is_one_square else "tiles"

    @property
    def is_one_square(self) -> bool:
        """Every image is one square, its only tile."""
        return self.tiling is None and self.sub_images is None

    @property
    def max_tiles(self) -> int:
        """Tiles that an image has at most."""
        if self.sub_images is not None:
            return self.sub_images.count
        return 1 if self.tiling is None else self.tiling.max_count

    @property
    def whole_tile(self) -> int:
        """Which of an image's tiles shows the whole of it: the first, or -1 for the last."""
        return 0 if self.sub_images is not None and self.sub_images.overview_first else -1

    def num_tiles(self, widths: np.ndarray, heights: np.ndarray, *, row: int | None = None) -> np.ndarray:
        """Tiles of images of so many pixels: [n] int64.

        Args:
            row: of the document in its source, whose images they are; None shows all of them at full resolution.
        """
        if self.tiling is not None:
            return tile_counts(widths, heights, self.tiling, self.size)
        return self.num_sub_images(None if row is None else np.array([row]), np.array([len(widths)]))

    def num_sub_images(self, rows: np.ndarray | None, num_images: np.ndarray) -> np.ndarray:
        """Tiles of images that are not cut by their shape, one document after another: [images] int64.

        Args:
            rows: [documents] of their source; None shows all images at full resolution.
            num_images: [documents] int64.
        """
        tiles = np.full(int(num_images.sum()), self.max_tiles, dtype=np.int64)
        if self.low_resolution is not None and rows is not None:
            tiles[self.low_resolution.chosen(rows, num_images)] = 1
        return tiles

    def num_places(self, tiles: np.ndarray) -> np.ndarray:
        """Tokens of images of so many tiles: [n] int64."""
        return self.places_around + self.tokens * tiles

    def ids(self, special_id: Callable[[str], int], *, tiles: int) -> list[int]:
        """The token ids of one image.

        Args:
            special_id: the id of a control token (`Tokenizer.special_id`).
        """
        return [*map(special_id, self.before), *[special_id(self.token)] * (self.tokens * tiles), *map(special_id, self.after)]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """What the tokenizer must know, each once."""
        return tuple(dict.fromkeys((*self.before, self.token, *self.after)))


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """A tower's mean as a colour."""
    red, green, blue = (round(255 * channel) for channel in mean)
    return red, green, blue

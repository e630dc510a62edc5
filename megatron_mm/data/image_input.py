"""How an image enters a model: which pixels, and which tokens stand for it in a document.

A model that looks at large images in tiles gets an image's tiles one after another, each as an image of its own:

    <img> CTX CTX CTX CTX | CTX CTX CTX CTX </img>      two tiles of four tokens between a token before and one after

Shape legend: n images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_mm.data.image_transform import ImageTransform, Resize, ToRgb
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
    """How images are cut into tiles; None makes one square of each."""
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
    def max_tiles(self) -> int:
        """Tiles that an image has at most."""
        return 1 if self.tiling is None else self.tiling.max_count

    def num_tiles(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Tiles of images of so many pixels: [n] int64."""
        if self.tiling is None:
            return np.ones(len(widths), dtype=np.int64)
        return tile_counts(widths, heights, self.tiling, self.size)

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

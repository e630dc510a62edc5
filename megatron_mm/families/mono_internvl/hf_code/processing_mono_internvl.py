"""Prepares images and text as inputs of Mono-InternVL. Part of the checkpoint: imports only NumPy, Pillow and transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from PIL import Image

from .image_prompts import ImagePromptProcessor
from .square_images import SquareImageProcessor, on_white, to_pillow


class MonoInternVLImageProcessor(SquareImageProcessor):
    """Mono-InternVL's image processor: an image becomes a grid of tiles that fits its shape, row by row, and if there are several tiles,
    the whole image as one more tile.

    The grid is the one whose ratio of columns to rows is closest to the image's ratio of width to height. Among equally close grids, one
    with more tiles is chosen only if the image has more than half as many pixels as the grid.

    Args:
        min_tiles: minimum number of tiles in a grid, not counting the whole image.
        max_tiles: maximum number of tiles in a grid, not counting the whole image.
        kwargs: arguments of `SquareImageProcessor`.
    """

    def __init__(self, min_tiles: int = 1, max_tiles: int = 12, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles

    def squares(self, image: Any, low_resolution: bool = False) -> list[np.ndarray]:
        """Return an image's tiles [3, H, W]; with low_resolution, the whole image as a single tile."""
        image, side = to_pillow(image), self.size["height"]
        rgb = image.convert("RGB") if self.to_rgb == "pillow" else on_white(image)
        columns, rows = (1, 1) if low_resolution else self.grid(*rgb.size)
        large = self._normalised(rgb.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
        tiles = [large[:, y : y + side, x : x + side] for y in range(0, rows * side, side) for x in range(0, columns * side, side)]
        whole = [self._normalised(rgb.resize((side, side), Image.Resampling.BICUBIC))] if len(tiles) > 1 else []
        return tiles + whole

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return (columns, rows) of the grid for an image of `width` x `height` pixels."""
        sides, side = range(1, self.max_tiles + 1), self.size["height"]
        grids = [(columns, rows) for columns in sides for rows in sides if self.min_tiles <= columns * rows <= self.max_tiles]
        chosen, least = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])):
            distance = abs(width / height - columns / rows)
            if distance < least or (distance == least and 2 * width * height > side * side * columns * rows):
                chosen = (columns, rows)
            least = min(least, distance)
        return chosen


class MonoInternVLProcessor(ImagePromptProcessor):
    """Mono-InternVL's processor: it replaces each `<image>` of a prompt with `<img>`, one `<IMG_CONTEXT>` per image token, and `</img>`.

    Args:
        tokens_per_image: number of image tokens for one tile.
    """

    if int(transformers.__version__.split(".")[0]) < 5:
        valid_kwargs = ["tokens_per_image"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_image: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def image_text(self, squares: int) -> str:
        return f"<img>{'<IMG_CONTEXT>' * (self.tokens_per_image * squares)}</img>"


# Makes `save_pretrained` write this file, too, in every version of transformers.
MonoInternVLImageProcessor.register_for_auto_class("AutoImageProcessor")
MonoInternVLProcessor.register_for_auto_class("AutoProcessor")

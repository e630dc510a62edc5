"""Images and text -> the inputs of Mono-InternVL. Part of the checkpoint: imports NumPy, Pillow and transformers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from PIL import Image

from .image_prompts import ImagePromptProcessor
from .square_images import SquareImageProcessor, on_white, to_pillow


class MonoInternVLImageProcessor(SquareImageProcessor):
    """A grid of tiles that suits the image's shape, row by row, and where there are several the whole image as one more.

    The grid is the one whose columns / rows is closest to width / height. Of grids that are equally close, one with more tiles is taken
    where the image has more than half of that grid's pixels.

    Args:
        min_tiles, max_tiles: of a grid; the whole image is not counted.
        kwargs: of `SquareImageProcessor`.
    """

    def __init__(self, min_tiles: int = 1, max_tiles: int = 12, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_tiles = min_tiles
        self.max_tiles = max_tiles

    def squares(self, image: Any, low_resolution: bool = False) -> list[np.ndarray]:
        """An image's tiles [3, H, W]; with low_resolution the whole image as one."""
        image, side = to_pillow(image), self.size["height"]
        rgb = image.convert("RGB") if self.to_rgb == "pillow" else on_white(image)
        columns, rows = (1, 1) if low_resolution else self.grid(*rgb.size)
        large = self._normalised(rgb.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
        tiles = [large[:, y : y + side, x : x + side] for y in range(0, rows * side, side) for x in range(0, columns * side, side)]
        whole = [self._normalised(rgb.resize((side, side), Image.Resampling.BICUBIC))] if len(tiles) > 1 else []
        return tiles + whole

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of an image of so many pixels."""
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
    """Mono-InternVL's prompts: each `<image>` becomes `<img>`, as many `<IMG_CONTEXT>` as its tiles take, `</img>`.

    Args:
        tokens_per_image: image tokens that one tile takes.
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


# So that `save_pretrained` writes this file, too, in every version of transformers.
MonoInternVLImageProcessor.register_for_auto_class("AutoImageProcessor")
MonoInternVLProcessor.register_for_auto_class("AutoProcessor")

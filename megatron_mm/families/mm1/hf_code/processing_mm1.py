"""Prepares images and text as inputs of MM1. Part of the checkpoint: imports only NumPy, Pillow and transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers

from .image_prompts import ImagePromptProcessor
from .square_images import SquareImageProcessor


class MM1ImageProcessor(SquareImageProcessor):
    """MM1's image processor: an image becomes one square or, for a model that was fine-tuned at high resolution, an overview and crops.

    Args:
        sub_images: {"grid": number of crops along a side, "overview_first": whether the overview precedes the crops}; None for one square.
        kwargs: arguments of `SquareImageProcessor`.
    """

    def __init__(self, sub_images: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sub_images = sub_images

    def squares(self, image: Any, low_resolution: bool = False) -> list[np.ndarray]:
        """Return an image's squares [3, H, W] in the order of their tokens; with low_resolution only the overview."""
        overview = self._pixels(image)
        if self.sub_images is None or low_resolution:
            return [overview]
        grid, side = self.sub_images["grid"], self.size["height"]
        large = self._pixels(image, times=grid)
        crops = [large[:, y : y + side, x : x + side] for y in range(0, grid * side, side) for x in range(0, grid * side, side)]
        return [overview, *crops] if self.sub_images["overview_first"] else [*crops, overview]


class MM1Processor(ImagePromptProcessor):
    """MM1's processor: it replaces each `<image>` of a prompt with the image tokens for all squares of the image.

    Args:
        tokens_per_image: number of image tokens for one square.
    """

    if int(transformers.__version__.split(".")[0]) < 5:
        valid_kwargs = ["tokens_per_image"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_image: int = 144,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def image_text(self, squares: int) -> str:
        return self.image_token * (self.tokens_per_image * squares)


# Makes `save_pretrained` write this file, too, in every version of transformers.
MM1ImageProcessor.register_for_auto_class("AutoImageProcessor")
MM1Processor.register_for_auto_class("AutoProcessor")

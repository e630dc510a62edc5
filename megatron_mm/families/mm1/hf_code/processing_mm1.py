"""Images and text -> the inputs of MM1. Part of the checkpoint: imports NumPy, Pillow and transformers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .square_images import SquareImageProcessor


class MM1ImageProcessor(SquareImageProcessor):
    """MM1's images: one square each or, of a model that was fine-tuned at high resolution, an overview and crops.

    Args:
        sub_images: {"grid": crops along a side, "overview_first": whether the overview comes before the crops}; None for one square.
        kwargs: of `SquareImageProcessor`.
    """

    def __init__(self, sub_images: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sub_images = sub_images

    def count(self, low_resolution: bool = False) -> int:
        """Squares that an image becomes."""
        return 1 if self.sub_images is None or low_resolution else self.sub_images["grid"] ** 2 + 1

    def preprocess(self, images: Any, return_tensors: str | None = None, low_resolution: Any = False, **kwargs: Any) -> BatchFeature:
        """One image or a list (Pillow, NumPy or torch) -> `pixel_values` [squares of all images, 3, H, W] float32.

        Args:
            low_resolution: show an image as its overview alone; one answer for all images, or one for each.
        """
        images = images if isinstance(images, list | tuple) else [images]
        low = [low_resolution] * len(images) if isinstance(low_resolution, bool) else list(low_resolution)
        shape = (0, 3, self.size["height"], self.size["width"])
        squares = [square for image, is_low in zip(images, low, strict=True) for square in self._squares(image, is_low)]
        pixels = np.stack(squares) if squares else np.zeros(shape, dtype=np.float32)
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _squares(self, image: Any, low_resolution: bool) -> list[np.ndarray]:
        overview = self._pixels(image)
        if self.count(low_resolution) == 1:
            return [overview]
        grid, side = self.sub_images["grid"], self.size["height"]
        large = self._pixels(image, times=grid)
        crops = [large[:, y : y + side, x : x + side] for y in range(0, grid * side, side) for x in range(0, grid * side, side)]
        return [overview, *crops] if self.sub_images["overview_first"] else [*crops, overview]


class MM1Processor(ProcessorMixin):
    """Prompts with `<image>` in them and their images -> `input_ids`, `attention_mask`, `pixel_values`.

    Each `<image>` becomes as many image tokens as an image takes, times its sub-images where the model looks at images so; `<s>` comes
    first, as in the training documents. A caption prompt is `<image>` alone. Sequences are padded on the left where there are several.

    Args:
        tokens_per_image: image tokens that an image of one square takes.
    """

    if int(transformers.__version__.split(".")[0]) < 5:  # later versions find the parts by the names in __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
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
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, low_resolution: bool | list[bool] = False, **kwargs: Any
    ) -> BatchFeature:
        """Inputs for the model.

        Args:
            images: one image, a list in the order of the `<image>`s of all prompts, or a list of such lists, one a prompt.
            text: a prompt or several; without any, `<image>` for each image.
            low_resolution: show images as their overviews alone, as demonstrations may be; one answer for all, or one for each image in
                the order of the `<image>`s. Changes nothing where the model has no sub-images.
            kwargs: for the tokenizer (`padding`, `max_length`, ...); `return_tensors` for all outputs.

        Returns:
            `input_ids`, `attention_mask` [b, s]; with images `pixel_values` [b, max squares of a prompt, 3, H, W], zeros
            where a prompt has fewer squares (an image, or its sub-images).

        Raises ValueError where the prompts do not hold as many `<image>` as there are images, or low_resolution has another number.
        """
        flat = _flat(images)
        prompts = [text] if isinstance(text, str) else list(text) if text is not None else [self.image_token] * len(flat)
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if sum(counts) != len(flat):
            raise ValueError(f"the prompts hold {sum(counts)} times {self.image_token}, but {len(flat)} images are given: make them equal")
        low = [low_resolution] * len(flat) if isinstance(low_resolution, bool) else list(low_resolution)
        if len(low) != len(flat):
            raise ValueError(f"low_resolution has {len(low)} answers, but {len(flat)} images are given: give one for each, or one for all")
        return_tensors = kwargs.pop("return_tensors", None)
        kwargs.setdefault("padding", len(prompts) > 1)
        left = iter(low)
        squares = [[self.image_processor.count(next(left)) for _ in range(count)] for count in counts]
        expanded = [self._expanded(prompt, of_prompt) for prompt, of_prompt in zip(prompts, squares, strict=True)]
        inputs = dict(self.tokenizer(expanded, return_token_type_ids=False, **kwargs))
        if flat:
            pixels = self.image_processor(flat, return_tensors="np", low_resolution=low)["pixel_values"]
            totals = np.array([sum(of_prompt) for of_prompt in squares])
            rows = np.zeros((len(prompts), int(totals.max()), *pixels.shape[1:]), dtype=np.float32)
            rows[np.arange(rows.shape[1]) < totals[:, None]] = pixels
            inputs["pixel_values"] = rows
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _expanded(self, prompt: str, squares: list[int]) -> str:
        """A prompt with as many image tokens in the place of each `<image>` as its squares take."""
        first, *rest = prompt.split(self.image_token)
        tokens = [self.image_token * (self.tokens_per_image * count) for count in squares]
        return first + "".join(image + text for image, text in zip(tokens, rest, strict=True))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As the tokenizer's."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for item in images for image in _flat(item)]

"""Prompts that contain `<image>`, and their images -> inputs of a model. Part of the checkpoint: imports only NumPy and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin


class ImagePromptProcessor(ProcessorMixin):
    """Prompts that contain `<image>`, and their images -> `input_ids`, `attention_mask`, `pixel_values`.

    As in the model's training documents, a sequence begins with `<s>`, and each `<image>` is expanded to the tokens of an image. A prompt
    for a caption is just `<image>`. Several sequences are padded on the left.
    """

    image_token = "<image>"
    if int(transformers.__version__.split(".")[0]) < 5:  # later versions find them from the parameter names of __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def image_text(self, squares: int) -> str:
        """Return the text that represents an image of this many squares of pixels."""
        raise NotImplementedError

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, low_resolution: bool | list[bool] = False, **kwargs: Any
    ) -> BatchFeature:
        """Prepare the inputs of the model.

        Args:
            images: one image, a list of images in the order of the `<image>`s in all prompts, or one such list per prompt.
            text: one prompt or several. By default there is one prompt, `<image>`, for each image.
            low_resolution: show an image of several squares only as its overview, for example in a demonstration. Either one value for all
                images, or one for each image in the order of the `<image>`s.
            kwargs: passed to the tokenizer (`padding`, `max_length`, ...); `return_tensors` applies to all outputs.

        Returns:
            `input_ids` and `attention_mask` [b, s]; with images also `pixel_values` [b, most squares in a prompt, 3, H, W], filled with
            zeros for prompts with fewer squares.

        Raises ValueError if there is neither a prompt nor an image, if the number of `<image>`s in the prompts is not the number of images,
        or if low_resolution has another number of values.
        """
        flat = _flat(images)
        prompts = [text] if isinstance(text, str) else list(text) if text is not None else [self.image_token] * len(flat)
        if not prompts:
            raise ValueError("no prompt and no image given: pass text, images or both")
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if sum(counts) != len(flat):
            raise ValueError(
                f"the prompts contain {self.image_token} {sum(counts)} times, but {len(flat)} images are given: make the numbers equal"
            )
        low = [low_resolution] * len(flat) if isinstance(low_resolution, bool) else list(low_resolution)
        if len(low) != len(flat):
            raise ValueError(
                f"low_resolution has {len(low)} values, but {len(flat)} images are given: pass one value per image, or one for all"
            )
        return_tensors = kwargs.pop("return_tensors", None)
        kwargs.setdefault("padding", len(prompts) > 1)
        squares = [self.image_processor.squares(image, is_low) for image, is_low in zip(flat, low, strict=True)]
        left = iter(squares)
        of_prompts = [[next(left) for _ in range(count)] for count in counts]
        written = [
            _replaced(prompt, self.image_token, [len(of_image) for of_image in own], self.image_text)
            for prompt, own in zip(prompts, of_prompts, strict=True)
        ]
        inputs = dict(self.tokenizer(written, return_token_type_ids=False, **kwargs))
        if flat:
            inputs["pixel_values"] = _padded([[square for of_image in own for square in of_image] for own in of_prompts])
        return BatchFeature(inputs, tensor_type=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Call the tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Call the tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def _replaced(prompt: str, token: str, squares: list[int], image_text: Callable[[int], str]) -> str:
    """Replace each image token in a prompt with the text of its image."""
    first, *rest = prompt.split(token)
    return first + "".join(image_text(count) + text for count, text in zip(squares, rest, strict=True))


def _padded(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Stack each prompt's squares, padded with zeros at the end: [b, most squares in a prompt, 3, H, W] float32."""
    shape = next(square for row in rows for square in row).shape
    out = np.zeros((len(rows), max(map(len, rows)), *shape), dtype=np.float32)
    for place, row in zip(out, rows, strict=True):
        for number, square in enumerate(row):
            place[number] = square
    return out


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if getattr(images, "ndim", 0) == 4:  # a batch in one array
        return list(images)
    if not isinstance(images, list | tuple):
        return [images]
    return [image for item in images for image in _flat(item)]

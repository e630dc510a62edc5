"""Images and text -> the inputs of InfiMM. Part of the checkpoint: imports NumPy, Pillow and transformers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .square_images import SquareImageProcessor


class InfiMMImageProcessor(SquareImageProcessor):
    """InfiMM's images."""


class InfiMMProcessor(ProcessorMixin):
    """Prompts with `<image>` in them and their images -> `input_ids`, `attention_mask`, `pixel_values`.

    Each `<image>` is written `<|endofchunk|><image>`; `<s>` comes first, as in the training documents. A caption prompt is `<image>` alone.
    Sequences are padded on the left where there are several.
    """

    if int(transformers.__version__.split(".")[0]) < 5:  # later versions find the parts by the names in __init__
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any) -> None:
        self.image_token = "<image>"
        self.written = "<|endofchunk|><image>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Inputs for the model.

        Args:
            images: one image, a list in the order of the `<image>`s of all prompts, or a list of such lists, one a prompt.
            text: a prompt or several; without any, `<image>` for each image.
            kwargs: for the tokenizer (`padding`, `max_length`, ...); `return_tensors` for all outputs.

        Returns:
            `input_ids`, `attention_mask` [b, s]; with images `pixel_values` [b, max images of a prompt, 3, H, W], zeros
            where a prompt has fewer images.

        Raises ValueError where the prompts do not hold as many `<image>` as there are images.
        """
        flat = _flat(images)
        prompts = [text] if isinstance(text, str) else list(text) if text is not None else [self.image_token] * len(flat)
        counts = [prompt.count(self.image_token) for prompt in prompts]
        if sum(counts) != len(flat):
            raise ValueError(f"the prompts hold {sum(counts)} times {self.image_token}, but {len(flat)} images are given: make them equal")
        return_tensors = kwargs.pop("return_tensors", None)
        kwargs.setdefault("padding", len(prompts) > 1)
        plain = [prompt.replace(self.written, self.image_token) for prompt in prompts]  # a chat template writes both tokens
        expanded = [prompt.replace(self.image_token, self.written) for prompt in plain]
        inputs = dict(self.tokenizer(expanded, return_token_type_ids=False, **kwargs))
        if flat:
            pixels = self.image_processor(flat, return_tensors="np")["pixel_values"]
            rows = np.zeros((len(prompts), max(counts), *pixels.shape[1:]), dtype=np.float32)
            rows[np.arange(max(counts)) < np.array(counts)[:, None]] = pixels
            inputs["pixel_values"] = rows
        return BatchFeature(inputs, tensor_type=return_tensors)

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

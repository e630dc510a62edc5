"""Prepares images and text as inputs of InfiMM. Part of the checkpoint: imports only transformers."""

from __future__ import annotations

from typing import Any

from transformers.image_processing_utils import BatchFeature

from .image_prompts import ImagePromptProcessor
from .square_images import SquareImageProcessor


class InfiMMImageProcessor(SquareImageProcessor):
    """InfiMM's image processor."""


class InfiMMProcessor(ImagePromptProcessor):
    """InfiMM's processor: it replaces each `<image>` of a prompt with `<|endofchunk|><image>`."""

    written = "<|endofchunk|><image>"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """As in `ImagePromptProcessor`. A chat template already writes both tokens of an image; they are not written twice."""
        if text is not None:
            text = [prompt.replace(self.written, self.image_token) for prompt in ([text] if isinstance(text, str) else text)]
        return super().__call__(images, text, **kwargs)

    def image_text(self, squares: int) -> str:
        return self.written


# Makes `save_pretrained` write this file, too, in every version of transformers.
InfiMMImageProcessor.register_for_auto_class("AutoImageProcessor")
InfiMMProcessor.register_for_auto_class("AutoProcessor")

"""Models whose images are tokens of the sequence. Part of the checkpoint: imports only torch."""

from __future__ import annotations

from typing import Any

import torch


class ImageTokens:
    """Mixin for such a `PreTrainedModel`: puts image features at the positions of image tokens, in a forward pass and in generation.

    The model must have `config.image_token_id` and implement `tokens_per_square` and `get_image_features`.

    Shape legend: b sequences, s tokens, n squares in all sequences, k tokens per square, h decoder width.
    """

    @property
    def tokens_per_square(self) -> int:
        """Number of image tokens for one square of pixels."""
        raise NotImplementedError

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, H, W] -> [n, k, h]."""
        raise NotImplementedError

    def embed_with_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Return token embeddings [b, s, h] with image features at the positions of image tokens.

        Args:
            input_ids: [b, s].
            pixel_values: [b, most squares in a sequence, 3, H, W], each sequence's squares followed by padding; or [n, 3, H, W], the
                squares of all sequences in order.

        Raises ValueError if the number of image tokens does not match the number of squares.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embedded
        is_image = input_ids == self.config.image_token_id
        if pixel_values.ndim == 5:  # one row of squares per sequence; shorter rows are padded
            num_squares = is_image.sum(dim=1) // self.tokens_per_square
            present = torch.arange(pixel_values.shape[1], device=num_squares.device) < num_squares[:, None]
            pixel_values = pixel_values[present.to(pixel_values.device)]
        if is_image.sum() != pixel_values.shape[0] * self.tokens_per_square:
            raise ValueError(
                f"input_ids contain {int(is_image.sum())} image tokens, but {pixel_values.shape[0]} images of {self.tokens_per_square} "
                "tokens are given: write <image> once for each image, let the model's processor expand it, and do not truncate prompts"
            )
        features = self.get_image_features(pixel_values)
        return embedded.masked_scatter(is_image[..., None], features.to(embedded.device, embedded.dtype))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pass pixels only to steps whose tokens include image tokens: the first step, or every step without a cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        step_ids = inputs.get("input_ids")
        if inputs.get("pixel_values") is not None and (step_ids is None or not (step_ids == self.config.image_token_id).any()):
            inputs["pixel_values"] = None
        return inputs


def cache_of(outputs: Any) -> dict[str, Any]:
    """Return the key/value cache of a decoder's output under the name that the installed transformers gives it."""
    name = "cache" if "cache" in outputs else "past_key_values"  # the former since 5.24
    return {name: outputs[name]} if name in outputs else {}

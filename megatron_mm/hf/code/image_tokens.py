"""Models whose images are tokens of the sequence. Part of the checkpoint: imports torch alone."""

from __future__ import annotations

from typing import Any

import torch


class ImageTokens:
    """What such a `PreTrainedModel` has besides: image features in the places of image tokens, in a pass and in generation.

    The model has `config.image_token_id`, and says below how many tokens a square of pixels takes and how it becomes features.

    Shape legend: b sequences, s tokens, n squares of all sequences, k tokens of a square, h decoder width.
    """

    @property
    def tokens_per_square(self) -> int:
        """Image tokens that one square of pixels takes."""
        raise NotImplementedError

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, H, W] -> [n, k, h]."""
        raise NotImplementedError

    def embed_with_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings [b, s, h] with image features in the places of image tokens.

        Args:
            input_ids: [b, s].
            pixel_values: [b, most squares of a sequence, 3, H, W], each sequence's own first; or [n, 3, H, W], those of all in order.

        Raises ValueError where the two do not hold as many images.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embedded
        is_image = input_ids == self.config.image_token_id
        if pixel_values.ndim == 5:  # rows of squares, the shorter ones padded
            num_squares = is_image.sum(dim=1) // self.tokens_per_square
            present = torch.arange(pixel_values.shape[1], device=num_squares.device) < num_squares[:, None]
            pixel_values = pixel_values[present.to(pixel_values.device)]
        if is_image.sum() != pixel_values.shape[0] * self.tokens_per_square:
            raise ValueError(
                f"input_ids hold {int(is_image.sum())} image tokens, but {pixel_values.shape[0]} images of {self.tokens_per_square} tokens "
                "are given: write <image> once for each image, let the model's processor expand it, and do not truncate prompts"
            )
        features = self.get_image_features(pixel_values)
        return embedded.masked_scatter(is_image[..., None], features.to(embedded.device, embedded.dtype))

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Pixels go with the step whose tokens hold image tokens: the first one, or every one without a cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        step_ids = inputs.get("input_ids")
        if inputs.get("pixel_values") is not None and (step_ids is None or not (step_ids == self.config.image_token_id).any()):
            inputs["pixel_values"] = None
        return inputs

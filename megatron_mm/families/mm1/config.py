"""MM1's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from megatron_mm.config import ConnectorConfig, ModelConfig, VisionConfig
from megatron_mm.config.checks import require
from megatron_mm.data.image_input import ImageInput, fill_colour
from megatron_mm.data.sub_images import SubImages


@dataclass(frozen=True)
class MM1Config(ModelConfig):
    """MM1 (arXiv 2403.09611): a CLIP tower, a connector, and a decoder whose sequence holds the image tokens."""

    family: ClassVar[str] = "mm1"
    vision: VisionConfig
    connector: ConnectorConfig
    sub_images: SubImages | None = None
    """Show every image as an overview and crops, each of size vision.image_size (section 4.1 of the paper); None shows it as one square."""

    def __post_init__(self) -> None:
        if self.connector.pools_to_grid:
            side = math.isqrt(self.connector.num_tokens)
            require(
                side <= self.vision.grid_size,
                f"connector num_tokens {self.connector.num_tokens} needs a {side}x{side} grid, but the tower gives only "
                f"{self.vision.grid_size}x{self.vision.grid_size} patches",
            )


def image_input(config: MM1Config) -> ImageInput:
    """Return how images enter the model: each image, or each of its sub-images, takes as many tokens as the connector produces."""
    vision = config.vision
    return ImageInput(
        size=vision.image_size,
        tokens=config.connector.num_tokens,
        fill=fill_colour(vision.mean),
        resize=vision.resize,
        sub_images=config.sub_images,
    )

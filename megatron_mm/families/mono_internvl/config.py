"""Mono-InternVL's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mm.config import ModelConfig
from megatron_mm.config.checks import require, require_positive
from megatron_mm.data.image_input import ImageInput, fill_colour

SPECIAL_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Tokens that InternVL adds to InternLM2's vocabulary, in the order of their ids (from 92544)."""

EXPERTS = {"text": "feed_forward", "visual": "feed_forward_ve"}
"""The two feed-forward networks of a layer: our names -> those of released checkpoints."""


@dataclass(frozen=True)
class PatchEmbeddingConfig:
    """How Mono-InternVL turns pixels into decoder tokens: patches with learned positions, squares of patches concatenated, and an MLP."""

    image_size: int
    """Side of a tile, in pixels."""
    patch_size: int
    """Side of a patch, in pixels."""
    hidden_size: int
    """Width of a patch's embedding."""
    unshuffle: int = 2
    """Patches along the side of the square that becomes one token."""
    position_grid: int = 32
    """Side of the grid of learned positions, in patches; interpolated if a tile has another number of patches."""
    norm_epsilon: float = 1e-5
    """Added to the variance inside the MLP's LayerNorm."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean subtracted from pixels in [0, 1] (ImageNet)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation that pixels are divided by (ImageNet)."""

    def __post_init__(self) -> None:
        require_positive(self, "image_size", "patch_size", "hidden_size", "unshuffle", "position_grid")
        require(
            self.image_size % (self.patch_size * self.unshuffle) == 0,
            f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size} x unshuffle {self.unshuffle}: "
            "a tile must consist of whole squares of patches",
        )

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of a tile."""
        return (self.grid_size // self.unshuffle) ** 2


@dataclass(frozen=True)
class MonoInternVLConfig(ModelConfig):
    """Mono-InternVL (arXiv 2410.08202): one decoder with a visual expert in addition to the MLP of every layer, and no image tower."""

    family: ClassVar[str] = "mono_internvl"
    patches: PatchEmbeddingConfig

    def __post_init__(self) -> None:
        require(self.decoder.moe is None, "Mono-InternVL's experts are chosen by modality: set model.decoder.moe to None")


def image_input(config: MonoInternVLConfig) -> ImageInput:
    """Return how images enter the model: a tile takes one token per square of patches; one token precedes the image and one follows it."""
    return ImageInput(
        size=config.patches.image_size,
        fill=fill_colour(config.patches.mean),
        tokens=config.patches.num_tokens,
        token="<IMG_CONTEXT>",
        before=("<img>",),
        after=("</img>",),
    )

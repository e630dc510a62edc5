"""InfiMM's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron_mm.config import EvaConfig, ModelConfig, ResamplerConfig
from megatron_mm.config.checks import require, require_positive
from megatron_mm.data.image_input import ImageInput, fill_colour

END_OF_CHUNK, IMAGE = "<|endofchunk|>", "<image>"


@dataclass(frozen=True)
class GatedConfig:
    """Flamingo's gated blocks, in which tokens attend to the latents of the last image before them."""

    every_n_layers: int
    """There is a block before decoder layers n, 2n, 3n ... (counted from 1)."""
    num_attention_heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of one attention head."""
    ffn_multiplier: int = 4
    """Width of the feed-forward network, as a multiple of the decoder's width."""

    def __post_init__(self) -> None:
        require_positive(self, "every_n_layers", "num_attention_heads", "head_dim", "ffn_multiplier")

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the indices, from 0, of the decoder layers with a block: (1, 3) for every second layer of 4."""
        return tuple(layer for layer in range(num_layers) if (layer + 1) % self.every_n_layers == 0)


@dataclass(frozen=True)
class InfiMMConfig(ModelConfig):
    """InfiMM (arXiv 2403.01487): an EVA-CLIP tower, a Perceiver resampler, and a language model with gated cross-attention."""

    family: ClassVar[str] = "infimm"
    vision: EvaConfig
    resampler: ResamplerConfig
    gated: GatedConfig

    def __post_init__(self) -> None:
        require(
            len(self.gated.layers(self.decoder.num_layers)) > 0,
            f"gated.every_n_layers {self.gated.every_n_layers} places no gated block before any of the "
            f"{self.decoder.num_layers} decoder layers: use a smaller number",
        )
        require(self.decoder.moe is None, "InfiMM's decoder has no experts: set model.decoder.moe to None")


def image_input(config: InfiMMConfig) -> ImageInput:
    """Return how images enter the model: each is two tokens, which are not replaced by image features; the loss includes the first."""
    return ImageInput(
        size=config.vision.image_size,
        fill=fill_colour(config.vision.mean),
        tokens=1,
        token=IMAGE,
        before=(END_OF_CHUNK,),
        learn_before=True,
        resize=config.vision.resize,
        resize_first=True,
    )

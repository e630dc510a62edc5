"""Mono-InternVL (arXiv 2410.08202): one decoder that takes image patches directly, with a text feed-forward network and a visual expert in
every layer.

In the sequence, an image is `<img>`, then 256 times `<IMG_CONTEXT>` for each of its tiles, then `</img>`. The embedded patches replace the
embeddings of `<IMG_CONTEXT>`, and only these tokens go through visual experts.
"""

from __future__ import annotations

import torch

from megatron_mm.config import FP8_MULTIPLES
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig, image_input
from megatron_mm.families.mono_internvl.modality_experts import modality_layer_spec, modality_layout
from megatron_mm.families.mono_internvl.patch_embedding import PatchEmbedding, PatchProjector
from megatron_mm.models.cache import CacheStep
from megatron_mm.models.chunk import Chunk
from megatron_mm.models.context import ChunkContext
from megatron_mm.models.decoder import layers_of_chunk


class MonoInternVLModel(Chunk):
    """One pipeline chunk of Mono-InternVL."""

    def __init__(self, config: MonoInternVLConfig, context: ChunkContext) -> None:
        encoders = _encoders(config, context) if context.pre_process else {}
        specs = [modality_layer_spec(context.backend) for _ in layers_of_chunk(config.decoder, context)]
        super().__init__(config.decoder, context, image=image_input(config), encoders=encoders, layer_specs=specs)
        self.multiple = FP8_MULTIPLES[context.fp8_recipe] if context.backend == "te" else 1

    def forward(
        self, batch: PackedBatch, *, pipeline_rows: int = 0, with_loss: bool = True, cache: CacheStep | None = None
    ) -> torch.Tensor:
        """Compute hidden states for the next stage, or on the last stage the result, as in `MM1Model.forward`."""
        decoder_input = None
        if self.pre_process and cache is not None and cache.cache.filled:
            decoder_input = self.embed_text(batch)
        elif self.pre_process:
            tokens = self.projector(self.patches(self.own_pixels(batch)))
            decoder_input = self.embed(batch, self.sharing.gather(tokens, owners=batch.image_owners))
        layout = modality_layout(batch, tokens_per_image=self.image.tokens, multiple=self.multiple)
        layout.cache = cache
        return self.decode(batch, decoder_input, layout, with_loss=with_loss)


def _encoders(config: MonoInternVLConfig, context: ChunkContext) -> dict[str, torch.nn.Module]:
    return {
        "patches": PatchEmbedding(config.patches, dtype=context.dtype),
        "projector": PatchProjector(config.patches, output_size=config.decoder.hidden_size, dtype=context.dtype),
    }

"""MM1 (arXiv 2403.09611): CLIP tower -> connector -> image tokens inside a decoder's sequence.

Shape legend: t packed tokens of a micro-batch, n images, p patches, v tower width, k tokens of an image, h decoder width.
"""

from __future__ import annotations

import torch

from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.mm1.config import MM1Config, image_input
from megatron_mm.models.cache import CacheStep
from megatron_mm.models.chunk import Chunk, document_bounds
from megatron_mm.models.connectors import build_connector
from megatron_mm.models.context import ChunkContext
from megatron_mm.models.decoder import decoder_transformer_config
from megatron_mm.models.encoder import ImageEncoder
from megatron_mm.models.layers import vision_layer_spec
from megatron_mm.models.vision import VisionTower, vision_transformer_config


class MM1Model(Chunk):
    """One pipeline chunk of MM1."""

    def __init__(self, config: MM1Config, context: ChunkContext) -> None:
        encoder = MM1Encoder(config, context) if context.holds_encoder else None
        super().__init__(config.decoder, context, image=image_input(config), encoders=encoder)

    def forward(
        self,
        batch: PackedBatch,
        *,
        pipeline_rows: int = 0,
        encoded: torch.Tensor | None = None,
        with_loss: bool = True,
        cache: CacheStep | None = None,
        as_plan: bool = False,
    ) -> torch.Tensor:
        """Compute hidden states for the next stage, or on the last stage the result.

        Args:
            batch: the micro-batch, with tensors on this process's device (`image_starts`, `image_owners` on the CPU).
            pipeline_rows: unused, since only hidden states are sent.
            encoded: see `Chunk.image_features`.
            with_loss: the last stage returns losses, otherwise logits.
            cache: in generation, the step that continues the documents.
            as_plan: see `Chunk.decode`.

        Returns:
            [t / tensor, 1, h] or [t, 1, h] hidden states; on the last stage per-token losses [1, t] in float32, or logits
            [1, t, vocabulary / tensor].
        """
        decoder_input = None
        if self.pre_process and cache is not None and cache.cache.filled:
            decoder_input = self.embed_text(batch)
        elif self.pre_process:
            decoder_input = self.embed(batch, self.image_features(batch, encoded))
        return self.decode(batch, decoder_input, document_bounds(batch, cache=cache), with_loss=with_loss, as_plan=as_plan)


class MM1Encoder(ImageEncoder):
    """The tower followed by the connector."""

    def __init__(self, config: MM1Config, context: ChunkContext) -> None:
        tower = VisionTower(
            config.vision,
            layer_spec=vision_layer_spec(context.backend),
            transformer_config=vision_transformer_config(
                config.vision,
                params_dtype=context.dtype,
                recompute=context.parallel.recompute_encoder or context.parallel.recompute,
                recompute_modules=context.parallel.recompute_encoder_modules or context.parallel.recompute_modules,
                on_gpu=context.on_gpu,
            ),
            pg_collection=context.encoder_groups,
        )
        width = config.decoder.hidden_size
        super().__init__(
            decoder_transformer_config(config.decoder, context),
            tokens=image_input(config).tokens,
            width=width,
            dtype=context.dtype,
            vision=tower,
            connector=build_connector(config.connector, vision=config.vision, output_size=width, dtype=context.dtype),
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] uint8 -> image tokens [n, k, h]."""
        return self.connector(self.vision(pixels))

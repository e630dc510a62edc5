"""MM1 (arXiv 2403.09611): CLIP tower -> connector -> image tokens inside a decoder's sequence.

Shape legend: t packed tokens of a micro-batch, n images, p patches, v tower width, k tokens of an image, h decoder width.
"""

from __future__ import annotations

import torch

from megatron_mm.config import MM1Config, ParallelConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.models.base import ChunkContext, ImageInput, ModelFamily, fill_colour
from megatron_mm.models.chunk import Chunk, document_bounds
from megatron_mm.models.connectors import build_connector
from megatron_mm.models.decoder import check_decoder_layout
from megatron_mm.models.layers import vision_layer_spec
from megatron_mm.models.vision import VisionTower, vision_transformer_config
from megatron_mm.planning.flops import mm1_step_flops


class MM1Model(Chunk):
    """One pipeline chunk of MM1."""

    def __init__(self, config: MM1Config, context: ChunkContext) -> None:
        encoders = _encoders(config, context) if context.pre_process else {}
        super().__init__(config.decoder, context, image=_image_input(config), encoders=encoders)

    def forward(self, batch: PackedBatch, *, pipeline_rows: int = 0, with_loss: bool = True) -> torch.Tensor:
        """Hidden states for the next stage, or on the last stage the result.

        Args:
            batch: the micro-batch, its tensors on this process's device (`image_starts`, `image_owners` on the CPU).
            pipeline_rows: unused: hidden states are all that travels.
            with_loss: the last stage returns losses, or else logits.

        Returns:
            [t / tensor, 1, h] or [t, 1, h] hidden states; on the last stage per-token losses [1, t] in float32, or logits
            [1, t, vocabulary / tensor].
        """
        decoder_input = self._embed(batch) if self.pre_process else None
        return self.language(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            decoder_input=decoder_input,
            labels=batch.labels[None] if with_loss else None,
            packed_seq_params=document_bounds(batch),
            padding_mask=self._padding(batch),
        )

    def _padding(self, batch: PackedBatch) -> torch.Tensor | None:
        """[1, t] bool, True for padding among this process's tokens, for the routers of sparse layers (`models.moe`)."""
        if self.config.num_moe_experts is None:
            return None
        local = self.sharing.local_tokens(batch.num_tokens)
        return ~batch.is_token[None, local.start : local.stop]

    def _embed(self, batch: PackedBatch) -> torch.Tensor:
        """Token embeddings with the image tokens in their places; this process's part of [t, 1, h]."""
        embedded_t1h = self.language.embedding(input_ids=batch.token_ids[None], position_ids=batch.position_ids[None])
        features_nkh = self._encode(batch)
        rows, positions = image_token_rows(
            batch.image_starts, tokens_per_image=self.image.tokens, local=self.sharing.local_tokens(batch.num_tokens)
        )
        device = embedded_t1h.device
        features_1h = features_nkh.flatten(0, 1).index_select(0, rows.to(device))[:, None].to(embedded_t1h.dtype)
        return embedded_t1h.index_put((positions.to(device),), features_1h)

    def _encode(self, batch: PackedBatch) -> torch.Tensor:
        """Image tokens [n, k, h] of all images of the micro-batch, each encoded by its owner."""
        return self.sharing.gather(self.connector(self.vision(self.own_pixels(batch))), owners=batch.image_owners)


def _encoders(config: MM1Config, context: ChunkContext) -> dict[str, torch.nn.Module]:
    tower = VisionTower(
        config.vision,
        layer_spec=vision_layer_spec(context.backend),
        transformer_config=vision_transformer_config(
            config.vision, params_dtype=context.dtype, recompute=context.parallel.recompute, on_gpu=context.on_gpu
        ),
        pg_collection=context.encoder_groups,
    )
    width = config.decoder.hidden_size
    return {"vision": tower, "connector": build_connector(config.connector, vision=config.vision, output_size=width, dtype=context.dtype)}


def image_token_rows(starts: torch.Tensor, *, tokens_per_image: int, local: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of the flattened image features go to which of this process's positions.

    Worked example: two images of 3 tokens at positions 2 and 7, and this process holds tokens 4..7 (of 0..9). Tokens 2 3 4
    belong to the first image and 7 8 9 to the second; 4 and 7 are here. Their rows among the 2 x 3 features are 2 and 3, and
    their local positions 4 - 4 = 0 and 7 - 4 = 3.

    Args:
        starts: [n] positions of the first token of each image.
        local: the tokens that this process holds.

    Returns:
        (rows, positions), both [tokens that are here].
    """
    positions = (starts[:, None] + torch.arange(tokens_per_image)).flatten()
    rows = ((positions >= local.start) & (positions < local.stop)).nonzero().squeeze(1)
    return rows, positions[rows] - local.start


def _image_input(config: MM1Config) -> ImageInput:
    return ImageInput(size=config.vision.image_size, tokens=config.connector.num_tokens, fill=fill_colour(config.vision.mean))


def _check_layout(config: MM1Config, parallel: ParallelConfig, world_size: int) -> None:
    check_decoder_layout(config.decoder, parallel, world_size)


FAMILY = ModelFamily(
    build=MM1Model,  # type: ignore[arg-type]
    check_layout=_check_layout,  # type: ignore[arg-type]
    image_input=_image_input,  # type: ignore[arg-type]
    step_flops=mm1_step_flops,  # type: ignore[arg-type]
    policies={"all": ("",)},
)

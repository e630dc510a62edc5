"""MM1 (arXiv 2403.09611): CLIP tower -> connector -> image tokens inside a decoder's sequence.

Shape legend: t packed tokens of a micro-batch, n images, p patches, v tower width, k tokens of an image, h decoder width.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from megatron_mm.config import MM1Config, ParallelConfig, VisionConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.models.base import ChunkContext, ImageInput, ModelFamily
from megatron_mm.models.connectors import build_connector
from megatron_mm.models.decoder import build_decoder, check_decoder_layout, decoder_transformer_config
from megatron_mm.models.layers import vision_layer_spec
from megatron_mm.models.vision import VisionTower, vision_transformer_config
from megatron_mm.parallel.replicated import mark_replicated, replicated_state
from megatron_mm.planning.flops import mm1_step_flops


class MM1Model(MegatronModule):
    """One pipeline chunk of MM1."""

    def __init__(self, config: MM1Config, context: ChunkContext) -> None:
        transformer_config = decoder_transformer_config(config.decoder, context)
        super().__init__(config=transformer_config)
        self.model_type = ModelType.encoder_or_decoder  # read by megatron-core's schedules
        self.tokens_per_image = config.connector.num_tokens
        self.blank_image = _fill_colour(config.vision)
        self.image_size = config.vision.image_size
        self.sharing = context.sharing
        self.pre_process = context.pre_process
        self.post_process = context.post_process
        self.vp_stage = context.virtual_stage
        self.share_embeddings_and_output_weights = config.decoder.tied_embeddings
        self.vision: VisionTower | None = None
        self.connector: torch.nn.Module | None = None
        if context.pre_process:
            self.vision = VisionTower(
                config.vision,
                layer_spec=vision_layer_spec(context.backend),
                transformer_config=vision_transformer_config(
                    config.vision, params_dtype=context.dtype, recompute=context.parallel.recompute, on_gpu=context.on_gpu
                ),
                pg_collection=context.encoder_groups,
            )
            self.connector = build_connector(
                config.connector, vision=config.vision, output_size=config.decoder.hidden_size, dtype=context.dtype
            )
            mark_replicated(self.vision)
            mark_replicated(self.connector)
        self.language = build_decoder(config.decoder, context, transformer_config=transformer_config)

    def set_input_tensor(self, input_tensor: list[torch.Tensor] | torch.Tensor | None) -> None:
        """Take the previous stage's hidden states; called by the pipeline schedule before forward."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The embedding table where this chunk has it, for the sum of its two gradients when it is tied."""
        return self.language.shared_embedding_or_output_weight()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> ShardedStateDict:
        """Every parameter under its global name: `vision.`, `connector.` (copies) and `language.` (cut).

        Transformer Engine's modules would add a pickle each, in which FP8 keeps the scales of earlier steps. Ours has none to keep
        (`decoder_transformer_config`), so these are left out: checkpoints are the same with and without Transformer Engine.
        """
        state = self.language.sharded_state_dict(f"{prefix}language.", sharded_offsets, metadata)
        if self.vision is not None and self.connector is not None:
            state.update(replicated_state(self.vision, prefix=f"{prefix}vision."))
            state.update(replicated_state(self.connector, prefix=f"{prefix}connector."))
        return {name: entry for name, entry in state.items() if "._extra_state" not in name}

    def forward(self, batch: PackedBatch, *, with_loss: bool = True) -> torch.Tensor:
        """Hidden states for the next stage, or on the last stage the result.

        Args:
            batch: the micro-batch, its tensors on this process's device (`image_starts`, `image_owners` on the CPU).
            with_loss: the last stage returns losses, or else logits.

        Returns:
            [t / tensor, 1, h] or [t, 1, h] hidden states; on the last stage per-token losses [1, t] in float32, or logits
            [1, t, vocabulary / tensor].
        """
        decoder_input = self._embed(batch) if self.pre_process else None
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        return self.language(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            decoder_input=decoder_input,
            labels=batch.labels[None] if with_loss else None,
            packed_seq_params=packed,
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
            batch.image_starts, tokens_per_image=self.tokens_per_image, local=self.sharing.local_tokens(batch.num_tokens)
        )
        device = embedded_t1h.device
        features_1h = features_nkh.flatten(0, 1).index_select(0, rows.to(device))[:, None].to(embedded_t1h.dtype)
        return embedded_t1h.index_put((positions.to(device),), features_1h)

    def _encode(self, batch: PackedBatch) -> torch.Tensor:
        """Image tokens [n, k, h] of all images of the micro-batch, each encoded by its owner.

        A process without an image encodes a blank one that nobody uses: so every encoder parameter takes part in every
        micro-batch's graph (with gradient zero), and gradient reductions that wait for all of them never hang.
        """
        assert batch.pixels is not None and self.vision is not None and self.connector is not None, "only the first stage encodes"
        pixels = batch.pixels
        if pixels.shape[0] == 0:
            blank = torch.tensor(self.blank_image, dtype=torch.uint8, device=pixels.device)
            pixels = blank[None, :, None, None].expand(1, 3, self.image_size, self.image_size)
        return self.sharing.gather(self.connector(self.vision(pixels)), owners=batch.image_owners)


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


def _fill_colour(vision: VisionConfig) -> tuple[int, int, int]:
    red, green, blue = (round(255 * channel) for channel in vision.mean)
    return red, green, blue


def _image_input(config: MM1Config) -> ImageInput:
    return ImageInput(size=config.vision.image_size, tokens=config.connector.num_tokens, fill=_fill_colour(config.vision))


def _check_layout(config: MM1Config, parallel: ParallelConfig, world_size: int) -> None:
    check_decoder_layout(config.decoder, parallel, world_size)


FAMILY = ModelFamily(
    build=MM1Model,  # type: ignore[arg-type]
    check_layout=_check_layout,  # type: ignore[arg-type]
    image_input=_image_input,  # type: ignore[arg-type]
    step_flops=mm1_step_flops,  # type: ignore[arg-type]
    policies={"all": ("",)},
)

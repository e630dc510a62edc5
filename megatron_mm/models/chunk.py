"""The base class of all families' pipeline chunks: the decoder, the modules that encode images, and their common state dict."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_mm.config import DecoderConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.data.image_input import ImageInput
from megatron_mm.models.cache import CacheStep, Layout
from megatron_mm.models.context import ChunkContext
from megatron_mm.models.decoder import build_decoder, decoder_transformer_config
from megatron_mm.models.encoder import ImageEncoder, encoder_state
from megatron_mm.parallel.replicated import mark_replicated
from megatron_mm.platform.device import send


def document_bounds(batch: PackedBatch, *, cache: CacheStep | None = None) -> Layout:
    """Return the document bounds of a micro-batch in the form that attention takes.

    Args:
        cache: in generation, the step that continues the documents.
    """
    return Layout(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        cache=cache,
    )


class Chunk(MegatronModule):
    """One pipeline chunk. `language` is its part of the decoder; the first stage also has the modules between pixels and decoder."""

    encoder: ImageEncoder | None
    """The encoder used by `image_features`: part of the first stage, or a separate module with `parallel.spread_encoder`."""

    def __init__(
        self,
        decoder: DecoderConfig,
        context: ChunkContext,
        *,
        image: ImageInput,
        encoders: dict[str, torch.nn.Module] | ImageEncoder | None,
        layer_specs: list[ModuleSpec] | None = None,
    ) -> None:
        """
        Args:
            image: how images enter the model.
            encoders: modules that every process of a tensor-parallel group holds in full and runs on its own share of the images; None
                except on the first stage. `image_features` needs an `ImageEncoder`.
            layer_specs: specs of this chunk's decoder layers; None for the decoder's default.
        """
        transformer_config = decoder_transformer_config(decoder, context)
        super().__init__(config=transformer_config)
        self.model_type = ModelType.encoder_or_decoder  # read by megatron-core's schedules
        self.image = image
        self.sharing = context.sharing
        self.pre_process = context.pre_process
        self.post_process = context.post_process
        self.vp_stage = context.virtual_stage
        self.share_embeddings_and_output_weights = decoder.tied_embeddings
        parts = encoders.parts if isinstance(encoders, ImageEncoder) else encoders or {}
        self.encoders = tuple(parts)
        self.spread_encoder: object = None
        self.__dict__["encoder"] = encoders if isinstance(encoders, ImageEncoder) else None  # not a submodule: its parts are
        for name, module in parts.items():
            mark_replicated(module)
            self.add_module(name, module)
        self.language = build_decoder(decoder, context, transformer_config=transformer_config, layer_specs=layer_specs)

    @property
    def module(self) -> GPTModel:
        """The decoder, under the name by which megatron-core's schedule of plans looks it up in a chunk (`parallel.overlap_experts`)."""
        return self.language

    def set_input_tensor(self, input_tensor: list[torch.Tensor] | torch.Tensor | None) -> None:
        """Set the input that the previous stage sent; called by the pipeline schedule before forward."""
        self.language.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Return the embedding table if this chunk has it, to sum its two gradients if it is tied."""
        return self.language.shared_embedding_or_output_weight()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return every parameter under its global name: those of the encoders (replicated), and `language.` (sharded).

        Each module of Transformer Engine would add a pickle with the FP8 scales of earlier steps. These are left out, so checkpoints are
        the same with and without Transformer Engine.
        """
        state = self.language.sharded_state_dict(f"{prefix}language.", sharded_offsets, metadata)
        state.update(encoder_state({name: self.get_submodule(name) for name in self.encoders}, prefix=prefix))
        return {name: entry for name, entry in state.items() if "._extra_state" not in name}

    def image_features(self, batch: PackedBatch, encoded: torch.Tensor | None) -> torch.Tensor:
        """Return the features of all images of a micro-batch, [num_images, tokens, width].

        Args:
            encoded: the features of this process's share, [num_owned, tokens, width], if already computed (`parallel.spread_encoder`).
        """
        if encoded is None:
            assert self.encoder is not None, "only a chunk with an image encoder encodes"
            encoded = self.encoder(self.own_pixels(batch))
        return self.sharing.gather(encoded, owners=batch.image_owners)

    def own_pixels(self, batch: PackedBatch) -> torch.Tensor:
        """Return the images that this process encodes, [max(1, num_owned), 3, H, W].

        A process without an image encodes a blank one whose features are not used. So every encoder parameter takes part in every
        micro-batch's graph (with gradient zero), and gradient reductions that wait for all parameters never hang.
        """
        assert batch.pixels is not None, "only the first stage encodes"
        if batch.pixels.shape[0]:
            return batch.pixels
        blank = send(torch.tensor(self.image.fill, dtype=torch.uint8), batch.pixels.device)
        return blank[None, :, None, None].expand(1, 3, self.image.size, self.image.size)

    def embed_text(self, batch: PackedBatch) -> torch.Tensor:
        """Return token embeddings, this process's part of [t, 1, h]."""
        return self.language.embedding(input_ids=batch.token_ids[None], position_ids=batch.position_ids[None])

    def embed(self, batch: PackedBatch, features_nkh: torch.Tensor) -> torch.Tensor:
        """Return token embeddings with image features at the image positions, this process's part of [t, 1, h].

        Args:
            features_nkh: features of all images of the micro-batch, `image.tokens` each.
        """
        embedded_t1h = self.embed_text(batch)
        rows, positions = image_token_rows(
            batch.image_starts, tokens_per_image=self.image.tokens, local=self.sharing.local_tokens(batch.num_tokens)
        )
        device = embedded_t1h.device
        features_1h = features_nkh.flatten(0, 1).index_select(0, send(rows, device))[:, None].to(embedded_t1h.dtype)
        return embedded_t1h.index_put((send(positions, device),), features_1h)

    def decode(
        self,
        batch: PackedBatch,
        decoder_input: torch.Tensor | None,
        layout: Layout,
        *,
        context: torch.Tensor | None = None,
        with_loss: bool,
        as_plan: bool = False,
    ) -> torch.Tensor:
        """Run this chunk's decoder layers, and on the last stage the output layer.

        Args:
            decoder_input: embeddings, on the first stage.
            layout: document bounds, and further data of the micro-batch that the family's layers need.
            context: further input of the layers, such as the latents that they attend to.
            with_loss: the last stage returns losses; otherwise logits, in generation only those at `CacheStep.read`.
            as_plan: do not run anything; return a schedule plan, which megatron-core's schedule then runs (`parallel.overlap_experts`).
        """
        if layout.cache is not None:
            return self._decode_with_cache(batch, decoder_input, layout, layout.cache, context=context)
        layout.padding = padding = self._padding(batch)
        decode = self.language.build_schedule_plan if as_plan else self.language
        return decode(
            input_ids=batch.token_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            decoder_input=decoder_input,
            labels=batch.labels[None] if with_loss else None,
            packed_seq_params=layout,
            padding_mask=padding,
            extra_block_kwargs=None if context is None else {"context": context},
        )

    def _decode_with_cache(
        self, batch: PackedBatch, decoder_input: torch.Tensor | None, layout: Layout, step: CacheStep, *, context: torch.Tensor | None
    ) -> torch.Tensor:
        """`decode` for generation with a cache. megatron-core's GPTModel is not called, since it would count positions from 0."""
        language = self.language
        # The rotary embedding sees the row as one document; the table that it gets holds the angles of the tokens' positions.
        row = send(torch.tensor([0, batch.num_tokens], dtype=torch.int32), batch.token_ids.device)
        layout.cu_seqlens_q = layout.cu_seqlens_kv = row
        angles_t11d = language.rotary_pos_emb(step.cache.capacity).index_select(0, step.positions)
        step.rotate_by(angles_t11d, dtype=self.config.params_dtype)
        hidden_l1h = language.decoder(
            hidden_states=decoder_input,
            attention_mask=None,
            rotary_pos_emb=angles_t11d,
            packed_seq_params=layout,
            padding_mask=self._padding(batch),
            **({} if context is None else {"context": context}),
        )
        if not self.post_process:
            return hidden_l1h
        if self.config.sequence_parallel:
            hidden_l1h = gather_from_sequence_parallel_region(hidden_l1h, group=language.pg_collection.tp)
        read_r1h = hidden_l1h.index_select(0, step.read)
        local = self.sharing.local_tokens(len(read_r1h))
        tied = language.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits_r1v, _ = language.output_layer(read_r1h[local.start : local.stop], weight=tied)
        return logits_r1v.transpose(0, 1)

    def _padding(self, batch: PackedBatch) -> torch.Tensor | None:
        """Return [1, t] bool, True for padding among this process's tokens, for the routers of sparse layers; None for a dense model."""
        if self.config.num_moe_experts is None:
            return None
        local = self.sharing.local_tokens(batch.num_tokens)
        return ~batch.is_token[None, local.start : local.stop]


def image_token_rows(starts: torch.Tensor, *, tokens_per_image: int, local: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows of the flattened image features go to which of this process's positions.

    Worked example: two images of 3 tokens start at positions 2 and 7, and this process holds tokens 4..7 (of 0..9). Tokens 2 3 4 belong to
    the first image and 7 8 9 to the second; of these, 4 and 7 are on this process. Their rows among the 2 x 3 features are 2 and 3, and
    their local positions 4 - 4 = 0 and 7 - 4 = 3.

    Args:
        starts: [n] position of the first token of each image.
        local: the tokens that this process holds.

    Returns:
        (rows, positions), both [image tokens on this process].
    """
    positions = (starts[:, None] + torch.arange(tokens_per_image)).flatten()
    rows = ((positions >= local.start) & (positions < local.stop)).nonzero().squeeze(1)
    return rows, positions[rows] - local.start

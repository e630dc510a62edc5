"""Flamingo's gated blocks (arXiv 2204.14198, section 3.1.2): before some decoder layers, tokens attend to the latents of one image.

    x <- x + tanh(attention_gate) * attention(norm(x), latents)
    x <- x + tanh(ffn_gate) * ffn(norm(x))

Gates are 0 at first, so the model starts as the plain language model. A token attends only to the last image at or before it in its own
document. Before the first image of a document, attention adds nothing but the feed-forward network still applies; in a document without
images, neither applies. Worked example, two documents (E is <|endofchunk|>, I is <image>; images A, B, C):

    tokens        <s>  a   E   I   b   E   I   c  </s> | <s>  d   E   I  </s> | <s>  e  </s>
    attends to     -   -   -   A   A   A   B   B   B   |  -   -   -   C   C   |  -   -   -
    feed-forward   x   x   x   x   x   x   x   x   x   |  x   x   x   x   x   |  -   -   -

So the tokens that attend to image k are contiguous, from its <image> to the next one or to the end of the document. Attention is packed
attention between these runs of tokens and the latents of their images, so no mask is needed and nothing is computed that a mask would
remove.

Under tensor parallelism the blocks are split like those of the decoder: heads and feed-forward width by column, outputs by row. Latents are
a separate sequence, [m, 1, v], which sequence parallelism splits.

Shape legend: t packed tokens (this process's part under sequence parallelism), n images, k latents of an image, m = n * k, v tower width,
h decoder width, r tokens that attend to an image, a heads of this process, d head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.infimm.config import GatedConfig
from megatron_mm.models.cache import CacheStep, Layout
from megatron_mm.models.inference import DecoderLayer
from megatron_mm.models.layers import PlainSubmodules
from megatron_mm.platform.device import send


@dataclass
class MediaLayout(Layout):
    """Which tokens attend to which image. It is passed with the document bounds to every layer of a micro-batch, also under recompute."""

    rows: torch.Tensor | None = None
    """[r] int64: positions, in the whole micro-batch, of the tokens that attend to an image, in order."""
    runs: PackedSeqParams | None = None
    """Bounds of the runs of these tokens that attend to the same image, and of that image's latents."""
    looks: torch.Tensor | None = None
    """[r, 1] in the model's type: 1; without any image, 0 for the single dummy row, which gives all weights a gradient."""
    in_media_document: torch.Tensor | None = None
    """[t, 1, 1] in the model's type: 1 for this process's tokens in documents with an image, else 0."""
    images: torch.Tensor | None = None
    """Only in generation. While prompts are computed, [sequences]: index of each sequence's last image in the micro-batch, or 0 if it has
    none. Later, [runs]: the sequence whose last image a run attends to."""


def media_layout(batch: PackedBatch, *, num_latents: int, local: range, dtype: torch.dtype) -> MediaLayout:
    """Return the layout of a micro-batch; see the module's worked example.

    Args:
        num_latents: number of latents of an image.
        local: the tokens that this process holds.
    """
    device = batch.token_ids.device
    starts, documents = batch.image_starts, batch.image_documents
    following = torch.cat([starts[1:], torch.tensor([batch.num_tokens])])
    ends = torch.minimum(documents[:, 1], following) if len(starts) else starts
    runs = [torch.arange(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    with_image = torch.zeros(batch.num_tokens, dtype=dtype)
    for begin, end in documents.tolist():
        with_image[begin:end] = 1
    real = bool(runs)
    runs = runs or [torch.zeros(1, dtype=torch.int64)]
    lengths = torch.tensor([0, *(len(run) for run in runs)])
    rows = torch.cat(runs)
    looks = torch.full((len(rows), 1), float(real), dtype=dtype, device=device)
    return _layout_of(batch, rows, lengths, with_image, looks, num_latents=num_latents, local=local)


def _layout_of(
    batch: PackedBatch,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    with_image: torch.Tensor,
    looks: torch.Tensor,
    *,
    num_latents: int,
    local: range,
) -> MediaLayout:
    """Build a layout from tensors on the CPU (except `looks`).

    Args:
        lengths: [runs + 1]: 0, and the tokens of each run.
        with_image: [t]: 1 for tokens of documents with an image.
    """
    device = batch.token_ids.device
    return MediaLayout(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        rows=send(rows, device),
        runs=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=send(lengths.cumsum(0).int(), device),
            cu_seqlens_kv=send((num_latents * torch.arange(len(lengths))).int(), device),
            max_seqlen_q=int(lengths.max()),
            max_seqlen_kv=num_latents,
        ),
        looks=looks,
        in_media_document=send(with_image[local.start : local.stop, None, None], device),
    )


_CACHED = ("latent_key", "latent_value")
"""Tensors that generation caches for each sequence: keys and values [sequences, k, a, d] of its last image."""


def last_images(batch: PackedBatch, *, num_sequences: int) -> torch.Tensor:
    """Return the index of the last image of each of the first documents of a micro-batch, [num_sequences]; 0 if it has none."""
    found = torch.zeros(num_sequences, dtype=torch.int64)
    begins = batch.cu_seqlens[:num_sequences].tolist()
    for image, begin in enumerate(batch.image_documents[:, 0].tolist()):
        found[begins.index(begin)] = image
    return found


def continued_media_layout(batch: PackedBatch, step: CacheStep, *, num_latents: int, local: range, dtype: torch.dtype) -> MediaLayout:
    """Return the layout of new tokens of cached sequences: each attends to the last image of its sequence, whose keys and values are
    cached."""
    device = batch.token_ids.device
    runs = [(number, count) for number, count in enumerate(step.counts) if count and step.cache.images[number]]
    looks = torch.tensor(step.cache.images)[torch.arange(len(step.counts)).repeat_interleave(torch.tensor(step.counts))]
    rows = looks.nonzero().squeeze(1)
    with_image = F.pad(looks.to(dtype), (0, batch.num_tokens - len(looks)))
    lengths = torch.tensor([0, *(count for _, count in runs)])
    layout = _layout_of(
        batch, rows, lengths, with_image, torch.ones(len(rows), 1, dtype=dtype, device=device), num_latents=num_latents, local=local
    )
    return replace(layout, cache=step, images=send(torch.tensor([number for number, _ in runs], dtype=torch.int64), device))


class GatedCrossAttention(MegatronModule):
    """One gated block: hidden states [t, 1, h] and latents [m, 1, v] -> hidden states."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: PlainSubmodules,
        *,
        gated: GatedConfig,
        latent_size: int,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """
        Args:
            config: the decoder's configuration.
            latent_size: width of the latents.
        """
        own = _block_config(config, gated)
        super().__init__(config=own)
        self.tp_group = pg_collection.tp
        inner = gated.num_attention_heads * gated.head_dim
        self.head_dim = gated.head_dim
        self.layer_number = layer_number
        options = {"config": own, "init_method": own.init_method, "bias": False, "skip_bias_add": True, "is_expert": False}
        self.attention_norm = build_module(submodules.norm, config=own, hidden_size=own.hidden_size, eps=own.layernorm_epsilon)
        self.linear_q = build_module(submodules.column, own.hidden_size, inner, gather_output=False, **options)
        self.linear_kv = build_module(submodules.column, latent_size, 2 * inner, gather_output=False, **options)
        self.core_attention = build_module(
            submodules.core_attention,
            config=own,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.padding,
            attention_type="cross",
            pg_collection=pg_collection,
        )
        self.linear_out = build_module(submodules.row, inner, own.hidden_size, input_is_parallel=True, **options)
        self.ffn_norm = build_module(submodules.norm, config=own, hidden_size=own.hidden_size, eps=own.layernorm_epsilon)
        self.ffn = MLP(
            own,
            MLPSubmodules(linear_fc1=submodules.column, linear_fc2=submodules.row),
            ffn_hidden_size=own.ffn_hidden_size,
            tp_group=pg_collection.tp,
        )
        self.attention_gate = self._gate()
        self.ffn_gate = self._gate()

    def _gate(self) -> torch.nn.Parameter:
        gate = torch.nn.Parameter(torch.empty(1, dtype=self.config.params_dtype))
        gate.init_value = 0.0  # type: ignore[attr-defined]
        gate.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]  # each process sees its part of the tokens
        return gate

    def forward(self, hidden_t1h: torch.Tensor, latents_m1v: torch.Tensor, media: MediaLayout) -> torch.Tensor:
        """[t, 1, h] -> [t, 1, h]."""
        hidden_t1h = hidden_t1h + self.attention_gate.tanh() * self._attend(self.attention_norm(hidden_t1h), latents_m1v, media)
        assert media.in_media_document is not None
        ffn_t1h, _ = self.ffn(self.ffn_norm(hidden_t1h))
        return hidden_t1h + self.ffn_gate.tanh() * media.in_media_document * ffn_t1h

    def _attend(self, normed_t1h: torch.Tensor, latents_m1v: torch.Tensor, media: MediaLayout) -> torch.Tensor:
        assert media.rows is not None and media.runs is not None and media.looks is not None
        query_t1q, _ = self.linear_q(normed_t1h)
        key_mad, value_mad = self._keys_values(latents_m1v, media)
        attended_tq = torch.zeros_like(query_t1q).squeeze(1)
        if len(media.rows):
            query_rad = query_t1q.squeeze(1).index_select(0, media.rows).unflatten(-1, (-1, self.head_dim))
            attended_rq = self.core_attention(
                query_rad, key_mad, value_mad, None, attn_mask_type=AttnMaskType.padding, packed_seq_params=media.runs
            )
            attended_tq = attended_tq.index_copy(0, media.rows, attended_rq * media.looks)
        out_t1h, _ = self.linear_out(attended_tq.unsqueeze(1))
        return out_t1h

    def _keys_values(self, latents_m1v: torch.Tensor, media: MediaLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that the runs attend to, [m, a, d] each: computed from the latents, or cached."""
        cache = None if media.cache is None else media.cache.cache
        if cache is not None and cache.filled:
            assert media.images is not None
            key, value = (cache.kept(self.layer_number, name).index_select(0, media.images) for name in _CACHED)
            return key.flatten(0, 1), value.flatten(0, 1)
        seen_m1q, _ = self.linear_kv(latents_m1v)
        # Key and value of a head are adjacent, so that each process's part of the rows contains whole heads of both.
        seen = [part.contiguous() for part in seen_m1q.squeeze(1).unflatten(-1, (-1, 2, self.head_dim)).unbind(2)]
        if cache is not None:
            assert media.images is not None and media.runs is not None
            for name, part in zip(_CACHED, seen, strict=True):
                cache.keep(self.layer_number, name, part.unflatten(0, (-1, media.runs.max_seqlen_kv)).index_select(0, media.images))
        return seen[0], seen[1]


class GatedTransformerLayer(DecoderLayer):
    """A decoder layer with a gated block before it; the latents are passed as megatron-core's `context`."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        block: PlainSubmodules,
        gated: GatedConfig,
        latent_size: int,
        **layer: object,
    ) -> None:
        super().__init__(config, submodules, **layer)
        self.gated = GatedCrossAttention(
            config, block, gated=gated, latent_size=latent_size, layer_number=self.layer_number, pg_collection=self.pg_collection
        )

    def forward(
        self, hidden_states: torch.Tensor, *, context: torch.Tensor, packed_seq_params: MediaLayout, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([t, 1, h], latents [m, 1, v]) -> ([t, 1, h], latents [m, 1, v])."""
        hidden_states = self.gated(hidden_states, context, packed_seq_params)
        return super().forward(hidden_states, context=context, packed_seq_params=packed_seq_params, **kwargs)


def gated_layer_spec(layer: ModuleSpec, *, block: PlainSubmodules, gated: GatedConfig, latent_size: int) -> ModuleSpec:
    """Return the spec of a decoder layer with a gated block before it."""
    params = {**layer.params, "block": block, "gated": gated, "latent_size": latent_size}
    return ModuleSpec(module=GatedTransformerLayer, params=params, submodules=layer.submodules)


def _block_config(config: TransformerConfig, gated: GatedConfig) -> TransformerConfig:
    """Return the decoder's config with the block's own shapes. It is a copy, since a new object would derive its other fields again."""
    own = copy.copy(config)
    own.num_attention_heads = own.num_query_groups = gated.num_attention_heads
    own.kv_channels = gated.head_dim
    own.ffn_hidden_size = gated.ffn_multiplier * config.hidden_size
    own.gated_linear_unit = False
    own.activation_func = F.gelu
    own.bias_activation_fusion = False
    own.normalization = "LayerNorm"
    own.layernorm_epsilon = 1e-5
    return own

"""Feed-forward layers chosen by modality (Mono-InternVL, arXiv 2410.08202, section 3.1): a text network and a visual expert.

Each token goes through ONE of the two: tokens are gathered by modality, each network processes its own tokens, and the results are
scattered back to their places. (Computing both networks for every token and masking one, as the released code does, is twice the work.)

    tokens       <s> <img>  I   I   I  </img>  a   dog  </s>          I is <IMG_CONTEXT>; <img> and </img> are text
    text rows     0    1                 5     6    7    8
    visual rows             2   3   4

Every pipeline stage knows from the plan which tokens belong to images (`ModalityLayout`). This is passed along with the document bounds, so
that every layer of a micro-batch gets it, including recomputed layers.

Under tensor parallelism, both networks are split like that of a dense layer, with the same communication as one network: tokens are
gathered once, the rows of each network are known for the whole micro-batch, and the two partial results are summed over the group together.

Shape legend: t packed tokens of a micro-batch (all of them), l this process's part of them under sequence parallelism, h width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_mm.data.batch import PackedBatch
from megatron_mm.models.cache import Layout
from megatron_mm.models.inference import DecoderLayer
from megatron_mm.models.layers import Backend, decoder_layer_spec, plain_submodules
from megatron_mm.platform.device import send


@dataclass(frozen=True)
class Rows:
    """The rows of one modality's tokens in a micro-batch."""

    gather: torch.Tensor
    """Rows to compute, [at least count] int64: the tokens in order, then copies of row 0 if kernels need a multiple of some number."""
    count: int
    """Number of tokens; results of later rows are dropped."""

    @property
    def tokens(self) -> torch.Tensor:
        return self.gather[: self.count]


@dataclass
class ModalityLayout(Layout):
    """The rows of each modality's tokens, with the document bounds."""

    text: Rows | None = None
    visual: Rows | None = None


def modality_layout(batch: PackedBatch, *, tokens_per_image: int, multiple: int) -> ModalityLayout:
    """Return the layout of a micro-batch; see the module's worked example. Padding counts as text.

    Args:
        multiple: pad the tokens of each network to a multiple of this number, and if it is more than 1, to at least one multiple. With
            Transformer Engine it is the multiple that FP8 products need, otherwise 1.
    """
    visual = torch.zeros(batch.num_tokens, dtype=torch.bool)
    visual[(batch.image_starts[:, None] + torch.arange(tokens_per_image)).flatten()] = True
    text_rows, visual_rows = (rows_of(mask, multiple=multiple, device=batch.token_ids.device) for mask in (~visual, visual))
    return ModalityLayout(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        text=text_rows,
        visual=visual_rows,
    )


def rows_of(mask: torch.Tensor, *, multiple: int, device: torch.device) -> Rows:
    """Return the rows of the tokens that a mask [t] on the CPU selects, padded to a multiple of a number."""
    rows = mask.nonzero().squeeze(1)
    wanted = -(-max(len(rows), multiple if multiple > 1 else 0) // multiple) * multiple
    padded = torch.cat([rows, torch.zeros(wanted - len(rows), dtype=torch.int64)])
    return Rows(gather=send(padded, device), count=len(rows))


class _Scattered(torch.autograd.Function):
    """Two modalities' results [r, 1, h], each followed by its rows [r], in their places: [t, 1, h].

    Only the rows are kept for the backward pass. `Tensor.index_copy` also keeps the results, of which its gradient needs the shape alone.
    """

    @staticmethod
    def forward(ctx: Any, text: torch.Tensor, text_rows: torch.Tensor, visual: torch.Tensor, visual_rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(text_rows, visual_rows)
        out = text.new_empty(len(text) + len(visual), *text.shape[1:])
        return out.index_copy_(0, text_rows, text).index_copy_(0, visual_rows, visual)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        text_rows, visual_rows = ctx.saved_tensors
        return grads[0].index_select(0, text_rows), None, grads[0].index_select(0, visual_rows), None


class ModalityExperts(MegatronModule):
    """The two networks of a layer: [l, 1, h] -> [l, 1, h]."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        # With is_expert, megatron-core's linear layers leave all communication to the enclosing module, as needed here.
        options = {"is_expert": True, "ffn_hidden_size": config.ffn_hidden_size, "tp_group": tp_group}
        self.text = MLP(config, submodules, **options)
        self.visual = MLP(config, submodules, **options)
        for parameter in self.visual.parameters():
            parameter.init_like = (".visual.", ".text.")

    def forward(self, hidden_l1h: torch.Tensor, layout: ModalityLayout) -> torch.Tensor:
        """[l, 1, h] -> [l, 1, h]."""
        hidden_t1h = self._gather(hidden_l1h)
        results: list[torch.Tensor] = []
        for expert, rows in ((self.text, layout.text), (self.visual, layout.visual)):
            assert rows is not None
            out_r1h, _ = expert(hidden_t1h.index_select(0, rows.gather))
            results += [out_r1h[: rows.count], rows.tokens]
        return self._reduce(_Scattered.apply(*results))

    def _gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return all tokens; the backward pass sums their gradients over the group, in which each process has a part of both networks."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def _reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the parameters of both networks under their names, sharded like those of a dense MLP."""
        return {
            name: entry
            for part in ("text", "visual")
            for name, entry in getattr(self, part).sharded_state_dict(f"{prefix}{part}.", sharded_offsets, metadata).items()
        }


class ModalityTransformerLayer(DecoderLayer):
    """A decoder layer whose feed-forward network depends on a token's modality."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, experts: MLPSubmodules, **layer: object
    ) -> None:
        super().__init__(config, submodules, **layer)
        self.mlp = ModalityExperts(config, experts, tp_group=self.pg_collection.tp)

    def forward(
        self, hidden_states: torch.Tensor, *, packed_seq_params: ModalityLayout, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[l, 1, h] -> [l, 1, h], and megatron-core's context, unchanged."""
        hidden_states, context = self._forward_attention(hidden_states, packed_seq_params=packed_seq_params, **kwargs)
        return hidden_states + self.mlp(self.pre_mlp_layernorm(hidden_states), packed_seq_params), context


def modality_layer_spec(backend: Backend) -> ModuleSpec:
    """Return the spec of a decoder layer with text and visual experts, which the layer itself builds in place of its MLP."""
    layer, plain = decoder_layer_spec(backend, separate_norm=True), plain_submodules(backend)
    layer.submodules.mlp = IdentityOp
    params = {**layer.params, "experts": MLPSubmodules(linear_fc1=plain.column, linear_fc2=plain.row)}
    return ModuleSpec(module=ModalityTransformerLayer, params=params, submodules=layer.submodules)

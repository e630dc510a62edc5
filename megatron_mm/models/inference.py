"""Layers of the torch backend, with a faster path for generation.

A generation step multiplies every weight with only a few tokens. megatron-core's layers are made for training: each matrix product goes
through autograd functions that prepare gradients and tensor-parallel sums, every layer computes sines and cosines of rotary angles, and
modules are nested deeply. For a few tokens, this takes longer than the products themselves. While generating with a cache, these layers do
the same arithmetic directly, in the same order. Matrices that are split over processes, norms of queries, experts, and family-specific
parts use megatron-core's path, and so does training.

Shape legend: t tokens of a step's row, n query heads, g key/value heads, d head width, h width, f feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_mm.models.cache import CacheStep, cache_of

Out = tuple[torch.Tensor, torch.Tensor | None]
"""Return type of megatron-core's modules: an output, and a bias that the caller adds."""


class DecoderLayer(TransformerLayer):
    """megatron-core's layer: attention, then a feed-forward network, each after a norm and with a residual connection."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """[t, 1, h] -> [t, 1, h], and megatron-core's context, unchanged."""
        if not self._is_short(options) or type(self.mlp) is not MLP:
            return super().forward(*arguments, **options)
        hidden, context = self._forward_attention(*arguments, **options)
        return _added(hidden, _feed_forward(self.mlp, self.pre_mlp_layernorm(hidden))), context

    def _forward_attention(self, hidden_states: torch.Tensor, **options: Any) -> Out:
        """Run the first half of `forward`, which families' layers call, too."""
        if not self._is_short(options):
            found: Out = super()._forward_attention(hidden_states, **options)
            return found
        normed, step = self.input_layernorm(hidden_states), cache_of(options["packed_seq_params"])
        assert step is not None
        if not _rotates_plainly(self.self_attention, step):
            chosen = {name: options[name] for name in ("rotary_pos_emb", "packed_seq_params")}
            return _added(hidden_states, self.self_attention(normed, None, **chosen)), options.get("context")
        return _added(hidden_states, _attended(self.self_attention, normed, step)), options.get("context")

    def _is_short(self, options: dict[str, Any]) -> bool:
        return not self.training and not torch.is_grad_enabled() and cache_of(options.get("packed_seq_params")) is not None


def _added(hidden: torch.Tensor, found: Out) -> torch.Tensor:
    out, bias = found
    return hidden + (out if bias is None else out + bias)


def _product(layer: torch.nn.Module, input_: torch.Tensor) -> Out:
    """Return a linear layer's output, [..., in] -> [..., out], and its bias if the caller must add it."""
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear) or layer.tp_group.size() > 1:
        found: Out = layer(input_)
        return found
    out = torch.matmul(input_, layer.weight.t())
    if layer.bias is None or layer.skip_bias_add:
        return out, layer.bias
    return out + layer.bias, None


def _feed_forward(mlp: MLP, normed: torch.Tensor) -> Out:
    """[t, 1, h] -> [t, 1, h]."""
    config = mlp.config
    plain = not (config.use_te_activation_func or config.bias_activation_fusion or config.glu_linear_offset)
    if not (plain and config.gated_linear_unit) or config.activation_func_clamp_value is not None:
        found: Out = mlp(normed)
        return found
    both_t1f, bias = _product(mlp.linear_fc1, normed)
    gate, up = (both_t1f if bias is None else both_t1f + bias).chunk(2, dim=-1)
    return _product(mlp.linear_fc2, config.activation_func(gate) * up)


def _rotates_plainly(attention: SelfAttention, step: CacheStep) -> bool:
    """Return whether heads are rotated over their whole width, directly after the projection (without a norm)."""
    config = attention.config
    other = config.rotary_interleaved or config.no_rope_freq or config.attention_output_gate
    normed = attention.q_layernorm is not None or attention.k_layernorm is not None
    return not (other or normed) and step.rotary is not None and step.rotary[0].shape[-1] == attention.hidden_size_per_attention_head


def _attended(attention: SelfAttention, normed: torch.Tensor, step: CacheStep) -> Out:
    """[t, 1, h] -> [t, 1, h]."""
    mixed, bias = _product(attention.linear_qkv, normed)
    groups, width = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    # For each group: its queries, then its key and its value.
    mixed_tgxd = (mixed if bias is None else mixed + bias).view(len(mixed), groups, -1, width)
    rotated_tgxd = _rotated(mixed_tgxd[:, :, :-1], step)
    attended = step.attend(
        attention.layer_number,
        rotated_tgxd[:, :, :-1].reshape(len(mixed), -1, width),
        rotated_tgxd[:, :, -1],
        mixed_tgxd[:, :, -1],
        scale=attention.core_attention.scale,
    )
    return _product(attention.linear_proj, attended.unsqueeze(1))


def _rotated(x_tgxd: torch.Tensor, step: CacheStep) -> torch.Tensor:
    """Rotate queries and keys by their positions, as megatron-core does."""
    assert step.rotary is not None
    cos_t11d, sin_t11d = step.rotary
    first, second = x_tgxd.chunk(2, dim=-1)
    return x_tgxd * cos_t11d + torch.cat((-second, first), dim=-1) * sin_t11d

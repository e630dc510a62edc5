"""Layer specs: the modules of megatron-core's TransformerLayer for each of the two layer backends.

`te` is Transformer Engine (GPU, bf16 and FP8, norm and linear fused). `torch` is plain PyTorch and runs everywhere: norms that carry the
`sequence_parallel` mark (torch's own do not, and megatron-core refuses them under sequence parallelism) and scaled-dot-product attention
that keeps packed documents apart. Both use the same names in checkpoints, in which norms have tensors of their own.

Shape legend: s tokens, b sequences (1 when packed), h width, t packed tokens, n heads, d head width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_mm.models.cache import cache_of
from megatron_mm.models.inference import DecoderLayer
from megatron_mm.models.moe import Router
from megatron_mm.platform.engine import mlp_spec, te_experts

Backend = Literal["te", "torch"]


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm, by `config.normalization`, in float32 inside; [..., h] -> [..., h].

    Its parameters are marked `sequence_parallel`, so that megatron-core sums their gradients over the tensor-parallel
    group when each process normalises its own part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.bias is not None:
            return F.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class TorchDotProductAttention(torch.nn.Module):
    """Core attention by torch's scaled-dot-product attention; packed documents are attended to one by one.

    Going document by document costs a kernel launch each, and in return computes the sum of squared document lengths
    instead of the square of their sum, without a mask of that size.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: object,
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "the torch backend has no context parallelism"
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend; key and value may have fewer heads than the query (grouped queries).

        Args:
            query, key, value: packed [t, n, d], or [s, b, n, d].
            packed_seq_params: document boundaries of packed input; those of keys may differ from those of queries.

        Returns:
            Packed [t, n * d], or [s, b, n * d].
        """
        assert attention_bias is None, "the torch backend takes no attention bias"
        cached = cache_of(packed_seq_params)
        if cached is not None:
            return cached.attend(self.layer_number, query, key, value, scale=self.scale)
        causal = attn_mask_type is AttnMaskType.causal
        if packed_seq_params is None:
            attended_bnsd = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), causal=causal)
            return attended_bnsd.permute(2, 0, 1, 3).flatten(2)
        of_queries, of_keys = (bounds.diff().tolist() for bounds in (packed_seq_params.cu_seqlens_q, packed_seq_params.cu_seqlens_kv))
        documents = zip(query.split(of_queries), key.split(of_keys), value.split(of_keys), strict=True)
        attended = [self._attend(*(x.transpose(0, 1).unsqueeze(0) for x in document), causal=causal) for document in documents]
        return torch.cat(attended, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _attend(self, q_bnsd: torch.Tensor, k_bnsd: torch.Tensor, v_bnsd: torch.Tensor, *, causal: bool) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q_bnsd, k_bnsd, v_bnsd, is_causal=causal, scale=self.scale, enable_gqa=q_bnsd.shape[1] != k_bnsd.shape[1]
        )


_FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Transformer Engine keeps a norm inside the linear that follows it; checkpoints name it as the norm it is."""


def _torch_layer_spec(mask: AttnMaskType) -> ModuleSpec:
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=TorchDotProductAttention, linear_proj=RowParallelLinear
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=mlp_spec(MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


@functools.cache
def _te_attention() -> type:
    """Transformer Engine's core attention, which in generation attends to the cache as the torch backend does."""

    class CachedAttention(te_layers.TEDotProductAttention):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            cached = cache_of(options.get("packed_seq_params"))
            if cached is None:
                return super().forward(query, key, value, *arguments, **options)
            scale = self.softmax_scale if self.softmax_scale is not None else 1.0 / math.sqrt(self.config.kv_channels)
            return cached.attend(self.layer_number, query, key, value, scale=scale)

    return CachedAttention


def _te_layer_spec(mask: AttnMaskType) -> ModuleSpec:
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.params = {"attn_mask_type": mask}
    spec.submodules.self_attention.submodules.core_attention = _te_attention()
    spec.submodules.sharded_state_dict_keys_map = dict(_FUSED_NORM_NAMES)
    return spec


_LAYER_SPECS = {"te": _te_layer_spec, "torch": _torch_layer_spec}
_NORMS = {"te": te_layers.TENorm, "torch": TorchNorm}


def decoder_layer_spec(backend: Backend, *, experts: bool = False, separate_norm: bool = False) -> ModuleSpec:
    """A decoder layer: causal attention within each packed document, then the MLP that the config describes, or experts of it.

    Args:
        separate_norm: the norm before the MLP is a module of its own, as it is with experts: Transformer Engine else fuses it with the
            MLP's first matrix, and a router reads what that would have normalised.
    """
    spec = _decoder_layer_spec(backend)
    if backend == "te" and (experts or separate_norm):
        spec.submodules.pre_mlp_layernorm = te_layers.TENorm
        spec.submodules.sharded_state_dict_keys_map = {k: v for k, v in _FUSED_NORM_NAMES.items() if not k.startswith("mlp.")}
    if experts:
        mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        submodule = te_experts() if backend == "te" else ModuleSpec(module=SequentialMLP, submodules=mlp)
        spec.submodules.mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=submodule, router=Router))
    return spec


def _decoder_layer_spec(backend: Backend) -> ModuleSpec:
    # Packed sequences are causal inside each document; Transformer Engine calls that mask padding_causal and derives it
    # from cu_seqlens when it is given a causal mask and packed input.
    return _LAYER_SPECS[backend](AttnMaskType.causal)


def vision_layer_spec(backend: Backend) -> ModuleSpec:
    """A layer of an image tower: every patch attends to every patch of the same image.

    On Transformer Engine its linear layers add their biases inside the matrix products. megatron-core else adds them afterwards, to fuse
    that with what follows, which it cannot for a tower: three kernels more a layer, and three for the biases' gradients.
    """
    spec = _LAYER_SPECS[backend](AttnMaskType.no_mask)
    if backend == "te":
        row = _adding_its_bias(te_layers.TERowParallelLinear)
        spec.submodules.self_attention.submodules.linear_proj = row
        spec.submodules.mlp = mlp_spec(
            MLPSubmodules(linear_fc1=_adding_its_bias(te_layers.TELayerNormColumnParallelLinear), linear_fc2=row)
        )
    return spec


@functools.cache
def _adding_its_bias(linear: type) -> type:
    """One of megatron-core's linear layers of Transformer Engine that leaves no bias to others."""

    class AddingItsBias(linear):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "skip_bias_add": False})
            if self.tp_size == 1:  # else a bias is added once, to the sum over the tensor-parallel group
                self.gemm_bias_unfused_add = False

    return AddingItsBias


@dataclass(frozen=True)
class PlainSubmodules:
    """Single layers of a backend, for blocks that megatron-core has no spec of."""

    norm: type
    column: type
    """Linear layer whose output is cut over tensor parallelism."""
    row: type
    """Linear layer whose input is cut."""
    core_attention: type


_PLAIN_SUBMODULES = {
    "te": PlainSubmodules(
        te_layers.TENorm, te_layers.TEColumnParallelLinear, te_layers.TERowParallelLinear, te_layers.TEDotProductAttention
    ),
    "torch": PlainSubmodules(TorchNorm, ColumnParallelLinear, RowParallelLinear, TorchDotProductAttention),
}


def plain_submodules(backend: Backend) -> PlainSubmodules:
    """The backend's single layers."""
    return _PLAIN_SUBMODULES[backend]


def norm_module(backend: Backend) -> type:
    """The norm class for what stands outside a layer, such as the final norm."""
    return _NORMS[backend]

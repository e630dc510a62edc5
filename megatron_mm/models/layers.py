"""Layer specs: the modules of megatron-core's TransformerLayer for each of the two layer backends.

`te` is Transformer Engine (GPU, bf16 and FP8, norm and linear fused). `torch` is plain PyTorch and runs everywhere: norms that carry the
`sequence_parallel` mark (torch's own do not, and megatron-core refuses them under sequence parallelism) and scaled-dot-product attention
that keeps packed documents apart. Both use the same names in checkpoints, in which norms have tensors of their own.

Shape legend: s tokens, b sequences (1 when packed), h width, t packed tokens, n heads, d head width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
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
from megatron_mm.platform.device import has_flash_attention
from megatron_mm.platform.engine import mlp_spec, te_experts

Backend = Literal["te", "torch"]


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm, depending on `config.normalization`, computed in float32; [..., h] -> [..., h].

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
    """Core attention with torch's scaled-dot-product attention, which processes packed documents one by one.

    This needs a kernel launch per document. In return it computes the sum of squared document lengths instead of the square of their sum,
    and needs no mask of that size.
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
        """Compute attention; key and value may have fewer heads than the query (grouped queries).

        Args:
            query, key, value: packed [t, n, d], or [s, b, n, d].
            packed_seq_params: document bounds of packed input; they may differ between keys and queries.

        Returns:
            Packed [t, n * d], or [s, b, n * d].
        """
        assert attention_bias is None, "the torch backend does not support an attention bias"
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
"""Checkpoint names of norms that Transformer Engine keeps inside the linear layer after them."""


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


def attends_by_document() -> bool:
    """Whether PyTorch computes the attention over packed documents on the `te` backend: in deterministic runs.

    Transformer Engine has no fused deterministic kernel for packed documents on Blackwell and, if they are long, on Hopper, unless
    flash-attn is installed. It would store the weights of every token for every token instead.
    """
    return torch.are_deterministic_algorithms_enabled() and not has_flash_attention()


@functools.cache
def _te_attention() -> type:
    """Return Transformer Engine's core attention, extended to attend to the cache in generation as the torch backend does."""

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
    is_packed = mask is AttnMaskType.causal
    spec.submodules.self_attention.submodules.core_attention = (
        TorchDotProductAttention if is_packed and attends_by_document() else _te_attention()
    )
    spec.submodules.sharded_state_dict_keys_map = dict(_FUSED_NORM_NAMES)
    return spec


_LAYER_SPECS = {"te": _te_layer_spec, "torch": _torch_layer_spec}
_NORMS = {"te": te_layers.TENorm, "torch": TorchNorm}


def decoder_layer_spec(backend: Backend, *, experts: bool = False, separate_norm: bool = False) -> ModuleSpec:
    """Return the spec of a decoder layer: causal attention within each packed document, then an MLP or experts.

    Args:
        separate_norm: make the norm before the MLP a module of its own. This is always so with experts, since their router needs the
            normalised input; otherwise Transformer Engine fuses the norm with the MLP's first matrix.
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
    # Packed sequences are causal inside each document. Transformer Engine calls that mask padding_causal, and derives it from cu_seqlens
    # if it gets a causal mask and packed input.
    return _LAYER_SPECS[backend](AttnMaskType.causal)


def vision_layer_spec(backend: Backend) -> ModuleSpec:
    """Return the spec of an image tower's layer: every patch attends to every patch of the same image.

    With Transformer Engine, its linear layers add their biases inside the matrix products. By default megatron-core adds them later, to
    fuse the addition with the next operation. For a tower it cannot fuse them, which would take three more kernels per layer, and three for
    the gradients of the biases.
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
    """Return a subclass of one of megatron-core's Transformer Engine linear layers that adds its bias itself."""

    class AddingItsBias(linear):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "skip_bias_add": False})
            if self.tp_size == 1:  # otherwise the bias must be added once, to the sum over the tensor-parallel group
                self.gemm_bias_unfused_add = False

    return AddingItsBias


@dataclass(frozen=True)
class PlainSubmodules:
    """Single layers of a backend, for blocks that have no spec in megatron-core."""

    norm: type
    column: type
    """Linear layer whose output is split over tensor parallelism."""
    row: type
    """Linear layer whose input is split over tensor parallelism."""
    core_attention: type


_PLAIN_SUBMODULES = {
    "te": PlainSubmodules(
        te_layers.TENorm, te_layers.TEColumnParallelLinear, te_layers.TERowParallelLinear, te_layers.TEDotProductAttention
    ),
    "torch": PlainSubmodules(TorchNorm, ColumnParallelLinear, RowParallelLinear, TorchDotProductAttention),
}


def plain_submodules(backend: Backend) -> PlainSubmodules:
    """Return the backend's single layers."""
    plain = _PLAIN_SUBMODULES[backend]
    return replace(plain, core_attention=TorchDotProductAttention) if attends_by_document() else plain


def norm_module(backend: Backend) -> type:
    """Return the class of norms outside layers, such as the final norm."""
    return _NORMS[backend]

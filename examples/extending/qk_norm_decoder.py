"""A decoder variant that is not in the package: norms of the queries and keys of each head, as in Qwen3 (arXiv 2505.09388).

megatron-mm train examples/extending/qk_norm_decoder.py:debug_qk_norm --run-dir runs/qk_norm --data.path data/demo
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.hf.decoder_variants import DecoderVariant, register_decoder_variant
from megatron_mm.hf.mapping import Direct, Entry
from megatron_mm.models.layers import Backend, norm_module


def with_qk_norm(llama: TransformerConfig) -> TransformerConfig:
    """megatron-core then sums the norms' gradients over a tensor-parallel group."""
    return replace(llama, qk_layernorm=True)


def qk_norm_layer(layer: ModuleSpec, backend: Backend) -> ModuleSpec:
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = norm_module(backend)
    return layer


def qk_norm_entries(ours: str, theirs: str) -> list[Entry]:
    return [Direct(f"{ours}.self_attention.{x}_layernorm.weight", f"{theirs}.self_attn.{x}_norm.weight") for x in "qk"]


QK_NORM = DecoderVariant(
    transformer_config=with_qk_norm,
    layer_spec=qk_norm_layer,
    entries=qk_norm_entries,
    settings={"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
)
register_decoder_variant("qk_norm", QK_NORM)


def debug_qk_norm() -> Experiment:
    """`debug_mm1` with norms of queries and keys."""
    base = get_recipe("debug_mm1")
    model = replace(base.model, decoder=replace(base.model.decoder, variant="qk_norm"))
    return replace(base, recipe="debug_qk_norm", model=model)

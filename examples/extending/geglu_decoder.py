"""A decoder variant that is not in the package: GELU instead of SiLU in the gated feed-forward (GEGLU, arXiv 2002.05202).

megatron-mm train examples/extending/geglu_decoder.py:debug_geglu --run-dir runs/geglu --data.path data/demo
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.hf.decoder_variants import DecoderVariant, register_decoder_variant


def with_gelu(llama: TransformerConfig) -> TransformerConfig:
    """megatron-core's own fused kernel is for SiLU."""
    return replace(llama, activation_func=F.gelu, bias_activation_fusion=False)


register_decoder_variant("geglu", DecoderVariant(transformer_config=with_gelu, settings={"hidden_act": "gelu"}))


def debug_geglu() -> Experiment:
    """`debug_mm1` with a GEGLU decoder."""
    base = get_recipe("debug_mm1")
    model = replace(base.model, decoder=replace(base.model.decoder, variant="geglu"))
    return replace(base, recipe="debug_geglu", model=model)

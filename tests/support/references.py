"""Plain PyTorch reference models of our configurations, with random weights."""

from __future__ import annotations

import torch

from megatron_mm.config import EvaConfig
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from support.infimm_reference import InfiMMReference, InfiMMSizes, TowerSizes
from support.mono_reference import MonoReference, MonoSizes
from support.random_weights import randomize
from support.small_infimm import IMAGE_ID
from support.small_mono import CONTEXT_ID


def tower_sizes(vision: EvaConfig) -> TowerSizes:
    return TowerSizes(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.num_layers,
        heads=vision.num_attention_heads,
        ffn=vision.ffn_hidden_size,
        output=vision.output_size,
        eva02=vision.swiglu,
        post_norm=vision.block == "post_norm",
        rotary_grid=vision.rotary_grid or 0,
    )


def infimm_reference(config: InfiMMConfig, *, image_token: int = IMAGE_ID) -> InfiMMReference:
    """Return the reference model of a configuration: every weight random, gates at about 0.6."""
    decoder = config.decoder
    reference = InfiMMReference(
        InfiMMSizes(
            tower=tower_sizes(config.vision),
            vocab=decoder.vocab_size,
            width=decoder.hidden_size,
            ffn=decoder.ffn_hidden_size,
            layers=decoder.num_layers,
            heads=decoder.num_attention_heads,
            kv_heads=decoder.num_query_groups,
            every=config.gated.every_n_layers,
            rope_theta=decoder.rotary_base,
            image_token=image_token,
            latents=config.resampler.num_latents,
            resampler_layers=config.resampler.num_layers,
            cross_heads=config.gated.num_attention_heads,
            cross_head_dim=config.gated.head_dim,
        )
    )
    randomize(reference)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("_gate"):
                parameter.add_(0.6)
    return reference


def mono_reference(config: MonoInternVLConfig, *, image_token: int = CONTEXT_ID) -> MonoReference:
    """Return the reference model of a configuration, every weight random."""
    decoder, patches = config.decoder, config.patches
    sizes = MonoSizes(
        image_size=patches.image_size,
        patch_size=patches.patch_size,
        patch_width=patches.hidden_size,
        vocab=decoder.vocab_size,
        width=decoder.hidden_size,
        ffn=decoder.ffn_hidden_size,
        layers=decoder.num_layers,
        heads=decoder.num_attention_heads,
        kv_heads=decoder.num_query_groups,
        rope_theta=decoder.rotary_base,
        image_token=image_token,
    )
    reference = MonoReference(sizes)
    randomize(reference)
    return reference

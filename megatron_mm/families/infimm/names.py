"""InfiMM's table: our tensor names <-> those of the authors' released checkpoints.

model.vision_encoder    EVA-CLIP
model.perceiver         the resampler
model.lang_encoder      Llama or Mistral; each layer is stored together with the gated block before it
"""

from __future__ import annotations

import torch

from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.infimm.files import infimm_settings
from megatron_mm.hf.decoders import llama_table
from megatron_mm.hf.formats import EVA_ROTARY, ROTARY, AnyFormat, Format
from megatron_mm.hf.mapping import Direct, Entry, StackedKV, both, expand
from megatron_mm.hf.towers import eva_table
from megatron_mm.models.eva import rotary_angles


def infimm_table(config: InfiMMConfig, *, vocab_rows: int | None = None) -> list[Entry]:
    """Return the mapping of every parameter of an InfiMM.

    Args:
        vocab_rows: number of vocabulary rows to write; None writes all.
    """
    language = "model.lang_encoder."
    return [
        *eva_table(config.vision, prefix="model.vision_encoder."),
        *_resampler_table(config),
        *llama_table(
            config.decoder,
            body=f"{language}model.",
            head=f"{language}lm_head.weight",
            inner=".decoder_layer",
            vocab_rows=vocab_rows,
        ),
        *[entry for layer in config.gated.layers(config.decoder.num_layers) for entry in _gated_table(config, layer)],
    ]


def infimm_constants(config: InfiMMConfig) -> dict[str, torch.Tensor]:
    """Return tensors of released checkpoints that are not weights: the tower's rotary cosines and sines [patches, head_dim], once for the
    tower and once more for each block. The authors' code expects them in a checkpoint."""
    angles = rotary_angles(config.vision)
    if angles is None:
        return {}
    by_channel = angles[1:].float().repeat_interleave(2, dim=1)  # without the class token; both channels of a pair
    values = {"freqs_cos": by_channel.cos(), "freqs_sin": by_channel.sin()}
    places = ["", *(f"blocks.{layer}.attn." for layer in range(config.vision.num_layers))]
    return {f"model.vision_encoder.{place}rope.{name}": value for place in places for name, value in values.items()}


def _resampler_table(config: InfiMMConfig) -> list[Entry]:
    ours, theirs = "resampler.layers.{layer}", "model.perceiver.layers.{layer}"
    layer = [
        *both(f"{ours}.feature_norm", f"{theirs}.0.norm_media"),
        *both(f"{ours}.latent_norm", f"{theirs}.0.norm_latents"),
        Direct(f"{ours}.query.weight", f"{theirs}.0.to_q.weight"),
        Direct(f"{ours}.key_value.weight", f"{theirs}.0.to_kv.weight"),
        Direct(f"{ours}.output.weight", f"{theirs}.0.to_out.weight"),
        *both(f"{ours}.ffn_norm", f"{theirs}.1.0"),
        Direct(f"{ours}.ffn_hidden.weight", f"{theirs}.1.1.weight"),
        Direct(f"{ours}.ffn_output.weight", f"{theirs}.1.3.weight"),
    ]
    return [
        Direct("resampler.latents", "model.perceiver.latents"),
        *expand(layer, placeholder="layer", count=config.resampler.num_layers),
        *both("resampler.norm", "model.perceiver.norm"),
    ]


def _gated_table(config: InfiMMConfig, number: int) -> list[Entry]:
    ours = f"language.decoder.layers.{number}.gated"
    theirs = f"model.lang_encoder.model.layers.{number}.gated_cross_attn_layer"
    heads = {"num_heads": config.gated.num_attention_heads, "head_dim": config.gated.head_dim}
    return [
        Direct(f"{ours}.attention_gate", f"{theirs}.attn_gate"),
        Direct(f"{ours}.ffn_gate", f"{theirs}.ff_gate"),
        *both(f"{ours}.attention_norm", f"{theirs}.attn.norm"),
        Direct(f"{ours}.linear_q.weight", f"{theirs}.attn.to_q.weight"),
        StackedKV(f"{ours}.linear_kv.weight", f"{theirs}.attn.to_kv.weight", **heads),
        Direct(f"{ours}.linear_out.weight", f"{theirs}.attn.to_out.weight"),
        *both(f"{ours}.ffn_norm", f"{theirs}.ff.0"),
        Direct(f"{ours}.ffn.linear_fc1.weight", f"{theirs}.ff.1.weight"),
        Direct(f"{ours}.ffn.linear_fc2.weight", f"{theirs}.ff.3.weight"),
    ]


FORMATS: dict[str, AnyFormat] = {
    "infimm": Format(
        part="whole",
        signature="model.perceiver.latents",
        prefixes={"": (EVA_ROTARY, ROTARY, r"model\.lang_encoder\.(old_decoder_blocks|gated_cross_attn_layers)\..*")},
        config=InfiMMConfig,
        table=lambda model, naming: infimm_table(model),
        settings=infimm_settings,
        model_types=("infimm", "infimm-zephyr"),
    )
}
"""Formats of whole InfiMM models. The ignored prefixes are second copies of layers in the authors' modules, and rotary tables."""

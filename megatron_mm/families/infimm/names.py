"""InfiMM's table: our tensor names <-> those of the authors' released checkpoints.

model.vision_encoder    EVA-CLIP
model.perceiver         the resampler
model.lang_encoder      Llama or Mistral, each layer beside the gated block that stands before it
"""

from __future__ import annotations

import torch

from megatron_mm.config import EvaConfig
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.hf.decoders import llama_table
from megatron_mm.hf.mapping import QKV, Direct, Entry, Positions, StackedKV, Wrapped, both, expand
from megatron_mm.models.eva import rotary_angles


def infimm_table(config: InfiMMConfig, *, vocab_rows: int | None = None) -> list[Entry]:
    """Every parameter of an InfiMM.

    Args:
        vocab_rows: rows of the vocabulary that are written; None writes all.
    """
    language = "model.lang_encoder."
    names = {"body": f"{language}model.", "head": f"{language}lm_head.weight", "inner": ".decoder_layer"}
    return [
        *eva_table(config.vision, prefix="model.vision_encoder."),
        *_resampler_table(config),
        *llama_table(config.decoder, **names, vocab_rows=vocab_rows),  # type: ignore[arg-type]
        *[entry for layer in config.gated.layers(config.decoder.num_layers) for entry in _gated_table(config, layer)],
    ]


def infimm_constants(config: InfiMMConfig) -> dict[str, torch.Tensor]:
    """Tensors of released checkpoints that are no weights: the tower's rotary cosines and sines [patches, head_dim], once for the tower and
    once more for each block. Their authors' code expects to find them."""
    angles = rotary_angles(config.vision)
    if angles is None:
        return {}
    by_channel = angles[1:].float().repeat_interleave(2, dim=1)  # without the class token; both channels of a pair
    values = {"freqs_cos": by_channel.cos(), "freqs_sin": by_channel.sin()}
    places = ["", *(f"blocks.{layer}.attn." for layer in range(config.vision.num_layers))]
    return {f"model.vision_encoder.{place}rope.{name}": value for place in places for name, value in values.items()}


def eva_table(config: EvaConfig, *, prefix: str = "") -> list[Entry]:
    """A tower as EVA-CLIP names it: EVA02-L's kind, or EVA01-g's and EVA02-bigE's.

    Args:
        prefix: of their names.
    """
    ours, theirs = "vision.layers.{layer}", f"{prefix}blocks.{{layer}}"
    names = {x: f"{theirs}.attn.{x}_proj.weight" for x in "qkv"}
    eva02 = [
        # Three projections are the rows of one: a QKV of a single head as wide as the tower.
        QKV(
            f"{ours}.attention.qkv.weight",
            q=names["q"],
            k=names["k"],
            v=names["v"],
            num_heads=1,
            num_groups=1,
            head_dim=config.hidden_size,
        ),
        *both(f"{ours}.attention.inner_norm", f"{theirs}.attn.inner_attn_ln"),
        *both(f"{ours}.mlp.gate", f"{theirs}.mlp.w1"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp.w2"),
        *both(f"{ours}.mlp.inner_norm", f"{theirs}.mlp.ffn_ln"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp.w3"),
    ]
    eva01 = [
        Direct(f"{ours}.attention.qkv.weight", f"{theirs}.attn.qkv.weight"),
        *both(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
        *both(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
    ]
    layer = [
        *both(f"{ours}.attention_norm", f"{theirs}.norm1"),
        Direct(f"{ours}.attention.q_bias", f"{theirs}.attn.q_bias"),
        Direct(f"{ours}.attention.v_bias", f"{theirs}.attn.v_bias"),
        *both(f"{ours}.attention.output", f"{theirs}.attn.proj"),
        *both(f"{ours}.mlp_norm", f"{theirs}.norm2"),
        *(eva02 if config.swiglu else eva01),
    ]
    return [
        Wrapped("vision.class_embedding", f"{prefix}cls_token", axes=2),
        Positions("vision.position_embedding", f"{prefix}pos_embed", num_patches=config.grid_size**2, axes=1),
        *both("vision.patch_embedding", f"{prefix}patch_embed.proj"),
        *expand(layer, placeholder="layer", count=config.num_layers),
        *both("vision.norm", f"{prefix}norm"),
        *both("vision.head", f"{prefix}head"),
    ]


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

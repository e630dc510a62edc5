"""FLOPs of a training step of InfiMM."""

from __future__ import annotations

from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.flops import (
    FlopCount,
    StepWork,
    Trainable,
    count_attention,
    count_embedding,
    count_eva,
    count_mlp,
    count_output,
    count_resampler,
)


def infimm_flops(model: InfiMMConfig, trainable: Trainable, work: StepWork) -> float:
    """Return the FLOPs of tower, resampler, and decoder with its gated blocks. In a frozen decoder, gradients flow back only to the first
    trainable gated block."""
    latents = FlopCount(trainable)
    count_eva(latents, model.vision, num_images=work.num_images)
    count_resampler(
        latents,
        model.resampler,
        width=model.vision.hidden_size,
        num_features=model.vision.num_tokens,
        num_images=work.num_images,
    )
    count = FlopCount(trainable)
    count.flops += latents.flops
    count_embedding(count)
    for layer in range(model.decoder.num_layers):
        if layer in model.gated.layers(model.decoder.num_layers):
            _count_gated(count, model, layer, work, latents_have_gradient=latents.has_gradient)
        count_attention(count, model.decoder, layer, work)
        count_mlp(count, model.decoder, layer, work)
    count_output(count, model.decoder, work)
    return count.flops


def _count_gated(count: FlopCount, model: InfiMMConfig, layer: int, work: StepWork, *, latents_have_gradient: bool) -> None:
    """Count a gated block. Every token is counted as attending to an image. If some do not, this overstates the block's attention, which is
    under a thousandth of its work."""
    name, gated, width = f"language.decoder.layers.{layer}.gated", model.gated, model.decoder.hidden_size
    inner, product = gated.num_attention_heads * gated.head_dim, 2.0 * width * work.num_tokens
    latents = count.branch()
    latents.has_gradient = latents_have_gradient
    latents.weight(f"{name}.linear_kv.weight", 2.0 * work.num_images * model.resampler.num_latents * model.vision.hidden_size * 2 * inner)
    count.weight(f"{name}.attention_norm.weight")
    count.weight(f"{name}.linear_q.weight", product * inner)
    count.join(latents)
    count.activations(2.0 * work.num_tokens * 2 * model.resampler.num_latents * inner)
    count.weight(f"{name}.linear_out.weight", product * inner)
    count.weight(f"{name}.ffn.linear_fc1.weight", product * gated.ffn_multiplier * width)
    count.weight(f"{name}.ffn.linear_fc2.weight", product * gated.ffn_multiplier * width)

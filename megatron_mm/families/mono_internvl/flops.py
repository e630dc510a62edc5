"""FLOPs of a training step of Mono-InternVL."""

from __future__ import annotations

from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.flops import FlopCount, StepWork, Trainable, count_attention, count_embedding, count_output


def mono_internvl_flops(model: MonoInternVLConfig, trainable: Trainable, work: StepWork) -> float:
    """Return the FLOPs of patch embedding, projector and decoder. A token goes through one feed-forward network, for text or for images."""
    patches, decoder = model.patches, model.decoder
    visual = work.num_images * patches.num_tokens
    count = FlopCount(trainable)
    pixels = 3 * patches.patch_size**2
    count.weight("patches.projection.weight", 2.0 * work.num_images * patches.grid_size**2 * pixels * patches.hidden_size)
    count.weight("projector.hidden.weight", 2.0 * visual * patches.unshuffle**2 * patches.hidden_size * decoder.hidden_size)
    count.weight("projector.output.weight", 2.0 * visual * decoder.hidden_size**2)
    count_embedding(count)
    for layer in range(decoder.num_layers):
        count_attention(count, decoder, layer, work)
        for expert, tokens in (("text", work.num_tokens - visual), ("visual", visual)):
            name, product = f"language.decoder.layers.{layer}.mlp.{expert}", 2.0 * decoder.hidden_size * decoder.ffn_hidden_size * tokens
            count.weight(f"{name}.linear_fc1.weight", 2 * product)
            count.weight(f"{name}.linear_fc2.weight", product)
    count_output(count, decoder, work)
    return count.flops

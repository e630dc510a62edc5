"""Tokens, FLOPs and MFU: the one definition, for the trainer and for planning.

A multiplication and an addition are two FLOPs; the backward pass costs twice the forward: one product for the gradient of the input, one
for that of the weights. Frozen weights have no gradient, and what lies before everything that learns has none at all. Attention is
counted over the documents' own lengths, and causal attention half. The image encoder counts. Recomputation, norms, activations, the
embedding look-up and padding tokens do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.config import ConnectorConfig, DecoderConfig, EvaConfig, Precision, VisionConfig
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig

FORWARD_AND_BACKWARD = 3
FORWARD_AND_INPUT_GRADIENT = 2


@dataclass(frozen=True)
class StepWork:
    """What a training step works on, over all processes; padding not counted."""

    num_tokens: int
    """Tokens of the decoder's sequence."""
    sum_squared_lengths: int
    """Sum over documents of their squared length in tokens."""
    num_images: int


PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H100": {"bf16": 989, "fp8": 1979, "fp32": 67},
    "H200": {"bf16": 989, "fp8": 1979, "fp32": 67},
    "A100": {"bf16": 312, "fp32": 19.5},
}
"""Dense peaks of one device (NVIDIA's data sheets, SXM), by a part of the device's name."""


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """Peak of a device in TFLOP/s; None for one that the table does not know (a CPU, say)."""
    for name, peaks in PEAK_TFLOPS.items():
        if name in device_name:
            return peaks.get(precision)
    return None


def mfu(tflops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation of one device, between 0 and 1; None where the peak is unknown."""
    return tflops / peak if peak else None


def decoder_matmul_parameters(decoder: DecoderConfig) -> int:
    """Weights that a token is multiplied with, the output layer included, tied or not; in a sparse layer the router and top-k experts."""
    width = decoder.hidden_size
    query, key_value = decoder.num_attention_heads * decoder.head_dim, decoder.num_query_groups * decoder.head_dim
    attention, mlp = width * (query + 2 * key_value) + query * width, 3 * width * decoder.ffn_hidden_size
    total = decoder.num_layers * (attention + mlp) + width * decoder.vocab_size
    if decoder.moe is not None:
        total += len(decoder.sparse_layers) * ((decoder.moe.top_k - 1) * mlp + width * decoder.moe.num_experts)
    return total


def decoder_flops(decoder: DecoderConfig, *, num_tokens: int, sum_squared_lengths: int) -> float:
    """FLOPs of training the decoder on a batch.

    Args:
        num_tokens: tokens that are not padding.
        sum_squared_lengths: sum over documents of their squared length in tokens.
    """
    matmuls = 2 * decoder_matmul_parameters(decoder) * num_tokens
    # Scores and values: two products of 2 * length^2 * heads * head_dim, half of which causality leaves.
    attention = 2 * decoder.num_layers * decoder.num_attention_heads * decoder.head_dim * sum_squared_lengths
    return FORWARD_AND_BACKWARD * float(matmuls + attention)


def vision_flops(vision: VisionConfig) -> float:
    """FLOPs of training the image tower on one image."""
    tokens, width = vision.num_patches + 1, vision.hidden_size
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * width
    layer = 2 * tokens * (4 * width**2 + 2 * width * vision.ffn_hidden_size) + 4 * tokens**2 * width
    return FORWARD_AND_BACKWARD * float(patches + vision.num_layers * layer)


def connector_flops(connector: ConnectorConfig, vision: VisionConfig, *, output_size: int) -> float:
    """FLOPs of training the connector on one image; depthwise convolutions and squeeze-excitation are left out (under 1%)."""
    width, inner, patches, tokens = vision.hidden_size, connector.hidden_size, vision.num_patches, connector.num_tokens
    if connector.kind == "average":
        forward = tokens * width * output_size
    elif connector.kind == "attention":
        forward = patches * width * 2 * inner + 2 * tokens * patches * inner + 2 * tokens * inner * inner + tokens * inner * output_size
    else:
        before = patches * (2 * width * inner + inner * inner) + (connector.depth - 1) * patches * 2 * inner * inner
        after = connector.depth * tokens * 2 * inner * inner + tokens * (inner * output_size + output_size * output_size)
        forward = before + after
    return FORWARD_AND_BACKWARD * 2.0 * forward


def mm1_step_flops(model: MM1Config, policy: str, work: StepWork) -> float:
    """FLOPs of one training step of MM1: decoder, image tower and connector, forward and backward."""
    image = vision_flops(model.vision) + connector_flops(model.connector, model.vision, output_size=model.decoder.hidden_size)
    return decoder_flops(model.decoder, num_tokens=work.num_tokens, sum_squared_lengths=work.sum_squared_lengths) + work.num_images * image


def infimm_step_flops(model: InfiMMConfig, policy: str, work: StepWork) -> float:
    """FLOPs of one training step of InfiMM: tower forward; resampler and gated blocks forward and backward; the decoder as the policy says.

    A frozen decoder passes gradients on, down to the first gated block. Every token is counted as looking at an image, which overstates
    the blocks' attention (under a thousandth of their work) where some do not.
    """
    decoder, gated = model.decoder, model.gated
    gated_layers = gated.layers(decoder.num_layers)
    if policy == "ift":
        language = decoder_flops(decoder, num_tokens=work.num_tokens, sum_squared_lengths=work.sum_squared_lengths)
    else:
        language = _frozen_decoder_flops(decoder, work, first_learning=gated_layers[0])
    inner, width, latents = gated.num_attention_heads * gated.head_dim, decoder.hidden_size, model.resampler.num_latents
    of_token = 2 * width * inner + 2 * gated.ffn_multiplier * width**2 + 2 * latents * inner
    of_image = latents * model.vision.hidden_size * 2 * inner
    blocks = len(gated_layers) * FORWARD_AND_BACKWARD * 2.0 * (of_token * work.num_tokens + of_image * work.num_images)
    return language + blocks + work.num_images * (eva_forward_flops(model.vision) + resampler_flops(model))


def _frozen_decoder_flops(decoder: DecoderConfig, work: StepWork, *, first_learning: int) -> float:
    """Forward everywhere; gradients of inputs from the output layer down to the layer `first_learning`."""
    output = decoder.hidden_size * decoder.vocab_size
    layer = (decoder_matmul_parameters(decoder) - output) / decoder.num_layers
    passed = decoder.num_layers - first_learning
    matmuls = 2 * work.num_tokens * (layer * (decoder.num_layers + passed) + FORWARD_AND_INPUT_GRADIENT * output)
    attention = 2 * decoder.num_attention_heads * decoder.head_dim * work.sum_squared_lengths
    return float(matmuls + attention * (decoder.num_layers + (FORWARD_AND_BACKWARD - 1) * passed))


def eva_forward_flops(vision: EvaConfig) -> float:
    """FLOPs of the EVA tower's forward pass on one image."""
    tokens, width = vision.num_tokens, vision.hidden_size
    patches = 2 * (tokens - 1) * 3 * vision.patch_size**2 * width
    mlp = (3 if vision.swiglu else 2) * width * vision.ffn_hidden_size
    layer = 2 * tokens * (4 * width**2 + mlp) + 4 * tokens**2 * width
    return float(patches + vision.num_layers * layer)


def resampler_flops(model: InfiMMConfig) -> float:
    """FLOPs of training the Perceiver resampler on one image."""
    config, width = model.resampler, model.vision.hidden_size
    inner, latents, seen = config.num_attention_heads * config.head_dim, config.num_latents, model.vision.num_tokens + config.num_latents
    layer = (
        latents * 2 * width * inner + seen * 2 * width * inner + 2 * latents * seen * inner + latents * 2 * config.ffn_multiplier * width**2
    )
    return FORWARD_AND_BACKWARD * 2.0 * config.num_layers * layer


def mono_internvl_step_flops(model: MonoInternVLConfig, policy: str, work: StepWork) -> float:
    """FLOPs of one training step of Mono-InternVL; a token goes through one feed-forward network, so forward the decoder is a dense one.

    Until the last stage (s2) text's networks and the output layer are frozen, in the first two attention is too. Gradients pass all layers
    all the same, as the patches in front of them learn.
    """
    decoder, patches = model.decoder, model.patches
    width, visual = decoder.hidden_size, work.num_images * patches.num_tokens
    frozen = 0  # products of a token with a weight that has no gradient
    if policy != "s2":
        mlp = 3 * width * decoder.ffn_hidden_size
        frozen += decoder.num_layers * mlp * (work.num_tokens - visual) + width * decoder.vocab_size * work.num_tokens
    if policy in ("s1_1", "s1_2"):
        inner, groups = decoder.num_attention_heads * decoder.head_dim, 2 * decoder.num_query_groups * decoder.head_dim
        frozen += decoder.num_layers * (width * (inner + groups) + inner * width) * work.num_tokens
    language = decoder_flops(decoder, num_tokens=work.num_tokens, sum_squared_lengths=work.sum_squared_lengths) - 2.0 * frozen
    squares = patches.unshuffle**2 * patches.hidden_size
    of_image = patches.grid_size**2 * 3 * patches.patch_size**2 * patches.hidden_size + patches.num_tokens * (squares * width + width**2)
    return language + FORWARD_AND_BACKWARD * 2.0 * of_image * work.num_images

"""Definitions of tokens, FLOPs and MFU, used by both the trainer and the planner.

A multiplication and an addition are two FLOPs. In a training step, each matrix product of the forward pass is counted once, and

    once more   for the gradient of the weight, if the weight is trainable
    once more   for the gradient of the input, if any weight before it is trainable

so three times if everything is trainable, and once if nothing up to that point is trainable. A product of activations (attention's scores
and values) has two inputs, so it is counted once or three times. Whether a weight is trainable is looked up by its name, so this code need
not change for a new freeze policy. Attention is counted over the lengths of the documents, and causal attention as half. The image encoder
is included. Recomputation, norms, activations, the embedding look-up and padding tokens are not.

This module covers the blocks that families share; connectors (`models.connectors`) and families (`Family.flops`) define their own counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mm.config import DecoderConfig, EvaConfig, Precision, ResamplerConfig, VisionConfig

Trainable = Callable[[str], bool]
"""Predicate: whether the parameter with a global name is trainable (`Family.trainable`)."""


@dataclass(frozen=True)
class StepWork:
    """Amount of data that a training step processes, over all processes and excluding padding."""

    num_tokens: int
    """Tokens of the decoder's sequences."""
    sum_squared_lengths: int
    """Sum over documents of their squared length in tokens."""
    num_images: int


class FlopCount:
    """Adds up the training FLOPs of a chain of matrix products, in the order of the forward pass.

    Worked example: a frozen product, a trainable one and a frozen one, of 10 FLOPs each, cost 10 + 30 + 20.
    """

    def __init__(self, trainable: Trainable = lambda name: True) -> None:
        self.trainable = trainable
        self.flops = 0.0
        self.has_gradient = False
        """True if a weight counted so far is trainable, so gradients flow back to here."""

    def weight(self, name: str, forward: float = 0.0) -> None:
        """Count a product with a weight.

        Args:
            name: the weight's global name.
            forward: FLOPs of the forward pass; 0 for a parameter that is not counted itself, such as an embedding table or a norm.
        """
        if self.trainable(name):
            # The first product of a tower is counted like the others, although pixels need no gradient: it is about 0.1% of the tower.
            self.flops += 3 * forward
            self.has_gradient = True
        else:
            self.flops += (2 if self.has_gradient else 1) * forward

    def activations(self, forward: float) -> None:
        """Count a product of activations."""
        self.flops += (3 if self.has_gradient else 1) * forward

    def join(self, other: FlopCount) -> None:
        """Add another chain whose result is an input of this one at this point."""
        self.flops += other.flops
        self.has_gradient = self.has_gradient or other.has_gradient

    def branch(self) -> FlopCount:
        """Return an empty chain with the same trainable weights."""
        return FlopCount(self.trainable)


PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "H100": {"bf16": 989, "fp8": 1979, "fp32": 67},
    "H200": {"bf16": 989, "fp8": 1979, "fp32": 67},
    "A100": {"bf16": 312, "fp32": 19.5},
}
"""Peak TFLOP/s of one device without sparsity (NVIDIA's data sheets, SXM), by a part of the device's name."""


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """Return the peak of a device in TFLOP/s, or None if the table does not list it (such as a CPU)."""
    for name, peaks in PEAK_TFLOPS.items():
        if name in device_name:
            return peaks.get(precision)
    return None


def mfu(tflops: float, peak: float | None) -> float | None:
    """Return the model FLOPs utilisation of one device, between 0 and 1, or None if the peak is unknown."""
    return tflops / peak if peak else None


# ------------------------------------------------------------------------------------------------------------------ decoder


def decoder_matmul_parameters(decoder: DecoderConfig) -> int:
    """Return the number of weights that a token is multiplied with. This includes the output layer, even if tied, and in a sparse layer the
    router and the top-k experts."""
    width = decoder.hidden_size
    query, key_value = decoder.num_attention_heads * decoder.head_dim, decoder.num_query_groups * decoder.head_dim
    attention, mlp = width * (query + 2 * key_value) + query * width, 3 * width * decoder.ffn_hidden_size
    total = decoder.num_layers * (attention + mlp) + width * decoder.vocab_size
    if decoder.moe is not None:
        total += len(decoder.sparse_layers) * ((decoder.moe.top_k - 1) * mlp + width * decoder.moe.num_experts)
    return total


def decoder_flops(decoder: DecoderConfig, *, num_tokens: int, sum_squared_lengths: int) -> float:
    """Return the FLOPs of training the whole decoder on a batch.

    Args:
        num_tokens: tokens that are not padding.
        sum_squared_lengths: sum over documents of their squared length in tokens.
    """
    count = FlopCount()
    count_decoder(count, decoder, StepWork(num_tokens=num_tokens, sum_squared_lengths=sum_squared_lengths, num_images=0))
    return count.flops


def count_decoder(count: FlopCount, decoder: DecoderConfig, work: StepWork) -> None:
    """Count the decoder on a step's tokens."""
    count_embedding(count)
    for layer in range(decoder.num_layers):
        count_attention(count, decoder, layer, work)
        count_mlp(count, decoder, layer, work)
    count_output(count, decoder, work)


def count_embedding(count: FlopCount) -> None:
    """Count the embedding: the look-up costs nothing, but if it is trainable, gradients flow back to it from the first layer."""
    count.weight("language.embedding.word_embeddings.weight")


def count_attention(count: FlopCount, decoder: DecoderConfig, layer: int, work: StepWork) -> None:
    """Count self-attention of a layer and the norm before it."""
    name, width, tokens = f"language.decoder.layers.{layer}", decoder.hidden_size, work.num_tokens
    query, key_value = decoder.num_attention_heads * decoder.head_dim, decoder.num_query_groups * decoder.head_dim
    count.weight(f"{name}.input_layernorm.weight")
    count.weight(f"{name}.self_attention.linear_qkv.weight", 2.0 * width * (query + 2 * key_value) * tokens)
    # Scores and values: two products of 2 * length^2 * heads * head_dim, of which the causal mask leaves half.
    count.activations(2.0 * query * work.sum_squared_lengths)
    count.weight(f"{name}.self_attention.linear_proj.weight", 2.0 * query * width * tokens)


def count_mlp(count: FlopCount, decoder: DecoderConfig, layer: int, work: StepWork) -> None:
    """Count the SwiGLU of a layer and the norm before it; in a sparse layer, the router and the top-k experts."""
    name, product = f"language.decoder.layers.{layer}", 2.0 * decoder.hidden_size * decoder.ffn_hidden_size * work.num_tokens
    count.weight(f"{name}.pre_mlp_layernorm.weight")
    if decoder.moe is None or layer not in decoder.sparse_layers:
        count.weight(f"{name}.mlp.linear_fc1.weight", 2 * product)
        count.weight(f"{name}.mlp.linear_fc2.weight", product)
        return
    count.weight(f"{name}.mlp.router.weight", 2.0 * decoder.hidden_size * decoder.moe.num_experts * work.num_tokens)
    count.weight(f"{name}.mlp.experts.linear_fc1.weight", 2 * decoder.moe.top_k * product)
    count.weight(f"{name}.mlp.experts.linear_fc2.weight", decoder.moe.top_k * product)


def count_output(count: FlopCount, decoder: DecoderConfig, work: StepWork) -> None:
    """Count the final norm and the output layer, which may be the embedding table."""
    name = "language.embedding.word_embeddings.weight" if decoder.tied_embeddings else "language.output_layer.weight"
    count.weight("language.decoder.final_layernorm.weight")
    count.weight(name, 2.0 * decoder.hidden_size * decoder.vocab_size * work.num_tokens)


# ------------------------------------------------------------------------------------------------------- image towers and such


def vision_flops(vision: VisionConfig) -> float:
    """Return the FLOPs of training the image tower on one image."""
    count = FlopCount()
    count_vision(count, vision, num_images=1)
    return count.flops


def count_vision(count: FlopCount, vision: VisionConfig, *, num_images: int) -> None:
    """Count the CLIP tower on some images."""
    width, tokens = vision.hidden_size, vision.num_patches + 1
    product = 2.0 * num_images * tokens * width
    count.weight("vision.patch_embedding.weight", 2.0 * num_images * vision.num_patches * 3 * vision.patch_size**2 * width)
    for layer in range(vision.num_layers):
        name = f"vision.transformer.layers.{layer}"
        count.weight(f"{name}.self_attention.linear_qkv.weight", product * 3 * width)
        count.activations(4.0 * num_images * tokens**2 * width)
        count.weight(f"{name}.self_attention.linear_proj.weight", product * width)
        count.weight(f"{name}.mlp.linear_fc1.weight", product * vision.ffn_hidden_size)
        count.weight(f"{name}.mlp.linear_fc2.weight", product * vision.ffn_hidden_size)


def count_eva(count: FlopCount, vision: EvaConfig, *, num_images: int) -> None:
    """Count the EVA tower on some images."""
    width, tokens = vision.hidden_size, vision.num_tokens
    product = 2.0 * num_images * tokens * width
    count.weight("vision.patch_embedding.weight", 2.0 * num_images * (tokens - 1) * 3 * vision.patch_size**2 * width)
    for layer in range(vision.num_layers):
        name = f"vision.layers.{layer}"
        count.weight(f"{name}.attention.qkv.weight", product * 3 * width)
        count.activations(4.0 * num_images * tokens**2 * width)
        count.weight(f"{name}.attention.output.weight", product * width)
        if vision.swiglu:
            count.weight(f"{name}.mlp.gate.weight", product * vision.ffn_hidden_size)
        count.weight(f"{name}.mlp.up.weight", product * vision.ffn_hidden_size)
        count.weight(f"{name}.mlp.down.weight", product * vision.ffn_hidden_size)


def count_resampler(count: FlopCount, config: ResamplerConfig, *, width: int, num_features: int, num_images: int) -> None:
    """Count the Perceiver resampler on the features of some images.

    Args:
        width: width of the tower.
        num_features: number of features per image.
    """
    inner, latents, seen = config.num_attention_heads * config.head_dim, config.num_latents, num_features + config.num_latents
    product = 2.0 * num_images * latents * width
    count.weight("resampler.latents")
    for layer in range(config.num_layers):
        name = f"resampler.layers.{layer}"
        count.weight(f"{name}.query.weight", product * inner)
        count.weight(f"{name}.key_value.weight", 2.0 * num_images * seen * width * 2 * inner)
        count.activations(2.0 * num_images * 2 * latents * seen * inner)
        count.weight(f"{name}.output.weight", product * inner)
        count.weight(f"{name}.ffn_hidden.weight", product * config.ffn_multiplier * width)
        count.weight(f"{name}.ffn_output.weight", product * config.ffn_multiplier * width)

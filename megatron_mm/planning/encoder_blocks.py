"""The image encoder as blocks: towers, connectors, the resampler, patches. Every process of the first stage has all of them and runs them
on its own share of a micro-batch's images.

Shape legend: n images of this process, s tokens per image inside the tower, v tower width, k tokens per image in the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from megatron_mm.config import ConnectorConfig, EvaConfig, ResamplerConfig, VisionConfig
from megatron_mm.families.mono_internvl.config import PatchEmbeddingConfig
from megatron_mm.flops import FlopCount, Trainable
from megatron_mm.planning.decoder_block import decoder_layer
from megatron_mm.planning.decoder_shape import DecoderShape, Recompute, Tokens, Trained
from megatron_mm.planning.kernels import Attention, Block, Kernel, Product, Stream
from megatron_mm.planning.layer_sections import linear
from megatron_mm.planning.layout import Layout

CONNECTOR_TENSORS = 11
"""Tensors of the connector's width that a bottleneck block of the C-Abstractor keeps per place (models/connectors/c_abstractor.py): the
outputs of three convolutions, of two norms and two activations, the input of the last convolution, the sum and its activation; and its
part of those of the first block's shortcut and of the projection."""
RESAMPLER_TENSORS, PROJECTOR_TENSORS = 11, 6
"""Parameter tensors of a layer of the resampler (three LayerNorms, five matrices; beside the layers there are latents and a norm), and of
the projector (a LayerNorm, two matrices with biases)."""
EVA_OPERATIONS = 6
"""Operations of a pass through an EVA layer beside those of a plain layer: it puts together the bias of the projection and the padded
weights, and has a norm inside of attention, as its fused kernels leave them (models/eva.py)."""
ALONE = Layout(gpus=1, sequence=False)
"""Layout of towers, which are not split."""


def tower_blocks(vision: VisionConfig | EvaConfig, *, images: int, trained: Trained, recompute: Recompute) -> list[Block]:
    """Blocks of a vision transformer: patches, then its layers."""
    tokens = vision.grid_size**2 + 1
    gated = isinstance(vision, EvaConfig) and vision.swiglu
    shape = DecoderShape(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        heads=vision.num_attention_heads,
        kv_heads=vision.num_attention_heads,
        head_dim=vision.hidden_size // vision.num_attention_heads,
        ffn=vision.ffn_hidden_size,
        gated=gated,
        vocab=0,
        causal=False,
        rotary=isinstance(vision, EvaConfig),
    )
    batch = Tokens(tokens=images * tokens, pairs=images * tokens**2, length=tokens)
    layer = decoder_layer(shape, ALONE, batch, sparse=False, fp8=False, recompute=recompute, trained=trained)
    if not trained.weights:
        layer = replace(layer, saved=0.0, transient=layer.saved)
    if isinstance(vision, EvaConfig):
        more = Stream(0.0, kernels=EVA_OPERATIONS)
        forward, backward = (_plain((*kernels, more)) if kernels else () for kernels in (layer.forward, layer.backward))
        layer = replace(layer, forward=forward, backward=backward)
    layer = replace(layer, name="tower layer")
    return [patches_block(vision, images=images, trained=trained), *[layer] * vision.num_layers]


def _plain(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """The kernels of modules of torch itself."""
    return tuple(replace(kernel, plain=True) if isinstance(kernel, Product | Attention) else kernel for kernel in kernels)


def patches_block(vision: VisionConfig | EvaConfig | PatchEmbeddingConfig, *, images: int, trained: Trained) -> Block:
    """Block that turns normalised pixels into embedded patches."""
    rows, width, inner = images * vision.grid_size**2, vision.hidden_size, 3 * vision.patch_size**2
    forward, backward = linear(rows, width, inner, fp8=False, trained=trained)
    pixels = images * 3 * vision.image_size**2
    return Block(
        name="patches",
        forward=(Stream(20 * pixels, kernels=6), *forward, Stream(8 * rows * width, kernels=3)),
        backward=(*backward, Stream(8 * rows * width, kernels=3)) if trained.weights else (),
        parameters=width * (inner + vision.grid_size**2) if trained.weights else 0.0,
        frozen_parameters=0.0 if trained.weights else width * (inner + vision.grid_size**2),
        saved=(2 * rows * inner + 2 * rows * width) if trained.weights else 0.0,
    )


def connector_block(connector: ConnectorConfig, vision: VisionConfig, *, output_size: int, images: int, trainable: Trainable) -> Block:
    """Block of the connector: products as `models.connectors` counts them, and the memory traffic between them."""
    from megatron_mm.models.connectors import count_connector

    def flops(trainable: Trainable) -> float:
        count = FlopCount(trainable)
        count_connector(count, connector, vision=vision, output_size=output_size, num_images=images)
        return count.flops

    once, trained = flops(lambda name: False), flops(trainable)
    inner = connector.hidden_size
    places = images * (vision.grid_size**2 + connector.num_tokens) * (connector.depth if connector.kind == "c_abstractor" else 1)
    # Passes of a bottleneck block: norms and activations of three convolutions, a depthwise convolution, squeeze-and-excite, the sum.
    passes = 34 if connector.kind == "c_abstractor" else 6
    rows = max(1.0, images * vision.grid_size**2)
    product = Product(rows, inner, once / (2 * rows * inner))
    width = vision.hidden_size
    parameters = once / max(1, images) / (2 * vision.grid_size**2) + (output_size**2 + inner * output_size)
    backward: tuple[Kernel, ...] = ()
    if trained > once:
        backward = (
            replace(product, count=round((trained - once) / once)),
            Stream(2 * passes * places * inner * 2, kernels=20 * connector.depth),
        )
    return Block(
        name="connector",
        forward=(product, Stream(passes * places * inner * 2, kernels=16 * connector.depth), Stream(4 * rows * width)),
        backward=backward,
        parameters=parameters if backward else 0.0,
        frozen_parameters=0.0 if backward else parameters,
        saved=2.0 * CONNECTOR_TENSORS * places * inner if backward else 0.0,
    )


def resampler_block(config: ResamplerConfig, *, width: int, num_features: int, images: int, trained: Trained) -> Block:
    """Block of the Perceiver resampler."""
    inner, latents, seen = config.num_attention_heads * config.head_dim, config.num_latents, num_features + config.num_latents
    rows = images * latents
    forward: list[Kernel] = []
    backward: list[Kernel] = []
    for products in ((rows, inner, width), (images * seen, 2 * inner, width), (rows, width, inner)):
        f, b = linear(*products, fp8=False, trained=trained)
        forward, backward = forward + f, backward + b
    pairs = float(rows * seen)
    forward.append(Attention(pairs, seen, config.num_attention_heads, config.head_dim, causal=False))
    backward.append(Attention(pairs, seen, config.num_attention_heads, config.head_dim, causal=False, backward=True))
    for products in ((rows, config.ffn_multiplier * width, width), (rows, width, config.ffn_multiplier * width)):
        f, b = linear(*products, fp8=False, trained=trained)
        forward, backward = forward + f, backward + b
    moved = 2 * (6 * images * seen * width + 8 * rows * width + 3 * rows * config.ffn_multiplier * width)
    forward.append(Stream(moved, kernels=12))
    backward.append(Stream(2 * moved, kernels=20))
    parameters = config.num_layers * (width * inner * 4 + 2 * config.ffn_multiplier * width**2)
    # features and latents together, as normalised, and their keys and values; queries, attention's output; two norms; the MLP
    saved = 2 * (images * seen * width + images * seen * 2 * inner + rows * (2 * inner + 2 * width + 2 * config.ffn_multiplier * width))
    return Block(
        name="resampler",
        forward=_plain(forward) * config.num_layers,
        backward=_plain(backward) * config.num_layers if trained.weights else (),
        parameters=parameters if trained.weights else 0.0,
        frozen_parameters=0.0 if trained.weights else parameters,
        saved=saved * config.num_layers if trained.weights else 0.0,
        tensors=3 + RESAMPLER_TENSORS * config.num_layers if trained.weights else 0,
    )


def projector_block(patches: PatchEmbeddingConfig, *, output_size: int, images: int, trained: Trained) -> Block:
    """Block of Mono-InternVL's norm and two linear layers on squares of patches."""
    rows, wide = images * patches.num_tokens, patches.unshuffle**2 * patches.hidden_size
    first, first_back = linear(rows, output_size, wide, fp8=False, trained=trained)
    second, second_back = linear(rows, output_size, output_size, fp8=False, trained=trained)
    parameters = wide * output_size + output_size**2
    return Block(
        name="projector",
        forward=(Stream(4 * rows * wide, kernels=2), *first, Stream(4 * rows * output_size), *second),
        backward=(*second_back, Stream(6 * rows * output_size), *first_back, Stream(6 * rows * wide, kernels=2)) if trained.weights else (),
        parameters=parameters if trained.weights else 0.0,
        frozen_parameters=0.0 if trained.weights else parameters,
        saved=2 * rows * (2 * wide + 2 * output_size) if trained.weights else 0.0,
        tensors=PROJECTOR_TENSORS if trained.weights else 0,
    )

"""Blocks of each model family: its encoders, and how it makes its decoder layers, with what the freeze policy leaves out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_mm.config import ModelConfig
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.flops import Trainable
from megatron_mm.planning.decoder_block import decoder_layer, saved_by_layer
from megatron_mm.planning.decoder_shape import DecoderShape, Recompute, Tokens, Trained
from megatron_mm.planning.encoder_blocks import connector_block, patches_block, projector_block, resampler_block, tower_blocks
from megatron_mm.planning.kernels import Attention, Block, Kernel, Stream
from megatron_mm.planning.layer_sections import ATTENTION_TENSORS, attention_section, linear, tensor_messages
from megatron_mm.planning.layout import Layout
from megatron_mm.planning.workload import MicroBatch

GATED_LENGTH = 512
"""Length of a document, in tokens, that is assumed for the rate of attention to latents."""
GATED_TENSORS = 11
"""Parameter tensors of a gated block: two LayerNorms, five matrices, two gates."""


@dataclass
class Chain:
    """Tracks, in the order of the forward pass, whether gradients flow back to the current block (as `flops.FlopCount` does)."""

    trainable: Trainable
    has_gradient: bool = False

    def trained(self, name: str) -> Trained:
        """Return what the backward pass computes for a weight of this name."""
        weights = self.trainable(name)
        self.has_gradient = self.has_gradient or weights
        return Trained(weights=weights, inputs=self.has_gradient)


@dataclass(frozen=True)
class LayerContext:
    """What a decoder layer's blocks depend on."""

    shape: DecoderShape
    layout: Layout
    tokens: Tokens
    micro: MicroBatch
    layer: int
    fp8: bool
    recompute: Recompute
    chain: Chain


@dataclass(frozen=True)
class Parts:
    """A family's encoders, and how it makes its decoder layers."""

    encoders: tuple[Block, ...]
    layer: Callable[[LayerContext], tuple[Block, ...]]
    key: Callable[[int], Any] = lambda layer: None
    """Key of a layer; layers with the same key have the same blocks."""


def family_blocks(model: ModelConfig) -> Callable[..., Parts]:
    """Return the function that makes a family's blocks. Raises ValueError if the planner has none."""
    build = _FAMILIES.get(type(model))
    if build is None:
        raise ValueError(
            f"the planner has no model of the blocks of {model.family} models: add them to planning.family_blocks, or use `plan --trace`"
        )
    return build


def _plain_layer(context: LayerContext) -> tuple[Block, ...]:
    trained = context.chain.trained(f"language.decoder.layers.{context.layer}.self_attention.linear_qkv.weight")
    sparse = context.layer in context.shape.sparse_layers
    return (
        decoder_layer(
            context.shape, context.layout, context.tokens, sparse=sparse, fp8=context.fp8, recompute=context.recompute, trained=trained
        ),
    )


def _mm1(model: MM1Config, chain: Chain, images: int, recompute: Recompute) -> Parts:
    trained = chain.trained("vision.patch_embedding.weight")
    tower = tower_blocks(model.vision, images=images, trained=trained, recompute=recompute)
    chain.trained("connector.output.weight")
    connector = connector_block(
        model.connector, model.vision, output_size=model.decoder.hidden_size, images=images, trainable=chain.trainable
    )
    return Parts((*tower, connector), _plain_layer)


def _infimm(model: InfiMMConfig, chain: Chain, images: int, recompute: Recompute) -> Parts:
    tower = tower_blocks(model.vision, images=images, trained=chain.trained("vision.class_embedding"), recompute=recompute)
    own = Chain(chain.trainable)
    resampler = resampler_block(
        model.resampler,
        width=model.vision.hidden_size,
        num_features=model.vision.num_tokens,
        images=images,
        trained=own.trained("resampler.latents"),
    )
    gated = model.gated.layers(model.decoder.num_layers)

    def layer(context: LayerContext) -> tuple[Block, ...]:
        before = (_gated_block(model, context),) if context.layer in gated else ()
        return (*before, *_plain_layer(context))

    return Parts((*tower, resampler), layer, key=lambda number: number in gated)


def _gated_block(model: InfiMMConfig, context: LayerContext) -> Block:
    """Block of a gated layer: attention of tokens to latents, then an MLP."""
    gated, layout, h = model.gated, context.layout, model.decoder.hidden_size
    t, tp = context.tokens.tokens, layout.tensor
    rows = layout.rows(t)
    inner, wide = gated.num_attention_heads * gated.head_dim / tp, gated.ffn_multiplier * h / tp
    latents = max(1, context.micro.images) * model.resampler.num_latents
    trained = context.chain.trained(f"language.decoder.layers.{context.layer}.gated.linear_q.weight")
    enter, enter_back = tensor_messages(layout, 2 * t * h, trained=trained, entering=True)
    leave, leave_back = tensor_messages(layout, 2 * t * h, trained=trained, entering=False)
    forward: list[Kernel] = [Stream(16 * rows * h, kernels=8), *enter, *enter]
    backward: list[Kernel] = [Stream(24 * rows * h, kernels=12), *enter_back, *enter_back]
    for shape in ((t, inner, h), (latents, 2 * inner, model.vision.hidden_size), (t, h, inner), (t, wide, h), (t, h, wide)):
        f, b = linear(*shape, fp8=False, trained=trained)
        forward, backward = forward + f, backward + b
    pairs = t * model.resampler.num_latents
    heads = gated.num_attention_heads / tp
    core = Attention(pairs, GATED_LENGTH, heads, gated.head_dim, causal=False)
    forward += [core, Stream(8 * t * inner + 6 * t * wide, kernels=6), *leave, *leave]
    backward += [replace(core, backward=True), *leave_back, *leave_back]
    backward.append(Stream(12 * t * inner + 8 * t * wide, kernels=8))
    parameters = 2 * inner * h + 2 * inner * model.vision.hidden_size + 2 * wide * h
    # the two inputs, as they are and normalised, the two outputs, which their gates multiply; queries, attention's output before and after
    # it is put in place; the MLP's hidden layer before and after its activation; the latents' keys and values
    kept = 12 * rows * h + 2 * t * (3 * inner + 2 * wide) + 4 * latents * inner
    if "full" in context.recompute:
        backward, kept = [*forward, *backward], 0.0  # part of the recomputed layer that follows it
    return Block(
        name="gated block",
        forward=tuple(forward),
        backward=tuple(backward) if trained.weights or trained.inputs else (),
        parameters=parameters if trained.weights else 0.0,
        frozen_parameters=0.0 if trained.weights else parameters,
        saved=kept,
        tensors=GATED_TENSORS if trained.weights else 0,
    )


def _mono_internvl(model: MonoInternVLConfig, chain: Chain, images: int, recompute: Recompute) -> Parts:
    patches = patches_block(model.patches, images=images, trained=chain.trained("patches.projection.weight"))
    projector = projector_block(
        model.patches, output_size=model.decoder.hidden_size, images=images, trained=chain.trained("projector.output.weight")
    )

    def layer(context: LayerContext) -> tuple[Block, ...]:
        return (_modality_layer(model, context),)

    return Parts((patches, projector), layer)


def _modality_layer(model: MonoInternVLConfig, context: LayerContext) -> Block:
    """Block of a Mono-InternVL layer: attention, then the MLP of each token's modality."""
    shape, layout, tokens, chain = context.shape, context.layout, context.tokens, context.chain
    name, h, tp, b = f"language.decoder.layers.{context.layer}", shape.hidden_size, layout.tensor, shape.branches
    rows = layout.rows(tokens.tokens)
    attends = chain.trained(f"{name}.self_attention.linear_qkv.weight")
    forward, backward, core, _ = attention_section(shape, layout, tokens, fp8=context.fp8, trained=attends)
    enter, enter_back = tensor_messages(layout, 2 * tokens.tokens * h, trained=attends, entering=True)
    leave, leave_back = tensor_messages(layout, 2 * tokens.tokens * h, trained=attends, entering=False)
    visual = min(tokens.tokens, context.micro.images * model.patches.num_tokens)
    mlp: list[Kernel] = [Stream(12 * rows * h, kernels=6), *enter]
    mlp_back: list[Kernel] = [Stream(16 * rows * h, kernels=8), *leave_back]
    kept = saved_by_layer(shape, layout, tokens, sparse=False, fp8=context.fp8, weights=attends.weights)
    if attends.weights:  # the norm before the experts is a module of its own; the rows that an expert takes from its output are kept below
        kept["norms"] /= 2
    kept["mlp hidden"], kept["mlp activation"] = 0.0, 0.0
    taken = 1 if context.fp8 else 2
    trainable, frozen, tensors = 0.0, 0.0, ATTENTION_TENSORS if attends.weights else 0
    for expert, count in (("text", tokens.tokens - visual), ("visual", visual)):
        trained = chain.trained(f"{name}.mlp.{expert}.linear_fc1.weight")
        for shape_of in ((count, b * shape.ffn / tp, h), (count, h, shape.ffn / tp)):
            f, back = linear(*shape_of, fp8=context.fp8, trained=trained)
            mlp, mlp_back = mlp + f, mlp_back + back
        mlp.append(Stream(2 * (b + 1) * count * shape.ffn / tp + 8 * count * h, kernels=3))
        mlp_back.append(Stream(2 * (2 * b + 1) * count * shape.ffn / tp + 8 * count * h, kernels=3))
        kept["mlp hidden"] += 2 * count * (b * shape.ffn / tp)
        kept["mlp activation"] += taken * count * (h + shape.ffn / tp) * trained.weights
        size = shape.mlp_parameters(shape.ffn) / tp
        trainable, frozen = trainable + size * trained.weights, frozen + size * (not trained.weights)
        tensors += 2 * trained.weights
    size = shape.attention_parameters / tp
    trainable, frozen = trainable + size * attends.weights, frozen + size * (not attends.weights)
    forward, backward = [*forward, *mlp, *leave], [*mlp_back, *enter_back, *backward]
    if "full" in context.recompute:
        backward, kept = [*forward, *backward], {"input": 2 * rows * h}
    elif "core_attn" in context.recompute:
        backward = [core, *backward]
    return Block(
        name="layer",
        forward=tuple(forward),
        backward=tuple(backward),
        parameters=trainable,
        frozen_parameters=frozen,
        saved=sum(kept.values()),
        tensors=tensors,
        fp8_parameters=trainable + frozen if context.fp8 else 0.0,
    )


_FAMILIES: dict[type, Callable[[Any, Chain, int, Recompute], Parts]] = {
    MM1Config: _mm1,
    InfiMMConfig: _infimm,
    MonoInternVLConfig: _mono_internvl,
}

"""A recipe as a job: its model's blocks on the stages of its layout, with the micro-batches of its workload."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.config.parallel import IMAGES_AT_ONCE
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig
from megatron_mm.families.registry import family_of
from megatron_mm.flops import Trainable
from megatron_mm.planning.bridge_recipes import OVERLAPPED
from megatron_mm.planning.decoder_block import decoder_layer, embedding, output, saved_by_layer
from megatron_mm.planning.decoder_shape import DecoderShape, Recompute, Tokens, Trained
from megatron_mm.planning.encoder_blocks import connector_block, patches_block, projector_block, resampler_block, tower_blocks
from megatron_mm.planning.hardware import OURS, STACKS, Gpu, Software, with_host, with_precision
from megatron_mm.planning.job import Beside, Job, divided
from megatron_mm.planning.kernels import Attention, Block, Kernel, Message, Stream
from megatron_mm.planning.layer_sections import attention_section, linear, tensor_messages
from megatron_mm.planning.layout import Layout
from megatron_mm.planning.workload import MicroBatch, Workload, Workloads

EXPERT_IMBALANCE = 1.10
"""Tokens of the experts on the most loaded process, relative to the mean, under load-balance losses."""
DECODING_BESIDE = 1.33
"""Host time while threads decode with Pillow, which share the interpreter with the thread that launches kernels, relative to host time
without: a forward pass of mm1_1b took 0.60 and 0.45 s (docs/gpu.md)."""
MOST_KINDS = 12
"""Largest number of different micro-batches; if there are more, those with similar numbers of images are merged."""


@dataclass(frozen=True)
class Planned:
    """A recipe's job and its workload."""

    experiment: Experiment
    job: Job
    work: Workload
    flops: float
    """FLOPs of the whole step, on real tokens."""


def check_number_format(experiment: Experiment, gpu: Gpu) -> None:
    """Raise ValueError if the GPU does not multiply in the recipe's number format."""
    if experiment.train.precision != "fp8":
        return
    if not gpu.fp8_tflops:
        raise ValueError(f"train.precision is fp8, but an {gpu.name} has no FP8: use --train.precision bf16, or another --gpu")
    if experiment.precision.fp8_recipe == "mxfp8" and not gpu.fp4_tflops:
        raise ValueError(
            f"precision.fp8_recipe is mxfp8, which an {gpu.name} does not have: use another one, or a GPU of the Blackwell generation"
        )


def recompute_of(experiment: Experiment, *, encoder: bool = False) -> Recompute:
    """The recipe's recomputation in the planner's terms, of the image tower (`encoder`) or of the decoder."""
    parallel = experiment.parallel
    kind, modules = parallel.recompute, parallel.recompute_modules
    if encoder:
        kind, modules = parallel.recompute_encoder or kind, parallel.recompute_encoder_modules or modules
    return frozenset({"full"}) if kind == "full" else frozenset(modules) if kind == "selective" else frozenset()


def _software_of(experiment: Experiment, software: Software) -> Software:
    """Apply the experiment's choices to the stack: number formats, overlapped messages, how tokens are sent to experts."""
    parallel = experiment.parallel
    if experiment.data.decoder == "pillow":
        software = with_host(software, DECODING_BESIDE)
    stack = with_precision(software, experiment.precision, single=experiment.train.precision == "fp32")
    if parallel.overlap_tensor:
        stack = replace(stack, hides_tensor_messages=STACKS["nemo"].hides_tensor_messages)
    if parallel.expert_dispatch != "alltoall":  # a token is sent once per machine, and permutation is part of the exchange
        stack = replace(stack, dispatcher=parallel.expert_dispatch, expert_operations=0.5)
    if parallel.overlaps_experts:
        stack = replace(stack, hides_expert_messages=OVERLAPPED)
    return replace(stack, hides_data_messages=parallel.overlap_grad_reduce)


def plan_recipe(
    experiment: Experiment,
    gpu: Gpu,
    gpus: int,
    *,
    software: Software | None = None,
    work: Workload | None = None,
    made: dict[Any, Any] | None = None,
) -> Planned:
    """Make the job of a recipe on a number of GPUs.

    Args:
        made: blocks of earlier calls for the same model, tensor- and expert-parallel degrees, which are used again; new ones are added.

    Raises ValueError if the layout cannot hold the model or its batch.
    """
    family = family_of(experiment.model)
    family.check_layout(experiment.model, experiment.parallel, gpus)
    layout = Layout.of(experiment.parallel, gpus)
    stack = _software_of(experiment, software or OURS)
    if work is None:
        work = Workloads(experiment).of(data_size=layout.data)
    kinds, order = _kinds(work.micro_batches)
    made = {} if made is None else made
    blocks = tuple(_stages(experiment, layout, micro, made) for micro in kinds)
    shape, tensor = experiment.model.decoder, layout.tensor
    most = max(micro.images for micro in kinds)
    rows = family.pipeline_rows(experiment.model, experiment.parallel, kinds[0].tokens, most)
    early = experiment.parallel.overlap_param_gather and experiment.parallel.distributed_optimizer
    job = Job(
        layout=layout,
        gpu=gpu,
        software=stack,
        kinds=blocks,
        micro_batches=order,
        hidden_bytes=2 * rows * shape.hidden_size / (tensor if layout.sequence else 1),
        overlap_parameter_gather=early,
        replicated_parameters=_replicated(blocks[0][0]) if tensor > 1 else 0.0,
        beside=_beside(experiment, layout, work) if experiment.parallel.spread_encoder else Beside(),
        micro_batches_at_once=2 if experiment.parallel.overlaps_experts else 1,
    )
    if work.whole not in made:
        made[work.whole] = family.step_flops(experiment.model, experiment.train.freeze_policy, work.whole)
    return Planned(experiment, job, work, made[work.whole])


def with_stages(planned: Planned, experiment: Experiment) -> Planned:
    """Divide a plan's layers over the virtual stages of another experiment, which differs from the plan's in nothing else."""
    parallel = experiment.parallel
    layout = replace(planned.job.layout, virtual=parallel.virtual, stage_layers=parallel.stage_layers)
    counts = layout.layers(experiment.model.decoder.num_layers)
    kinds = tuple(divided(list(itertools.chain(*stages)), counts) for stages in planned.job.kinds)
    return replace(planned, experiment=experiment, job=replace(planned.job, layout=layout, kinds=kinds))


def _beside(experiment: Experiment, layout: Layout, work: Workload) -> Beside:
    """The encoder's work on every process, for its share of the images of a step."""
    model = experiment.model
    images = -(-sum(micro.images for micro in work.micro_batches) // (layout.tensor * layout.pipeline))
    times = max(1, -(-images // IMAGES_AT_ONCE))
    at_once = max(1, -(-images // times))
    chain = _Chain(family_of(model).trainable(experiment.train.freeze_policy))
    blocks = _blocks_of(model)(model, chain, at_once, recompute_of(experiment, encoder=True)).encoders
    if isinstance(model, InfiMMConfig):
        numbers = model.resampler.num_latents * model.vision.hidden_size
    else:
        numbers = family_of(model).image_input(model).tokens * model.decoder.hidden_size
    return Beside(blocks, times, message_bytes=2.0 * images * numbers)


_ENCODERS = ("patches", "tower layer", "connector", "resampler", "projector")


def _replicated(stage: tuple[Block, ...]) -> float:
    return sum(block.parameters for block in stage if block.name in _ENCODERS)


def _kinds(micro_batches: tuple[MicroBatch, ...]) -> tuple[list[MicroBatch], tuple[int, ...]]:
    """Return the kinds of micro-batches, and the kind of each one. If there are too many, similar ones (by images) become their mean."""
    distinct = sorted(set(micro_batches), key=lambda m: (-m.images, -m.sum_squared_lengths))
    size = -(-len(distinct) // MOST_KINDS)
    groups = [distinct[first : first + size] for first in range(0, len(distinct), size)]
    where = {micro: number for number, group in enumerate(groups) for micro in group}
    means = [
        MicroBatch(
            tokens=max(m.tokens for m in group),
            real_tokens=sum(m.real_tokens for m in group) // len(group),
            sum_squared_lengths=sum(m.sum_squared_lengths for m in group) // len(group),
            images=-(-sum(m.images for m in group) // len(group)),
        )
        for group in groups
    ]
    return means, tuple(where[micro] for micro in micro_batches)


# ------------------------------------------------------------------------------------------------------------ stages


@dataclass
class _Chain:
    """Tracks, in the order of the forward pass, whether gradients flow back to the current block (as `flops.FlopCount` does)."""

    trainable: Trainable
    has_gradient: bool = False

    def trained(self, name: str) -> Trained:
        """Return what the backward pass computes for a weight of this name."""
        weights = self.trainable(name)
        self.has_gradient = self.has_gradient or weights
        return Trained(weights=weights, inputs=self.has_gradient)


def _stages(experiment: Experiment, layout: Layout, micro: MicroBatch, made: dict[Any, Any]) -> tuple[tuple[Block, ...], ...]:
    model, data = experiment.model, experiment.data
    family = family_of(model)
    shape = DecoderShape.of(model.decoder, imbalance=EXPERT_IMBALANCE)
    squares = max(1, micro.sum_squared_lengths)
    tokens = Tokens(tokens=micro.tokens, pairs=squares / 2, length=squares / max(1, micro.tokens))
    chain = _Chain(family.trainable(experiment.train.freeze_policy))
    recompute = recompute_of(experiment)
    own, encoder_recompute = max(1, -(-micro.images // layout.tensor)), recompute_of(experiment, encoder=True)
    image_tokens = family.image_input(model).tokens
    if ("parts", own, encoder_recompute) not in made:
        parts = _blocks_of(model)(model, chain, own, encoder_recompute)
        made["parts", own, encoder_recompute] = parts, chain.has_gradient
    parts, chain.has_gradient = made["parts", own, encoder_recompute]
    gather = Message("all_gather", 2.0 * micro.images * image_tokens * shape.hidden_size, "tensor")
    inputs = _Chain(chain.trainable).trained("language.embedding.word_embeddings.weight")
    chain.has_gradient = chain.has_gradient or inputs.weights
    table = embedding(shape, layout, tokens, trained=inputs)
    joined = replace(table, forward=(*table.forward, gather)) if layout.tensor > 1 else table
    first = (joined,) if experiment.parallel.spread_encoder else (*parts.encoders, joined)
    fp8 = experiment.train.precision == "fp8"
    counts = layout.layers(shape.num_layers)
    blocks = list(first)
    for layer in range(shape.num_layers):
        key = ("layer", micro, recompute, layer in shape.sparse_layers, parts.key(layer), chain.has_gradient)
        if key not in made:
            context = _LayerContext(shape, layout, tokens, micro, layer, fp8, recompute, chain, data.sequence_length)
            made[key] = parts.layer(context), chain.has_gradient
        own_blocks, chain.has_gradient = made[key]
        blocks += own_blocks
    name = "language.embedding.word_embeddings.weight" if shape.tied else "language.output_layer.weight"
    fused = experiment.kernels.cross_entropy is not False
    blocks.append(output(shape, layout, tokens, trained=chain.trained(name), owns_table=not shape.tied or len(counts) > 1, fused=fused))
    return divided(blocks, counts)


def _blocks_of(model: ModelConfig) -> Callable[..., _Parts]:
    """Return the function that makes a family's blocks. Raises ValueError if the planner has none."""
    build = _FAMILIES.get(type(model))
    if build is None:
        raise ValueError(
            f"the planner has no model of the blocks of {model.family} models: add them to planning.recipe_job, or use `plan --trace`"
        )
    return build


@dataclass(frozen=True)
class _LayerContext:
    shape: DecoderShape
    layout: Layout
    tokens: Tokens
    micro: MicroBatch
    layer: int
    fp8: bool
    recompute: Recompute
    chain: _Chain
    sequence_length: int


@dataclass(frozen=True)
class _Parts:
    """A family's encoders, and how it makes its decoder layers."""

    encoders: tuple[Block, ...]
    layer: Callable[[_LayerContext], tuple[Block, ...]]
    key: Callable[[int], Any] = lambda layer: None
    """Key of a layer; layers with the same key have the same blocks."""


def _plain_layer(context: _LayerContext) -> tuple[Block, ...]:
    trained = context.chain.trained(f"language.decoder.layers.{context.layer}.self_attention.linear_qkv.weight")
    sparse = context.layer in context.shape.sparse_layers
    return (
        decoder_layer(
            context.shape, context.layout, context.tokens, sparse=sparse, fp8=context.fp8, recompute=context.recompute, trained=trained
        ),
    )


def _mm1(model: MM1Config, chain: _Chain, images: int, recompute: Recompute) -> _Parts:
    trained = chain.trained("vision.patch_embedding.weight")
    tower = tower_blocks(model.vision, images=images, trained=trained, recompute=recompute)
    chain.trained("connector.output.weight")
    connector = connector_block(
        model.connector, model.vision, output_size=model.decoder.hidden_size, images=images, trainable=chain.trainable
    )
    return _Parts((*tower, connector), _plain_layer)


def _infimm(model: InfiMMConfig, chain: _Chain, images: int, recompute: Recompute) -> _Parts:
    tower = tower_blocks(model.vision, images=images, trained=chain.trained("vision.class_embedding"), recompute=recompute)
    own = _Chain(chain.trainable)
    resampler = resampler_block(
        model.resampler,
        width=model.vision.hidden_size,
        num_features=model.vision.num_tokens,
        images=images,
        trained=own.trained("resampler.latents"),
    )
    gated = model.gated.layers(model.decoder.num_layers)

    def layer(context: _LayerContext) -> tuple[Block, ...]:
        blocks = _plain_layer(context) if context.layer not in gated else ()
        if context.layer in gated:
            block = _gated_block(model, context)
            blocks = (block, *_plain_layer(context))
        return blocks

    return _Parts((*tower, resampler), layer, key=lambda number: number in gated)


def _gated_block(model: InfiMMConfig, context: _LayerContext) -> Block:
    """Block of a gated layer: attention of tokens to latents, then an MLP."""
    gated, layout, h = model.gated, context.layout, model.decoder.hidden_size
    t, tp = context.tokens.tokens, layout.tensor
    rows = t / tp if layout.sequence else t
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
    forward += [Attention(pairs, 512, heads, gated.head_dim, causal=False), Stream(8 * t * inner + 6 * t * wide, kernels=6), *leave, *leave]
    backward += [Attention(pairs, 512, heads, gated.head_dim, causal=False, backward=True), *leave_back, *leave_back]
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
    )


def _mono_internvl(model: MonoInternVLConfig, chain: _Chain, images: int, recompute: Recompute) -> _Parts:
    patches = patches_block(model.patches, images=images, trained=chain.trained("patches.projection.weight"))
    projector = projector_block(
        model.patches, output_size=model.decoder.hidden_size, images=images, trained=chain.trained("projector.output.weight")
    )

    def layer(context: _LayerContext) -> tuple[Block, ...]:
        return (_modality_layer(model, context),)

    return _Parts((patches, projector), layer)


def _modality_layer(model: MonoInternVLConfig, context: _LayerContext) -> Block:
    """Block of a Mono-InternVL layer: attention, then the MLP of each token's modality."""
    shape, layout, tokens, chain = context.shape, context.layout, context.tokens, context.chain
    name, h, tp, b = f"language.decoder.layers.{context.layer}", shape.hidden_size, layout.tensor, shape.branches
    rows = tokens.tokens / tp if layout.sequence else tokens.tokens
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
    trainable = frozen = 0.0
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
        fp8_parameters=trainable + frozen if context.fp8 else 0.0,
    )


_FAMILIES: dict[type, Callable[[Any, _Chain, int, Recompute], _Parts]] = {
    MM1Config: _mm1,
    InfiMMConfig: _infimm,
    MonoInternVLConfig: _mono_internvl,
}

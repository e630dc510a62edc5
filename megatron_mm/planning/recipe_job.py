"""A recipe as a job: its model's blocks on the stages of its layout, with the micro-batches of its workload."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.config.parallel import IMAGES_AT_ONCE
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.registry import family_of
from megatron_mm.planning.bridge_recipes import OVERLAPPED
from megatron_mm.planning.decoder_block import embedding, output
from megatron_mm.planning.decoder_shape import DecoderShape, Recompute, Tokens
from megatron_mm.planning.family_blocks import Chain, LayerContext, family_blocks
from megatron_mm.planning.hardware import OURS, STACKS, Gpu, Software, with_precision
from megatron_mm.planning.job import Beside, Job, divided
from megatron_mm.planning.kernels import Block, Decoded, Message
from megatron_mm.planning.layout import Layout
from megatron_mm.planning.workload import MicroBatch, Workload, Workloads

EXPERT_IMBALANCE = 1.10
"""Tokens of the experts on the most loaded process, relative to the mean, under load-balance losses."""
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
    chain = Chain(family_of(model).trainable(experiment.train.freeze_policy))
    blocks = family_blocks(model)(model, chain, at_once, recompute_of(experiment, encoder=True)).encoders
    blocks = (*_decoding(experiment, at_once), *blocks)
    if isinstance(model, InfiMMConfig):
        numbers = model.resampler.num_latents * model.vision.hidden_size
    else:
        numbers = family_of(model).image_input(model).tokens * model.decoder.hidden_size
    return Beside(blocks, times, message_bytes=2.0 * images * numbers)


def _decoding(experiment: Experiment, images: float) -> tuple[Block, ...]:
    """The block of images that this process decodes beside its passes, if Pillow decodes them for sure: by option, or because they are cut
    into tiles or get JPEG artefacts (`data.load.loader`). Sub-images are decoded by Pillow, too, but are counted only with the option,
    because a picture is decoded once for all of its sub-images, and nobody has measured them."""
    data = experiment.data
    if data.decoder != "pillow" and data.max_tiles is None and data.jpeg_quality is None:
        return ()
    return (Block(name="decoding", forward=(Decoded(images),), backward=(Decoded(images),)),)


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


def _stages(experiment: Experiment, layout: Layout, micro: MicroBatch, made: dict[Any, Any]) -> tuple[tuple[Block, ...], ...]:
    model = experiment.model
    family = family_of(model)
    shape = DecoderShape.of(model.decoder, imbalance=EXPERT_IMBALANCE)
    squares = max(1, micro.sum_squared_lengths)
    tokens = Tokens(tokens=micro.tokens, pairs=squares / 2, length=squares / max(1, micro.tokens))
    chain = Chain(family.trainable(experiment.train.freeze_policy))
    recompute = recompute_of(experiment)
    own, encoder_recompute = max(1, -(-micro.images // layout.tensor)), recompute_of(experiment, encoder=True)
    image_tokens = family.image_input(model).tokens
    if ("parts", own, encoder_recompute) not in made:
        parts = family_blocks(model)(model, chain, own, encoder_recompute)
        made["parts", own, encoder_recompute] = parts, chain.has_gradient
    parts, chain.has_gradient = made["parts", own, encoder_recompute]
    gather = Message("all_gather", 2.0 * micro.images * image_tokens * shape.hidden_size, "tensor")
    inputs = Chain(chain.trainable).trained("language.embedding.word_embeddings.weight")
    chain.has_gradient = chain.has_gradient or inputs.weights
    table = embedding(shape, layout, tokens, trained=inputs)
    joined = replace(table, forward=(*table.forward, gather)) if layout.tensor > 1 else table
    encoders = () if experiment.parallel.spread_encoder else (*_decoding(experiment, micro.images / layout.tensor), *parts.encoders)
    fp8 = experiment.train.precision == "fp8"
    counts = layout.layers(shape.num_layers)
    blocks = [*encoders, joined]
    for layer in range(shape.num_layers):
        key = ("layer", micro, recompute, layer in shape.sparse_layers, parts.key(layer), chain.has_gradient)
        if key not in made:
            context = LayerContext(shape, layout, tokens, micro, layer, fp8, recompute, chain)
            made[key] = parts.layer(context), chain.has_gradient
        own_blocks, chain.has_gradient = made[key]
        blocks += own_blocks
    name = "language.embedding.word_embeddings.weight" if shape.tied else "language.output_layer.weight"
    fused = experiment.kernels.cross_entropy is not False
    blocks.append(output(shape, layout, tokens, trained=chain.trained(name), owns_table=not shape.tied or len(counts) > 1, fused=fused))
    return divided(blocks, counts)

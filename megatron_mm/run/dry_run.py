"""Describes a run without starting it: configuration, parameters on each pipeline stage, and the plan of the first steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_mm.config import Experiment
from megatron_mm.families.serialize import to_dict
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.stages import layers_per_stage
from megatron_mm.run.machine_checks import check_anywhere
from megatron_mm.run.start import check_beginning, check_no_secrets, check_shapes, find_hooks, fitting_tokenizer
from megatron_mm.training.build import build_chunks, build_encoder
from megatron_mm.training.freezing import check_patterns, freeze, trainable_patterns

PLANNED_STEPS = 2


@dataclass(frozen=True)
class StageParameters:
    """Numbers of parameters that each process of a pipeline stage holds (its own shards only), by part of the model."""

    held: dict[str, int]
    trainable: dict[str, int]
    """Parameters that are trainable under the experiment's freeze policy; parts without any are left out."""


def describe(experiment: Experiment) -> Iterator[str]:
    """Lines for the terminal.

    Raises ValueError if the layout cannot hold the model or its batches, if an option cannot run (on a machine without a GPU: on no
    machine), if an extra hook is not there, or if existing data or an existing `init_from` does not fit. Paths that do not exist are only
    named: they may exist where the run will be.
    """
    parallel = experiment.parallel
    world_size = max(topologies.world_size(), parallel.model_parallel_size * parallel.expert)
    check_no_secrets(experiment)
    find_hooks(experiment)
    check_shapes(experiment, world_size)
    unchecked = check_anywhere(experiment, world_size=world_size)
    data_size = parallel.data_parallel_size(world_size)
    yield json.dumps(to_dict(experiment), indent=2)
    yield ""
    yield (
        f"{world_size} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data_size}; "
        f"{experiment.num_micro_batches(data_size)} micro-batches of {experiment.train.micro_batch_size} sequences each a step"
    )
    if unchecked:
        yield unchecked
    yield from stage_table(experiment)
    yield ""
    yield from _plan(experiment)
    yield from _beginning(experiment)


def stage_parameters(experiment: Experiment) -> list[StageParameters]:
    """Parameters of every pipeline stage, in pipeline order. Raises ValueError if the freeze policy has a pattern that matches nothing."""
    experiment = _for_counting(experiment)
    parallel, patterns = experiment.parallel, trainable_patterns(experiment)
    stages: dict[int, StageParameters] = {}
    names: list[str] = []
    for rank in range(parallel.pipeline):
        with topologies.pretend(parallel, pipeline_rank=rank) as topology:
            encoder = build_encoder(experiment, topology)
            for virtual_stage, chunk in enumerate(build_chunks(experiment, topology)):
                modules = [chunk] if encoder is None or virtual_stage else [encoder, chunk]
                for module in modules:
                    names += [name for name, _ in module.named_parameters()]
                    freeze(module, patterns)
                stages[virtual_stage * parallel.pipeline + rank] = StageParameters(
                    held=_count(modules, only_trainable=False), trainable=_count(modules, only_trainable=True)
                )
    check_patterns(experiment, names)
    return [stages[stage] for stage in sorted(stages)]


def _for_counting(experiment: Experiment) -> Experiment:
    """The experiment without options that change no parameter but need packages which this machine may lack when a model is built."""
    parallel = replace(experiment.parallel, expert_dispatch="alltoall", overlap_experts=False, delay_weight_gradients=False)
    precision = "bf16" if experiment.train.precision == "fp8" else experiment.train.precision
    return replace(
        experiment,
        parallel=parallel,
        train=replace(experiment.train, precision=precision),
        precision=replace(experiment.precision, fp8_weights=False),
    )


def _count(modules: Sequence[torch.nn.Module], *, only_trainable: bool) -> dict[str, int]:
    parts = (part for module in modules for part in module.named_children())
    counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad or not only_trainable) for name, part in parts}
    return {name: count for name, count in counts.items() if count}


def stage_table(experiment: Experiment) -> Iterator[str]:
    """A line for each pipeline stage: its layers, and the parameters that each of its processes holds, in total and trainable."""
    parallel = experiment.parallel
    layers = layers_per_stage(parallel, num_layers=experiment.model.decoder.num_layers)
    policy = experiment.train.freeze_policy
    yield f"stage  pipeline rank  chunk  decoder layers  parameters on a process, and the trainable ones under freeze policy {policy}"
    for stage, parameters in enumerate(stage_parameters(experiment)):
        chunk, rank = divmod(stage, parallel.pipeline)
        trainable = "all trainable" if parameters.trainable == parameters.held else f"trainable {_total(parameters.trainable)}"
        yield f"{stage:5d}  {rank:13d}  {chunk:5d}  {layers[stage]:14d}  {_total(parameters.held)}; {trainable}"


def _total(parts: dict[str, int]) -> str:
    details = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    return f"{sum(parts.values()):,} ({details})" if parts else "0"


def _plan(experiment: Experiment) -> Iterator[str]:
    from megatron_mm.run.data import TRAINING, has_data, make_plan

    if not has_data(experiment):
        data = experiment.data.path
        missing = "contains no data set" if experiment.data.folder.is_dir() else "does not exist"
        yield f"no plan: data path {data} {missing} (use --data.path)"
        return
    if not experiment.data.tokenizer_path.is_file():
        yield f"tokenizer {experiment.data.tokenizer_path} does not exist (use --data.tokenizer)"
    else:
        fitting_tokenizer(experiment)
    plan = make_plan(experiment, split=TRAINING)
    state = plan.initial_state()
    for step in range(1, PLANNED_STEPS + 1):
        batch = plan.batch(state)
        yield f"step {step}:"
        yield from plan.describe(batch)
        state = batch.next_state


def _beginning(experiment: Experiment) -> Iterator[str]:
    if experiment.init_from is None:
        return
    if not experiment.init_from.exists():
        yield f"no check of its beginning: init_from {experiment.init_from} does not exist (use --init-from)"
    else:
        check_beginning(experiment, experiment.init_from, tokenizer=experiment.data.tokenizer_path.is_file())

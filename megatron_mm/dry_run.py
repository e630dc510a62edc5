"""What a run would be, without starting one: configuration, parameters of every pipeline stage, and the first steps' plan."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megatron_mm.config import Experiment, to_dict
from megatron_mm.models import family_of
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.build import build_chunks
from megatron_mm.parallel.stages import layers_per_stage

PLANNED_STEPS = 2


def describe(experiment: Experiment) -> Iterator[str]:
    """Lines for the terminal. Raises ValueError where the layout cannot hold the model, or data is named and cannot be opened."""
    parallel = experiment.parallel
    world_size = max(topologies.world_size(), parallel.model_parallel_size * parallel.expert)
    family_of(experiment.model).check_layout(experiment.model, parallel, world_size)
    data_size = parallel.data_parallel_size(world_size)
    yield json.dumps(to_dict(experiment), indent=2)
    yield ""
    yield (
        f"{world_size} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data_size}; "
        f"{experiment.num_micro_batches(data_size)} micro-batches of {experiment.train.micro_batch_size} sequences each a step"
    )
    yield from stage_table(experiment)
    yield ""
    yield from _plan(experiment)


def stage_parameters(experiment: Experiment) -> list[dict[str, int]]:
    """Parameters by part that each process of each pipeline stage holds (its own cut of them), in pipeline order."""
    parallel = experiment.parallel
    stages: dict[int, dict[str, int]] = {}
    for rank in range(parallel.pipeline):
        with topologies.pretend(parallel, pipeline_rank=rank) as topology:
            for virtual_stage, chunk in enumerate(build_chunks(experiment, topology)):
                parts = {name: sum(p.numel() for p in part.parameters()) for name, part in chunk.named_children()}
                stages[virtual_stage * parallel.pipeline + rank] = {name: count for name, count in parts.items() if count}
    return [stages[stage] for stage in sorted(stages)]


def stage_table(experiment: Experiment) -> Iterator[str]:
    """A line for each pipeline stage: its layers and the parameters that one process of it holds."""
    parallel = experiment.parallel
    layers = layers_per_stage(parallel, num_layers=experiment.model.decoder.num_layers)
    yield "stage  pipeline rank  chunk  decoder layers  parameters on a process"
    for stage, parts in enumerate(stage_parameters(experiment)):
        total = sum(parts.values())
        details = ", ".join(f"{name} {count:,}" for name, count in parts.items())
        chunk, rank = divmod(stage, parallel.pipeline)
        yield f"{stage:5d}  {rank:13d}  {chunk:5d}  {layers[stage]:14d}  {total:,} ({details})"


def _plan(experiment: Experiment) -> Iterator[str]:
    from megatron_mm.data.pipeline import make_plan

    if not experiment.data.path.is_dir():
        yield f"no plan: data path {experiment.data.path} does not exist (give --data.path)"
        return
    plan = make_plan(experiment, split="train")
    state = plan.initial_state()
    for step in range(1, PLANNED_STEPS + 1):
        batch = plan.batch(state)
        yield f"step {step}:"
        yield from plan.describe(batch)
        state = batch.next_state

"""What only saves on GPUs do, shown without one: weights are gathered during the next forward pass, and a save stages its
tensors in memory that the writer reads (`training.checkpoint.staging`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.parallel import topology as topologies
from megatron_mm.training import build
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.checkpoint.staging import Staging
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


def weights_after_saves(folder: Path) -> list[bool]:
    """Save, and train on while the files are written. Return whether all processes have the same weights after an update and after a save
    to memory, and whether the checkpoint holds the weights of when it was saved."""
    build.DistributedDataParallelConfig = gathering_late  # type: ignore[misc, assignment]
    experiment = small_experiment()
    experiment = replace(experiment, checkpoint=replace(experiment.checkpoint, memory=folder / "memory"))
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build.build_model(experiment, topology)
    optimizer = build_optimizer(experiment, model)
    step = TrainingStep(experiment, topology, model, optimizer, num_sources=2)
    step.run(random_step(experiment, topology, step=1), step=1)
    weights = [parameter for chunk in model for parameter in chunk.parameters()]
    same = [are_same(weights)]
    checkpointer = Checkpointer(experiment, topology, folder, model, optimizer)
    checkpointer.staging = Staging(topology.device)
    checkpointer.save(TrainState(step=1))
    updated = [weight.detach().clone() for weight in weights]
    step.run(random_step(experiment, topology, step=2), step=2)
    checkpointer.finish()
    checkpointer.keep_in_memory(TrainState(step=2))
    same.append(are_same(weights))
    checkpointer.load(next(checkpointer.folder.glob("step_*")))
    same.append(all(torch.equal(weight, expected) for weight, expected in zip(weights, updated, strict=True)))
    return same


def gathering_late(**options: Any) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(**{**options, "overlap_param_gather": True})


def are_same(weights: list[torch.Tensor]) -> bool:
    sums = torch.stack([weight.detach().double().square().sum() for weight in weights])
    others = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(others, sums)
    return all(torch.equal(sums, other) for other in others)


def test_a_save_waits_for_all_weights_and_writes_what_it_staged(tmp_path: Path) -> None:
    for after_update, *saved in run_processes(weights_after_saves, 2, tmp_path):
        assert not after_update, "the test shows nothing: the update has gathered all weights"
        assert saved == [True, True]

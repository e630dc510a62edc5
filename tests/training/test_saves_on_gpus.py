"""What only saves on GPUs do, shown without one: weights are gathered during the next forward pass, and a writer reads pinned memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.distributed import DistributedDataParallelConfig
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import engine
from megatron_mm.training import build
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


def weights_and_staged(folder: Path) -> tuple[list[bool], list[list[bool]]]:
    """Save twice. Return whether all processes have the same weights after an update and after a save to memory, and whether the checkpoint
    holds the updated weights; and whether copies in pinned memory exist (while the writer may read them, and after the save)."""
    build.DistributedDataParallelConfig = gathering_late  # type: ignore[misc, assignment]
    staged = copy_as_for_a_gpu()
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
    checkpointer.save(TrainState(step=1))
    gc.collect()
    exist = [[copy() is not None for copy in staged]]
    checkpointer.finish()
    gc.collect()
    exist.append([copy() is not None for copy in staged])
    engine.gather_weights(model)
    updated = [weight.detach().clone() for weight in weights]
    step.run(random_step(experiment, topology, step=2), step=2)
    checkpointer.keep_in_memory(TrainState(step=2))
    same.append(are_same(weights))
    checkpointer.load(next(checkpointer.folder.glob("step_*")))
    same.append(all(torch.equal(weight, expected) for weight, expected in zip(weights, updated, strict=True)))
    return same, exist


def gathering_late(**options: Any) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(**{**options, "overlap_param_gather": True})


def copy_as_for_a_gpu() -> list[weakref.ref[torch.Tensor]]:
    """Let a save copy all tensors before it starts the writer; return references to the copies."""
    staged: list[weakref.ref[torch.Tensor]] = []

    def preload(buckets: Any, non_blocking: bool = True) -> Any:
        found = [(path, key, (other, [(item, tensor.clone()) for item, tensor in tensors])) for path, key, (other, tensors) in buckets]
        staged.extend(weakref.ref(copy) for _, _, (_, copies) in found for _, copy in copies)
        return found

    FileSystemWriterAsync.preload_tensors = staticmethod(preload)  # type: ignore[method-assign]
    return staged


def are_same(weights: list[torch.Tensor]) -> bool:
    sums = torch.stack([weight.detach().double().square().sum() for weight in weights])
    others = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(others, sums)
    return all(torch.equal(sums, other) for other in others)


def test_a_save_waits_for_all_weights_and_keeps_what_the_writer_reads(tmp_path: Path) -> None:
    for (after_update, *saved), (during, after) in run_processes(weights_and_staged, 2, tmp_path):
        assert not after_update, "the test shows nothing: the update has gathered all weights"
        assert saved == [True, True]
        assert during and all(during), "the writer's copies are freed while it may read them"
        assert not any(after), "copies are kept for ever"

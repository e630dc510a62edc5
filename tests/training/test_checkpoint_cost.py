"""A save gathers nothing and writes every byte once; a run of elements is covered exactly by its boxes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.checkpoint.optimizer_state import Box, boxes
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


def test_the_worked_example() -> None:
    assert list(boxes((4, 3), 2, 10)) == [Box((0, 2), (1, 1)), Box((1, 0), (2, 3)), Box((3, 0), (1, 1))]


@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (1, 5), (3, 2, 4), (2, 3, 2, 2)])
def test_boxes_cover_every_run_in_order_and_nothing_else(shape: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for begin, end in itertools.combinations_with_replacement(range(numbers.size + 1), 2):
        found = list(boxes(shape, begin, end))
        covered = [numbers[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))].flatten() for box in found]
        assert np.concatenate([*covered, np.zeros(0, int)]).tolist() == list(range(begin, end))
        assert len(found) <= max(1, 2 * len(shape) - 1)


def save(folder: Path, parallel: dict[str, Any]) -> tuple[int, int]:
    """Save after a step; return the bytes of floating-point tensors sent in collectives meanwhile, and those that this process copied."""
    experiment = small_experiment(parallel=parallel, global_batch_size=8)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    optimizer = build_optimizer(experiment, model)
    TrainingStep(experiment, topology, model, optimizer, num_sources=2).run(random_step(experiment, topology, step=1), step=1)
    checkpointer = Checkpointer(experiment, topology, folder, model, optimizer)
    sent = 0

    def counting(collective: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            tensors = [item for value in (*args, *kwargs.values()) for item in (value if isinstance(value, list) else [value])]
            sent += sum(
                t.numel() * t.itemsize for t in tensors if isinstance(t, torch.Tensor) and t.dtype in (torch.float32, torch.bfloat16)
            )
            return collective(*args, **kwargs)

        return call

    for name in ("all_gather", "all_gather_into_tensor", "gather", "all_to_all", "broadcast", "send", "isend"):
        setattr(dist, name, counting(getattr(dist, name)))
    copied, clone = 0, torch.Tensor.clone

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal copied
        copied += tensor.numel() * tensor.itemsize if tensor.is_floating_point() else 0
        return clone(tensor, *args, **kwargs)

    torch.Tensor.clone = counted  # type: ignore[method-assign, assignment]
    checkpointer.save(TrainState(step=1))
    torch.Tensor.clone = clone  # type: ignore[method-assign]
    checkpointer.finish()
    return sent, copied


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {}),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(8, {}, marks=pytest.mark.slow),
        pytest.param(8, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_save_gathers_nothing_and_writes_every_byte_once(tmp_path: Path, world_size: int, parallel: dict[str, Any]) -> None:
    of_processes = run_processes(save, world_size, tmp_path, parallel)
    assert [sent for sent, _ in of_processes] == [0] * world_size
    (tensors,) = (tmp_path / "checkpoints").glob("step_*/tensors")
    metadata = dcp.FileSystemReader(tensors).read_metadata()
    stored: dict[str, int] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, dcp.metadata.TensorStorageMetadata):
            assert sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size), name
            stored[name] = math.prod(entry.size) * entry.properties.dtype.itemsize
    of_rank = [sum(path.stat().st_size for path in tensors.glob(f"__{rank}_*.distcp")) for rank in range(world_size)]
    if not parallel:  # stages differ in size, and copies of a tensor-parallel group are written by its first process
        assert max(of_rank) < 1.5 * sum(stored.values()) / world_size + 200_000, "every process writes its share; each tensor has a header"
    copied = sum(copied for _, copied in of_processes)
    assert copied < 0.1 * sum(stored.values()), "a fork sees this process's memory: only a SwiGLU's two branches are cut from it"

"""Sums and copies of many parameters at once equal megatron-core's, made one by one, with fewer operations."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from support.distributed import run_processes
from support.small import random_step, small_experiment
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import multi_tensor
from megatron_mm.training import build
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

STEPS = 3


class Operations(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def trained(parallel: dict[str, Any], precision: str, one_by_one: bool) -> tuple[list[float], list[torch.Tensor], Counter[str]]:
    """Losses, final weights, and the number of calls of each operation in the last step."""
    experiment = small_experiment(parallel=parallel, precision=precision)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    multi_tensor.install()
    copies = DistributedOptimizer._copy_main_params_to_model_params
    with (
        patch.object(build, "DataParallel", DistributedDataParallel if one_by_one else multi_tensor.DataParallel),
        patch.object(DistributedOptimizer, "_copy_main_params_to_model_params", copies.one_by_one if one_by_one else copies),
        patch.object(multi_tensor, "install", lambda: None),
    ):
        model = build.build_model(experiment, topology)
        step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
        losses = []
        for number in range(1, STEPS + 1):
            batches = random_step(experiment, topology, step=number)
            with Operations() as operations:
                losses.append(step.run(batches, step=number).losses.mean)
    weights = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    topologies.shutdown()
    return losses, weights, operations.counts


@pytest.mark.parametrize(
    ("world_size", "precision", "parallel"),
    [
        (1, "bf16", {}),
        pytest.param(1, "fp32", {}, marks=pytest.mark.slow),
        pytest.param(2, "bf16", {"overlap_grad_reduce": True}, marks=pytest.mark.slow),
        pytest.param(2, "bf16", {"overlap_grad_reduce": False}, marks=pytest.mark.slow),
        pytest.param(2, "bf16", {"pipeline": 2, "recompute": "full"}, marks=pytest.mark.slow),
        pytest.param(2, "bf16", {"distributed_optimizer": False}, marks=pytest.mark.slow),
        pytest.param(4, "bf16", {"tensor": 2, "pipeline": 2, "spread_encoder": True}, marks=pytest.mark.slow),
    ],
)
def test_sums_and_copies_are_the_same_in_fewer_operations(world_size: int, precision: str, parallel: dict[str, Any]) -> None:
    one_by_one, together = (run_processes(trained, world_size, parallel, precision, slowly) for slowly in (True, False))
    data_size = world_size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1))
    all_vectors = copies_saved = 0
    for (losses, weights, before), (other_losses, other_weights, after) in zip(one_by_one, together, strict=True):
        assert losses == other_losses
        assert all(map(torch.equal, weights, other_weights))
        vectors = sum(weight.ndim == 1 for weight in weights)
        assert before["add_"] - after["add_"] >= 4 // data_size * vectors, "one sum for each vector and micro-batch"
        assert after["_foreach_add_"] <= 3 * 4, "one for the vectors of a micro-batch, at most one for each bucket"
        all_vectors, copies_saved = all_vectors + vectors, copies_saved + before["copy_"] - after["copy_"]
    assert all_vectors > 8, "else the sums above show nothing"
    if precision == "bf16" and parallel.get("distributed_optimizer", True):
        assert copies_saved >= all_vectors // data_size, "each weight is copied by the one process that updates it"

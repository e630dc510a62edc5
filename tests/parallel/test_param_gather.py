"""Parameters of a sparse model are gathered once per step, and the weights equal those of megatron-core's own step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core.distributed import param_and_grad_buffer
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import MoEConfig
from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import engine
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep


def train(by_upstream: bool) -> tuple[Counter[str], int, list[torch.Tensor]]:
    """Train two steps on two processes; return the counts of collectives, the number of buckets, and the final weights."""
    calls: Counter[str] = Counter()
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, _counted(getattr(param_and_grad_buffer, name), name, calls))
    if by_upstream:
        engine.step_and_gather = lambda optimizer: optimizer.step_with_ready_grads()
    experiment = small_experiment(decoder={"moe": MoEConfig(num_experts=4, every_n_layers=2)})
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    for number in (1, 2):
        step.run(random_step(experiment, topology, step=number), step=number)
    weights = [parameter.detach().clone() for parameter in model[0].parameters()]
    buckets = sum(len(group.buckets) for group in model[0].bucket_groups + model[0].expert_parallel_bucket_groups)
    topologies.shutdown()
    return calls, buckets, weights


def _counted(function: Any, name: str, calls: Counter[str]) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*arguments, **options)

    return call


@pytest.fixture(scope="module")
def ours() -> tuple[Counter[str], int, list[torch.Tensor]]:
    return run_processes(train, 2, False)[0]


def test_each_bucket_is_gathered_once_a_step(ours: tuple[Counter[str], int, list[torch.Tensor]]) -> None:
    calls, buckets, _ = ours
    assert buckets >= 2, "one of dense parameters and one of experts"
    assert calls == {"dist_all_gather_func": 2 * buckets, "dist_reduce_scatter_func": 2 * buckets}


def test_weights_are_those_of_upstream_which_gathers_twice(ours: tuple[Counter[str], int, list[torch.Tensor]]) -> None:
    calls, buckets, weights = run_processes(train, 2, True)[0]
    assert calls["dist_all_gather_func"] == 4 * buckets, "megatron-core gathers once now: platform.engine.step_and_gather may go"
    assert all(torch.equal(a, b) for a, b in zip(ours[2], weights, strict=True))

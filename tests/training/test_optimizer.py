"""The learning rate, weight decay, clipping, and steps with non-finite gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import OptimizerConfig
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer, learning_rate
from megatron_mm.training.step import TrainingStep

CONFIG = OptimizerConfig(peak_lr=1.0, min_lr=0.1, warmup_steps=10)


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, CONFIG, schedule_steps=110) for step in (1, 5, 10, 35, 60, 110, 1000)]
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert rates == pytest.approx([0.1, 0.5, 1.0, quarter, 0.55, 0.1, 0.1])


def test_constant_learning_rate_stays_at_the_peak() -> None:
    constant = replace(CONFIG, decay="constant")
    assert [learning_rate(step, constant, schedule_steps=20) for step in (5, 10, 20, 500)] == [0.5, 1.0, 1.0, 1.0]


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(1, replace(CONFIG, warmup_steps=0), schedule_steps=10**9) == pytest.approx(1.0)


def _decayed() -> dict[str, float]:
    """Return the weight-decay multiplier of each parameter, by name."""
    experiment = small_experiment()
    model = build_model(experiment, topologies.initialize(experiment.parallel, seed=1))
    optimizer = build_optimizer(experiment, model)
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    names = {id(parameter): name for name, parameter in model[0].module.named_parameters()}
    found = {}
    for group in (
        part.model_float16_groups if hasattr(part, "model_float16_groups") and any(part.model_float16_groups) else part.model_fp32_groups
    ):
        for parameter in group:
            group_index, _ = part.model_param_group_index_map[parameter]
            found[names[id(parameter)]] = part.param_groups[group_index]["wd_mult"]
    return found


def test_weight_decay_leaves_out_norms_biases_and_vectors() -> None:
    (decayed,) = run_processes(_decayed, 1)
    assert len(decayed) > 50
    for name, factor in decayed.items():
        vector = name.endswith(("bias", "norm.weight", "class_embedding", "norm1.weight", "norm2.weight"))
        assert factor == (0.0 if vector else 1.0), name


def _poisoned(rank_to_poison: int) -> dict[str, Any]:
    """Run three steps on two data-parallel ranks; in the second step, the loss mask of one rank has a NaN."""
    experiment = small_experiment(parallel={"tensor": 2})
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    skipped, changed, norms = [], [], []
    for number in (1, 2, 3):
        batches = random_step(experiment, topology, step=number)
        if number == 2 and topology.data_rank == rank_to_poison:
            mask = batches[0].loss_mask.clone()
            mask[0] = float("nan")
            batches[0] = replace(batches[0], loss_mask=mask)
        before = [parameter.detach().clone() for parameter in model[0].parameters()]
        result = step.run(batches, step=number)
        skipped.append(result.update.skipped)
        norms.append(result.update.grad_norm)
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True)))
    return {"skipped": skipped, "changed": changed, "finite": [math.isfinite(norm) for norm in norms]}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(rank: int) -> None:
    expected = {"skipped": [False, True, False], "changed": [True, False, True], "finite": [True, False, True]}
    assert run_processes(_poisoned, 4, rank) == [expected] * 4


def _clipped(limit: float) -> float:
    """Return the norm of the weights' change in the first step."""
    experiment = small_experiment()
    experiment = replace(
        experiment, optimizer=replace(experiment.optimizer, clip_grad_norm=limit, epsilon=1.0, weight_decay=0.0, warmup_steps=0)
    )
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    before = [parameter.detach().clone() for parameter in model[0].parameters()]
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    step.run(random_step(experiment, topology, step=1), step=1)
    return math.sqrt(sum(float((a - b.detach()).square().sum()) for a, b in zip(before, model[0].parameters(), strict=True)))


def test_gradients_are_clipped_to_the_limit() -> None:
    """With epsilon 1 and tiny gradients Adam's first step is lr * g / (|g| + 1), nearly proportional to the gradient."""
    (small,), (smaller,) = run_processes(_clipped, 1, 1e-3), run_processes(_clipped, 1, 1e-4)
    assert small / smaller == pytest.approx(10.0, rel=5e-2)

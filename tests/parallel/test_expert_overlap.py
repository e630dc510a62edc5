"""Experts' exchange overlapped with another micro-batch's matrix products: same losses, and padding is not routed."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import MoEConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

STEPS = 5
PADDING = 20
"""Tokens at the end of each micro-batch."""


def train(parallel: dict[str, Any], depth: int) -> tuple[list[float], list[float], np.ndarray]:
    """Train; return losses, gradient norms, and tokens of each expert. Called by all processes of a layout.

    In fp32, so that equality can be tested: megatron-core requires bf16, but its schedule does not depend on it.
    """
    check = TransformerConfig.__post_init__

    def unchecked(self: TransformerConfig) -> None:
        self.bf16, own = True, self.bf16
        check(self)
        self.bf16 = own

    TransformerConfig.__post_init__ = unchecked  # type: ignore[method-assign]
    experts = MoEConfig(num_experts=4, every_n_layers=2)
    experiment = small_experiment(parallel=parallel, decoder={"moe": experts, "num_layers": depth})
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    results = [step.run([_padded(batch) for batch in random_step(experiment, topology, step=n)], step=n) for n in range(1, STEPS + 1)]
    topologies.shutdown()
    routing = [result.routing for result in results if result.routing is not None]
    return (
        [result.losses.mean for result in results],
        [result.update.grad_norm for result in results],
        np.stack([stats.tokens_per_expert for stats in routing]),
    )


def _padded(batch: PackedBatch) -> PackedBatch:
    is_token, mask = batch.is_token.clone(), batch.loss_mask.clone()
    is_token[-PADDING:], mask[-PADDING - 1 :] = False, 0
    return replace(batch, is_token=is_token, loss_mask=mask)


@functools.cache
def _one_process(depth: int) -> tuple[list[float], list[float], np.ndarray]:
    return run_processes(train, 1, {}, depth)[0]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (2, {"expert": 2}),
        pytest.param(4, {"expert": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"expert": 2, "pipeline": 2, "virtual": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"expert": 2, "pipeline": 2, "virtual": 2, "spread_encoder": True}, marks=pytest.mark.slow),
        pytest.param(2, {"expert": 2, "recompute": "selective", "recompute_modules": ("layernorm",)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_equal_those_of_one_process(world_size: int, parallel: dict[str, Any]) -> None:
    depth = 2 * parallel.get("pipeline", 1) * parallel.get("virtual", 1)
    losses, norms, tokens = _one_process(depth)
    for found in run_processes(train, world_size, {**parallel, "overlap_experts": True}, depth):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-4)
        assert (found[2] == tokens).all()
    assert torch.tensor(tokens[0].sum()) == (96 + 64) * 2 * 2 * (depth // 2) - 4 * PADDING * 2 * (depth // 2)  # top-2 of each sparse layer

"""FusedAdamW computes AdamW, and keeps its state as apex's and Transformer Engine's Adam do."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import adam
from megatron_mm.platform.adam import FusedAdamW
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], *, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (7,))]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_torchs_adamw(weight_decay: float) -> None:
    ours, theirs = _parameters(), _parameters()
    _train(FusedAdamW(ours, **{**OPTIONS, "weight_decay": weight_decay}), ours, steps=10, seed=1)
    _train(torch.optim.AdamW(theirs, **{**OPTIONS, "weight_decay": weight_decay}), theirs, steps=10, seed=1)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-7)


def test_steps_are_counted_in_the_group_and_the_rest_in_two_tensors() -> None:
    parameters = _parameters()
    optimizer = FusedAdamW(parameters, **OPTIONS)
    _train(optimizer, parameters, steps=3, seed=1)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["step"] == 3
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in state["state"].values())


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameters = _parameters()
    optimizer = FusedAdamW(parameters, **OPTIONS)
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert torch.equal(parameters[1], before) and parameters[1] not in optimizer.state


def test_going_on_from_a_state_is_exact() -> None:
    straight, resumed = _parameters(), _parameters()
    optimizer = FusedAdamW(straight, **OPTIONS)
    _train(optimizer, straight, steps=3, seed=1)
    saved, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in straight]
    _train(optimizer, straight, steps=3, seed=2)
    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    second = FusedAdamW(resumed, **OPTIONS)
    second.load_state_dict(saved)
    _train(second, resumed, steps=3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_groups_of_older_checkpoints_are_completed() -> None:
    """Transformer Engine's Adam reads `bias_correction` from parameter groups, in which our older checkpoints lack it."""
    optimizer = FusedAdamW(_parameters(), **OPTIONS)
    assert optimizer.param_groups[0]["bias_correction"] is True
    del optimizer.param_groups[0]["bias_correction"]
    optimizer.param_groups[0]["lr"] = 0.5
    adam.complete_groups(SimpleNamespace(optimizer=optimizer))
    assert optimizer.param_groups[0]["bias_correction"] is True and optimizer.param_groups[0]["lr"] == 0.5


def _steps_after_loading(*, installed: bool) -> dict[str, Any]:
    """Return the class of Adam that megatron-core builds, and its step counters after its own state is loaded."""
    if not installed:
        adam.install = lambda: None
    experiment = small_experiment(precision="fp32")
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    optimizer = build_optimizer(experiment, model)
    TrainingStep(experiment, topology, model, optimizer, num_sources=2).run(random_step(experiment, topology, step=1), step=1)
    (part,) = getattr(optimizer, "chained_optimizers", [optimizer])
    optimizer.load_state_dict(optimizer.state_dict())
    inner = part.optimizer
    counters = {id(state["step"]) for state in inner.state.values() if "step" in state}
    return {
        "kind": type(inner).__name__,
        "parameters": len(inner.state),
        "counters": len(counters),
        "of group": "step" in inner.param_groups[0],
    }


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="megatron-core takes Transformer Engine's Adam here")
def test_upstream_still_gives_all_parameters_one_counter_of_steps() -> None:
    """The update of each parameter then increments it: after loading, one step with N parameters counts as N steps."""
    (found,) = run_processes(functools.partial(_steps_after_loading, installed=False), 1)
    assert found["kind"] == "AdamW", "megatron-core falls back to another Adam now: see platform/adam.py"
    assert found["parameters"] > 1 and found["counters"] == 1, "megatron-core keeps counters apart now: platform/adam.py may go"


def test_ours_counts_in_the_group() -> None:
    (found,) = run_processes(functools.partial(_steps_after_loading, installed=True), 1)
    assert found["kind"] == "FusedAdamW" and found["counters"] == 0 and found["of group"]


def test_megatron_core_counts_as_apex_does() -> None:
    adam.install()
    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    assert optimizer.Adam is distributed.Adam is FusedAdamW and not optimizer.USING_PYTORCH_OPTIMIZER
    assert distributed.HAVE_APEX_OR_TE and distributed.USING_APEX_OPTIMIZER

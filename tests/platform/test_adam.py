"""FusedAdamW is AdamW, and keeps its state as apex's and Transformer Engine's do."""

from __future__ import annotations

import copy
import importlib
import inspect

import torch

from megatron_mm.platform.adam import FusedAdamW, install

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


def test_it_is_torchs_adamw() -> None:
    ours, theirs = _parameters(), _parameters()
    _train(FusedAdamW(ours, **OPTIONS), ours, steps=10, seed=1)
    _train(torch.optim.AdamW(theirs, **OPTIONS), theirs, steps=10, seed=1)
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


def test_upstream_still_falls_back_to_torchs_adamw() -> None:
    source = inspect.getsource(importlib.import_module("megatron.core.optimizer"))
    assert "USING_PYTORCH_OPTIMIZER" in source, "megatron-core chooses its Adam otherwise now: see platform/adam.py"
    install()
    optimizer = importlib.import_module("megatron.core.optimizer")
    assert not optimizer.USING_PYTORCH_OPTIMIZER

"""Fused kernels are used if they can run, and refused if they are requested but cannot."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from support.small import small_experiment

from megatron_mm.config import Experiment, KernelConfig, MoEConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.models.context import Kernels
from megatron_mm.training.kernels import choose_kernels, fuse_weight_gradients


@pytest.fixture(params=[True, False])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if request.param else None)
    return bool(request.param)


def sparse() -> Experiment:
    base = small_experiment()
    return replace(base, model=replace(base.model, decoder=replace(base.model.decoder, moe=MoEConfig(num_experts=4, every_n_layers=2))))


def test_what_can_run_is_taken(triton: bool) -> None:
    assert choose_kernels(small_experiment(), backend="torch") == Kernels()
    assert choose_kernels(small_experiment(), backend="te") == Kernels(weight_gradients=True, cross_entropy=triton)
    expected = Kernels(weight_gradients=True, cross_entropy=triton, token_permutation=triton, router=True)
    assert choose_kernels(sparse(), backend="te") == expected
    assert choose_kernels(get_recipe("debug_infimm"), backend="te").eva_tower


def test_one_that_is_not_wanted_is_not_taken(triton: bool) -> None:
    without = replace(sparse(), kernels=KernelConfig(weight_gradients=False, token_permutation=False, router=False))
    assert choose_kernels(without, backend="te") == Kernels(cross_entropy=triton)


@pytest.mark.parametrize("triton", [True], indirect=True)
@pytest.mark.parametrize(
    ("kernel", "backend", "why"),
    [
        ("weight_gradients", "torch", "layers are plain PyTorch here"),
        ("cross_entropy", "torch", "layers are plain PyTorch here"),
        ("token_permutation", "te", "the model has no experts"),
        ("router", "te", "the model has no experts"),
        ("eva_tower", "te", "the model has no EVA tower"),
    ],
)
@pytest.mark.usefixtures("triton")
def test_one_that_is_asked_for_and_cannot_run_is_refused(kernel: str, backend: str, why: str) -> None:
    asked = replace(small_experiment(), kernels=KernelConfig(**{kernel: True}))
    with pytest.raises(ValueError, match=rf"kernels\.{kernel} is True, but .*{why}.*: leave it unset"):
        choose_kernels(asked, backend=backend)


def test_layers_that_can_add_weight_gradients_are_told_to() -> None:
    chunk = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    chunk[0].fuse_wgrad_accumulation = False
    fuse_weight_gradients([chunk])
    assert chunk[0].fuse_wgrad_accumulation and not hasattr(chunk[1], "fuse_wgrad_accumulation")

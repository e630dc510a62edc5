"""InfiMM under every layout: loss curves of 20 steps equal one process's, with 0 to 6 images a micro-batch and latents on every stage."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from curves import Curve, assert_same, train_curve
from distributed import run_processes
from small_infimm import infimm_step, small_infimm


@dataclass(frozen=True)
class Layout:
    world_size: int
    policy: str = "ift"
    parallel: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.policy, *(f"{name}={value}" for name, value in self.parallel.items()), f"on {self.world_size}"])


LAYOUTS = [
    Layout(2, "ift", {"pipeline": 2}),
    Layout(2, "ift", {"pipeline": 2, "virtual": 2}),
    Layout(2, "ift", {"tensor": 2}),
    Layout(8, "ift", {"tensor": 2, "pipeline": 2}),
    Layout(1, "ift", {"recompute": "full"}),
    Layout(2, "pt", {"pipeline": 2, "virtual": 2, "recompute": "full"}),
    Layout(2, "pt", {"pipeline": 2, "stage_layers": (3, 1), "distributed_optimizer": False}),
    Layout(4, "pt", {"tensor": 2, "pipeline": 2}),
    Layout(2, "pt", {}),
]
MORE_LAYOUTS = [
    Layout(2, "ift", {"tensor": 2, "sequence": False}),
    Layout(2, "ift", {"distributed_optimizer": False}),
    Layout(1, "ift", {"recompute": "selective"}),
    Layout(2, "pt", {"tensor": 2, "sequence": False, "recompute": "full"}),
    Layout(4, "pt", {"pipeline": 4}),
    Layout(4, "pt", {"pipeline": 4, "stage_layers": (1, 1, 0, 2)}),
    Layout(8, "pt", {"tensor": 2, "pipeline": 2, "virtual": 2, "recompute": "full"}),
]


def train(layout: Layout) -> Curve:
    """The loss curve in a layout; called by all its processes. Gates are opened, so that images matter from the first step."""
    return train_curve(small_infimm(parallel=layout.parallel, policy=layout.policy), infimm_step, prepare=open_gates)


@torch.no_grad()
def open_gates(model: list) -> None:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.6)


@functools.cache
def _one_process(policy: str) -> Curve:
    return run_processes(train, 1, Layout(1, policy))[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str)
def test_loss_curve_equals_that_of_one_process(layout: Layout) -> None:
    assert_same(run_processes(train, layout.world_size, layout), _one_process(layout.policy))


def test_what_learns_is_what_the_policy_says() -> None:
    bridge, everything = _one_process("pt").learned, _one_process("ift").learned
    assert bridge and all(".resampler." in name or ".gated." in name for name in bridge)
    assert any(".self_attention." in name for name in everything) and any(".embedding." in name for name in everything)
    assert not any(".vision." in name for name in everything), "the tower is frozen in every stage"

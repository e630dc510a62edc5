"""InfiMM in every layout: losses of 20 steps equal those of one process, with 0 to 6 images per micro-batch and latents on every stage."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.curves import Curve, Layout, assert_same, train_curve
from support.distributed import run_processes
from support.small_infimm import infimm_step, small_infimm

LAYOUTS = [
    Layout(2, {"pipeline": 2, "virtual": 2}, policy="ift"),
    Layout(4, {"tensor": 2, "pipeline": 2}, policy="pt"),
]
MORE_LAYOUTS = [
    Layout(2, {"tensor": 2}, policy="ift"),
    Layout(8, {"tensor": 2, "pipeline": 2}, policy="ift"),
    Layout(2, {"pipeline": 2, "virtual": 2, "recompute": "full"}, policy="pt"),
    Layout(2, {"pipeline": 2, "stage_layers": (3, 1), "distributed_optimizer": False}, policy="pt"),
    Layout(2, {"pipeline": 2}, policy="ift"),
    Layout(1, {"recompute": "full"}, policy="ift"),
    Layout(2, {}, policy="pt"),
    Layout(2, {"tensor": 2, "sequence": False}, policy="ift"),
    Layout(2, {"distributed_optimizer": False}, policy="ift"),
    Layout(1, {"recompute": "selective"}, policy="ift"),
    Layout(2, {"tensor": 2, "sequence": False, "recompute": "full"}, policy="pt"),
    Layout(4, {"pipeline": 4}, policy="pt"),
    Layout(8, {"tensor": 2, "pipeline": 2, "spread_encoder": True}, policy="ift"),
    Layout(2, {"pipeline": 2, "spread_encoder": True}, policy="pt"),
    Layout(4, {"pipeline": 4, "stage_layers": (1, 1, 0, 2)}, policy="pt"),
    Layout(8, {"tensor": 2, "pipeline": 2, "virtual": 2, "recompute": "full"}, policy="pt"),
]


def train(layout: Layout) -> Curve:
    """Return the loss curve in a layout; called by all its processes. Gates are opened, so that images matter from the first step."""
    return train_curve(small_infimm(parallel=layout.parallel, policy=layout.policy), infimm_step, prepare=open_gates)


@torch.no_grad()
def open_gates(model: list[Any]) -> None:
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.6)


@functools.cache
def _one_process(policy: str) -> Curve:
    return run_processes(train, 1, Layout(1, policy=policy))[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str)
def test_loss_curve_equals_that_of_one_process(layout: Layout) -> None:
    assert_same(run_processes(train, layout.world_size, layout), _one_process(layout.policy))


def test_what_is_trainable_is_what_the_policy_says() -> None:
    bridge, everything = _one_process("pt").learned, _one_process("ift").learned
    assert bridge and all(".resampler." in name or ".gated." in name for name in bridge)
    assert any(".self_attention." in name for name in everything) and any(".embedding." in name for name in everything)
    assert not any(".vision." in name for name in everything), "the tower is frozen in every stage"

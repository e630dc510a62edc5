"""Mono-InternVL under every layout: loss curves of 20 steps equal one process's, with no tile, some, and tiles alone in a micro-batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
from curves import Curve, assert_same, train_curve
from distributed import run_processes
from small_mono import mono_step, small_mono


@dataclass(frozen=True)
class Layout:
    world_size: int
    policy: str = "s2"
    parallel: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.policy, *(f"{name}={value}" for name, value in self.parallel.items()), f"on {self.world_size}"])


LAYOUTS = [
    Layout(2, "s2", {"pipeline": 2}),
    Layout(2, "s2", {"pipeline": 2, "virtual": 2}),
    Layout(2, "s2", {"tensor": 2}),
    Layout(8, "s2", {"tensor": 2, "pipeline": 2}),
    Layout(1, "s2", {"recompute": "full"}),
    Layout(2, "s1_1", {"tensor": 2, "recompute": "full"}),
    Layout(2, "s1_3", {"pipeline": 2, "virtual": 2, "recompute": "full"}),
    Layout(2, "s1_1", {}),
]
MORE_LAYOUTS = [
    Layout(2, "s2", {"tensor": 2, "sequence": False}),
    Layout(2, "s2", {"distributed_optimizer": False}),
    Layout(1, "s2", {"recompute": "selective"}),
    Layout(4, "s1_1", {"pipeline": 4, "stage_layers": (0, 2, 2, 0)}),
    Layout(2, "s1_3", {"tensor": 2, "sequence": False, "recompute": "full"}),
    Layout(8, "s2", {"tensor": 2, "pipeline": 2, "virtual": 2, "recompute": "full"}),
]


def train(layout: Layout) -> Curve:
    """The loss curve in a layout; called by all its processes."""
    return train_curve(small_mono(parallel=layout.parallel, policy=layout.policy), mono_step)


@functools.cache
def _one_process(policy: str) -> Curve:
    return run_processes(train, 1, Layout(1, policy))[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str)
def test_loss_curve_equals_that_of_one_process(layout: Layout) -> None:
    assert_same(run_processes(train, layout.world_size, layout), _one_process(layout.policy))


def test_what_learns_is_what_the_policy_says() -> None:
    visual = set(_one_process("s1_1").learned)
    assert visual and all(name.startswith(("0.patches.", "0.projector.")) or ".mlp.visual." in name for name in visual)
    with_attention = set(_one_process("s1_3").learned)
    assert with_attention > visual and all(".self_attention." in name for name in with_attention - visual)
    everything = set(_one_process("s2").learned)
    assert everything > with_attention and any(".mlp.text." in name for name in everything)
    assert "0.patches.class_embedding" not in everything, "it takes no part in anything"

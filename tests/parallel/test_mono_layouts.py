"""Mono-InternVL in every layout: losses of 20 steps equal those of one process; micro-batches have no tiles, some, or only tiles."""

from __future__ import annotations

import functools

import pytest
from support.curves import Curve, Layout, assert_same, train_curve
from support.distributed import run_processes
from support.small_mono import mono_step, small_mono

LAYOUTS = [
    Layout(2, {"pipeline": 2, "virtual": 2}, policy="s2"),
    Layout(4, {"tensor": 2, "pipeline": 2}, policy="s2"),
]
MORE_LAYOUTS = [
    Layout(2, {"tensor": 2}, policy="s2"),
    Layout(8, {"tensor": 2, "pipeline": 2}, policy="s2"),
    Layout(2, {"pipeline": 2, "virtual": 2, "recompute": "full"}, policy="s1_3"),
    Layout(2, {"pipeline": 2}, policy="s2"),
    Layout(1, {"recompute": "full"}, policy="s2"),
    Layout(2, {}, policy="s1_1"),
    Layout(2, {"tensor": 2, "recompute": "full"}, policy="s1_1"),
    Layout(2, {"tensor": 2, "sequence": False}, policy="s2"),
    Layout(2, {"distributed_optimizer": False}, policy="s2"),
    Layout(1, {"recompute": "selective"}, policy="s2"),
    Layout(4, {"pipeline": 4, "stage_layers": (0, 2, 2, 0)}, policy="s1_1"),
    Layout(2, {"tensor": 2, "sequence": False, "recompute": "full"}, policy="s1_3"),
    Layout(8, {"tensor": 2, "pipeline": 2, "virtual": 2, "recompute": "full"}, policy="s2"),
]


def train(layout: Layout) -> Curve:
    """Return the loss curve in a layout; called by all its processes."""
    return train_curve(small_mono(parallel=layout.parallel, policy=layout.policy), mono_step)


@functools.cache
def _one_process(policy: str) -> Curve:
    return run_processes(train, 1, Layout(1, policy=policy))[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str)
def test_loss_curve_equals_that_of_one_process(layout: Layout) -> None:
    assert_same(run_processes(train, layout.world_size, layout), _one_process(layout.policy))


def test_what_is_trainable_is_what_the_policy_says() -> None:
    visual = set(_one_process("s1_1").learned)
    assert visual and all(name.startswith(("0.patches.", "0.projector.")) or ".mlp.visual." in name for name in visual)
    with_attention = set(_one_process("s1_3").learned)
    assert with_attention > visual and all(".self_attention." in name for name in with_attention - visual)
    everything = set(_one_process("s2").learned)
    assert everything > with_attention and any(".mlp.text." in name for name in everything)
    assert "0.patches.class_embedding" not in everything, "it takes no part in anything"

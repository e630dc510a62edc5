"""The layout never changes the result: losses of 20 steps equal those of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.curves import Curve, Layout, assert_same, train_curve
from support.distributed import run_processes
from support.small import IMAGES_OF_MICRO_BATCHES, random_step, small_experiment

from megatron_mm.parallel import topology as topologies

DEEP = {"num_layers": 4}
UNTIED = {"tied_embeddings": False}
FULL_HEADS = {"num_query_groups": 8}
PADDED = {"padding_rows": 40}
"""Of 128 vocabulary rows: of 4 tensor-parallel processes one has padding rows alone, and another some."""
LAYOUTS = [
    Layout(2, {"tensor": 2}),
    Layout(2, {"pipeline": 2}),
    Layout(2, {"pipeline": 2, "virtual": 2}, DEEP),
    Layout(2, {"distributed_optimizer": False}),
    Layout(8, {"tensor": 2, "pipeline": 2}),
    Layout(2, {"pipeline": 2, "spread_encoder": True}),
    Layout(1, {"recompute": "full"}),
    Layout(2, {"tensor": 2}, FULL_HEADS),
    Layout(2, {"tensor": 2}, PADDED),
]

MORE_LAYOUTS = [
    Layout(2, {"tensor": 2, "sequence": False}),
    Layout(2, {"pipeline": 2, "stage_layers": (3, 1)}, DEEP),
    Layout(2, {}),
    Layout(1, {"recompute": "selective"}),
    Layout(1, {"recompute": "selective", "recompute_modules": ("core_attn", "mlp", "layernorm")}),
    Layout(4, {"tensor": 2, "pipeline": 2}, UNTIED),
    Layout(4, {"tensor": 4}),
    Layout(4, {"tensor": 4}, PADDED | UNTIED),
    Layout(8, {"tensor": 2, "pipeline": 2, "spread_encoder": True}),
    Layout(4, {"pipeline": 2, "virtual": 2, "spread_encoder": True, "recompute": "full"}, DEEP),
    Layout(3, {"pipeline": 3, "spread_encoder": True}, DEEP),
    Layout(2, {"pipeline": 2, "stage_layers": (3, 1), "spread_encoder": True}, DEEP),
    Layout(2, {"pipeline": 2, "spread_encoder": True, "overlap_grad_reduce": False}),
    Layout(2, {"pipeline": 2, "stage_layers": (0, 4)}, DEEP),
    Layout(2, {"overlap_grad_reduce": False}),
    Layout(2, {"tensor": 2, "recompute": "full"}),
    Layout(8, {"tensor": 2, "pipeline": 2, "virtual": 2, "recompute": "full"}, DEEP),
]


def train(layout: Layout, precision: str = "fp32") -> Curve:
    """Return the loss curve in a layout; called by all its processes."""
    return train_curve(small_experiment(parallel=layout.parallel, decoder=layout.decoder, precision=precision), random_step)


@functools.cache
def _one_process(decoder: tuple[Any, ...], precision: str = "fp32") -> Curve:
    return run_processes(train, 1, Layout(1, decoder=dict(decoder)), precision)[0]


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str)
def test_loss_curve_equals_that_of_one_process(layout: Layout) -> None:
    assert_same(run_processes(train, layout.world_size, layout), _one_process(tuple(layout.decoder.items())))


def test_bf16_stays_close_to_one_process() -> None:
    """bf16 rounds to 8 bits of mantissa (4e-3) after sums in another order; 20 steps stay within 1e-2."""
    curve = run_processes(train, 4, Layout(4, {"tensor": 2, "pipeline": 2}), "bf16")[0]
    assert curve.losses == pytest.approx(_one_process((), "bf16").losses, rel=1e-2)


def test_steps_hold_micro_batches_with_no_one_and_many_images() -> None:
    alone = topologies.Topology(
        device=torch.device("cpu"), rank=0, world_size=1, tensor_rank=0, tensor_size=1, pipeline_rank=0, pipeline_size=1, virtual_size=1,
        data_rank=0, data_size=1,
    )  # fmt: skip
    experiment = small_experiment()
    for step in (1, 2):
        counts = {batch.num_images for batch in random_step(experiment, alone, step=step)}
        assert counts >= {0, 1} and max(counts) >= 3 and max(IMAGES_OF_MICRO_BATCHES) >= max(counts)

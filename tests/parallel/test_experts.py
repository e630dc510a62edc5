"""Sparse layers: the same losses, including auxiliary ones, in every layout; experts that receive no token."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_processes
from support.small import IMAGE_ID, random_step, small_experiment, small_run

from megatron_mm.config import MoEConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.models import moe
from megatron_mm.models.decoder import check_decoder_layout
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.start import start
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.routing import RoutingStats, draw_expert_load
from megatron_mm.training.step import TrainingStep

STEPS = 20
EXPERTS = MoEConfig(num_experts=4, every_n_layers=2)
TOLERANCE = 1e-5
"""Relative, fp32."""


@dataclass(frozen=True)
class Run:
    losses: list[float]
    grad_norms: list[float]
    routing: list[dict[str, float]]
    tokens_per_expert: np.ndarray


def train(
    parallel: dict[str, Any], experts: MoEConfig = EXPERTS, padding: int = 0, bias: tuple[float, ...] = (), only_images: bool = False
) -> Run:
    """Train for `STEPS` steps; called by all processes of a layout.

    Args:
        padding: number of tokens at the end of each micro-batch that become padding.
        bias: added to the router's logits.
        only_images: the first micro-batch of every step has only image tokens.
    """
    if bias:
        gating = moe.Router.gating
        moe.Router.gating = lambda self, input: gating(self, input) + torch.tensor(bias)
    experiment = small_experiment(parallel=parallel, decoder={"moe": experts, "num_layers": _depth(parallel)})
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    results = []
    for number in range(1, STEPS + 1):
        batches = [_pad(batch, padding) for batch in random_step(experiment, topology, step=number)]
        if only_images:
            ids = torch.full_like(batches[0].token_ids, IMAGE_ID)
            batches[0] = replace(batches[0], token_ids=ids, loss_mask=torch.zeros_like(batches[0].loss_mask))
        results.append(step.run(batches, step=number))
    topologies.shutdown()
    assert all(result.routing is not None for result in results)
    return Run(
        losses=[result.losses.mean for result in results],
        grad_norms=[result.update.grad_norm for result in results],
        routing=[result.routing.summary() for result in results],
        tokens_per_expert=sum(result.routing.tokens_per_expert for result in results),
    )


def _depth(parallel: dict[str, Any]) -> int:
    """Return the smallest number of layers that the stages allow."""
    return 2 * parallel.get("virtual", 1)


def _pad(batch: PackedBatch, count: int) -> PackedBatch:
    if not count:
        return batch
    is_token, mask = batch.is_token.clone(), batch.loss_mask.clone()
    is_token[-count:], mask[-count - 1 :] = False, 0
    return replace(batch, is_token=is_token, loss_mask=mask)


@functools.cache
def _one_process(padding: int = 0, depth: int = 2) -> Run:
    return run_processes(train_deep if depth == 4 else train, 1, {}, EXPERTS, padding)[0]


def train_deep(parallel: dict[str, Any], experts: MoEConfig, padding: int) -> Run:
    """`train` with four layers."""
    global _depth
    _depth = lambda _: 4  # noqa: E731
    return train(parallel, experts, padding)


LAYOUTS = [
    (2, {"expert": 2}),
    (2, {"tensor": 2}),
    (4, {"pipeline": 2, "expert": 2}),
    (8, {"tensor": 2, "pipeline": 2, "expert": 2}),
]
MORE_LAYOUTS = [
    (2, {"expert": 2, "distributed_optimizer": False}),
    (4, {"expert": 4}),
    (4, {"tensor": 2, "expert": 2}),
    (2, {"pipeline": 2, "virtual": 2}),
    (2, {"expert": 2, "recompute": "full"}),
    (4, {"pipeline": 2, "expert": 2, "spread_encoder": True}),
]


@pytest.mark.parametrize(
    ("world_size", "parallel"), [*LAYOUTS, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str
)
def test_losses_and_auxiliary_losses_equal_those_of_one_process(world_size: int, parallel: dict[str, Any]) -> None:
    expected, runs = _one_process(depth=_depth(parallel)), run_processes(train, world_size, parallel)
    assert all(run.losses == runs[0].losses and run.routing == runs[0].routing for run in runs)
    assert runs[0].losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert runs[0].grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    for ours, theirs in zip(runs[0].routing, expected.routing, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)
    assert (runs[0].tokens_per_expert == expected.tokens_per_expert).all()


def test_padding_is_routed_nowhere_and_counted_nowhere() -> None:
    """Each of 4 micro-batches of 96 or 64 tokens ends with 20 tokens of padding: with sequence parallelism, all on the second process."""
    padded, cut = _one_process(20), run_processes(train, 2, {"tensor": 2}, EXPERTS, 20)[0]
    assert padded.tokens_per_expert.sum() == STEPS * 2 * (96 - 20 + 64 - 20) * 2  # top-2 of one layer
    assert cut.losses == pytest.approx(padded.losses, rel=TOLERANCE)
    for ours, theirs in zip(cut.routing, padded.routing, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_losses_are_as_defined() -> None:
    """With equal logits every expert has probability 1/4, so entropy is log 4, z is log(4)^2, and the balance loss is 1 for any choice."""
    run = run_processes(_even, 1)[0]
    assert run["router_entropy"] == pytest.approx(math.log(4), rel=1e-5)
    assert run["z_loss"] == pytest.approx(math.log(4) ** 2, rel=1e-5)
    assert run["load_balance_loss"] == pytest.approx(1.0, rel=1e-5)


def _even() -> dict[str, float]:
    moe.Router.gating = lambda self, input: 0.0 * torch.nn.functional.linear(input.float(), self.weight.float())
    experiment = small_experiment(decoder={"moe": EXPERTS})
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    routing = step.run(random_step(experiment, topology, step=1), step=1).routing
    assert routing is not None
    return routing.summary()


def test_a_process_whose_tokens_all_go_elsewhere_and_experts_that_get_nothing() -> None:
    """Experts 2 and 3, which the second process holds, receive no token in 20 steps."""
    runs = run_processes(train, 2, {"expert": 2}, EXPERTS, 0, (0.0, 0.0, -1e4, -1e4))
    assert (runs[0].tokens_per_expert[:, 2:] == 0).all() and (runs[0].tokens_per_expert[:, :2] > 0).all()
    assert all(math.isfinite(value) for value in [*runs[0].losses, *runs[0].grad_norms])
    assert runs[0].routing[-1]["load_imbalance"] == pytest.approx(2.0)


def test_a_micro_batch_of_image_tokens_alone() -> None:
    (run,) = run_processes(train, 1, {}, EXPERTS, 0, (), True)
    assert all(math.isfinite(value) for value in [*run.losses, *run.grad_norms])


def test_a_capacity_drops_tokens_and_counts_them() -> None:
    (run,) = run_processes(train, 1, {}, replace(EXPERTS, capacity_factor=0.5))
    assert run.routing[0]["dropped_tokens"] > 0
    assert run.tokens_per_expert.sum() < STEPS * 4 * 96 * 2
    assert all(math.isfinite(loss) for loss in run.losses)


# ------------------------------------------------------------------------------------------------------------------- resume


def _run(data: Path, run_dir: Path, parallel: dict[str, Any], steps: int) -> list[float]:
    experiment = small_run(data, parallel=parallel, steps=steps, schedule_steps=8)
    decoder = replace(experiment.model.decoder, moe=EXPERTS)
    start(replace(experiment, model=replace(experiment.model, decoder=decoder)), run_dir)
    import json

    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), (4, {"tensor": 2, "expert": 2})], ids=str)
def test_a_checkpoint_of_expert_parallel_2_goes_on_in_other_layouts(
    demo_data: Path, tmp_path: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    straight = run_processes(_run, 2, demo_data, tmp_path / "straight", {"expert": 2}, 8)[0]
    run_processes(_run, 2, demo_data, tmp_path / "cut", {"expert": 2}, 4)
    resumed = run_processes(_run, world_size, demo_data, tmp_path / "cut", parallel, 8)[0]
    assert resumed == pytest.approx(straight, rel=TOLERANCE)
    assert (tmp_path / "cut" / "expert_load.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("experts", "parallel", "message"),
    [
        (EXPERTS, {"expert": 3}, "parallel.expert 3 does not divide the 4 experts: use one of [1, 2, 4]"),
        (None, {"expert": 2}, "the model has no experts"),
        (None, {"tensor": 2, "expert_tensor": 2}, "parallel.expert_tensor is 2, but the model has no experts"),
        (
            replace(EXPERTS, num_experts=8),
            {"expert": 8},
            "does not divide the data-parallel size 12 (12 processes / tensor 1 / pipeline 1)",
        ),
        (MoEConfig(num_experts=4, every_n_layers=9), {}, "moe.every_n_layers 9 makes none of the 2 layers sparse"),
        (EXPERTS, {"tensor": 2, "sequence": False}, "experts need sequence parallelism"),
    ],
)
def test_layouts_that_experts_do_not_allow(experts: MoEConfig | None, parallel: dict[str, Any], message: str) -> None:
    experiment = small_experiment(decoder={"moe": experts}, parallel=parallel)
    with pytest.raises(ValueError, match=r"expert|sparse") as error:
        check_decoder_layout(experiment.model.decoder, experiment.parallel, 12)
    assert message in str(error.value)


def test_experts_are_cut_by_a_divisor_of_the_tensor_parallel_degree() -> None:
    with pytest.raises(ValueError, match=r"parallel\.expert_tensor 4 does not divide parallel\.tensor 2"):
        small_experiment(parallel={"tensor": 2, "expert_tensor": 4})


def test_cut_experts_need_gpus() -> None:
    experiment = small_experiment(decoder={"moe": EXPERTS}, parallel={"tensor": 2, "expert_tensor": 2})
    with pytest.raises(ValueError, match=r"parallel\.expert_tensor is 2, but gloo cannot gather the uneven numbers of tokens"):
        topologies.initialize(experiment.parallel, seed=1)


def test_the_heat_map_is_drawn(tmp_path: Path) -> None:
    stats = RoutingStats((1, 3), np.ones(2), np.ones(2), np.ones(2), np.array([[1.0, 6.0], [2.0, 2.0]]), np.array([[0.0, 4.0], [2.0, 2.0]]))
    assert stats.imbalance.tolist() == [2.0, 1.0] and stats.dropped.tolist() == [3.0, 0.0]
    assert draw_expert_load(stats.tokens_per_expert, stats.layers, tmp_path / "x.png", title="t").stat().st_size > 1000


@pytest.mark.slow
def test_a_collapsed_router_sends_no_process_more_than_its_bound() -> None:
    """All tokens choose the two experts of the first process: with a bound of 1.5 equal shares, 0.5 of 2 are dropped."""
    collapsed = (9.0, 9.0, 0.0, 0.0)
    bounded = run_processes(train, 2, {"expert": 2, "max_expert_load": 1.5}, EXPERTS, 0, collapsed)[0]
    free = run_processes(train, 2, {"expert": 2}, EXPERTS, 0, collapsed)[0]
    chosen, kept = free.tokens_per_expert.sum(), bounded.tokens_per_expert
    assert kept.sum() == pytest.approx(0.75 * chosen, rel=0.05) and (kept[:, :2].sum(), kept[:, 2:].sum()) == (kept.sum(), 0)
    assert all(step["dropped_tokens"] > 0 for step in bounded.routing) and all(math.isfinite(loss) for loss in bounded.losses)

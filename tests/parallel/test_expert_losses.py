"""The routers' losses are those of the whole global batch, however it is packed, and their gradients match their definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import Experiment, MoEConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.models.moe import Router, routers
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.routing import RoutingStats
from megatron_mm.training.step import TrainingStep

EXPERTS = MoEConfig(num_experts=4, every_n_layers=2)
STEPS = 5


def sparse_experiment(experts: MoEConfig = EXPERTS, **train: int) -> Experiment:
    """Build a small sparse model without gradient clipping."""
    experiment = small_experiment(decoder={"moe": experts}, **train)
    return replace(experiment, optimizer=replace(experiment.optimizer, clip_grad_norm=0.0))


def uneven_step(experiment: Experiment, topology: Topology, *, step: int) -> list[PackedBatch]:
    """Return micro-batches of one sequence each, with different numbers of images and real tokens: 96, 64, 64 and 48."""
    batches = random_step(experiment, topology, step=step)
    for index, batch in enumerate(batches):
        is_token, mask = batch.is_token.clone(), batch.loss_mask.clone()
        is_token[96 - 16 * index :], mask[95 - 16 * index :] = False, 0
        batches[index] = replace(batch, is_token=is_token, loss_mask=mask)
    return batches


def joined(first: PackedBatch, second: PackedBatch) -> PackedBatch:
    """Join two micro-batches into one."""
    cut = ("token_ids", "labels", "loss_mask", "is_token", "position_ids", "source_ids", "image_owners", "pixels")
    return replace(
        first,
        **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in cut},
        cu_seqlens=torch.cat([first.cu_seqlens, second.cu_seqlens[1:] + first.cu_seqlens[-1]]),
        max_seqlen=max(first.max_seqlen, second.max_seqlen),
        image_starts=torch.cat([first.image_starts, second.image_starts + first.num_tokens]),
        image_documents=torch.cat([first.image_documents, second.image_documents + first.num_tokens]),
    )


def train_packed(groups: list[tuple[int, ...]]) -> list[list[float]]:
    """Train; return loss, gradient norm and router values of each step. `groups` lists the sequences of each micro-batch."""
    experiment = sparse_experiment()
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    packed = replace(experiment, train=replace(experiment.train, micro_batch_size=len(groups[0])))
    step = TrainingStep(packed, topology, model, build_optimizer(packed, model), num_sources=2)
    values = []
    for number in range(1, STEPS + 1):
        one_by_one = uneven_step(experiment, topology, step=number)
        batches = [joined(*(one_by_one[index] for index in group)) if len(group) > 1 else one_by_one[group[0]] for group in groups]
        result = step.run(batches, step=number)
        assert result.routing is not None
        values.append([result.losses.mean, result.update.grad_norm, *result.routing.summary().values()])
    topologies.shutdown()
    return values


@pytest.mark.parametrize("groups", [[(0, 1), (2, 3)], [(0, 3), (2, 1)], [(3,), (1,), (0,), (2,)]], ids=str)
def test_losses_do_not_depend_on_which_sequences_share_a_micro_batch(groups: list[tuple[int, ...]]) -> None:
    expected, found = run_processes(train_packed, 1, [(0,), (1,), (2,), (3,)])[0], run_processes(train_packed, 1, groups)[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


# -------------------------------------------------------------------------------------------------------------------- gradients


def _router(experiment: Experiment) -> Router:
    topology = topologies.initialize(experiment.parallel, seed=1)
    ((layer, router),) = routers(build_model(experiment, topology))
    assert layer == 1
    return router


def _gradient_of_the_router_alone() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the router's gradient, that of the written-out definition) for 10 tokens, 3 of them padding, and uneven shares."""
    torch.manual_seed(0)
    router = _router(sparse_experiment(replace(EXPERTS, load_balance_loss=0.3, z_loss=0.2)))
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])
    router.shares.copy_(shares)
    router.token_weight = 0.6
    with torch.no_grad():
        router.weight.normal_()
    tokens, padding = torch.randn(10, 1, 64), torch.tensor([0, 0, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    weights, _ = router(tokens, padding[:, None])
    (found,) = torch.autograd.grad((0.0 * weights).sum(), [router.weight])

    weight = router.weight.detach().clone().requires_grad_()
    logits = tokens[~padding, 0] @ weight.T
    balance = 4 * sum(shares[expert] * logits.softmax(dim=1)[:, expert].sum() for expert in range(4))
    objective = 0.6 * (0.3 * balance + 0.2 * sum(token.exp().sum().log() ** 2 for token in logits))
    return found, torch.autograd.grad(objective, [weight])[0]


def test_a_routers_gradient_is_that_of_the_definition() -> None:
    found, expected = run_processes(_gradient_of_the_router_alone, 1)[0]
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def _first_step(z_loss: float, shift: float) -> tuple[torch.Tensor, RoutingStats]:
    """Run a whole step with the router's weights moved by `shift` in a fixed direction; return its gradient and statistics."""
    experiment = sparse_experiment(replace(EXPERTS, load_balance_loss=0.0, z_loss=z_loss))
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    ((_, router),) = routers(model)
    with torch.no_grad():
        router.weight.add_(shift * _direction())
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    result = step.run(uneven_step(experiment, topology, step=1), step=1)
    assert result.routing is not None
    gradient = router.weight.main_grad.clone()
    topologies.shutdown()
    return gradient, result.routing


def _direction() -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(3))


def _slopes() -> tuple[float, float]:
    """Return (the z-loss's part of the step's gradient along the direction, the slope of the logged z-loss along it)."""
    coefficient, distance = 50.0, 0.00125
    added = (_first_step(coefficient, 0.0)[0] - _first_step(0.0, 0.0)[0]) / coefficient
    rise = _first_step(0.0, distance)[1].z - _first_step(0.0, -distance)[1].z
    return float((added * _direction()).sum()), float(rise[0]) / (2 * distance)


def test_a_steps_gradient_is_that_of_the_logged_loss() -> None:
    """A coefficient therefore has the same effect on the objective, whatever share of the tokens is counted."""
    gradient, slope = run_processes(_slopes, 1)[0]
    assert abs(slope) > 0.1
    assert gradient == pytest.approx(slope, rel=2e-4)  # the error of the central difference, which falls with its square, is 4e-5


# ----------------------------------------------------------------------------------------------------------------------- shares


def _shares_after_a_step() -> tuple[torch.Tensor, torch.Tensor]:
    experiment = sparse_experiment()
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    ((_, router),) = routers(model)
    assert router.shares.tolist() == [0.25] * 4
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    routing = step.run(uneven_step(experiment, topology, step=1), step=1).routing
    assert routing is not None
    with torch.no_grad():
        step.evaluate(uneven_step(experiment, topology, step=2))
    names = [name for name in model[0].module.sharded_state_dict() if name.endswith("router.shares")]
    assert names == ["language.decoder.layers.1.mlp.router.shares"], "shares are a part of checkpoints"
    return router.shares.clone(), torch.from_numpy(routing.chosen_per_expert[0])


def test_routers_remember_the_shares_of_the_step_and_not_those_of_an_evaluation() -> None:
    shares, chosen = run_processes(_shares_after_a_step, 1)[0]
    assert chosen.sum() == 2 * (96 + 64 + 64 + 48), "two experts for each real token; the second micro-batch is 64 tokens long"
    torch.testing.assert_close(shares.double(), chosen / chosen.sum())

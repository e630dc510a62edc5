"""Routers as replays of graphs: sparse models train alike in every layout, and what cannot be right is refused before training."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support.distributed import run_processes
from support.recorded_graph import recorded_graphs
from support.small import random_step, small_experiment

from megatron_mm.config import Experiment, KernelConfig, MoEConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.models.moe import Router, routers
from megatron_mm.models.router_graph import GraphedRouting
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import cuda_graph
from megatron_mm.reporting.run_files import EVALUATIONS, METRICS
from megatron_mm.run import machine_checks
from megatron_mm.run import start as starting
from megatron_mm.training.build import build_model
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.router_graph import graph_routers
from megatron_mm.training.step import TrainingStep

STEPS, EXPERTS, WIDTH = 3, 4, 64


def sparse(*, graph: bool = False, parallel: dict[str, Any] | None = None, **train: Any) -> Experiment:
    """A small model whose layers are all sparse, and whose micro-batches have 96 and 64 tokens in turn."""
    decoder = {"moe": MoEConfig(num_experts=EXPERTS, every_n_layers=1), "num_layers": 2 * (parallel or {}).get("virtual", 1)}
    return replace(small_experiment(decoder=decoder, parallel=parallel, **train), kernels=KernelConfig(router_graph=graph))


def with_and_without(options: dict[str, Any]) -> list[tuple[list[list[float]], list[int]]]:
    """Return what `values` returns without and with graphs."""
    topology = topologies.initialize(sparse(**options).parallel, seed=1)
    try:
        with recorded_graphs():
            return [values(sparse(graph=graph, **options), topology) for graph in (False, True)]
    finally:
        topologies.shutdown()


def values(experiment: Experiment, topology: Topology) -> tuple[list[list[float]], list[int]]:
    """Return the values of some steps and of an evaluation, and how many forward passes of each router were replays."""
    model = build_model(experiment, topology)
    graph_routers(experiment, model, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    found = []
    for number in range(1, STEPS + 1):
        result = step.run(random_step(experiment, topology, step=number), step=number)
        assert result.routing is not None
        found.append([result.losses.mean, result.update.grad_norm, *result.routing.summary().values()])
    found.append([step.evaluate(random_step(experiment, topology, step=9)).mean])
    graphed = [router.graphed for _, router in routers(list(model)) if router.graphed is not None]
    return found, [graphs.replays for graphs in graphed if isinstance(graphs, GraphedRouting)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_the_same(precision: str) -> None:
    (plain, _), (found, replays) = with_and_without({"precision": precision})
    assert found == plain and replays == [4 * STEPS] * 2  # every micro-batch of training in both layers, and none of the evaluation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dropped"),
    [
        ({"pipeline": 2}, 0),
        ({"pipeline": 2, "virtual": 2}, 0),
        ({"tensor": 2}, 0),
        ({"expert": 2, "max_expert_load": 1.05}, 40),
        ({"expert": 2, "overlap_experts": True}, 0),
    ],
    ids=str,
)
def test_a_run_is_the_same_in_every_layout(layout: dict[str, Any], dropped: int) -> None:
    for (plain, _), (found, replays) in run_processes(with_and_without, 2, {"precision": "bf16", "parallel": layout}):
        micro_batches = 2 if "expert" in layout else 4
        assert (
            found == plain and replays == [micro_batches * STEPS] * len(replays) and len(replays) == (1 if layout == {"pipeline": 2} else 2)
        )
        assert sum(line[-1] for line in found[:-1]) >= dropped, "the limit of choices is reached"


# ------------------------------------------------------------------------------------------------------------------ a router by itself


@contextlib.contextmanager
def graphed_router() -> Iterator[tuple[Router, GraphedRouting]]:
    """The first router of a model, with one copy of its graphs, which have 96 rows."""
    experiment = sparse(graph=True)
    topology = topologies.initialize(experiment.parallel, seed=1)
    try:
        scale = torch.full((1,), 0.5)
        with recorded_graphs(), patch.object(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale):
            model = build_model(experiment, topology)
            assert graph_routers(experiment, model, topology) == 2
            _, router = next(routers(list(model)))
            assert isinstance(router.graphed, GraphedRouting) and len(router.graphed.copies) == 1 and router.graphed.rows == 96
            router.token_weight = torch.tensor(0.7)
            router.shares.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
            yield router, router.graphed
    finally:
        topologies.shutdown()


def passes(router: Router, *, tokens: int, graphed: GraphedRouting | None) -> tuple[torch.Tensor, ...]:
    """Run both passes on random tokens, the last tenth of which is padding; return weights, choices, gradient and record."""
    router.graphed = graphed
    hidden, weights, chosen, gradient = forward(router, tokens=tokens)
    (found,) = torch.autograd.grad(weights, hidden, gradient)
    return weights.detach().clone(), chosen.clone(), found, router.record.take(torch.device("cpu"))


def forward(router: Router, *, tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 1, WIDTH, generator=generator).requires_grad_()
    weights, chosen = router(hidden, torch.arange(tokens)[:, None] >= 0.9 * tokens)
    return hidden, weights, chosen, torch.randn(tokens, EXPERTS, generator=generator)


@pytest.mark.parametrize(("tokens", "replayed"), [((96, 8, 40, 96), 4), ((97, 96), 1)])
def test_micro_batches_of_any_size(tokens: tuple[int, ...], replayed: int) -> None:
    """Those of more than 96 tokens run without a graph."""
    with graphed_router() as (router, graphs):
        for number in tokens:
            found, expected = (passes(router, tokens=number, graphed=wanted) for wanted in (graphs, None))
            assert all(map(torch.equal, found[:3], expected[:3]))
            torch.testing.assert_close(found[3], expected[3], rtol=1e-6, atol=0)  # sums over another number of rows round differently
        assert graphs.replays == replayed


def test_a_micro_batch_that_waits_keeps_its_results() -> None:
    """While it waits for its backward pass, the others run without a graph. If that pass never comes, its copy is free again."""
    with graphed_router() as (router, graphs):
        expected = [passes(router, tokens=number, graphed=None) for number in (40, 96)]
        router.graphed = graphs
        (first, *waiting), (second, *other) = forward(router, tokens=40), forward(router, tokens=96)
        assert graphs.replays == 1 and not graphs.copies[0].is_free
        for hidden, (weights, chosen, gradient), (theirs, chosen_too, found, _) in zip(
            (first, second), (waiting, other), expected, strict=True
        ):
            assert torch.equal(weights, theirs) and torch.equal(chosen, chosen_too)
            assert torch.equal(torch.autograd.grad(weights, hidden, gradient)[0], found)
        assert graphs.copies[0].is_free
        dropped = forward(router, tokens=96)
        assert not graphs.copies[0].is_free
        del dropped
        assert graphs.copies[0].is_free


def test_a_number_that_is_not_finite_stays_in_its_micro_batch() -> None:
    with graphed_router() as (router, graphs):
        expected = passes(router, tokens=40, graphed=None)
        router.graphed = graphs
        with torch.enable_grad():
            weights, _ = router(torch.full((96, 1, WIDTH), torch.nan, requires_grad=True))
            weights.sum().backward()
        router.record.take(torch.device("cpu"))
        found = passes(router, tokens=40, graphed=graphs)
        assert all(map(torch.equal, found[:3], expected[:3])) and found[3].isfinite().all()


def test_a_frozen_router_and_generation_run_without_a_graph() -> None:
    with graphed_router() as (router, graphs):
        router.weight.requires_grad_(False)
        router(torch.zeros(8, 1, WIDTH))
        router.weight.requires_grad_(True)
        with torch.no_grad():
            router(torch.zeros(8, 1, WIDTH))
        router.eval()(torch.zeros(8, 1, WIDTH))
        assert graphs.replays == 0


def stale(forward: Any, backward: Any, example: torch.Tensor, **others: Any) -> cuda_graph.Passes:
    """A capture whose replays do not read their input."""
    weights = forward(example)
    gradient = torch.zeros_like(weights)
    backward(weights, gradient)
    return cuda_graph.Passes(weights.detach, gradient, lambda: None)


def failing(*_: Any, **__: Any) -> cuda_graph.Passes:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (stale, r"router_graph is True, but a replay of a router differs from the router by inf \(allowed: 1e-05\): leave it out"),
        (failing, r"router_graph is True, but the graph of a router fails \(operation not permitted when stream is capturing\): leave"),
    ],
)
def test_a_graph_that_is_wrong_or_fails_is_refused(capture: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "capture_passes", capture)
    with pytest.raises(ValueError, match=message), graphed_router():
        pass


# ---------------------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_whole_run_is_the_same(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With micro-batches of real documents, evaluations and captions in between, and a resume."""
    monkeypatch.setattr(machine_checks, "check_options", lambda experiment, **others: None)  # it finds no GPU
    base = get_recipe("debug_mm1_moe")
    for graph in (False, True):
        for steps in (3, 5):
            experiment = replace(
                base,
                data=replace(base.data, path=demo_data, decoder="pillow"),
                train=replace(base.train, steps=steps, global_batch_size=8, micro_batch_size=2),
                eval=replace(base.eval, interval=2, batches=1, samples=2),
                monitor=replace(base.monitor, wandb="disabled"),
                kernels=KernelConfig(router_graph=graph),
            )
            with recorded_graphs() as graphs:
                starting.start(experiment, tmp_path / str(graph))
            assert any(one.replays > 3 for one in graphs.made) == graph
    plain, found = (
        [
            *({name: line[name] for name in ("loss", "grad_norm", "experts")} for line in read_metrics(tmp_path / str(graph) / METRICS)),
            *map(json.loads, (tmp_path / str(graph) / EVALUATIONS).read_text().splitlines()),
        ]
        for graph in (False, True)
    )
    assert len(plain) > 5 and found == plain

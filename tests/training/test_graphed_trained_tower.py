"""A tower that trains as replays of graphs: MM1 trains alike, whichever micro-batches replay, and what is wrong is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.recorded_graph import RecordedGraph, recorded_graphs
from support.small import random_step, small_experiment, small_run

from megatron_mm.config import Experiment, KernelConfig
from megatron_mm.models.tower_graph import Forward
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.stages import most_in_flight
from megatron_mm.platform.cuda_graph import Passes, capture_passes
from megatron_mm.run import machine_checks
from megatron_mm.run import start as starting
from megatron_mm.training.build import build_model
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep
from megatron_mm.training.tower_graph import graph_tower, graphed_tower

IMAGES = 4
"""Micro-batches have none, one, and four images."""


@pytest.fixture
def graphs() -> Iterator[type[RecordedGraph]]:
    with recorded_graphs() as made:
        yield made


def graphed(experiment: Experiment, images: int = IMAGES) -> Experiment:
    return replace(experiment, kernels=KernelConfig(tower_graph=images))


def filled_up(forward: Forward, images: int = IMAGES) -> Forward:
    """Encode as many images as a graph does, so that features and gradients are the same bits."""

    def run(pixels: torch.Tensor) -> torch.Tensor:
        blank = pixels.new_zeros(max(0, images - len(pixels)), *pixels.shape[1:])
        return forward(torch.cat([pixels, blank]))[: len(pixels)]

    return run


def with_model(experiment: Experiment, use: Callable[[Any, Any], Any]) -> Any:
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    try:
        return use(topology, build_model(experiment, topology, optimizer=True))
    finally:
        topologies.shutdown()


def losses(experiment: Experiment) -> list[float]:
    """Return losses and gradient norms of three steps, and the loss of a validation."""

    def train(topology: Any, model: Any) -> list[float]:
        names = list(model[0].module.sharded_state_dict())
        tower = model[0].module.encoder.parts["vision"]
        if not graph_tower(experiment, model):
            tower.forward = filled_up(tower.forward)
        assert list(model[0].module.sharded_state_dict()) == names  # a checkpoint has the same tensors
        step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
        found = []
        for number in (1, 2, 3):
            result = step.run(random_step(experiment, topology, step=number), step=number)
            found += [result.losses.mean, result.update.grad_norm]
        assert all(copy.is_free for copy in getattr(tower.forward, "copies", ()))
        return [*found, step.evaluate(random_step(experiment, topology, step=4)).mean]

    return with_model(experiment, train)  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_and_gradient_norms_are_bit_identical(precision: str, graphs: type[RecordedGraph]) -> None:
    experiment = small_experiment(precision=precision)
    plain = losses(experiment)
    assert not graphs.made
    assert losses(graphed(experiment)) == plain
    forward, backward = graphs.made  # one copy of both passes
    assert backward.replays == 3 * 4 + 1 and forward.replays > backward.replays  # micro-batches, and the comparison at the start


def test_weights_of_a_part_of_the_tower(graphs: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only some of the tower's parameters train: the others have no gradients, and the losses are the same."""
    monkeypatch.setattr("megatron_mm.training.build.trainable_patterns", lambda experiment: ("vision.*layers.1", "connector", "language"))
    monkeypatch.setattr("megatron_mm.training.build.check_patterns", lambda *args: None)
    plain = losses(small_experiment())
    assert losses(graphed(small_experiment())) == plain and len(graphs.made) == 2


def test_micro_batches_with_more_images_run_without_the_graph(graphs: type[RecordedGraph]) -> None:
    """Of none, one and four images, a graph of two takes the first two. Losses differ by rounding."""
    plain = losses(small_experiment(precision="fp32"))
    found = losses(graphed(small_experiment(precision="fp32"), images=2))
    assert found == pytest.approx(plain, rel=1e-5)
    assert 0 < graphs.made[1].replays - 1 < 3 * 4


def test_a_micro_batch_without_a_free_copy_runs_without_the_graph(graphs: type[RecordedGraph]) -> None:
    """Two passes wait for their backward passes, but there is one copy. A third one whose features were dropped leaves its copy free."""
    experiment = graphed(small_experiment(precision="fp32", parallel={"overlap_grad_reduce": False}))

    def run(topology: Any, model: Any) -> None:
        graph_tower(experiment, model)
        tower, wrapped = model[0].module.encoder.parts["vision"], model[0]
        parameters = list(tower.parameters())
        pixels = torch.randint(0, 256, (2, IMAGES, 3, 16, 16), dtype=torch.uint8)
        before = graphs.made[0].replays
        dropped = tower(pixels[0])
        assert not tower.forward.copies[0].is_free
        del dropped
        features = [tower(part) for part in pixels]
        assert graphs.made[0].replays == before + 2  # the dropped pass, and the first of these
        with torch.no_grad():
            assert torch.equal(tower(pixels[0]), features[0])  # and an evaluation does not disturb what waits
        assert graphs.made[0].replays == before + 2
        for part in features:
            part.square().sum().backward()
        found = [parameter.main_grad.clone() for parameter in parameters]
        wrapped.zero_grad_buffer()
        tower.forward = tower.forward.eager
        for part in pixels:
            tower(part).square().sum().backward()
        for parameter, gradient in zip(parameters, found, strict=True):
            torch.testing.assert_close(gradient, parameter.main_grad, rtol=1e-5, atol=1e-6)
        assert any(gradient.any() for gradient in found)

    with_model(experiment, run)


def half(forward: Forward, backward: Any, pixels: torch.Tensor, **options: Any) -> Passes:
    """Passes whose backward pass adds half of each gradient."""
    return capture_passes(forward, lambda features, gradient: backward(features, gradient / 2), pixels, **options)


def failing(*args: Any, **options: Any) -> Passes:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (
            half,
            r"tower_graph is 4, but gradients of a replay differ from the tower's by 0\.5 of their norm \(allowed: 0\.001\): leave it out",
        ),
        (failing, r"tower_graph is 4, but the tower's graph fails \(operation not permitted when stream is capturing\): leave it out"),
    ],
)
def test_passes_that_are_wrong_or_fail_are_refused(capture: Any, message: str, graphs: type[RecordedGraph]) -> None:
    experiment = graphed(small_experiment())

    def build(topology: Any, model: Any) -> None:
        with pytest.raises(ValueError, match=message):
            graph_tower(experiment, model, capture_passes=capture)
        assert graphed_tower(model) is None

    with_model(experiment, build)


def test_a_spread_tower_that_trains_is_refused(graphs: type[RecordedGraph]) -> None:
    def build(topology: Any, model: Any) -> None:
        with pytest.raises(ValueError, match=r"the tower trains and its images are spread over pipeline ranks .*: leave it out"):
            graph_tower(replace(experiment, parallel=replace(experiment.parallel, pipeline=2, spread_encoder=True)), model)

    experiment = graphed(small_experiment())
    with_model(experiment, build)


def train(data: Path, run_dir: Path, parallel: dict[str, Any], with_graph: bool) -> None:
    experiment = small_run(data, steps=3, parallel=parallel, global_batch_size=4, precision="fp32")

    def fill_up(experiment: Experiment, topology: Any, **others: Any) -> Any:
        model = build_model(experiment, topology, **others)
        if (encoder := model[0].module.encoder) is not None:
            encoder.parts["vision"].forward = filled_up(encoder.parts["vision"].forward, images=8)
        return model

    machine_checks.check_options = lambda experiment, **others: None  # type: ignore[assignment, misc]  # it finds no GPU
    if not with_graph:
        starting.build_model = fill_up
    with recorded_graphs() as graphs:
        starting.start(graphed(experiment, images=8) if with_graph else experiment, run_dir)
        if with_graph and graphs.made:
            assert len(graphs.made) == 2 * most_in_flight(experiment.parallel)
            assert all(graph.replays > 3 for graph in graphs.made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        {"pipeline": 2},
        {"pipeline": 2, "virtual": 2},
        {"tensor": 2},
        {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ],
)
def test_losses_are_bit_identical_in_every_layout(parallel: dict[str, Any], demo_data: Path, tmp_path: Path) -> None:
    for with_graph in (False, True):
        run_processes(train, 2, demo_data, tmp_path / str(with_graph), parallel, with_graph)
    plain, found = (read_metrics(tmp_path / str(with_graph) / "metrics.jsonl") for with_graph in (False, True))
    assert [(line["loss"], line["grad_norm"]) for line in found] == [(line["loss"], line["grad_norm"]) for line in plain]
    assert len(plain) == 3 and all(line["tower_blanks"] > 0 for line in found) and not any(line["tower_blanks"] for line in plain)

"""A frozen tower as replays: InfiMM trains alike, and what cannot be right is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small_infimm import infimm_run, infimm_step, small_infimm

from megatron_mm.config import Experiment, KernelConfig
from megatron_mm.models.tower_graph import GraphedTower
from megatron_mm.parallel import topology as topologies
from megatron_mm.run import machine_checks
from megatron_mm.run import start as starting
from megatron_mm.training.build import build_model
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep
from megatron_mm.training.tower_graph import allowed_difference, graph_tower, graphed_tower, replay_difference

Forward = Callable[[torch.Tensor], torch.Tensor]
IMAGES = 4


def one_by_one(forward: Forward) -> Forward:
    """Encode images one by one: their features are then the same bits whichever images come with them."""

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return torch.cat([forward(image[None]) for image in pixels])

    return run


def eager(forward: Forward, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Take the place of a capture: run the tower itself, into the same memory at every call."""
    features = torch.empty_like(forward(pixels))

    def replay() -> torch.Tensor:
        assert pixels.shape[0] == IMAGES
        return features.copy_(one_by_one(forward)(pixels))

    return replay


def stale(forward: Forward, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A replay that does not read its input."""
    features = forward(pixels)
    return lambda: features


def failing(forward: Forward, pixels: torch.Tensor) -> Callable[[], torch.Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def graphed(experiment: Experiment) -> Experiment:
    return replace(experiment, kernels=KernelConfig(tower_graph=IMAGES))


def with_model(experiment: Experiment, use: Callable[[Any, Any], Any]) -> Any:
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    try:
        return use(topology, build_model(experiment, topology))
    finally:
        topologies.shutdown()


def losses(experiment: Experiment) -> tuple[list[float], int]:
    """Return the losses of two steps and a validation, whose micro-batches have no, one and six images, and the blank images."""

    def train(topology: Any, model: Any) -> tuple[list[float], int]:
        names = list(model[0].module.sharded_state_dict())
        if not graph_tower(experiment, model, capture=eager):
            tower = model[0].module.encoder.parts["vision"]
            tower.forward = one_by_one(tower.forward)
        assert list(model[0].module.sharded_state_dict()) == names  # a checkpoint has the same tensors
        step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
        found = [step.run(infimm_step(experiment, topology, step=number), step=number).losses.mean for number in (1, 2)]
        found.append(step.evaluate(infimm_step(experiment, topology, step=3)).mean)
        runs = graphed_tower(model)
        return found, 0 if runs is None else runs.take_blanks()

    return with_model(experiment, train)  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_bit_identical(precision: str) -> None:
    experiment = small_infimm(policy="pt", precision=precision)
    plain, none = losses(experiment)
    found, blanks = losses(graphed(experiment))
    assert found == plain and none == 0 < blanks


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (stale, r"tower_graph is 4, but a replay differs from the tower by .* \(allowed: 0\.001\): leave it out"),
        (failing, r"tower_graph is 4, but the tower's graph fails \(operation not permitted when stream is capturing\): leave it out"),
    ],
)
def test_a_graph_that_is_wrong_or_fails_is_refused(capture: Any, message: str) -> None:
    experiment = graphed(small_infimm(policy="pt", precision="fp32"))

    def build(topology: Any, model: Any) -> None:
        with pytest.raises(ValueError, match=message):
            graph_tower(experiment, model, capture=capture)
        assert graphed_tower(model) is None

    with_model(experiment, build)


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 1e-3), (0.01, 0.03), (0.5, 0.5)])
def test_as_much_is_allowed_as_the_tower_itself_rounds(noise: float, allowed: float) -> None:
    """A tower whose features depend on the number of images. Its replays may differ by that, but not by as much as other images."""

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        features = pixels.flatten(1).float()
        return features + noise * features.roll(1, dims=1) * (len(pixels) > 1)

    pixels = torch.zeros(IMAGES, 3, 16, 16, dtype=torch.uint8)
    found = allowed_difference(GraphedTower(pixels, lambda: tower(pixels)), tower)
    assert found == pytest.approx(allowed, rel=0.7) and found <= 0.5 < replay_difference(
        GraphedTower(pixels, lambda: tower(torch.full_like(pixels, 128))), tower, numbers=[IMAGES]
    )


def test_a_run_counts_its_blank_images(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    call = GraphedTower.__call__

    def noted(self: GraphedTower, pixels: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pixels))
        return call(self, pixels)

    monkeypatch.setattr(machine_checks, "check_options", lambda experiment, **others: None)  # it finds no GPU
    monkeypatch.setattr(starting, "graph_tower", partial(graph_tower, capture=eager))
    monkeypatch.setattr(GraphedTower, "__call__", noted)
    starting.start(graphed(infimm_run(demo_data, policy="pt", steps=2)), tmp_path / "run")
    assert encoded[:3] == [IMAGES] * 3  # the comparison at the start, which is not counted
    blanks = [line["tower_blanks"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(blanks) == 2 and sum(blanks) == sum(-number % IMAGES for number in encoded[3:]) > 0


def train(data: Path, run_dir: Path, parallel: dict[str, Any], with_graph: bool) -> None:
    experiment = infimm_run(data, policy="pt", steps=3, parallel=parallel, global_batch_size=4)

    def take_one_by_one(experiment: Experiment, topology: Any, **others: Any) -> Any:
        model = build_model(experiment, topology, **others)
        if (encoder := model[0].module.encoder) is not None:
            encoder.parts["vision"].forward = one_by_one(encoder.parts["vision"].forward)
        return model

    machine_checks.check_options = lambda experiment, **others: None  # type: ignore[assignment, misc]  # it finds no GPU
    if with_graph:
        starting.graph_tower = partial(graph_tower, capture=eager)  # type: ignore[assignment]
    else:
        starting.build_model = take_one_by_one
    starting.start(graphed(experiment) if with_graph else experiment, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"pipeline": 2, "spread_encoder": True}, {"tensor": 2}])
def test_losses_are_bit_identical_in_every_layout(parallel: dict[str, Any], demo_data: Path, tmp_path: Path) -> None:
    for with_graph in (False, True):
        run_processes(train, 2, demo_data, tmp_path / str(with_graph), parallel, with_graph)
    plain, found = (read_metrics(tmp_path / str(with_graph) / "metrics.jsonl") for with_graph in (False, True))
    assert [line["loss"] for line in found] == [line["loss"] for line in plain] and len(plain) == 3
    assert all(line["tower_blanks"] > 0 for line in found) and not any(line["tower_blanks"] for line in plain)

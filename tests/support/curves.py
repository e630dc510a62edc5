"""Loss curves for the tests that compare layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

STEPS = 20
TOLERANCE = 1e-5
"""Relative, fp32. A different order of summation changes a loss by about 1e-7 per step."""


@dataclass(frozen=True)
class Layout:
    """A layout on a number of processes, and other changes to the small experiment."""

    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    policy: str = ""

    def __str__(self) -> str:
        settings = (f"{name}={value}" for name, value in {**self.parallel, **self.decoder}.items())
        return " ".join([*([self.policy] if self.policy else []), *settings, f"on {self.world_size}"])


@dataclass(frozen=True)
class Curve:
    losses: list[float]
    by_source: list[float]
    """Losses of the last step, by source."""
    grad_norms: list[float]
    frozen_changed: list[str]
    """Frozen parameters that changed; must be empty."""
    learned: list[str]
    """All parameters that changed."""


def train_curve(
    experiment: Experiment,
    batches: Callable[..., list[PackedBatch]],
    *,
    prepare: Callable[[list[torch.nn.Module]], None] = lambda model: None,
) -> Curve:
    """Train in the experiment's layout; called by all its processes.

    Args:
        batches: (experiment, topology, step=...) -> this process's micro-batches of a step.
        prepare: changes the model before the first step.
    """
    topology: Topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    prepare(model)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    parameters = {f"{index}.{name}": p for index, chunk in enumerate(model) for name, p in chunk.module.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    results = [step.run(batches(experiment, topology, step=number), step=number) for number in range(1, STEPS + 1)]
    changed = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
    topologies.shutdown()
    return Curve(
        losses=[result.losses.mean for result in results],
        by_source=list(results[-1].losses.by_source(["a", "b"]).values()),
        grad_norms=[result.update.grad_norm for result in results],
        frozen_changed=[name for name in changed if not parameters[name].requires_grad],
        learned=changed,
    )


def assert_same(curves: list[Curve], expected: Curve) -> None:
    """Check that all processes agree with each other, and with the one-process run."""
    assert all(curve.losses == curves[0].losses for curve in curves), "processes disagree about the losses"
    assert curves[0].losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert curves[0].by_source == pytest.approx(expected.by_source, rel=TOLERANCE)
    assert curves[0].grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)
    assert not any(curve.frozen_changed for curve in curves), "frozen weights changed"
    assert expected.learned, "nothing was learned, so nothing was compared"

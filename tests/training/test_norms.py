"""Norms by part equal those of the model's tensors, in every layout and with every optimizer."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.curves import Layout
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import MoEConfig
from megatron_mm.families.registry import family_of
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.norms import PartNorms
from megatron_mm.training.optimizer import build_optimizer, learning_rate
from megatron_mm.training.step import TrainingStep

Norms = dict[str, dict[str, float]]
TOLERANCE = 1e-5
"""Relative, fp32: two steps summed in another order. Update ratios divide by roots of small second moments; they get ten times as much."""
EXPERTS = {"moe": MoEConfig(num_experts=4, every_n_layers=1)}
DENSE = {"num_layers": 4}
LAYOUTS = [
    Layout(4, {"tensor": 2, "pipeline": 2}, DENSE),
    Layout(4, {"tensor": 2, "expert": 2}, EXPERTS),
]
MORE_LAYOUTS = [
    Layout(2, {"tensor": 2}, DENSE),
    Layout(2, {"pipeline": 2, "virtual": 2}, DENSE),
    Layout(2, {}, DENSE),
    Layout(2, {"distributed_optimizer": False}, DENSE),
    Layout(2, {"expert": 2}, EXPERTS),
    Layout(4, {"pipeline": 2, "expert": 2}, EXPERTS),
]


def measure(layout: Layout, precision: str = "fp32") -> tuple[Norms, Norms]:
    """Return the norms of the third step as measured, and as computed from this process's tensors (correct on one process)."""
    experiment = small_experiment(parallel=layout.parallel, decoder=layout.decoder, precision=precision)
    experiment = replace(experiment, optimizer=replace(experiment.optimizer, warmup_steps=0, epsilon=1e-5, weight_decay=0.3))
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    optimizer = build_optimizer(experiment, model)
    family = family_of(experiment.model)
    norms = PartNorms(model, optimizer, parts=[*family.parts, "rest"], part_of=family.part_of)
    step = TrainingStep(experiment, topology, model, optimizer, num_sources=2)
    weights: list[dict[str, torch.Tensor]] = []
    told: tuple[float, ...] = ()
    direct: Norms = {}

    def tell() -> torch.Tensor:
        nonlocal direct
        parameters = {name: p for chunk in model for name, p in chunk.module.named_parameters()}
        weights.append({name: p.detach().clone() for name, p in parameters.items()})
        if len(weights) == 3:
            changes = {name: weights[2][name] - weights[1][name] for name in parameters}
            by_part = functools.partial(_by_part, part_of=family.part_of)
            size = by_part(weights[2])
            direct = {
                "grad_norms": by_part({name: p.main_grad for name, p in parameters.items()}),
                "param_norms": size,
                "update_ratios": {name: value / size[name] for name, value in by_part(changes).items()},
            }
        number = len(weights)
        lr = learning_rate(number - 1, experiment.optimizer, schedule_steps=experiment.train.schedule_steps) if number > 1 else None
        return norms.squares(lr=lr, device=topology.device)

    for number in (1, 2, 3):
        told = step.run(random_step(experiment, topology, step=number), step=number, tell=tell).told
    topologies.shutdown()
    return norms.from_sums(told), direct


def _by_part(tensors: dict[str, torch.Tensor], *, part_of: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, tensor in tensors.items():
        found[part_of(name)] = found.get(part_of(name), 0.0) + float(tensor.double().square().sum())
    return {name: value**0.5 for name, value in found.items()}


@functools.cache
def _one_process(experts: bool) -> tuple[Norms, Norms]:
    return run_processes(measure, 1, Layout(1, decoder=EXPERTS if experts else DENSE))[0]


def assert_close(found: Norms, expected: Norms) -> None:
    for name, values in expected.items():
        tolerance = 10 * TOLERANCE if name == "update_ratios" else TOLERANCE
        assert found[name] == pytest.approx(values, rel=tolerance), name


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_norms_are_those_of_the_tensors(experts: bool) -> None:
    found, direct = _one_process(experts)
    assert set(found["grad_norms"]) == ({"experts"} if experts else set()) | {"decoder", "tower", "connector"}
    assert set(found["update_ratios"]) == set(found["grad_norms"])
    assert_close(found, direct)


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LAYOUTS)], ids=str)
def test_norms_are_the_same_in_every_layout(layout: Layout) -> None:
    for found, _ in run_processes(measure, layout.world_size, layout):
        assert_close(found, _one_process("moe" in layout.decoder)[0])


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False])
def test_norms_in_bf16_are_of_the_fp32_weights(distributed: bool) -> None:
    """bf16 rounds to 8 bits of mantissa: norms are measured on fp32 weights, from which the model's differ by half of the last bit."""
    found, direct = run_processes(measure, 1, Layout(1, {"distributed_optimizer": distributed}, DENSE), "bf16")[0]
    assert found["grad_norms"] == pytest.approx(direct["grad_norms"], rel=1e-3)
    assert found["param_norms"] == pytest.approx(direct["param_norms"], rel=1e-2)

"""A sparse model made from a dense checkpoint computes the same as the dense one, whatever layouts write and read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import random_step, small_run

from megatron_mm.config import Experiment, MoEConfig
from megatron_mm.conversion.upcycle import check_upcycling, upcycle
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.start import start
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import find_checkpoint, load_weights
from megatron_mm.training.step import TrainingStep

EXPERTS = MoEConfig(num_experts=4, every_n_layers=2)


def dense_experiment(data: Path, parallel: dict[str, Any] | None = None, steps: int = 2) -> Experiment:
    return small_run(data, parallel=parallel, steps=steps, schedule_steps=8)


def sparse_experiment(data: Path, parallel: dict[str, Any] | None = None, steps: int = 2) -> Experiment:
    base = dense_experiment(data, parallel, steps)
    return replace(base, recipe="sparse", model=replace(base.model, decoder=replace(base.model.decoder, moe=EXPERTS)))


def _train_dense(data: Path, run_dir: Path, parallel: dict[str, Any]) -> None:
    start(dense_experiment(data, parallel), run_dir)


def _upcycle(data: Path, dense: Path, run_dir: Path, parallel: dict[str, Any]) -> None:
    upcycle(dense, run_dir, sparse_experiment(data, parallel))


def _loss(experiment: Experiment, checkpoint: Path) -> float:
    """Return a checkpoint's loss on fixed batches, in the experiment's layout."""
    topology = topologies.initialize(experiment.parallel, seed=7)
    model = build_model(experiment, topology)
    load_weights(experiment, topology, model, checkpoint)
    step = TrainingStep(experiment, topology, model, None, num_sources=2)
    return step.evaluate(random_step(experiment, topology, step=1)).mean


def _dense_loss(data: Path, checkpoint: Path) -> float:
    return _loss(dense_experiment(data), checkpoint)


def _sparse_loss(data: Path, checkpoint: Path, parallel: dict[str, Any]) -> float:
    return _loss(sparse_experiment(data, parallel), checkpoint)


def _train_sparse(data: Path, run_dir: Path, parallel: dict[str, Any]) -> int:
    return start(sparse_experiment(data, parallel, steps=3), run_dir).step


@pytest.fixture(scope="module")
def dense(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint written with tensor parallel 2."""
    run_dir = tmp_path_factory.mktemp("dense")
    run_processes(_train_dense, 2, demo_data, run_dir, {"tensor": 2})
    return find_checkpoint(run_dir)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [pytest.param(1, {}, marks=pytest.mark.slow), pytest.param(4, {"pipeline": 2, "expert": 2}, marks=pytest.mark.slow)],
    ids=["one process", "pipeline 2 expert 2"],
)
def test_the_fresh_sparse_model_is_the_dense_one_and_learns(
    demo_data: Path, dense: Path, tmp_path: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    run_processes(_upcycle, world_size, demo_data, dense, tmp_path, parallel)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.name == "step_00000000"
    (expected,) = run_processes(_dense_loss, 1, demo_data, dense)
    for size, layout in ((1, {}), (2, {"expert": 2})):
        found = run_processes(_sparse_loss, size, demo_data, checkpoint, layout)[0]
        assert found == pytest.approx(expected, rel=1e-5)
    assert run_processes(_train_sparse, world_size, demo_data, tmp_path, parallel) == [3] * world_size
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["experts"] for line in lines)


def _weights(data: Path, checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of the image tower's MLPs, and those of the experts."""
    experiment = sparse_experiment(data)
    topology = topologies.initialize(experiment.parallel, seed=7)
    model = build_model(experiment, topology)
    load_weights(experiment, topology, model, checkpoint)
    named = {name: parameter.detach().clone() for name, parameter in model[0].module.named_parameters()}
    return (
        {name: value for name, value in named.items() if name.startswith("vision.") and ".mlp." in name},
        {name: value for name, value in named.items() if ".experts." in name},
    )


def _dense_weights(data: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    experiment = dense_experiment(data)
    topology = topologies.initialize(experiment.parallel, seed=7)
    model = build_model(experiment, topology)
    load_weights(experiment, topology, model, checkpoint)
    return {name: parameter.detach().clone() for name, parameter in model[0].module.named_parameters()}


def test_the_tower_keeps_its_mlps_and_every_expert_is_the_dense_mlp(demo_data: Path, dense: Path, tmp_path: Path) -> None:
    run_processes(_upcycle, 1, demo_data, dense, tmp_path, {})
    ((tower, experts),) = run_processes(_weights, 1, demo_data, find_checkpoint(tmp_path))
    (before,) = run_processes(_dense_weights, 1, demo_data, dense)
    assert len(tower) == 8 and all(torch.equal(value, before[name]) for name, value in tower.items())
    assert len(experts) == 2 * 4 * 2
    for name, value in experts.items():
        head, _, tail = name.partition(".experts.local_experts.")
        assert torch.equal(value, before[f"{head}.{tail.partition('.')[2]}"]), name


def test_what_cannot_be_upcycled_is_named(demo_data: Path, dense: Path) -> None:
    good = sparse_experiment(demo_data)
    with pytest.raises(ValueError, match="has no experts: choose a sparse one"):
        check_upcycling(dense_experiment(demo_data), dense)
    wide = replace(good, model=replace(good.model, decoder=replace(good.model.decoder, ffn_hidden_size=128)))
    with pytest.raises(
        ValueError, match=r"is not the backbone of sparse: model.decoder.ffn_hidden_size is 96 in the checkpoint and 128 in the recipe"
    ):
        check_upcycling(wide, dense)

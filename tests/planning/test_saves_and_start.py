"""The planner's numbers for saves and the start equal the bytes that a real process stages and the numbers that it draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from support.distributed import run_processes

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.planning.hardware import GPUS
from megatron_mm.planning.job import Job
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.saves_and_start import describe_saves_and_start, numbers_drawn, save_cost
from megatron_mm.planning.tracing.start import numbers_drawn as really_drawn
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint.state import run_state
from megatron_mm.training.optimizer import build_optimizer, initialize_state


def experiment(recipe: str = "debug_mm1") -> Experiment:
    base = get_recipe(recipe)
    return replace(base, train=replace(base.train, precision="bf16"))


def job(settings: Experiment, gpus: int) -> Job:
    return plan_recipe(settings, GPUS["h100-sxm"], gpus).job


def staged_and_drawn(recipe: str) -> tuple[int, int]:
    """Return the bytes of state that this process stages (weights divided by their copies), and the numbers drawn for its weights."""
    settings = experiment(recipe)
    topology = topologies.initialize(settings.parallel, seed=1)
    model = build_model(settings, topology)
    optimizer = build_optimizer(settings, model)
    initialize_state(optimizer)
    state = run_state(model, optimizer, topology, loading=False, generators=False)
    apply_factories(state)
    tensors = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor) and entry.data is not None]
    assert not any(isinstance(entry, ShardedTensorFactory) for entry in nested_values(state))
    of_optimizer = sum(t.data.numel() * t.data.itemsize for t in tensors if t.key.startswith("optimizer."))
    of_weights = sum(t.data.numel() * t.data.itemsize for t in tensors if not t.key.startswith("optimizer."))
    return of_optimizer + of_weights // topology.data_size, really_drawn([chunk.module for chunk in model])


@pytest.mark.parametrize(
    ("recipe", "processes"),
    [("debug_mm1", 1), pytest.param("debug_mm1_moe", 1, marks=pytest.mark.slow), pytest.param("debug_mm1", 2, marks=pytest.mark.slow)],
)
def test_bytes_of_a_save_are_those_that_a_process_stages(recipe: str, processes: int) -> None:
    """To 2%, because the planner leaves out some vectors."""
    planned = job(experiment(recipe), processes)
    found = run_processes(staged_and_drawn, processes, recipe)
    assert save_cost(planned).staged_bytes == pytest.approx(max(staged for staged, _ in found), rel=0.02)
    assert numbers_drawn(planned) == pytest.approx(max(drawn for _, drawn in found), rel=0.02)


def test_a_share_of_the_state_shrinks_with_data_parallelism() -> None:
    settings = get_recipe("mm1_30b")
    few, many = (save_cost(job(settings, gpus)) for gpus in (256, 512))
    assert few.staged_bytes == pytest.approx(2 * many.staged_bytes, rel=1e-6)


def test_the_lines_name_bytes_and_parts() -> None:
    save, start = describe_saves_and_start(job(get_recipe("mm1_30b"), 512))
    assert "B to its host" in save and "a resume reads" in save
    assert "imports 15 to 19" in start and "B initial weights" in start

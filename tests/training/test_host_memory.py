"""A model that cannot fit into the memory of a machine without a GPU is refused before it is built."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.small import small_experiment

from megatron_mm.config import PrecisionConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology as topologies
from megatron_mm.run.dry_run import stage_parameters
from megatron_mm.training import host_memory
from megatron_mm.training.build import build_chunks, build_model
from megatron_mm.training.host_memory import machine_memory, state_bytes


def test_state_is_counted_by_its_formats() -> None:
    """fp32: weights, gradients and two moments of 4 bytes. bf16: weights of 2, gradients, master weights and two moments of 4, of which two
    data-parallel ranks share 12."""
    experiment = small_experiment()
    (stage,) = stage_parameters(experiment)
    count = sum(stage.held.values())
    half = small_experiment(precision="bf16")
    formats = replace(half, precision=PrecisionConfig(gradients="bf16", exp_avg="bf16", exp_avg_sq="bf16"))
    for asked, ranks, optimizer, per_weight in (
        (experiment, 1, True, 16),
        (experiment, 1, False, 8),
        (half, 2, True, 12),
        (formats, 1, True, 12),
    ):
        with topologies.pretend(asked.parallel, pipeline_rank=0) as topology:
            assert state_bytes(build_chunks(asked, topology), asked, data_size=ranks, optimizer=optimizer) == per_weight * count


def test_frozen_weights_have_no_gradients() -> None:
    recipe = get_recipe("infimm_zephyr_7b_pt")
    (stage,) = stage_parameters(recipe)
    with topologies.pretend(recipe.parallel, pipeline_rank=0) as topology:
        found = state_bytes(build_chunks(recipe, topology), recipe, data_size=1, optimizer=True)
    assert found == 2 * sum(stage.held.values()) + 16 * sum(stage.trainable.values())


def test_a_model_that_is_too_large_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "machine_memory", lambda: 2e9)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *_, **__: pytest.fail("weights were drawn"))
    experiment = get_recipe("mm1_1b")
    topology = topologies.initialize(experiment.parallel, seed=1)
    try:
        with pytest.raises(
            ValueError, match=r"optimizer state take \d\d\.\d GB on this machine \(processes: 1\), which has 2.0 GB of memory"
        ):
            build_model(experiment, topology, optimizer=True)
    finally:
        topologies.shutdown()


@pytest.mark.parametrize(("local", "refused"), [("2", True), ("1", False), (None, False)])
def test_only_processes_that_are_surely_on_this_machine_count(local: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers other than torchrun do not say how many there are."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(host_memory, "machine_memory", lambda: 3e9)
    monkeypatch.setattr(host_memory, "state_bytes", lambda *_, **__: 2e9)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda needed: needed.mul_(2))
    with pytest.raises(ValueError, match="processes: 2") if refused else contextlib.nullcontext():
        host_memory.check_memory([], small_experiment(), SimpleNamespace(world_size=2, data_size=2), optimizer=True)


def test_memory_of_a_machine_and_of_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       1000 kB\nMemAvailable:    300 kB\nSwapTotal:       200 kB\n")
    assert machine_memory(meminfo=meminfo, groups=tmp_path / "none") == 1200 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory(meminfo=meminfo, groups=tmp_path) == 1200 * 1024
    (tmp_path / "memory.max").write_text(f"{500 * 1024}\n")
    assert machine_memory(meminfo=meminfo, groups=tmp_path) == 700 * 1024
    assert machine_memory(meminfo=tmp_path / "none") == float("inf")

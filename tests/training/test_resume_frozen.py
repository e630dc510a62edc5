"""Resuming is exact if most of the model is frozen, and if a pipeline stage has nothing to train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_processes
from support.small_infimm import infimm_run
from support.small_mono import mono_run

from megatron_mm.config import Experiment
from megatron_mm.run.start import start

FAMILIES: dict[str, tuple[Callable[..., Experiment], str]] = {"infimm": (infimm_run, "pt"), "mono": (mono_run, "s1_1")}
NOTHING_TO_TRAIN = {"pipeline": 2, "stage_layers": (4, 0)}
"""The second stage has only the frozen output layer."""


def run(family: str, data: Path, run_dir: Path, layout: dict[str, Any], steps: int) -> None:
    make, policy = FAMILIES[family]
    start(make(data, parallel=layout, steps=steps, schedule_steps=20, policy=policy), run_dir)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_same_layout_and_on_others(family: str, demo_data: Path, tmp_path: Path) -> None:
    straight, half = tmp_path / "straight", tmp_path / "half"
    run_processes(run, 2, family, demo_data, straight, NOTHING_TO_TRAIN, 8)
    run_processes(run, 2, family, demo_data, half, NOTHING_TO_TRAIN, 4)
    shutil.copytree(half, tmp_path / "one")
    run_processes(run, 2, family, demo_data, half, NOTHING_TO_TRAIN, 8)
    assert losses(half) == losses(straight), "bit-identical"
    run_processes(run, 1, family, demo_data, tmp_path / "one", {}, 8)
    assert losses(tmp_path / "one") == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_from_tensor_and_pipeline_parallel(family: str, demo_data: Path, tmp_path: Path) -> None:
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    run_processes(run, 1, family, demo_data, straight, {}, 8)
    run_processes(run, 4, family, demo_data, moved, {"tensor": 2, "pipeline": 2}, 4)
    run_processes(run, 2, family, demo_data, moved, {"pipeline": 2, "virtual": 2}, 8)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-5)

"""A run with `spread_encoder` gives the same results, including evaluations, captions, profiles and roll-backs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.config import ParallelConfig, ProfileConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.families.registry import family_of
from megatron_mm.run import fault_hooks
from megatron_mm.run.roll_back import read
from megatron_mm.run.start import start
from megatron_mm.training.step import StepResult, TrainingStep

SPIKE, STEPS = 5, 6
"""Step whose loss is multiplied by ten the first time, and number of steps."""


def train(data: Path, run_dir: Path, parallel: dict[str, Any]) -> None:
    """Train with evaluations, captions, a profile, and a loss spike that causes a roll-back."""
    run, fault_hooks.LEAST_STEPS, seen = TrainingStep.run, 3, list[int]()

    def spiking(self: TrainingStep, *arguments: Any, step: int, **others: Any) -> StepResult:
        result = run(self, *arguments, step=step, **others)
        if step == SPIKE and not seen:
            seen.append(step)
            result = replace(result, losses=replace(result.losses, losses=[10 * loss for loss in result.losses.losses]))
        return result

    TrainingStep.run = spiking  # type: ignore[method-assign]
    experiment = small_run(data, parallel=parallel, steps=STEPS, schedule_steps=20, after_spike="roll_back", checksum_interval=2)
    experiment = replace(
        experiment,
        eval=replace(experiment.eval, interval=2, batches=1, samples=2, max_new_tokens=3),
        checkpoint=replace(experiment.checkpoint, interval=2),
        profile=ProfileConfig(steps="2:3", ranks=(1,)),
    )
    start(experiment, run_dir)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_evaluations_a_profile_and_a_roll_back_is_the_same(demo_data: Path, tmp_path: Path) -> None:
    plain, spread = tmp_path / "plain", tmp_path / "spread"
    run_processes(train, 2, demo_data, plain, {"pipeline": 2})
    run_processes(train, 2, demo_data, spread, {"pipeline": 2, "spread_encoder": True})
    assert [line.to_step for line in read(spread)] == [line.to_step for line in read(plain)] == [4]
    for name in ("metrics.jsonl", "eval.jsonl"):
        ours, theirs = ({line["step"]: line for line in lines(run / name)} for run in (spread, plain))
        assert ours.keys() == theirs.keys()
        for step, line in ours.items():
            losses = [key for key, value in line.items() if "loss" in key and isinstance(value, float)]
            assert losses, name
            for key in losses:
                assert line[key] == pytest.approx(theirs[step][key], rel=1e-5), (name, step, key)
    assert [line["phases"]["encoder"] > 0 for line in lines(spread / "metrics.jsonl")] == [True] * STEPS
    assert [line["phases"]["encoder"] for line in lines(plain / "metrics.jsonl")] == [0.0] * STEPS
    (profile,) = (spread / "profile").glob("*.txt")
    assert "vision" in profile.read_text(), "the second stage encodes, and its profile says so"


def test_a_family_without_an_encoder_is_refused_before_the_start() -> None:
    experiment = get_recipe("debug_mono_internvl")
    with pytest.raises(ValueError, match="mono_internvl models have no image encoder to spread: leave it out"):
        family_of(experiment.model).check_layout(experiment.model, ParallelConfig(pipeline=2, spread_encoder=True), 2)

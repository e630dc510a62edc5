"""The training loop counts skipped steps, logs the count, and restores it after a resume."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.data.batch import PackedBatch
from megatron_mm.run.start import start
from megatron_mm.training.step import StepResult, TrainingStep

POISONED = (2, 3)
"""Steps in which the second process's loss is not a number."""


def _train(data: Path, run_dir: Path, steps: int) -> tuple[int, int]:
    """Train; return the numbers of steps done and skipped, as counted by this process."""
    run = TrainingStep.run

    def poisoned(self: TrainingStep, micro_batches: list[PackedBatch], *, step: int, **others: Any) -> StepResult:
        if step in POISONED and os.environ["RANK"] == "1":
            first = micro_batches[0]
            micro_batches = [replace(first, loss_mask=first.loss_mask * float("nan")), *micro_batches[1:]]
        return run(self, micro_batches, step=step, **others)

    TrainingStep.run = poisoned  # type: ignore[method-assign]
    state = start(small_run(data, steps=steps, schedule_steps=20), run_dir)
    return state.step, state.skipped_steps


def test_skipped_steps_are_counted_on_all_processes_and_over_a_resume(demo_data: Path, tmp_path: Path) -> None:
    assert run_processes(_train, 2, demo_data, tmp_path, 5) == [(5, 2)] * 2
    assert run_processes(_train, 2, demo_data, tmp_path, 6) == [(6, 2)] * 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["skipped"] for line in lines] == [False, True, True, False, False, False]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 2, 2]


def _train_until_error(data: Path, run_dir: Path, steps: int, limit: int) -> str:
    """Train with NaN in the first process's weights from step 2 on; return the error that ends the run ("" if none)."""
    run = TrainingStep.run

    def poisoned(self: TrainingStep, micro_batches: list[PackedBatch], *, step: int, **others: Any) -> StepResult:
        if step == 2 and os.environ["RANK"] == "0":
            with torch.no_grad():
                next(self.model[0].parameters()).fill_(float("nan"))
        return run(self, micro_batches, step=step, **others)

    TrainingStep.run = poisoned  # type: ignore[method-assign]
    experiment = small_run(data, steps=steps, schedule_steps=20, max_skipped_in_a_row=limit)
    try:
        start(replace(experiment, checkpoint=replace(experiment.checkpoint, interval=3)), run_dir)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_run_ends_on_all_processes_after_so_many_skipped_steps_in_a_row(demo_data: Path, tmp_path: Path) -> None:
    errors = run_processes(_train_until_error, 2, demo_data, tmp_path, 20, 4)
    assert all("not finite in 4 steps in a row, 2 to 5 (the last one: loss nan" in error for error in errors), errors
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000003"], "complete, for the run waits for it"
    state = json.loads((tmp_path / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert (state["skipped_steps"], state["skipped_in_a_row"]) == (2, 2)
    assert run_processes(_train_until_error, 1, demo_data, tmp_path / "never", 5, 0) == [""]

"""The training loop counts what it skips, writes it down, and knows it after a resume."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.distributed import run_processes
from support.small import small_run

from megatron_mm.data.batch import PackedBatch
from megatron_mm.run.start import start
from megatron_mm.training.step import StepResult, TrainingStep

POISONED = (2, 3)
"""Steps in which the second process's loss is not a number."""


def _train(data: Path, run_dir: Path, steps: int) -> tuple[int, int]:
    """Steps done and skipped, as this process knows them."""
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

"""After bad numbers a run ends or rolls back, as configured, and skips the data; a resumed run sees the same batches."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.data.batch import PackedBatch
from megatron_mm.run import fault_hooks
from megatron_mm.run.fault_hooks import Copies, odd_copies
from megatron_mm.run.roll_back import FILE, Line, read
from megatron_mm.run.start import start
from megatron_mm.training.checkpoint import completed_checkpoints
from megatron_mm.training.step import StepResult, TrainingStep

BAD = 5
"""Number of the global batch with bad data, from 1."""


def _digest(batch: PackedBatch) -> int:
    return hash(tuple(batch.token_ids.tolist()))


def _batches(data: Path, run_dir: Path, steps: int) -> list[list[int]]:
    """Train; return a digest of each micro-batch of this process, for each step."""
    run, found = TrainingStep.run, []

    def noting(self: TrainingStep, micro_batches: list[PackedBatch], **others: Any) -> StepResult:
        found.append([_digest(batch) for batch in micro_batches])
        return run(self, micro_batches, **others)

    TrainingStep.run = noting  # type: ignore[method-assign]
    start(small_run(data, steps=steps, schedule_steps=20), run_dir)
    return found


def _train(data: Path, run_dir: Path, kind: str, bad: set[int], steps: int) -> None:
    """Train with a loss that is ten times too large ("spike") or not a number ("nan") in every step that sees a bad batch."""
    run, fault_hooks.LEAST_STEPS = TrainingStep.run, 3

    def poisoned(self: TrainingStep, micro_batches: list[PackedBatch], *, step: int, **others: Any) -> StepResult:
        if kind == "nan":
            micro_batches = [
                replace(batch, loss_mask=batch.loss_mask * float("nan")) if _digest(batch) in bad else batch for batch in micro_batches
            ]
        seen = torch.tensor(float(any(_digest(batch) in bad for batch in micro_batches)))
        torch.distributed.all_reduce(seen)
        result = run(self, micro_batches, step=step, **others)
        if kind == "spike" and seen:
            result = replace(result, losses=replace(result.losses, losses=[10 * loss for loss in result.losses.losses]))
        return result

    TrainingStep.run = poisoned  # type: ignore[method-assign]
    experiment = small_run(data, steps=steps, schedule_steps=20, max_skipped_in_a_row=3, after_skipped="roll_back", after_spike="roll_back")
    start(replace(experiment, checkpoint=replace(experiment.checkpoint, interval=2)), run_dir)


def _losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


@pytest.fixture(scope="module")
def batches(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[set[int]]:
    """Digests of the micro-batches of each global batch."""
    found = run_processes(_batches, 2, demo_data, tmp_path_factory.mktemp("clean"), 7)
    return [set().union(*of_step) for of_step in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "from_step"), [("spike", 5), ("nan", 7)])
def test_a_run_goes_back_leaves_the_data_out_and_a_resume_sees_the_same(
    kind: str, from_step: int, batches: list[set[int]], demo_data: Path, tmp_path: Path
) -> None:
    bad = set().union(*batches[BAD - 1 : from_step])
    once, resumed = tmp_path / "once", tmp_path / "resumed"
    run_processes(_train, 2, demo_data, once, kind, bad, 9)
    (line,) = read(once)
    assert (line.from_step, line.to_step) == (from_step, 4)
    assert ("more than 1.5 times" if kind == "spike" else "not finite in 3 steps in a row, 5 to 7") in line.reason
    losses = _losses(once)
    assert list(losses) == list(range(1, 10)) and all(loss < 8 for loss in losses.values()), "no bad batch came again"
    assert [path.name for path in completed_checkpoints(once)] == ["step_00000008", "step_00000009"]
    assert (once / "checkpoints" / "rolled-back-step_00000006").is_dir() == (kind == "nan")
    for steps in (5, 7, 9):
        run_processes(_train, 2, demo_data, resumed, kind, bad, steps)
    assert _losses(resumed) == losses, "bit for bit"
    assert [replace(found, time="") for found in read(resumed)] == [replace(line, time="")]


def _always_bad(data: Path, run_dir: Path, after: str) -> str:
    run = TrainingStep.run

    def poisoned(self: TrainingStep, micro_batches: list[PackedBatch], *, step: int, **others: Any) -> StepResult:
        if step >= 3:
            micro_batches = [replace(batch, loss_mask=batch.loss_mask * float("nan")) for batch in micro_batches]
        return run(self, micro_batches, step=step, **others)

    TrainingStep.run = poisoned  # type: ignore[method-assign]
    experiment = small_run(data, steps=20, schedule_steps=20, max_skipped_in_a_row=2, after_skipped=after, max_roll_backs=1)
    try:
        start(replace(experiment, checkpoint=replace(experiment.checkpoint, interval=2)), run_dir)
    except RuntimeError as error:
        return str(error)
    return ""


def test_half_a_line_of_roll_backs_counts_for_nothing(tmp_path: Path) -> None:
    line = Line(time="", reason="a spike", from_step=7, to_step=4, plan={"x": 1})
    (tmp_path / FILE).write_text(json.dumps(asdict(line)) + "\n" + json.dumps(asdict(line))[:30])
    assert read(tmp_path) == [line]


def test_a_run_goes_back_so_often_and_no_more(demo_data: Path, tmp_path: Path) -> None:
    errors = run_processes(_always_bad, 2, demo_data, tmp_path, "roll_back")
    assert all("The run has gone back 1 times already" in error and FILE in error for error in errors), errors


def _flips_a_bit(data: Path, run_dir: Path) -> str:
    run = TrainingStep.run

    def flipped(self: TrainingStep, micro_batches: list[PackedBatch], *, step: int, **others: Any) -> StepResult:
        if step == 3 and os.environ["RANK"] == "2":
            weight = dict(self.model[0].module.named_parameters())["language.decoder.layers.1.mlp.linear_fc1.weight"]
            weight.data.view(-1)[7:8].view(torch.int32).bitwise_xor_(1)
        return run(self, micro_batches, step=step, **others)

    TrainingStep.run = flipped  # type: ignore[method-assign]
    try:
        start(small_run(data, steps=6, schedule_steps=20, global_batch_size=3, checksum_interval=1), run_dir)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_one_flipped_bit_in_a_copy_of_a_weight_names_its_rank(demo_data: Path, tmp_path: Path) -> None:
    errors = run_processes(_flips_a_bit, 3, demo_data, tmp_path / "found")
    assert errors == [errors[0]] * 3
    assert "differ before the update of step 3: rank 2 (" in errors[0] and "differs from ranks 0, 1 in 1 parameters" in errors[0]
    assert "language.decoder.layers.1.mlp.linear_fc1.weight" in errors[0]


def test_which_copy_is_odd_is_said_as_far_as_it_can_be() -> None:
    usual, odd = Copies("a", [0, 1, 2], {"w": 1, "v": 5}), Copies("b", [0, 1, 2], {"w": 2, "v": 5})
    assert odd_copies([[usual], [odd], [usual]]) == "rank 1 (b) differs from ranks 0, 2 in 1 parameters, such as w"
    two = [[Copies("a", [0, 1], {"w": 1})], [Copies("b", [0, 1], {"w": 2})]]
    assert "it cannot be determined which of them is wrong" in odd_copies(two)

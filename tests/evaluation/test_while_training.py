"""Evaluating a run while it trains: its W&B run is not touched, a checkpoint may be removed, and linked checkpoints are named."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small import small_run
from support.wandb_file import config, history, run_ids

from megatron_mm.evaluation.results import Result
from megatron_mm.run.evaluate_tasks import Target, _while_it_is_there, log_to_wandb, open_target
from megatron_mm.run.lock import RunLock


def _result() -> Result:
    setting = {"task": "gqa", "shots": 4, "limit": None, "model": {"checkpoint": "step_00000020"}}
    return Result("gqa", "GQA", "accuracy, %", {"score": 41.5}, setting, 2, 0, {}, "", 1.0)


def _scores(path: Path) -> dict[str, Any]:
    """Return the line of W&B's file with the scores; its service may write it shortly after the run has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for line in history(path):
            if "evaluation/gqa/4shot" in line:
                return line
        time.sleep(0.2)
    raise AssertionError(f"{path} has no scores")


def test_scores_go_to_the_runs_wandb_run_and_while_it_trains_to_one_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    experiment = small_run(tmp_path)
    experiment = replace(experiment, monitor=replace(experiment.monitor, wandb="offline", run_name="first"))
    log_to_wandb(experiment, tmp_path, [_result()], step=20)
    assert not (tmp_path / "wandb").exists(), "training has no W&B run there"
    (tmp_path / "wandb_run_id").write_text("abcd1234\n")
    log_to_wandb(experiment, tmp_path, [_result()], step=20)
    (own,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    line = _scores(own)
    assert run_ids(own) == {"abcd1234"}
    assert line["evaluation/gqa/4shot"] == 41.5 and line["train/step"] == 20
    assert not {"world_size", "parallel"} & set(config(own)), "the training's configuration stays"
    with RunLock(tmp_path):
        log_to_wandb(experiment, tmp_path, [_result()], step=20)
    (beside,) = set(tmp_path.glob("wandb/offline-run-*/*.wandb")) - {own}
    assert _scores(beside) and run_ids(beside) == {"abcd1234-evaluation"}


def _checkpoint(path: Path, step: int) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"step": step, "files": {}}))
    return path


def test_a_checkpoint_that_goes_while_it_is_read_is_said(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoints" / "step_00000020", 20)
    with pytest.raises(FileNotFoundError, match="damaged"), _while_it_is_there(checkpoint):
        raise FileNotFoundError("damaged")
    with (
        pytest.raises(ValueError, match=r"step_00000020 was removed while it was read: .*--checkpoint.keep-every"),
        _while_it_is_there(checkpoint),
    ):
        (checkpoint / "manifest.json").unlink()
        raise FileNotFoundError("tensors")


def test_links_and_copies_of_checkpoints(tmp_path: Path) -> None:
    whole = _checkpoint(tmp_path / "run" / "checkpoints" / "step_00000020", 20)
    (whole.parent / "best").symlink_to(whole.name)
    target = open_target(whole.parent / "best", None, out=None)
    assert (target.name, target.step, target.folder) == ("step_00000020", 20, tmp_path / "run")
    copied = Target(path := _checkpoint(tmp_path / "kept" / "good one", 40), path, is_export=False)
    assert (copied.name, copied.step, copied.folder) == ("good one", 40, tmp_path / "kept")

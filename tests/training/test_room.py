"""A run warns, after a checkpoint, if the disk has no room for those to come."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from megatron_mm.config import CheckpointConfig
from megatron_mm.run.hooks import Checkpoints
from megatron_mm.training.checkpoint.room import missing_room
from megatron_mm.training.trainer import StepRecord, Trainer

GB = 10**9


def write_checkpoints(run_dir: Path, *steps: int) -> None:
    """Manifests of checkpoints of 10 GB."""
    for step in steps:
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"files": {"__0_0.distcp": [4 * GB, 1], "__1_0.distcp": [6 * GB, 2]}}))


@pytest.mark.parametrize(
    ("steps", "saves_left", "free", "more"),
    [
        ((2,), 9, 30, 0),
        ((2,), 9, 29, 3),
        ((2,), 2, 20, 0),
        ((2,), 2, 19, 2),
        ((2, 4, 6), 9, 10, 0),
        ((2, 4, 6), 9, 9, 1),
        ((2, 4, 6, 8), 9, 9, 1),
        ((2,), 0, 0, 0),
        ((), 9, 0, 0),
    ],
)
def test_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], saves_left: int, free: int, more: int
) -> None:
    write_checkpoints(tmp_path, *steps)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free * GB))
    warning = missing_room(tmp_path, config=CheckpointConfig(keep=3), saves_left=saves_left)
    if not more:
        assert warning is None
    else:
        assert warning is not None
        assert f"takes 10 GB, and {more} more will be written" in warning and f"has only {free} GB free" in warning


def test_a_run_warns_once_and_only_on_the_main_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoints(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=GB))
    config = CheckpointConfig(interval=100)
    experiment = SimpleNamespace(checkpoint=config, train=SimpleNamespace(steps=900))
    for is_main in (False, True):
        checkpointer = SimpleNamespace(poll=lambda told: None, saved_step=None)
        names = {"experiment": experiment, "checkpointer": checkpointer, "run_dir": tmp_path}
        trainer = SimpleNamespace(**names, topology=SimpleNamespace(is_main=is_main), state=SimpleNamespace(best_step=None))
        hook = Checkpoints(cast(Trainer, trainer))
        with caplog.at_level(logging.WARNING):
            for step in (1, 2, 3, 4):
                checkpointer.saved_step = None if step == 1 else step
                hook.after_step(cast(StepRecord, SimpleNamespace(step=step, told={hook: (0.0, 0.0)})))
                assert len(caplog.records) == (is_main and step > 1)

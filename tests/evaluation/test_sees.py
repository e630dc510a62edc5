"""The model looks at the images: it predicts words that only they can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.data.demo import prepare_demo
from megatron_mm.evaluation.run import Evaluated, evaluate, experiment_of
from megatron_mm.training.checkpoint import find_checkpoint

STEPS = 130
TIMEOUT = 480
"""Seconds; about 40 on two cores."""


def _start(run_dir: Path, data: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_mm", "train", "debug_mm1", "--run-dir", run_dir, "--data.path", data]
    command += [
        "--train.steps",
        STEPS,
        "--train.schedule-steps",
        STEPS,
        "--eval.interval",
        0,
        "--train.global-batch-size",
        4,
        "--monitor.wandb",
        "disabled",
        *options,
    ]
    return subprocess.Popen([str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Evaluated]:
    """debug_mm1 after the same steps on the same data, with images and without, on held-out data."""
    folder = tmp_path_factory.mktemp("sees")
    prepare_demo(folder / "data", samples=2000)
    runs = {images: _start(folder / images, folder / "data", "--data.images", images) for images in ("true", "blank")}
    try:
        codes = [run.wait(TIMEOUT) for run in runs.values()]
    finally:
        for run in runs.values():
            run.kill()
    assert codes == [0, 0]
    found = {}
    for images in runs:
        checkpoint = find_checkpoint(folder / images)
        experiment = experiment_of(checkpoint)
        found[images] = evaluate(replace(experiment, eval=replace(experiment.eval, samples=0)), checkpoint)
        print(f"\ntrained on {images} images", *found[images].report(), sep="\n")
    return found


def test_true_images_lower_the_held_out_loss_by_far(trained: dict[str, Evaluated]) -> None:
    assert trained["true"].worth_of_images() > 0.3


def test_a_model_trained_without_images_gets_nothing_from_them(trained: dict[str, Evaluated]) -> None:
    blind = trained["blank"].losses
    assert blind["blank"]["heldout/loss"] > 1.3 * trained["true"].losses["true"]["heldout/loss"]
    assert trained["blank"].worth_of_images() < 0.02


def test_text_without_images_is_not_affected_by_them(trained: dict[str, Evaluated]) -> None:
    losses = trained["true"].losses
    assert losses["true"]["heldout/loss/text"] == pytest.approx(losses["shuffled"]["heldout/loss/text"], rel=1e-6)

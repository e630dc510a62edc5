"""The model uses the images: it predicts words that only they determine."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.data.prepare.demo import prepare_demo
from megatron_mm.run.evaluate import Evaluated, evaluate, experiment_of
from megatron_mm.training.checkpoint import find_checkpoint

pytestmark = pytest.mark.slow

STEPS = 130
TIMEOUT = 480
"""Time limit of a run, in seconds; it takes about 40 on two cores."""
RUNS = {
    "mm1": ("debug_mm1", "true"),
    "mm1 without images": ("debug_mm1", "blank"),
    "infimm": ("debug_infimm", "true"),
    "mono_internvl": ("debug_mono_internvl", "true"),
}
"""Recipe, and the images used in training (`data.images`)."""


def _start(recipe: str, run_dir: Path, data: Path, *options: str) -> subprocess.Popen[bytes]:
    settings = {
        "--run-dir": run_dir,
        "--data.path": data,
        "--train.steps": STEPS,
        "--train.schedule-steps": STEPS,
        "--train.global-batch-size": 4,
        "--eval.interval": 0,
        "--monitor.wandb": "disabled",
    }
    command = [sys.executable, "-m", "megatron_mm", "train", recipe, *itertools.chain(*settings.items()), *options]
    return subprocess.Popen([str(word) for word in command], env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prepare_demo(path := tmp_path_factory.mktemp("sees") / "data", samples=2000)
    return path


def _train(names: list[str], folder: Path, data: Path) -> dict[str, Evaluated]:
    """Train models at the same time for the same steps on the same data; return their results on held-out data."""
    runs = {name: _start(RUNS[name][0], folder / name, data, "--data.images", RUNS[name][1]) for name in names}
    try:
        codes = [run.wait(TIMEOUT) for run in runs.values()]
    finally:
        for run in runs.values():
            run.kill()
    assert set(codes) == {0}
    found = {}
    for name in runs:
        checkpoint = find_checkpoint(folder / name)
        experiment = experiment_of(checkpoint)
        found[name] = evaluate(replace(experiment, eval=replace(experiment.eval, samples=0)), checkpoint)
        print(f"\n{name}", *found[name].report(), sep="\n")
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Evaluated]:
    return _train(["mm1", "mm1 without images"], tmp_path_factory.mktemp("runs"), data)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Evaluated]:
    return _train(["infimm", "mono_internvl"], tmp_path_factory.mktemp("runs"), data)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["infimm", "mono_internvl"])
def test_other_families_answer_the_questions_from_the_images(others: dict[str, Evaluated], family: str) -> None:
    """Interleaved documents have a question before each picture and the answer after it."""
    losses = others[family].losses
    assert losses["true"]["heldout/loss/interleaved"] < 0.85 * losses["shuffled"]["heldout/loss/interleaved"]
    assert others[family].worth_of_images() > 0.2


def test_true_images_lower_the_held_out_loss_by_far(trained: dict[str, Evaluated]) -> None:
    assert trained["mm1"].worth_of_images() > 0.3


def test_a_model_trained_without_images_gets_nothing_from_them(trained: dict[str, Evaluated]) -> None:
    blind = trained["mm1 without images"].losses
    assert blind["blank"]["heldout/loss"] > 1.3 * trained["mm1"].losses["true"]["heldout/loss"]
    assert trained["mm1 without images"].worth_of_images() < 0.02


def test_text_without_images_is_not_affected_by_them(trained: dict[str, Evaluated]) -> None:
    losses = trained["mm1"].losses
    assert losses["true"]["heldout/loss/text"] == pytest.approx(losses["shuffled"]["heldout/loss/text"], rel=1e-6)

"""An evaluation, or a resumed run, on data with another template or tokenizer is noticed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.distributed import run_processes
from support.small_infimm import infimm_run

from megatron_mm.config import Experiment
from megatron_mm.data.prepare.index import prepare_index
from megatron_mm.data.text.tokenizer import train_tokenizer
from megatron_mm.families.serialize import load_experiment
from megatron_mm.run.evaluate import evaluate, experiment_of
from megatron_mm.run.start import start
from megatron_mm.training.checkpoint import find_checkpoint


def _chats(data: Path, steps: int = 2) -> Experiment:
    experiment = infimm_run(data, steps=steps, schedule_steps=4)
    return replace(experiment, data=replace(experiment.data, mixture={"conversations": 1.0}))


def _train(data: Path, run_dir: Path) -> None:
    start(_chats(data), run_dir)


@pytest.fixture(scope="module")
def trained(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on conversations with vicuna's template, and its data."""
    folder = tmp_path_factory.mktemp("chats")
    data = Path(shutil.copytree(demo_data, folder / "data"))
    prepare_index(data, template="vicuna")
    run_processes(_train, 1, data, folder / "run")
    return folder / "run", data


def test_a_run_records_the_template_that_its_data_was_indexed_with(trained: tuple[Path, Path]) -> None:
    run_dir, _ = trained
    assert load_experiment(run_dir / "config.json").data.chat_template == "vicuna"
    assert load_experiment(find_checkpoint(run_dir) / "experiment.json").data.chat_template == "vicuna"


def test_evaluation_refuses_another_template_and_another_tokenizer(trained: tuple[Path, Path], demo_data: Path, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(trained[0])
    experiment = experiment_of(checkpoint)
    on_other = replace(experiment, data=replace(experiment.data, path=demo_data))
    with pytest.raises(ValueError, match=r"indexed with the chat template plain, but data.chat_template is vicuna"):
        evaluate(on_other, checkpoint)
    other = tmp_path / "data"
    shutil.copytree(demo_data, other)
    train_tokenizer((f"a {word} of other words" for word in "abcdefgh" * 40), other / "tokenizer.model", vocab_size=300)
    with pytest.raises(ValueError, match="was trained with a different tokenizer than"):
        evaluate(replace(experiment, data=replace(experiment.data, path=other)), checkpoint)


def test_a_resume_under_another_template_is_told(trained: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from megatron_mm.run.changes import warn_of_changes
    from megatron_mm.run.data import as_indexed, make_plan

    run_dir, data = trained
    again = Path(shutil.copytree(data, tmp_path / "data"))
    prepare_index(again, template="llama2")
    warn_of_changes(as_indexed(_chats(again), make_plan(_chats(again), split="train").indexes), run_dir / "config.json")
    assert "data.chat_template vicuna and resumes with llama2" in caplog.text

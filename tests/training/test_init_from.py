"""From one training stage to the next: a checkpoint's weights, a fresh optimizer, other frozen parts, strict matching of names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small_infimm import infimm_run

from megatron_mm.run.start import assemble, check, start
from megatron_mm.training import checkpoint as checkpoints
from megatron_mm.training.checkpoint import find_checkpoint
from megatron_mm.training.trainer import Trainer

STEPS = 4


def first_stage(data: Path, run_dir: Path, layout: dict[str, Any]) -> None:
    start(infimm_run(data, parallel=layout, steps=STEPS, schedule_steps=STEPS, policy="ift"), run_dir)


def second_stage(data: Path, first: Path, run_dir: Path, layout: dict[str, Any]) -> dict[str, Any]:
    """Train 20 steps with policy "pt"; return the weights before and after, and the sizes of optimizer state and gradient buffers."""
    experiment = replace(infimm_run(data, parallel=layout, steps=20, schedule_steps=20, policy="pt"), init_from=first)
    trainer = assemble(check(experiment, run_dir), run_dir)
    before = _weights(trainer)
    states = sum(len(part.optimizer.state) for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]))
    grads = sum(buffer.numel for chunk in trainer.model for buffer in chunk.buffers)
    trainer.fit()
    return {"before": before, "after": _weights(trainer), "states": states, "grads": grads}


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for chunk in trainer.model for name, p in chunk.module.named_parameters()}


@pytest.fixture(scope="module")
def first(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("first") / "run"
    run_processes(first_stage, 1, demo_data, run_dir, {})
    return run_dir


def test_a_stage_begins_with_the_weights_of_the_one_before_and_a_fresh_optimizer(first: Path, demo_data: Path, tmp_path: Path) -> None:
    (found,) = run_processes(second_stage, 1, demo_data, first, tmp_path / "alone", {})
    assert found["states"] == 0, "no moments before the first step"
    (initial,) = run_processes(_fresh_weights, 1, demo_data, tmp_path / "fresh")
    moved = {name for name, before in found["before"].items() if not torch.equal(before, initial[name])}
    assert any(".linear_qkv." in name for name in moved), "the first stage's weights are not the initial ones"
    changed = {name for name, before in found["before"].items() if not torch.equal(before, found["after"][name])}
    assert changed and all(name.startswith("resampler.") or ".gated." in name for name in changed), "frozen weights are bit-identical"
    learning = sum(tensor.numel() for name, tensor in found["after"].items() if name.startswith("resampler.") or ".gated." in name)
    assert learning <= found["grads"] < 1.1 * learning, "gradient buffers are for what learns"
    lines = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21)), "a stage counts its own steps"


def _fresh_weights(data: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    return _weights(assemble(check(infimm_run(data, steps=1, schedule_steps=1, policy="ift"), run_dir), run_dir))


@pytest.mark.slow
def test_another_layout_begins_with_the_same_weights(first: Path, demo_data: Path, tmp_path: Path) -> None:
    """Pipeline 2 whose last stage has no gated block, so nothing on it is trainable."""
    layout = {"pipeline": 2, "stage_layers": (4, 0)}
    run_processes(second_stage, 1, demo_data, first, tmp_path / "alone", {})
    run_processes(second_stage, 2, demo_data, first, tmp_path / "two", layout)
    alone, two = ([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("alone", "two"))
    assert two == pytest.approx(alone, rel=1e-5)


def test_another_policy_is_a_new_run(first: Path, demo_data: Path) -> None:
    experiment = infimm_run(demo_data, steps=8, schedule_steps=8, policy="pt")
    with pytest.raises(ValueError, match=r"was trained with train.freeze_policy 'ift', not 'pt': .* --run-dir NEW --init-from"):
        check(experiment, first)


def test_an_unknown_policy_lists_those_of_the_family(demo_data: Path, tmp_path: Path) -> None:
    experiment = infimm_run(demo_data, steps=8, schedule_steps=8, policy="all")
    with pytest.raises(
        ValueError,
        match=r"train.freeze_policy is 'all', but must be one of the policies of infimm models: \['ift', 'ift_frozen_language', 'mtt',",
    ):
        check(experiment, tmp_path)


def test_another_model_and_another_tokenizer_are_refused(first: Path, demo_data: Path, tmp_path: Path) -> None:
    experiment = replace(infimm_run(demo_data, steps=8, schedule_steps=8, policy="pt"), init_from=first)
    check(experiment, tmp_path)
    other = replace(experiment, model=replace(experiment.model, decoder=replace(experiment.model.decoder, num_layers=6)))
    with pytest.raises(ValueError, match=r"holds a different model .*model.decoder.num_layers is 4 there and 6 here"):
        check(other, tmp_path)
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes((demo_data / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"not a SentencePiece model|a different tokenizer"):
        check(replace(experiment, data=replace(experiment.data, tokenizer=tokenizer)), tmp_path)
    with pytest.raises(ValueError, match="neither a complete checkpoint nor a run directory"):
        check(replace(experiment, init_from=tmp_path / "nowhere"), tmp_path)


def _strict(data: Path, first: Path, run_dir: Path) -> str:
    """Load a checkpoint into a model with a renamed module; return the error."""
    experiment = infimm_run(data, steps=1, schedule_steps=1, policy="pt")
    trainer = assemble(check(experiment, run_dir), run_dir)
    chunk = trainer.model[0].module
    chunk.renamed = chunk.resampler
    chunk.encoders = ("vision", "renamed")
    try:
        checkpoints.load_weights(experiment, trainer.topology, trainer.model, find_checkpoint(first))
    except ValueError as error:
        return str(error)
    return ""


def test_missing_weights_are_listed(first: Path, demo_data: Path, tmp_path: Path) -> None:
    (message,) = run_processes(_strict, 1, demo_data, first, tmp_path)
    assert "lacks" in message and "renamed.latents" in message and "renamed.norm.weight" in message

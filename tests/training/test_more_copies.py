"""Copies of the training state in addition to checkpoints: in memory, in other storage, and the best checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.evaluation.heldout import HeldOut
from megatron_mm.run.start import check, start
from megatron_mm.training.checkpoint import completed_checkpoints, find_checkpoint
from megatron_mm.training.checkpoint.copies import Copies
from megatron_mm.training.trainer import Hook, StepRecord

PARALLEL = {"pipeline": 2}


class _Killed(Exception):
    pass


class _DiesAfter(Hook):
    step = 0

    def after_step(self, record: StepRecord) -> None:
        if record.step == self.step + 1:
            self.trainer.checkpointer.finish()
            raise _Killed


def _train(data: Path, run_dir: Path, steps: int, checkpoint: dict[str, Any], dies_after: int = 0, **others: Any) -> list[str]:
    """Train, possibly dying in the step after `dies_after`; return the log lines about resuming and copies."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_mm").setLevel(logging.INFO)
    logging.getLogger("megatron_mm").addHandler(handler)
    _DiesAfter.step = dies_after
    experiment = small_run(data, steps=steps, schedule_steps=20, **others)
    experiment = replace(experiment, checkpoint=replace(experiment.checkpoint, **checkpoint))
    with contextlib.suppress(_Killed):
        start(experiment, run_dir, more_hooks=lambda trainer, monitor, plan: [_DiesAfter(trainer)] if dies_after else [])
    return [text for text in said if "resumed from" in text or "copied" in text or "copy" in text]


def _losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_store_that_does_not_answer_is_asked_once(demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Copies] = []

    def complete(copies: Copies) -> list[str]:
        asked.append(copies)
        raise OSError("it is gone")

    monkeypatch.setattr(Copies, "complete", complete)
    with pytest.raises(ValueError, match=r"^the run has no checkpoint, and none can be fetched from .*copies: it is gone$"):
        _train(demo_data, tmp_path / "run", 1, {"copy_to": str(tmp_path / "copies")})
    assert len(asked) == 1


def test_a_run_does_not_write_into_its_data(demo_data: Path) -> None:
    with pytest.raises(ValueError, match=r"is the data set of --data\.path: choose another --run-dir"):
        check(small_run(demo_data), demo_data)


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed optimizer", "plain optimizer"])
def test_a_restart_resumes_from_memory_bit_for_bit(distributed: bool, demo_data: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    parallel = {"tensor": 2, "distributed_optimizer": distributed}
    options = {"interval": 4, "memory": memory, "memory_interval": 1}
    once, again = tmp_path / "once", tmp_path / "again"
    run_processes(_run_in, 2, demo_data, once, 9, {"interval": 100}, parallel)
    run_processes(_run_in, 2, demo_data, again, 9, options, parallel, 6)
    assert [path.name for path in completed_checkpoints(again)] == ["step_00000004"]
    said = run_processes(_run_in, 2, demo_data, again, 9, options, parallel)[0]
    assert said == [f"resumed from the copy of step 6 in {memory}"]
    assert _losses(again) == _losses(once)
    assert not list(memory.iterdir()), "the memory is free at the end"


def _run_in(data: Path, run_dir: Path, steps: int, checkpoint: dict[str, Any], parallel: dict[str, Any], dies_after: int = 0) -> list[str]:
    return _train(data, run_dir, steps, checkpoint, dies_after, parallel=parallel)


@pytest.mark.slow
def test_a_copy_that_one_process_lacks_or_of_another_layout_is_not_used(demo_data: Path, tmp_path: Path) -> None:
    memory, run_dir = tmp_path / "memory", tmp_path / "run"
    options = {"interval": 4, "memory": memory, "memory_interval": 1}
    run_processes(_run_in, 2, demo_data, run_dir, 9, options, PARALLEL, 6)
    kept = Path(shutil.copytree(memory, tmp_path / "kept"))
    run_again = Path(shutil.copytree(run_dir, tmp_path / "kept_run"))
    said = run_processes(_run_in, 2, demo_data, run_dir, 7, options, {"tensor": 2})[0]
    assert "step_00000004 (written under another layout)" in said[0]
    shutil.rmtree(run_dir)
    shutil.copytree(run_again, run_dir)
    shutil.copytree(kept, memory, dirs_exist_ok=True)
    for path in memory.glob("*/rank-00001-*"):  # the node was replaced
        path.unlink()
    said = run_processes(_run_in, 2, demo_data, run_dir, 7, options, PARALLEL)[0]
    assert [words for words in said if words.startswith("resumed from")] == [f"resumed from {run_dir / 'checkpoints' / 'step_00000004'}"]


def test_every_checkpoint_is_copied_elsewhere_checked_and_fetched_when_the_run_has_lost_its_own(demo_data: Path, tmp_path: Path) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    options = {"interval": 2, "keep": 2, "copy_to": str(elsewhere)}
    said = run_processes(_run_in, 2, demo_data, run_dir, 6, options, PARALLEL)[0]
    assert f"checkpoint step_00000006 copied to {elsewhere}" in said[-1]
    assert len(list(elsewhere.iterdir())) <= 2
    mine = {
        path.relative_to(run_dir / "checkpoints"): path.read_bytes()
        for path in completed_checkpoints(run_dir)[-1].rglob("*")
        if path.is_file()
    }
    assert {path: (elsewhere / path).read_bytes() for path in mine} == mine
    before = _losses(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    said = run_processes(_run_in, 2, demo_data, run_dir, 7, options, PARALLEL)[0]
    assert f"has no checkpoint: fetching step_00000006 from {elsewhere}" in "\n".join(said) or "resumed from" in said[0]
    assert _losses(run_dir)[:6] == before and len(_losses(run_dir)) == 7


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_all_damaged_takes_its_copy(demo_data: Path, tmp_path: Path) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    options = {"interval": 2, "keep": 2, "copy_to": str(elsewhere)}
    run_processes(_run_in, 2, demo_data, run_dir, 4, options, PARALLEL)
    before = _losses(run_dir)
    for checkpoint in completed_checkpoints(run_dir):
        (checkpoint / "state.json").write_text("{}")
    said = "\n".join(run_processes(_run_in, 2, demo_data, run_dir, 5, options, PARALLEL)[0])
    assert f"resumed from {run_dir / 'checkpoints' / 'step_00000004'}" in said
    assert _losses(run_dir)[:4] == before and len(_losses(run_dir)) == 5
    assert len(list((run_dir / "checkpoints").glob("damaged-step_*"))) == 2


def test_a_copy_that_reads_back_otherwise_has_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "run" / "step_00000002"
    (checkpoint / "tensors").mkdir(parents=True)
    (checkpoint / "tensors" / "a").write_bytes(b"abc")
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {"a": [3, 891568578]}}))
    copies = Copies("memory://elsewhere", superseded=lambda checkpoints: checkpoints[:-1])
    copies.add(checkpoint)
    copies.finish(seconds=10, beat=lambda: None)
    assert copies.complete() == ["step_00000002"]
    fetched = copies.fetch("step_00000002", tmp_path)
    assert (fetched / "tensors" / "a").read_bytes() == b"abc" and find_checkpoint(fetched) == fetched

    put = copies.store.put_file

    def damaging(here: str, there: str, **others: Any) -> None:
        put(here, there, **others)
        if there.endswith("tensors/a"):
            copies.store.pipe_file(there, b"abd")

    monkeypatch.setattr(copies.store, "put_file", damaging, raising=False)
    copies.add(Path(shutil.copytree(checkpoint, checkpoint.with_name("step_00000004"))))
    copies.finish(seconds=10, beat=lambda: None)
    assert "a was read back as 3 bytes with CRC-32" in caplog.text
    assert copies.complete() == ["step_00000002"], "the one before stays"
    with pytest.raises(ValueError, match=r"checkpoint\.copy_to nothing://there cannot be opened"):
        Copies("nothing://there", superseded=lambda checkpoints: [])


def _evaluates(data: Path, run_dir: Path, steps: int) -> None:
    values = iter([3.0, 2.0, 2.5, 2.7])
    HeldOut.losses = lambda self, step, **others: {"heldout/loss": next(values)}  # type: ignore[method-assign]
    experiment = small_run(data, steps=steps, schedule_steps=20)
    experiment = replace(
        experiment,
        eval=replace(experiment.eval, interval=3, batches=1, samples=0),
        checkpoint=replace(experiment.checkpoint, best=True, keep=1, interval=4),
    )
    start(experiment, run_dir)


@pytest.mark.slow
def test_the_checkpoint_with_the_lowest_held_out_loss_stays(demo_data: Path, tmp_path: Path) -> None:
    run_processes(_evaluates, 2, demo_data, tmp_path, 12)
    assert [path.name for path in completed_checkpoints(tmp_path)] == ["step_00000006", "step_00000012"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000006"
    assert find_checkpoint(tmp_path / "checkpoints" / "best").is_dir()

"""Resuming is exact: identical losses on the same layout, the same samples and loss curve on any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.distributed import run_processes
from support.small import small_run

from megatron_mm.run.start import check, note_samples, start
from megatron_mm.training.checkpoint import TrainState

Layout = dict[str, Any]
TENSOR_PIPELINE: Layout = {"tensor": 2, "pipeline": 2}
STEPS = 12


def run(data: Path, run_dir: Path, layout: Layout, steps: int, options: dict[str, Any] | None = None) -> None:
    """Train up to `steps`; called by all processes of a layout."""
    experiment = small_run(data, parallel=layout, steps=steps, schedule_steps=20)
    start(replace(experiment, checkpoint=replace(experiment.checkpoint, **(options or {}))), run_dir)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir)]


@pytest.fixture(scope="module")
def straight(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run directories of 12 steps without a stop, by world size (1 and 4)."""
    runs = {}
    for world_size, layout in ((1, {}), (4, TENSOR_PIPELINE)):
        runs[world_size] = tmp_path_factory.mktemp("straight")
        run_processes(run, world_size, demo_data, runs[world_size], layout, STEPS)
    return runs


@pytest.fixture(scope="module")
def half(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same runs, stopped after 6 steps."""
    runs = {}
    for world_size, layout in ((1, {}), (4, TENSOR_PIPELINE)):
        runs[world_size] = tmp_path_factory.mktemp("half")
        run_processes(run, world_size, demo_data, runs[world_size], layout, STEPS // 2)
    return runs


def copy(run_dir: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_dir, to / "run"))


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (4, TENSOR_PIPELINE)], ids=["one process", "tensor 2 pipeline 2"])
def test_resume_on_the_same_layout_is_bit_identical(
    demo_data: Path, straight: dict[int, Path], half: dict[int, Path], tmp_path: Path, world_size: int, layout: Layout
) -> None:
    """Resume twice: an error in loading may only show in the checkpoint saved afterwards."""
    run_dir = copy(half[world_size], tmp_path)
    for steps in (9, STEPS):
        run_processes(run, world_size, demo_data, run_dir, layout, steps)
    assert losses(run_dir) == losses(straight[world_size])
    assert [line["grad_norm"] for line in metrics(run_dir)] == [line["grad_norm"] for line in metrics(straight[world_size])]


def test_metrics_have_every_step_once_with_the_promised_fields(straight: dict[int, Path]) -> None:
    lines = metrics(straight[4])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert {"loss", "losses", "grad_norm", "lr", "tokens", "images", "seconds", "tokens_per_s", "tflops", "mfu"} <= set(lines[0])
    assert losses(straight[4]) == pytest.approx(losses(straight[1]), rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 4}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        (2, {"pipeline": 2, "virtual": 2}),
        pytest.param(4, {"pipeline": 2, "spread_encoder": True}, marks=pytest.mark.slow),
    ],
    ids=["one process", "tensor 4", "data 2", "pipeline 2 virtual 2", "pipeline 2 spread encoder"],
)
def test_resume_on_another_layout_continues_the_curve(
    demo_data: Path, straight: dict[int, Path], half: dict[int, Path], tmp_path: Path, world_size: int, layout: Layout
) -> None:
    run_dir = copy(half[4], tmp_path)
    run_processes(run, world_size, demo_data, run_dir, layout, STEPS)
    assert [line["step"] for line in metrics(run_dir)] == list(range(1, STEPS + 1))
    assert losses(run_dir) == pytest.approx(losses(straight[4]), rel=1e-5)
    for ours, theirs in zip(metrics(run_dir), metrics(straight[4]), strict=True):  # the same samples in every global batch
        assert (ours["tokens"], ours["images"], set(ours["losses"])) == (theirs["tokens"], theirs["images"], set(theirs["losses"]))


@pytest.mark.slow
def test_resume_of_a_run_whose_pipeline_ranks_all_encode(demo_data: Path, straight: dict[int, Path], tmp_path: Path) -> None:
    """Resuming is exact on the same layout, and any other layout can load the checkpoint."""
    spread: Layout = {"tensor": 2, "pipeline": 2, "spread_encoder": True}
    without_stop, stopped = tmp_path / "straight", tmp_path / "stopped"
    run_processes(run, 4, demo_data, without_stop, spread, STEPS)
    run_processes(run, 4, demo_data, stopped, spread, STEPS // 2)
    elsewhere = copy(stopped, tmp_path)
    run_processes(run, 4, demo_data, stopped, spread, STEPS)
    assert losses(stopped) == losses(without_stop)
    run_processes(run, 2, demo_data, elsewhere, {"tensor": 2}, STEPS)
    for run_dir in (stopped, elsewhere):
        assert losses(run_dir) == pytest.approx(losses(straight[4]), rel=1e-5)


def test_a_run_that_is_done_says_so_and_does_nothing(demo_data: Path, half: dict[int, Path], tmp_path: Path) -> None:
    run_dir = copy(half[1], tmp_path)
    run_processes(run, 1, demo_data, run_dir, {}, STEPS // 2)
    assert losses(run_dir) == losses(half[1])


def test_a_run_is_not_resumed_with_another_tokenizer(demo_data: Path, half: dict[int, Path], tmp_path: Path) -> None:
    """A checkpoint of before tokenizers were kept has none to compare."""
    tokenizer = tmp_path / "other.model"
    tokenizer.write_bytes((demo_data / "tokenizer.model").read_bytes() + b"\xc2\x3e\x00")  # an unknown field: still a valid model
    experiment = small_run(demo_data, steps=STEPS, schedule_steps=20)
    other = replace(experiment, data=replace(experiment.data, tokenizer=tokenizer))
    run_dir = copy(half[1], tmp_path)
    check(experiment, run_dir)
    with pytest.raises(
        ValueError, match=r"was trained with a different tokenizer than .*other.model: copy .*tokenizer.model to .* --run-dir"
    ):
        check(other, run_dir)
    (checkpoint,) = (run_dir / "checkpoints").glob("step_*")
    (checkpoint / "tokenizer.model").unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["descriptions"]["tokenizer.model"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    check(other, run_dir)


def test_a_resume_warns_of_sources_with_another_number_of_samples(half: dict[int, Path], caplog: pytest.LogCaptureFixture) -> None:
    """The number is in the checkpoint; one of an earlier version has none."""
    (checkpoint,) = (half[1] / "checkpoints").glob("step_*")
    state = TrainState(**json.loads((checkpoint / "state.json").read_text()))
    sizes = {"interleaved": 96, "pairs": 120, "text": 24}
    assert state.num_samples == sizes
    note_samples(state, sizes, warn=True)
    note_samples(TrainState(), sizes, warn=True)
    assert not caplog.text
    note_samples(state, {**sizes, "pairs": 1498, "new": 5}, warn=True)
    assert [record.getMessage() for record in caplog.records] == [
        "source pairs had 120 samples and has 1,498 now: its samples come in another order, so some may be repeated or left out"
    ]
    assert state.num_samples["pairs"] == 1498

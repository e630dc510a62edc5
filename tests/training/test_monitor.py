"""metrics.jsonl has every step once; W&B gets the same, continues after a resume, and may fail without harm."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.monitors import experiment, lines, metrics, monitor
from support.wandb_file import config, history, run_ids

from megatron_mm.config import MoEConfig
from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.reporting.monitor import Monitor
from megatron_mm.reporting.wandb_run import redact
from megatron_mm.training.metrics import MetricsFile, draw_loss_curve, to_json
from megatron_mm.training.routing import draw_expert_load

# -------------------------------------------------------------------------------------------------------------- metrics.jsonl


def test_a_resume_appends_and_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resume_step=0)
    for step in range(1, 6):
        file.write(metrics(step))
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 6, "los')  # the process died while writing
    file = MetricsFile(path, resume_step=3)
    file.write(metrics(4, loss=9.0))
    file.close()
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 9.0)]


def test_the_line_says_what_is_per_device_and_a_dense_run_has_no_file_of_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    base = experiment()
    quiet = replace(base, monitor=replace(base.monitor, wandb="disabled"))
    decoder = replace(quiet.model.decoder, moe=MoEConfig(num_experts=4, every_n_layers=1))
    moe = replace(quiet, model=replace(quiet.model, decoder=decoder))
    for name, settings in (("dense", quiet), ("sparse", moe)):
        watched = Monitor(settings, tmp_path / name, resume_step=0, world_size=4, is_main=True)
        watched.log_step(metrics(1))
        watched.close(exit_code=0)
        assert (tmp_path / name / "experts.jsonl").is_file() == (name == "sparse")
    assert "200 tokens/s  0.1 TFLOP/s per device  " in caplog.text


def test_a_number_that_json_cannot_write_is_null() -> None:
    assert json.loads(to_json({"a": math.nan, "b": {"c": math.inf, "d": 1.5}})) == {"a": None, "b": {"c": None, "d": 1.5}}


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl", resume_step=0)
    file.write(metrics(1))
    assert len(lines(tmp_path / "m.jsonl")) == 1
    file.close()


# ------------------------------------------------------------------------------------------------------------------------ W&B


def test_wandb_has_everything_of_metrics_jsonl_and_a_resume_goes_on_with_the_same_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    for first in (1, 3):
        watched = monitor(run_dir, resume_step=first - 1)
        for step in (first, first + 1):
            watched.log_step(metrics(step, experts={"z_loss": 1.0 + step, "load_imbalance": 1.5}))
        watched.log_eval(first + 1, {"heldout/loss": 0.5})
        watched.log_picture(first + 1, "expert_load", draw_expert_load(np.ones((2, 4)), (1, 3), run_dir / "expert_load.png", title="t"))
        watched.log_captions(first + 1, [CaptionSample(image=picture, true="a red circle", generated="a red square")])
        watched.close(exit_code=0)
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    deadline = time.monotonic() + 30  # a separate process writes them, possibly with a delay
    while not all(run_ids(file) and len(history(file)) >= 7 for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run_ids(files[0]) == run_ids(files[1]) == {(run_dir / "wandb_run_id").read_text().strip()}
    logged = [entry for file in files for entry in history(file)]
    steps = {entry["train/step"]: entry for entry in logged if "train/loss" in entry}
    for line in lines(run_dir / "metrics.jsonl"):
        entry = steps[line["step"]]
        for name, value in line.items():
            if isinstance(value, dict):
                group = "loss" if name == "losses" else name
                assert {member: entry[f"train/{group}/{member}"] for member in value} == value
            elif value is not None:
                assert entry[f"train/{name}"] == value
        assert line["experts"] and line["losses"]
        assert entry["axis/tokens"] == line["total_tokens"] and entry["axis/hours"] >= 0
    resumes = [entry["events/resume"] for entry in logged if "events/resume" in entry]
    assert resumes == [1]
    assert [entry["train/step"] for entry in logged if "events/resume" in entry] == [2]
    assert [entry["heldout/loss"] for entry in logged if "heldout/loss" in entry] == [0.5, 0.5]
    tables = [(entry["captions/ncols"], entry["captions/nrows"]) for entry in logged if "captions/nrows" in entry]
    assert tables == [(3, 1), (3, 1)]
    assert [entry["train/step"] for entry in logged if "expert_load/path" in entry] == [2, 4]
    assert [entry["train/step"] for entry in logged if "loss_curve/path" in entry] == [2, 4]
    pictures = list((files[0].parent / "files" / "media").rglob("*.png"))
    assert pictures, "the captions' images and the loss curve are kept with the run"
    stored = config(files[0])
    assert stored["recipe"] == "debug_mm1" and stored["world_size"] == 4
    assert (run_dir / "loss_curve.png").stat().st_size > 1000


def test_training_goes_on_when_wandb_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no service")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, Settings=lambda **_: None))
    watched = monitor(tmp_path / "run")
    watched.log_step(metrics(1))
    watched.log_captions(1, [CaptionSample(image=np.zeros((4, 4, 3), dtype=np.uint8), true="a", generated="b")])
    watched.close(exit_code=0)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert [r.message for r in caplog.records if "W&B" in r.message] == [
        "W&B failed to start (RuntimeError: no service) and is switched off; metrics.jsonl is still written"
    ]


def started(watched: Monitor) -> Any:
    """Wait until the library's thread has started its run; return the run."""
    deadline = time.monotonic() + 60
    while not watched._wandb._counts and time.monotonic() < deadline:
        time.sleep(0.02)
    return watched._wandb._run


def test_training_goes_on_when_wandb_fails_in_the_middle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watched = monitor(tmp_path / "run")
    watched.log_step(metrics(1))
    run = started(watched)

    def fail(*_: Any) -> None:
        raise BrokenPipeError("service is gone")

    watched._wandb._run = SimpleNamespace(log=fail)
    for step in (2, 3):
        watched.log_step(metrics(step))
    watched.close(exit_code=0)
    run.finish()
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert sum("is switched off" in record.message for record in caplog.records) == 1


_KILLED = """
import logging, sys, time
from pathlib import Path
import psutil
from support.monitors import metrics, monitor
logging.basicConfig(level="WARNING", format="%(message)s", stream=sys.stdout)
watched = monitor(Path(sys.argv[1]))
watched.log_step(metrics(1))
while not watched._wandb._counts:
    time.sleep(0.02)
service = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("wandb")]
assert service, "W&B runs without a service process"
for process in service:
    process.kill()
psutil.wait_procs(service)
for step in range(2, 30):
    watched.log_step(metrics(step))
watched.close(exit_code=0)
"""


def test_training_goes_on_when_wandb_is_killed(tmp_path: Path) -> None:
    """In a process of its own, as the library has one service per process."""
    tests = Path(__file__).parents[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}  # not this process's service
    environment = {**own, "PYTHONPATH": f"{tests.parent}:{tests}"}
    command = [sys.executable, "-W", "ignore", "-c", _KILLED, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 30))
    assert [line for line in done.stdout.splitlines() if "W&B" in line and "switched off" in line] == done.stdout.splitlines()[:1]


def test_training_goes_on_when_wandb_cannot_write_its_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    watched = monitor(tmp_path / "run")
    watched.log_step(metrics(1))
    watched.close(exit_code=0)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert sum("W&B" in record.message for record in caplog.records) <= 1


def test_the_curve_has_a_gap_where_the_loss_is_not_a_number(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    for step, loss in enumerate((2.0, math.nan, 1.0), start=1):
        file.write(metrics(step, loss=loss, losses={"pairs": loss}))
    file.close()
    assert draw_loss_curve(tmp_path).stat().st_size > 1000


def test_the_console_tells_of_skipped_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = experiment()
    (tmp_path / "run").mkdir()
    quiet = replace(base, monitor=replace(base.monitor, wandb="disabled"))
    watched = Monitor(quiet, tmp_path / "run", resume_step=0, world_size=1, is_main=True)
    with caplog.at_level("INFO"):
        watched.log_step(metrics(1, skipped=True, skipped_steps=4, grad_norm=math.nan, mfu=0.4))
    watched.close(exit_code=0)
    assert "step 1 skipped: the gradient was not finite (4 so far)" in caplog.text
    assert "MFU 40.0%" in caplog.text
    assert lines(tmp_path / "run" / "metrics.jsonl")[0]["grad_norm"] is None


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("s3://bucket/data", True),
        ("https://user:pass@host/data", False),
        ("https://host/data?token=abc", False),
        ("hf_abcdefghijklmnopqrstuvwx", False),
        ("runs/first", True),
    ],
)
def test_credentials_do_not_reach_wandb(value: str, kept: bool) -> None:
    assert redact({"a": [value]}) == {"a": [value if kept else "[redacted]"]}

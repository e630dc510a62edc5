"""Destinations of metrics receive the right values, and none of them can stop or slow down a run."""

from __future__ import annotations

import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.monitors import experiment, lines, metrics

from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.reporting import events
from megatron_mm.reporting.monitor import Monitor
from megatron_mm.reporting.prometheus_page import PrometheusPage
from megatron_mm.reporting.sinks import Sink, Sinks
from megatron_mm.training.metrics import MetricsFile


def monitor(run_dir: Path, *, resume_step: int = 0, **fields: Any) -> Monitor:
    run_dir.mkdir(exist_ok=True)
    base = experiment()
    quiet = replace(base, monitor=replace(base.monitor, **{"wandb": "disabled", **fields}))
    return Monitor(quiet, run_dir, resume_step=resume_step, world_size=4, is_main=True)


class Recorder(Sink):
    name = "a recorder"

    def __init__(self, log: Callable[[int], None] = lambda step: None) -> None:
        super().__init__()
        self.steps: list[int] = []
        self._log = log

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._log(step)
        self.steps.append(step)


# ------------------------------------------------------------------------------------------------------------------- queue


def test_a_place_that_fails_is_switched_off_with_one_warning_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise OSError("no space")

    broken, good = Recorder(fail), Recorder()
    sinks = Sinks([broken, good])
    for step in range(1, 6):
        sinks.tell("log", step, {})
    sinks.close(exit_code=0)
    assert broken.steps == [1] and good.steps == [1, 2, 3, 4, 5]
    assert [r.getMessage() for r in caplog.records] == [
        "a recorder failed to log (OSError: no space) and is switched off; metrics.jsonl is still written"
    ]


def test_a_place_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("megatron_mm.reporting.sinks._QUEUE", 10)
    monkeypatch.setattr("megatron_mm.reporting.sinks._CLOSE_SECONDS", 0.2)
    stuck = threading.Event()
    good = Recorder()
    sinks = Sinks([Recorder(lambda step: stuck.wait(60)), good])
    for step in range(50):
        sinks.tell("log", step, {})  # would block for ever if it waited for the sink
        time.sleep(0.001)
    assert sinks.left_out >= 39 and good.steps == list(range(50)), "it costs its own numbers alone"
    sinks.close(exit_code=0)
    stuck.set()
    said = " ".join(r.getMessage() for r in caplog.records)
    assert "is behind" in said and "did not accept the last metrics" in said and "were not sent" in said


# -------------------------------------------------------------------------------------------------------------- Prometheus


def read(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_reads_the_newest_step_on_loopback_alone(tmp_path: Path) -> None:
    watched = monitor(tmp_path / "run", prometheus=0)
    (page,) = watched._sinks.sinks
    assert isinstance(page, PrometheusPage) and page._server.server_address[0] == "127.0.0.1"
    for step in (1, 2):
        watched.log_step(metrics(step, total_tokens=100 * step, phases={"forward": 0.25}, grad_norms={"tower": 0.5}, loss=float("nan")))
    deadline = time.monotonic() + 10
    while 'step{run="run"} 2.0' not in read(page.port) and time.monotonic() < deadline:
        time.sleep(0.02)
    text = read(page.port)
    for line in ('megatron_mm_source_loss{run="run",source="pairs"} 1.5', 'megatron_mm_phase{run="run",phase="forward"} 0.25',
                 'megatron_mm_grad_norm{run="run",part="tower"} 0.5', 'megatron_mm_loss{run="run"} NaN',
                 'megatron_mm_tokens_total{run="run"} 200.0', "# TYPE megatron_mm_tokens_total counter",
                 'megatron_mm_events_total{run="run",kind="start"} 1'):  # fmt: skip
        assert line in text.splitlines(), line
    names = [line.split(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(names) == len(set(names)), "no sample stands twice"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        read(page.port, "/config")
    watched.close(exit_code=0)
    with pytest.raises(OSError):
        read(page.port)


def test_a_port_that_is_taken_costs_prometheus_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = monitor(tmp_path / "first", prometheus=0)
    second = monitor(tmp_path / "second", prometheus=first._sinks.sinks[0].port)
    second.log_step(metrics(1))
    second.close(exit_code=0)
    first.close(exit_code=0)
    assert len(lines(tmp_path / "second" / "metrics.jsonl")) == 1
    assert sum("Prometheus failed to start" in r.getMessage() for r in caplog.records) == 1


# -------------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_has_numbers_captions_and_events_and_a_resume_purges(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir, picture = tmp_path / "run", np.zeros((8, 8, 3), dtype=np.uint8)
    for resume, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        watched = monitor(run_dir, resume_step=resume, tensorboard=True)
        for step in steps:
            watched.log_step(metrics(step, loss=float(step + resume)))
        watched.log_captions(steps[-1], [CaptionSample(image=picture, true="a", generated="b")])
        watched.close(exit_code=0)
    found = reader.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 5), (4, 6)]
    assert "train/loss/pairs" in found.Tags()["scalars"] and "captions/0" in found.Tags()["images"]
    assert any(name.startswith("events/resume") for name in found.Tags()["tensors"])


def test_training_goes_on_without_the_package_of_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    watched = monitor(tmp_path / "run", tensorboard=True)
    watched.log_step(metrics(1))
    watched.close(exit_code=0)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    assert sum("TensorBoard failed to start" in r.getMessage() for r in caplog.records) == 1


# ------------------------------------------------------------------------------------------------------------ files of a run


def test_warnings_are_events_and_those_before_the_monitor_too(tmp_path: Path) -> None:
    log = logging.getLogger("megatron_mm.somewhere")
    events.listen()
    log.warning("checkpoint %s is damaged", "step_3")
    watched = monitor(tmp_path / "run", resume_step=2)
    for step in range(3, 20):
        watched.log_step(metrics(step, skipped=step == 4))
        log.warning("blank image in sample %d", step)
    log.info("nothing")
    watched.close(exit_code=0, events_of_end=[("end", "all steps are done")])
    log.warning("after the end")
    found = [(line["step"], line["kind"], line["text"]) for line in lines(tmp_path / "run" / "events.jsonl")]
    assert found[0][:2] == (2, "resume") and found[1] == (2, "warning", "checkpoint step_3 is damaged")
    assert [step for step, kind, _ in found if kind == "skipped"] == [4]
    blanks = [text for _, _, text in found if text.startswith("blank")]
    assert len(blanks) == 10 and blanks[-1].endswith("(further ones like this are only in the log)")
    assert found[-1] == (19, "end", "all steps are done")


def test_a_restart_keeps_events_and_mends_half_a_line(tmp_path: Path) -> None:
    monitor(tmp_path / "run").close(exit_code=1)
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')
    monitor(tmp_path / "run", resume_step=1).close(exit_code=0)
    written = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert len(written) == 3 and '"start"' in written[0] and '"resume"' in written[2]


def test_the_images_of_captions_are_kept_once(tmp_path: Path) -> None:
    watched = monitor(tmp_path / "run")
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for step in (1, 2):
        watched.log_captions(step, [CaptionSample(image=picture, true="a", generated=str(step))])
    watched.close(exit_code=0)
    rows = lines(tmp_path / "run" / "captions.jsonl")
    assert [row["samples"][0]["generated"] for row in rows] == ["1", "2"]
    assert [path.name for path in (tmp_path / "run" / "captions").iterdir()] == [Path(rows[0]["samples"][0]["image"]).name]


def test_the_console_shows_the_first_and_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="megatron_mm")
    watched = monitor(tmp_path / "run", resume_step=6, console_interval=10)
    steps = watched.experiment.train.steps
    for step in range(7, steps + 1):
        watched.log_step(metrics(step))
    watched.close(exit_code=0)
    said = [r.getMessage() for r in caplog.records]
    assert "resumed after step 6 on 4 processes (tensor 1, pipeline 1, expert 1); run directory" in said[0]
    shown = [int(line.split("/")[0].removeprefix("step ")) for line in said if line.startswith("step ")]
    assert shown == sorted({7, *range(10, steps + 1, 10), steps})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    file.write(metrics(1))
    disk = file._file
    with Path("/dev/full").open("ab", buffering=0) as full:
        file._file = full
        for step in (2, 3):
            file.write(metrics(step))
    file._file = disk
    file.write(metrics(4))
    file.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 4]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "cannot be written" in said[0] and said[1].endswith("can be written again; 2 lines were lost")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_that_events_can_be_written_again_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning is itself an event."""
    events.listen()
    try:
        watched = monitor(tmp_path / "run")
        disk = watched._events._file
        with Path("/dev/full").open("ab", buffering=0) as full:
            watched._events._file = full
            watched.event("mine", "lost")
        watched._events._file = disk
        watched.event("mine", "kept")
        watched.close(exit_code=0)
    finally:
        events.stop()
    assert [r.getMessage().rpartition(" can be")[2] for r in caplog.records].count(" written again; 2 lines were lost") == 1

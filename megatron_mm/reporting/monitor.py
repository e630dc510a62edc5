"""Logs a run's metrics to files in the run directory, the console, and the destinations that the experiment names (`reporting.sinks`)."""

from __future__ import annotations

import hashlib
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_mm.config import Experiment
from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.reporting import events
from megatron_mm.reporting.prometheus_page import PrometheusPage
from megatron_mm.reporting.run_files import CAPTIONS, EVALUATIONS, EVENTS, EXPERTS, METRICS, PHASES
from megatron_mm.reporting.sinks import Sink, Sinks
from megatron_mm.reporting.tensorboard_run import TensorBoardRun
from megatron_mm.reporting.wandb_run import WandbRun
from megatron_mm.training.metrics import MetricsFile, StepMetrics, draw_loss_curve

logger = logging.getLogger(__name__)

_ALERTS_NOT = ("start", "resume", "end", "stop")
"""Kinds of events that are not alerts."""


class Monitor:
    """Logs a run on the main process; does nothing on the others."""

    def __init__(self, experiment: Experiment, run_dir: Path, *, resume_step: int, world_size: int, is_main: bool) -> None:
        self.is_main = is_main
        self.run_dir = run_dir
        self.experiment = experiment
        self._began, self._first_step, self._last_step = time.monotonic(), resume_step, resume_step
        self._axes: dict[str, float] = {}
        self._said_nothing_held_out = False
        if not is_main:
            return
        self._metrics = MetricsFile(run_dir / METRICS, resume_step=resume_step)
        self._evaluations = MetricsFile(run_dir / EVALUATIONS, resume_step=resume_step)
        self._captions = MetricsFile(run_dir / CAPTIONS, resume_step=resume_step)
        details = (PHASES,) if experiment.model.decoder.moe is None else (PHASES, EXPERTS)
        self._details = {name: MetricsFile(run_dir / name, resume_step=resume_step) for name in details}
        self._events, self._lock = MetricsFile(run_dir / EVENTS, resume_step=None), threading.RLock()
        self._wandb = WandbRun(experiment, run_dir, world_size=world_size)
        self._sinks = Sinks(list(self._places(resume_step)))
        parallel = experiment.parallel
        layout = f"tensor {parallel.tensor}, pipeline {parallel.pipeline}, expert {parallel.expert}"
        verb = f"resumed after step {resume_step}" if resume_step else "started"
        self.event("resume" if resume_step else "start", f"{verb} on {world_size} processes ({layout})")
        logger.info("%s %s on %d processes (%s); run directory %s", experiment.recipe, verb, world_size, layout, run_dir)
        listening = events.listening()
        if listening is not None:
            listening.pass_to(self.event)

    def _places(self, resume_step: int) -> Iterator[Sink]:
        config = self.experiment.monitor
        if self._wandb.is_on:
            yield self._wandb
        if config.tensorboard:
            yield TensorBoardRun(self.run_dir, resume_step=resume_step)
        if config.prometheus is not None:
            yield PrometheusPage(config.run_name or self.run_dir.name, host=config.prometheus_host, port=config.prometheus)

    # ----------------------------------------------------------------------------------------------------------- of a step

    def log_step(self, metrics: StepMetrics) -> None:
        """Log a training step everywhere."""
        if not self.is_main:
            return
        self._metrics.write(metrics)
        self._last_step = metrics.step
        self._axes = {
            "axis/tokens": metrics.total_tokens,
            "axis/images": metrics.total_images,
            "axis/hours": (time.monotonic() - self._began) / 3600,
        }
        self._tell(metrics.step, flat_metrics(metrics))
        if metrics.skipped:
            logger.warning(
                "step %d skipped: the gradient was not finite (%d so far)", metrics.step, metrics.skipped_steps, extra={"kind": "skipped"}
            )
        ends = (self._first_step + 1, self.experiment.train.steps)
        if metrics.step % self.experiment.monitor.console_interval == 0 or metrics.step in ends:
            logger.info(self._line(metrics))

    def _tell(self, step: int, values: dict[str, Any]) -> None:
        self._sinks.tell("log", step, {**self._axes, **values})

    def _line(self, metrics: StepMetrics) -> str:
        steps = self.experiment.train.steps
        pace = (time.monotonic() - self._began) / max(1, metrics.step - self._first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (steps - metrics.step))) if pace * (steps - metrics.step) < 86400 else "days"
        used = "" if metrics.mfu is None else f"  MFU {100 * metrics.mfu:.1f}%"
        return (
            f"step {metrics.step}/{steps}  loss {_loss(metrics)}  grad {metrics.grad_norm:.3f}  lr {metrics.lr:.2e}  "
            f"{metrics.tokens_per_s:,.0f} tokens/s  {metrics.tflops:.3g} TFLOP/s per device{used}  {left} left"
        )

    def log_values(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of a step outside metrics.jsonl."""
        if self.is_main:
            self._tell(step, values)

    def log_details(self, name: str, step: int, values: dict[str, Any]) -> None:
        """Append to one of the run directory's files of details, `PHASES` or `EXPERTS`."""
        if self.is_main:
            self._details[name].write({"step": step, **values})

    # --------------------------------------------------------------------------------------------------- events, evaluation

    def event(self, kind: str, text: str) -> None:
        """Record an event that happened after the newest step."""
        if not self.is_main:
            return
        with self._lock:
            self._events.write({"step": self._last_step, "time": time.time(), "kind": kind, "text": text})
        self._sinks.tell("event", self._last_step, kind, text, kind not in _ALERTS_NOT)

    def log_eval(self, step: int, losses: dict[str, float]) -> None:
        """Log held-out losses."""
        if not self.is_main:
            return
        if not losses:
            self._say_nothing_held_out(step)
            return
        self._evaluations.write({"step": step, **losses})
        self._tell(step, losses)
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in losses.items()))

    def _say_nothing_held_out(self, step: int) -> None:
        """Log once that there is no held-out data, which is not an error."""
        if not self._said_nothing_held_out:
            logger.info(
                "step %d: no held-out loss, because %s has no folder heldout (--eval.interval 0 turns evaluations off)",
                step,
                self.experiment.data.path,
            )
        self._said_nothing_held_out = True

    def log_captions(self, step: int, samples: list[CaptionSample]) -> None:
        """Log a table of images with true and generated captions; each image is stored once, in `captions/`."""
        if not self.is_main or not samples:
            return
        self._sinks.tell("captions", step, samples)
        try:
            rows = [{"image": self._kept(sample), "true": sample.true, "generated": sample.generated} for sample in samples]
            self._captions.write({"step": step, "samples": rows})
        except OSError as error:
            logger.warning("the images of captions cannot be written (%s): training continues", error)
        for sample in samples:
            logger.info("  true: %s   generated: %s", sample.true, sample.generated)

    def _kept(self, sample: CaptionSample) -> str:
        name = f"captions/{hashlib.sha256(sample.image.tobytes()).hexdigest()[:16]}.png"
        path = self.run_dir / name
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(sample.image).save(path)
        return name

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Log a picture file."""
        if self.is_main:
            self._sinks.tell("picture", step, name, path)

    def close(self, *, exit_code: int, events_of_end: Sequence[tuple[str, str]] = ()) -> None:
        """Draw the loss curve, and close all files and destinations.

        Args:
            events_of_end: (kind, text) of the events that say how the run ended.
        """
        if not self.is_main:
            return
        for kind, text in events_of_end:
            self.event(kind, text)
        events.stop()
        for file in (self._metrics, self._evaluations, self._captions, *self._details.values(), self._events):
            file.close()
        try:
            if (self.run_dir / METRICS).stat().st_size:
                self._sinks.tell("picture", self._last_step, "loss_curve", draw_loss_curve(self.run_dir))
        except Exception as error:  # a full disk, a missing font: a picture must not end the run
            logger.warning("loss_curve.png cannot be drawn (%s: %s); metrics.jsonl has the numbers", type(error).__name__, error)
        self._sinks.close(exit_code=exit_code)


def _loss(metrics: StepMetrics) -> str:
    """The loss as text. In a step without supervised tokens it is not a number, which is not an error."""
    return f"{metrics.loss:.4f}" if any(metrics.source_tokens.values()) or math.isfinite(metrics.loss) else "none (no supervised tokens)"


_GROUPS = {"losses": "loss"}
"""Names of metric groups in other destinations, where they differ."""


def flat_metrics(metrics: StepMetrics) -> dict[str, Any]:
    """A step's numbers under one name each: `train/loss`, `train/loss/pairs`."""
    flat: dict[str, Any] = {}
    for name, value in asdict(metrics).items():
        if isinstance(value, dict):
            flat |= {f"train/{_GROUPS.get(name, name)}/{member}": number for member, number in value.items()}
        elif value is not None:
            flat[f"train/{name}"] = value
    return flat

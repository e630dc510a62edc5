"""Where metrics go: metrics.jsonl, the console, and Weights & Biases."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path

from megatron_mm.config import Experiment
from megatron_mm.evaluation.captions import CaptionSample
from megatron_mm.reporting.wandb_run import WandbRun
from megatron_mm.training.metrics import MetricsFile, StepMetrics, draw_loss_curve

logger = logging.getLogger(__name__)


class Monitor:
    """Writes on the main process; does nothing on the others."""

    def __init__(self, experiment: Experiment, run_dir: Path, *, resume_step: int, world_size: int, is_main: bool) -> None:
        self.is_main = is_main
        self.run_dir = run_dir
        self.experiment = experiment
        self._began, self._first_step, self._last_step = time.monotonic(), resume_step, resume_step
        if is_main:
            self._metrics = MetricsFile(run_dir / "metrics.jsonl", resume_step=resume_step)
            self._evaluations = MetricsFile(run_dir / "eval.jsonl", resume_step=resume_step)
            self._wandb = WandbRun(experiment, run_dir, world_size=world_size)

    def log_step(self, metrics: StepMetrics) -> None:
        """Log a training step everywhere."""
        if not self.is_main:
            return
        self._metrics.write(metrics)
        self._last_step = metrics.step
        values = asdict(metrics)
        losses, bad, experts = values.pop("losses"), values.pop("bad_samples"), values.pop("experts")
        flat = {f"train/{name}": value for name, value in values.items() if value is not None}
        flat |= {f"train/loss/{name}": value for name, value in losses.items()} | {f"train/bad_samples/{n}": v for n, v in bad.items()}
        flat |= {f"train/experts/{name}": value for name, value in experts.items()}
        self._wandb.log(flat)
        if metrics.skipped:
            logger.warning("step %d skipped: the gradient was not finite (%d so far)", metrics.step, metrics.skipped_steps)
        if metrics.step % self.experiment.monitor.console_interval == 0 or metrics.step == self._first_step + 1:
            logger.info(self._line(metrics))

    def _line(self, metrics: StepMetrics) -> str:
        steps = self.experiment.train.steps
        pace = (time.monotonic() - self._began) / max(1, metrics.step - self._first_step)
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (steps - metrics.step))) if pace * (steps - metrics.step) < 86400 else "days"
        used = "" if metrics.mfu is None else f"  MFU {100 * metrics.mfu:.1f}%"
        return (
            f"step {metrics.step}/{steps}  loss {metrics.loss:.4f}  grad {metrics.grad_norm:.3f}  lr {metrics.lr:.2e}  "
            f"{metrics.tokens_per_s:,.0f} tokens/s  {metrics.tflops:.3g} TFLOP/s{used}  {left} left"
        )

    def log_eval(self, step: int, losses: dict[str, float]) -> None:
        """Log held-out losses; nothing where there are none."""
        if not self.is_main or not losses:
            return
        self._evaluations.write({"step": step, **losses})
        self._wandb.log({"train/step": step, **losses})
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in losses.items()))

    def log_values(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of a step in W&B alone."""
        if self.is_main:
            self._wandb.log({"train/step": step, **values})

    def log_captions(self, step: int, samples: list[CaptionSample]) -> None:
        """Log a table of images with true and generated captions."""
        if not self.is_main or not samples:
            return
        self._wandb.log_captions(step, samples)
        for sample in samples:
            logger.info("  true: %s   generated: %s", sample.true, sample.generated)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Log a picture file."""
        if self.is_main:
            self._wandb.log_picture(step, name, path)

    def close(self, *, exit_code: int) -> None:
        """Draw the loss curve and end the W&B run."""
        if not self.is_main:
            return
        self._metrics.close()
        self._evaluations.close()
        if (self.run_dir / "metrics.jsonl").stat().st_size:
            self._wandb.log_picture(self._last_step, "loss_curve", draw_loss_curve(self.run_dir))
        self._wandb.finish(exit_code)

"""A monitor of a small run, metrics for it, and the lines that it wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.reporting.monitor import Monitor
from megatron_mm.training.metrics import StepMetrics


def metrics(step: int, **changes: Any) -> StepMetrics:
    values = {
        **{"step": step, "loss": 2.0 / step, "losses": {"pairs": 1.5, "text": 2.5}, "grad_norm": 1.0, "lr": 1e-3, "tokens": 100},
        **{"images": 7, "seconds": 0.5, "tokens_per_s": 200.0, "tflops": 0.1, "mfu": None},
    }
    return StepMetrics(**{**values, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def experiment() -> Experiment:
    base = get_recipe("debug_mm1")
    return replace(base, monitor=replace(base.monitor, wandb="offline", console_interval=1))


def monitor(run_dir: Path, resume_step: int = 0) -> Monitor:
    run_dir.mkdir(exist_ok=True)
    return Monitor(experiment(), run_dir, resume_step=resume_step, world_size=4, is_main=True)

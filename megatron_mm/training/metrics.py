"""`metrics.jsonl`: one line per step, with one JSON object; the complete record of a run, whether W&B works or not."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """What is logged of a step. Numbers are of the whole global batch unless said otherwise."""

    step: int
    loss: float
    """Nats per counted token."""
    losses: dict[str, float]
    """The same by source."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Padding not counted."""
    images: int
    seconds: float
    """Wall time of the step."""
    tokens_per_s: float
    tflops: float
    """TFLOP/s of one device (`flops`)."""
    mfu: float | None
    skipped: bool = False
    """The gradient was not finite and no weight changed."""
    skipped_steps: int = 0
    """Such steps since the beginning of training."""
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples that failed at run time since the beginning of training, by source."""
    fill: float = 1.0
    """Part of the batch that is not padding."""
    data_seconds: float = 0.0
    """Part of `seconds` spent waiting for data."""
    experts: dict[str, float] = field(default_factory=dict)
    """Sparse layers (`training.routing.RoutingStats.summary`); empty for a dense model."""
    source_tokens: dict[str, float] = field(default_factory=dict)
    """Supervised tokens of each source: those that its loss is the mean of."""
    time: float = 0.0
    """When the step ended, seconds since 1970."""
    total_tokens: int = 0
    """Since the beginning of training."""
    total_images: int = 0
    """Likewise."""
    memory_gb: float = 0.0
    """Of the main process, GB: the most that its GPU held so far, or what it has resident on a CPU."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the step by phase on the main process (`training.phases`)."""
    balance: float | None = None
    """Work of the mean data-parallel rank over that of the busiest, planned FLOPs; in steps of `monitor.detail_interval`."""
    grad_norms: dict[str, float] = field(default_factory=dict)
    """By part of the model, before clipping; in steps of `monitor.detail_interval`."""
    param_norms: dict[str, float] = field(default_factory=dict)
    """Of trainable parameters by part, before the step; likewise."""
    update_ratios: dict[str, float] = field(default_factory=dict)
    """Norm of the step before's update over that of the parameters, by part; likewise."""


def to_json(values: dict[str, Any]) -> str:
    """One line of valid JSON; a number that JSON cannot write (NaN, infinity) is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(values), allow_nan=False)


class MetricsFile:
    """A .jsonl file of steps that a resume appends to and in which no step stands twice."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """Open to append after `resume_step`; later lines (of a run that died after its last checkpoint) are dropped. None drops none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._torn = False
        """The file ends with a part of a line."""
        self._lost = 0
        """Lines that could not be written since the last one that could."""
        if path.is_file() and resume_step is None:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 1))
                self._torn = size > 0 and file.read() != b"\n"
        elif path.is_file():
            assert resume_step is not None
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)
        self._file = path.open("ab", buffering=0)

    def write(self, values: StepMetrics | dict[str, Any]) -> None:
        """Append a line; it is with the operating system when this returns. A disk that does not take it costs the line, not the run."""
        line = to_json(values if isinstance(values, dict) else asdict(values))
        data = ("\n" * self._torn + line + "\n").encode()
        try:
            written = self._file.write(data)
            if written < len(data):
                self._torn = True
                raise OSError(f"{written} of {len(data)} bytes were taken")
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                logger.warning(
                    "%s cannot be written (%s): training continues, and lines are lost until it can be written again", self._path, error
                )
            return
        self._torn = False
        if self._lost:
            logger.warning("%s can be written again; %d lines were lost", self._path, self._lost)
            self._lost = 0

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # torn by a crash


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; without those that a crash or a full disk has torn."""
    return [json.loads(line) for line in path.read_text().splitlines() if math.isfinite(_step_of(line))]


def draw_loss_curve(run_dir: Path) -> Path:
    """Draw `loss_curve.png` from metrics.jsonl: loss over steps, in all and by source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_dir / "metrics.jsonl")
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for source in sorted({name for line in lines for name in line["losses"]}):
        points = [(line["step"], line["losses"][source]) for line in lines if line["losses"].get(source) is not None]
        axes.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.6, label=source)
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="black", label="all")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_dir.name)
    axes.legend()
    figure.tight_layout()
    out = run_dir / "loss_curve.png"
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out

"""`metrics.jsonl`: one JSON object a line, a line a step; the truth about a run, whatever W&B does."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO


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


def to_json(values: dict[str, Any]) -> str:
    """One line of valid JSON; a number that JSON cannot write (NaN, infinity) is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(values), allow_nan=False)


class MetricsFile:
    """A .jsonl file of steps that a resume appends to and in which no step stands twice."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Open to append after `resume_step`; later lines (of a run that died after its last checkpoint) are dropped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept))
            partial.replace(path)
        self._file: TextIO = path.open("a")

    def write(self, values: StepMetrics | dict[str, Any]) -> None:
        """Append a line; it is with the operating system when this returns."""
        self._file.write(to_json(values if isinstance(values, dict) else asdict(values)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # torn by a crash


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


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

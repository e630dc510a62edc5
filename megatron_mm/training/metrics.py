"""`metrics.jsonl`: one line per step, with one JSON object; the complete record of a run, whether W&B works or not."""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

_POINTS = 2000
"""Of a curve in a picture, at most."""


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
        if resume_step is not None and path.is_file():
            os.truncate(path, _end_of(path, resume_step))  # which a full disk allows, too
        self._torn = ends_torn(path)
        """The file ends with a part of a line."""
        self._lost = 0
        """Lines that could not be written since the last one that could."""
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


def _parsed(line: str | bytes) -> dict[str, Any] | None:
    """The values of a line; None if a crash has torn it."""
    try:
        values: dict[str, Any] = json.loads(line)
        return values if math.isfinite(float(values["step"])) else None
    except (ValueError, KeyError, TypeError):
        return None


def ends_torn(path: Path) -> bool:
    """Whether a file ends with a part of a line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read() != b"\n"


def _end_of(path: Path, step: int) -> int:
    """Bytes up to the end of the last line of this step or an earlier one. Read from the file's end: steps only grow, since every resume
    has cut the file."""
    end = path.stat().st_size
    if not end:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while end:
            start = content.rfind(b"\n", 0, end - 1) + 1
            values = _parsed(content[start:end])
            if values is not None and values["step"] <= step:
                return end
            end = start
    return 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; without those that a crash or a full disk has torn."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The same, one after another."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (values := _parsed(line)) is not None:
                yield values


def _thinned(values: array[float]) -> np.ndarray:
    """At most `_POINTS` means of neighbours, in order."""
    if not values:
        return np.zeros(0)
    starts = np.arange(0, len(values), -(-len(values) // _POINTS))
    return np.asarray(np.add.reduceat(np.asarray(values), starts) / np.diff(starts, append=len(values)))


def draw_loss_curve(run_dir: Path) -> Path:
    """Draw `loss_curve.png` from metrics.jsonl: loss over steps, in all and by source; of a long run means of several steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, tuple[array[float], array[float]]] = defaultdict(lambda: (array("d"), array("d")))
    for line in iterate_metrics(run_dir / "metrics.jsonl"):
        for name, value in [("", line["loss"]), *line["losses"].items()]:
            if value is not None:
                curves[name][0].append(line["step"])
                curves[name][1].append(value)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for source in sorted(curves.keys() - {""}):
        axes.plot(*map(_thinned, curves[source]), linewidth=0.8, alpha=0.6, label=source)
    axes.plot(*map(_thinned, curves[""]), color="black", label="all")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=run_dir.name)
    axes.legend()
    figure.tight_layout()
    out = run_dir / "loss_curve.png"
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out

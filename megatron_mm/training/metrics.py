"""`metrics.jsonl`: the complete record of a run, independent of W&B, with one JSON object (one line) per step."""

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
"""Maximum number of points of a curve in a picture."""


@dataclass(frozen=True)
class StepMetrics:
    """The logged values of a step. They are for the whole global batch unless stated otherwise."""

    step: int
    loss: float
    """Loss in nats per counted token."""
    losses: dict[str, float]
    """Loss of each source, in nats per counted token."""
    grad_norm: float
    """Gradient norm before clipping."""
    lr: float
    tokens: int
    """Tokens of the step, excluding padding."""
    images: int
    seconds: float
    """Wall time of the step, in seconds."""
    tokens_per_s: float
    tflops: float
    """TFLOP/s of one device (`flops`)."""
    mfu: float | None
    skipped: bool = False
    """True if the gradient was not finite, so no weight changed."""
    skipped_steps: int = 0
    """Skipped steps since the beginning of training."""
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples that failed at run time since the beginning of training, by source."""
    fill: float = 1.0
    """Fraction of the batch that is not padding."""
    tower_blanks: int = 0
    """Blank images computed since the previous step, also in evaluations, to fill up graphs of the image tower (`kernels.tower_graph`)."""
    data_seconds: float = 0.0
    """Part of `seconds` spent waiting for data."""
    experts: dict[str, float] = field(default_factory=dict)
    """Statistics of the sparse layers (`training.routing.RoutingStats.summary`); empty for a dense model."""
    source_tokens: dict[str, float] = field(default_factory=dict)
    """Supervised tokens of each source, over which its loss is the mean."""
    time: float = 0.0
    """End of the step, in seconds since 1970."""
    total_tokens: int = 0
    """Tokens since the beginning of training."""
    total_images: int = 0
    """Images since the beginning of training."""
    memory_gb: float = 0.0
    """Memory of the main process, in GB: the peak on its GPU so far, or the resident memory on a CPU."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the step by phase on the main process (`training.phases`)."""
    balance: float | None = None
    """Planned FLOPs of the mean data-parallel rank over those of the busiest; only in steps of `monitor.detail_interval`."""
    grad_norms: dict[str, float] = field(default_factory=dict)
    """Gradient norms before clipping, by part of the model; only in steps of `monitor.detail_interval`."""
    param_norms: dict[str, float] = field(default_factory=dict)
    """Norms of trainable parameters before the step, by part; only in steps of `monitor.detail_interval`."""
    update_ratios: dict[str, float] = field(default_factory=dict)
    """Norm of the previous step's update over that of the parameters, by part; only in steps of `monitor.detail_interval`."""


def to_json(values: dict[str, Any]) -> str:
    """Return one line of valid JSON; a number that JSON cannot represent (NaN, infinity) becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(values), allow_nan=False)


class MetricsFile:
    """A .jsonl file with one line per step. A resumed run appends to it, and no step occurs twice."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """Open to append after `resume_step`, dropping later lines (of a run that died after its last checkpoint); None keeps all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if resume_step is not None and path.is_file():
            os.truncate(path, _end_of(path, resume_step))  # possible even on a full disk
        self._torn = ends_torn(path)
        """True if the file ends with an incomplete line."""
        self._lost = 0
        """Lines lost since the last successful write."""
        self._file = path.open("ab", buffering=0)

    def write(self, values: StepMetrics | dict[str, Any]) -> None:
        """Append a line and pass it to the operating system. If the disk does not accept it, the line is lost, but the run continues."""
        line = to_json(values if isinstance(values, dict) else asdict(values))
        data = ("\n" * self._torn + line + "\n").encode()
        try:
            written = self._file.write(data)
            if written < len(data):
                self._torn = True
                raise OSError(f"only {written} of {len(data)} bytes were written")
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                logger.warning(
                    "%s cannot be written (%s): training continues, and lines are lost until it can be written again", self._path, error
                )
            return
        self._torn = False
        lost, self._lost = self._lost, 0
        if lost:  # the warning itself may be a line of this file
            logger.warning("%s can be written again; %d lines were lost", self._path, lost)

    def close(self) -> None:
        self._file.close()


def _parsed(line: str | bytes) -> dict[str, Any] | None:
    """Return the values of a line, or None if it is incomplete or damaged."""
    try:
        values: dict[str, Any] = json.loads(line)
        return values if math.isfinite(float(values["step"])) else None
    except (ValueError, KeyError, TypeError):
        return None


def ends_torn(path: Path) -> bool:
    """Return whether a file ends with an incomplete line."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read() != b"\n"


def _end_of(path: Path, step: int) -> int:
    """Return the number of bytes up to the end of the last line whose step is at most `step`. The file is searched from its end, because
    steps only increase: every resume truncates it."""
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
    """Return the lines of a metrics file, without incomplete ones (after a crash or on a full disk)."""
    return list(iterate_metrics(path))


def iterate_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a metrics file one after another."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if (values := _parsed(line)) is not None:
                yield values


def _thinned(values: array[float]) -> np.ndarray:
    """Reduce values to at most `_POINTS` means of neighbours, in order."""
    if not values:
        return np.zeros(0)
    starts = np.arange(0, len(values), -(-len(values) // _POINTS))
    return np.asarray(np.add.reduceat(np.asarray(values), starts) / np.diff(starts, append=len(values)))


def draw_loss_curve(run_dir: Path) -> Path:
    """Draw `loss_curve.png` from metrics.jsonl: loss over steps, overall and by source; for a long run, means of several steps."""
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

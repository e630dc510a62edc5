"""Reads the files of a run directory, some lines of which may be incomplete.

A process that is killed may leave an incomplete line, and a run that resumes repeats the steps after its last checkpoint. So lines that are
not JSON objects with a step are counted and left out, and a line for step s replaces all earlier lines for step s or later:

    steps as written   1 2 3 4 5 | 4 5 6     (resumed from the checkpoint of step 3)
    steps as read      1 2 3       4 5 6     2 lines replaced, 1 restart

Runs of earlier versions lack some files and fields; these are treated as empty.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

METRICS, EVALUATIONS, PLAN = "metrics.jsonl", "eval.jsonl", "plan.jsonl"
PHASES, EXPERTS, CAPTIONS, EVENTS = "phases.jsonl", "experts.jsonl", "captions.jsonl", "events.jsonl"
CONFIG = "config.json"
LOCK_FILE = "running.lock"
"""The first file that a run writes; `run.lock` holds it."""
_MOST_OBJECTS = 5000
RESULTS = "evaluation"
"""Folder with the results of `megatron-mm evaluate`, one JSON file each."""


@dataclass(frozen=True)
class Curve:
    """A number over steps."""

    steps: np.ndarray
    values: np.ndarray
    """NaN where the run wrote null, because the number was not finite."""

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The last finite value, or NaN."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite[-1]) if len(finite) else math.nan


NOTHING = Curve(np.zeros(0, dtype=np.int64), np.zeros(0))


@dataclass
class Lines:
    """The numbers of a .jsonl file of steps, in columns: `losses/pairs` is the value of `pairs` within `losses`."""

    columns: dict[str, Curve] = field(default_factory=dict)
    damaged: int = 0
    """Number of lines that are not a JSON object with a step."""
    replaced: int = 0
    """Number of lines that were left out because a later line has the same or an earlier step."""
    restarts: list[int] = field(default_factory=list)
    """Steps of lines that follow a line of the same or a later step."""
    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Steps of the lines that were kept."""

    def curve(self, name: str) -> Curve:
        return self.columns.get(name, NOTHING)

    def under(self, prefix: str) -> dict[str, Curve]:
        """The columns of a group by the rest of their names."""
        return {name.removeprefix(f"{prefix}/"): curve for name, curve in self.columns.items() if name.startswith(f"{prefix}/")}


def json_objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a .jsonl file, line by line; None for a line that is not an object."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                found = None
            yield found if isinstance(found, dict) else None


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, float(value)
        elif value is None:
            yield prefix + name, math.nan


def read_lines(path: Path) -> Lines:
    """The numbers of a file of steps, in the order of the steps."""
    steps = array("q")
    rows: dict[str, array[int]] = defaultdict(lambda: array("q"))
    values: dict[str, array[float]] = defaultdict(lambda: array("d"))
    found = Lines()
    for line in json_objects(path):
        step = None if line is None else line.get("step")
        if line is None or not isinstance(step, int) or isinstance(step, bool):
            found.damaged += 1
            continue
        if steps and step <= steps[-1]:
            found.restarts.append(step)
        for name, value in _numbers(line):
            rows[name].append(len(steps))
            values[name].append(value)
        steps.append(step)
    all_steps = np.array(steps, dtype=np.int64)
    counts = _not_replaced(all_steps)
    found.replaced = int((~counts).sum())
    found.steps = all_steps[counts]
    for name, of_rows in rows.items():
        places = np.array(of_rows, dtype=np.int64)
        kept = counts[places]
        if name != "step" and kept.any():
            found.columns[name] = Curve(all_steps[places[kept]], np.array(values[name])[kept])
    return found


def _not_replaced(steps: np.ndarray) -> np.ndarray:
    """Mask of the lines that are kept, because every later line has a later step: with the example above, 1 1 1 0 0 1 1 1."""
    if not len(steps):
        return np.zeros(0, dtype=bool)
    least_after = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    return steps < least_after


@dataclass
class Objects:
    """The objects of a file whose lines are more than numbers."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    every: int = 1
    """In a long file, one line in this many is kept, and the newest line."""


def read_objects(path: Path, *, replaces: bool, most: int = _MOST_OBJECTS) -> Objects:
    """The objects of a file that have a step.

    Args:
        replaces: whether a line replaces all earlier ones of its step or a later one.
        most: about this many lines of a longer file are kept, evenly spaced.
    """
    found, number = Objects(), 0
    newest: dict[str, Any] | None = None
    for line in json_objects(path):
        if line is None or not isinstance(line.get("step"), int):
            found.damaged += 1
            continue
        newest = line
        if number % found.every == 0:
            found.lines.append(line)
        number += 1
        if len(found.lines) > 2 * most:
            found.lines, found.every = found.lines[::2], 2 * found.every
    if newest is not None and found.lines[-1] is not newest:
        found.lines.append(newest)
    if replaces:
        kept = _not_replaced(np.array([line["step"] for line in found.lines], dtype=np.int64))
        found.lines = [line for line, keep in zip(found.lines, kept, strict=True) if keep]
    return found


@dataclass
class RunFiles:
    """A run directory, read once."""

    path: Path
    name: str
    config: dict[str, Any]
    metrics: Lines
    evaluations: Lines
    plan: Lines
    phases: Objects
    experts: Objects
    captions: Objects
    events: Objects
    results: list[dict[str, Any]]
    """Results of `megatron-mm evaluate`."""

    @property
    def damaged(self) -> dict[str, int]:
        """Damaged lines by file."""
        found = {
            METRICS: self.metrics.damaged,
            EVALUATIONS: self.evaluations.damaged,
            PLAN: self.plan.damaged,
            PHASES: self.phases.damaged,
            EXPERTS: self.experts.damaged,
            CAPTIONS: self.captions.damaged,
            EVENTS: self.events.damaged,
        }
        return {name: count for name, count in found.items() if count}

    @property
    def planned_steps(self) -> int | None:
        """`train.steps` of the newest start."""
        train = self.config.get("train")
        steps = train.get("steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else None

    def restarts(self) -> list[int]:
        """Steps after which the run was started again."""
        logged = [line["step"] for line in self.events.lines if line.get("kind") == "resume"]
        return logged or [step - 1 for step in self.metrics.restarts]


def read_run(path: Path, *, name: str | None = None) -> RunFiles:
    """Read a run directory. Raises ValueError if it does not exist or is not a run directory."""
    if not path.is_dir():
        raise ValueError(f"run directory {path} does not exist")
    if not any((path / name).is_file() for name in (METRICS, CONFIG)):
        raise ValueError(f"{path} is not a run directory: it has neither {METRICS} nor {CONFIG}")
    return RunFiles(
        path=path,
        name=name or path.resolve().name,
        config=_json(path / CONFIG),
        metrics=read_lines(path / METRICS),
        evaluations=read_lines(path / EVALUATIONS),
        plan=read_lines(path / PLAN),
        phases=read_objects(path / PHASES, replaces=True),
        experts=read_objects(path / EXPERTS, replaces=True, most=10),
        captions=read_objects(path / CAPTIONS, replaces=True),
        events=read_objects(path / EVENTS, replaces=False, most=1 << 20),
        results=[found for file in sorted((path / RESULTS).glob("*.json")) if "task" in (found := _json(file))],
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}

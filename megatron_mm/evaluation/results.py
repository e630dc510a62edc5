"""Results of tasks: JSON files, a table that also shows published figures, and TextCore's average."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.published import UNCONFIRMED, Published, published
from megatron_mm.evaluation.settings import differences, spelled, suffix
from megatron_mm.evaluation.tasks.registry import TEXTCORE

_CELL = 14
"""Width of a column of scores."""


@dataclass(frozen=True)
class Result:
    """Result of one task."""

    task: str
    title: str
    metric: str
    scores: dict[str, float]
    """Scores by name; the main one is "score"."""
    setting: dict[str, Any]
    """Task, shots, model (name, checkpoint, step), seed, limit, method, beams, wording; and what differs from the task's own setting
    (`evaluation.settings`)."""
    num_items: int
    """Number of answered items."""
    bad_items: int
    """Number of items left out because one of their images could not be read."""
    demonstrations: dict[str, list[str]]
    """Keys of the training examples shown with each of the first 1,000 items, by the item's key."""
    example_prompt: str
    seconds: float
    stderr: float | None = None
    """Standard error of the main score, in its unit (`evaluation.metrics.spread`); None if it is not known."""

    @property
    def shots(self) -> int:
        return int(self.setting["shots"])

    @property
    def score(self) -> float:
        return self.scores["score"]

    @staticmethod
    def name_of(setting: dict[str, Any]) -> str:
        return f"{setting['model']['checkpoint']}_{setting['task']}_{setting['shots']}shot{suffix(setting)}"

    def write(self, out: Path) -> Path:
        """Write NAME.json into a folder atomically; return its path."""
        path = out / f"{self.name_of(self.setting)}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return path


def read_results(folder: Path) -> list[Result]:
    """Read all results in a folder. Raises ValueError that names a file that is not a result."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(Result(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a result of `megatron-mm evaluate` ({error}): remove it") from None
    return found


def textcore(results: Sequence[Result]) -> dict[int, float]:
    """MM1's average over its text-only tasks, for each number of shots with which all of them have a result."""
    by_shots: dict[int, dict[str, float]] = {}
    for result in results:
        if result.task in TEXTCORE:
            by_shots.setdefault(result.shots, {})[result.task] = result.score
    return {shots: sum(found.values()) / len(found) for shots, found in by_shots.items() if set(found) == set(TEXTCORE)}


def mean_stderr(results: Sequence[Result]) -> float | None:
    """Standard error of the mean of several tasks' scores; None if that of a task is not known."""
    each = [result.stderr for result in results]
    return None if None in each or not each else math.hypot(*(one for one in each if one is not None)) / len(each)


def with_stderr(score: float, stderr: float | None) -> str:
    """Write a score as `45.0 ±1.2`."""
    return f"{score:.1f}" if stderr is None else f"{score:.1f} ±{stderr:.1f}"


def table(results: Sequence[Result], *, recipe: str = "") -> Iterator[str]:
    """Lines for the terminal: one row per task, one column per number of shots, the published scores of the recipe's model, and what
    differs from the tasks' own settings."""
    shots = sorted({result.shots for result in results})
    tasks = list(dict.fromkeys(result.task for result in results))
    of = {(result.task, result.shots): result for result in results}
    width = max((len(of_task.title) for of_task in results), default=0) + 2
    yield f"{'':{width}}" + "".join(f"{f'{n} shots':>{_CELL}}" for n in shots) + "   metric"
    sources: dict[str, None] = {}
    unconfirmed = False
    common = _common(results)
    for task in tasks:
        row = [of.get((task, n)) for n in shots]
        first = next(result for result in row if result is not None)
        cells = "".join(f"{'-' if result is None else with_stderr(result.score, result.stderr):>{_CELL}}" for result in row)
        yield f"{first.title:{width}}{cells}   {first.metric}"
        figures = [published(recipe, task, n) for n in shots]
        if any(figures):
            cells = "".join(f"{figure or '-'!s:>{_CELL}}" for figure in figures)
            yield f"{'  published':{width}}{cells}   {_model(figures)}"
            sources |= {figure.source: None for figure in figures if figure is not None}
            unconfirmed |= any(figure is not None and not figure.confirmed for figure in figures)
        yield from _own_differences([result for result in row if result is not None], common)
        bad = sum(result.bad_items for result in row if result is not None)
        if bad:
            yield f"  {bad} items of {task} were left out: their images cannot be read"
        if any(result is not None and result.setting["limit"] is not None for result in row):
            yield f"  {task}: only {first.num_items} items; do not compare with figures for all items"
    for number, average in textcore(results).items():
        error = mean_stderr([result for result in results if result.task in TEXTCORE and result.shots == number])
        yield f"{'TextCore, average':{width}}{with_stderr(average, error):>{_CELL}}   {number} shots"
    if any(result.stderr is not None for result in results):
        yield "±: one standard error, over the items"
    if common:
        yield f"all with {spelled(common)} (not the tasks' own setting)"
    for source in sources:
        yield f"published: {source}"
    if unconfirmed:
        yield UNCONFIRMED


def _common(results: Sequence[Result]) -> dict[str, str]:
    """Return the differences that all results have in common."""
    each = [set(differences(result.setting).items()) for result in results]
    shared = set.intersection(*each) if each else set()
    return {name: value for name, value in differences(results[0].setting).items() if (name, value) in shared} if shared else {}


def _own_differences(row: Sequence[Result], common: dict[str, str]) -> Iterator[str]:
    """Lines with the differences of a task's results that not all results have."""
    shots: dict[str, list[int]] = {}
    for result in row:
        own = {name: value for name, value in differences(result.setting).items() if name not in common}
        shots.setdefault(spelled(own), []).append(result.shots)
    for options, numbers in shots.items():
        if options:
            only = "" if len(numbers) == len(row) else f"{' and '.join(map(str, numbers))} shots "
            yield f"  {only}with {options}"


def _model(figures: Sequence[Published | None]) -> str:
    return ", ".join(dict.fromkeys(figure.model for figure in figures if figure is not None))


def metric_names(results: Sequence[Result]) -> dict[str, float]:
    """Return the scores and their standard errors under their names in W&B."""
    found = {}
    for result in results:
        scores = result.scores if result.stderr is None else {**result.scores, "stderr": result.stderr}
        for name, value in scores.items():
            part = "" if name == "score" else "/" + re.sub(r"[^\w.-]+", "_", name)
            found[f"evaluation/{result.task}/{result.shots}shot{suffix(result.setting)}{part}"] = value
    return found

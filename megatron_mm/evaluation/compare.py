"""Plots the results of several runs side by side, like MM1's figures 4 (connectors) and 5 (mixtures) for finished ablations.

There is one panel for each number of demonstrations, and one for TextCore with each number. Each panel has one bar per run: the mean over
the tasks for which all runs have results with that number of demonstrations. As in the paper, the mean is over CIDEr-D for captions and
accuracy for questions. A run is labelled with the settings that differ between runs: connector, image tokens, resolution, mixture, and the
step if the runs were evaluated after different numbers of steps.

Only comparable results are compared: results for part of a task (`--limit`) are ignored, and tasks that were evaluated in different ways
(seed, prompts, method, beams, number of items) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.results import Result, read_results, textcore
from megatron_mm.evaluation.tasks.registry import GROUPS, TEXTCORE

_PANELS = 4
_NAMES = {
    "model.connector.kind": "",
    "model.connector.num_tokens": "tokens ",
    "model.vision.image_size": "px ",
    "data.mixture": "",
}
"""Fields that ablations change -> prefix of their values in a label. If none of them differs, labels show the fields that do, by name."""

_ASKED = ("seed", "method", "beams", "wording", "text_demonstrations", "low_resolution_demonstrations")
"""Entries of a result's setting that describe how the task was evaluated."""


@dataclass(frozen=True)
class RunResults:
    """A run's results at its newest evaluated checkpoint."""

    run_dir: Path
    config: dict[str, Any]
    results: list[Result]

    @property
    def step(self) -> int:
        return int(self.results[0].setting["model"]["step"])

    def of(self, shots: int) -> dict[str, float]:
        """Scores with a number of demonstrations, by task, without the tasks of TextCore."""
        return {result.task: result.score for result in self.results if result.shots == shots and result.task not in TEXTCORE}


def read_run(run_dir: Path) -> RunResults:
    """Read the results of a run. Raises ValueError if it has no results of whole tasks."""
    folder = run_dir / "evaluation"
    every = read_results(folder) if folder.is_dir() else []
    found = [result for result in every if result.setting["limit"] is None]
    if not found:
        limits = ", ".join(sorted({f"--limit {result.setting['limit']}" for result in every}))
        only = f" ({len(every)} results with {limits} are not compared)" if every else ""
        raise ValueError(
            f"{run_dir} has no results of whole tasks in {folder}{only}: run `megatron-mm evaluate {run_dir} --tasks ...` first"
        )
    newest = max(result.setting["model"]["step"] for result in found)
    config = run_dir / "config.json"
    if not config.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no {config.name}")
    return RunResults(run_dir, json.loads(config.read_text()), [one for one in found if one.setting["model"]["step"] == newest])


def compare(run_dirs: Sequence[Path], *, out: Path) -> Iterator[str]:
    """Write the picture and a .json file with its values; yield lines for the terminal."""
    if len(run_dirs) < 2:
        raise ValueError("--compare needs at least two runs")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    check_asked_alike(runs)
    labels = labels_of([run.config for run in runs], [run.run_dir.name for run in runs])
    if len({run.step for run in runs}) > 1:
        labels = [f"{label}, step {run.step}" for label, run in zip(labels, runs, strict=True)]
    panels = panels_of(runs)
    if not panels:
        raise ValueError("the runs have no task and number of shots in common: evaluate all of them with the same --tasks and --shots")
    rows = {title: dict(zip(labels, values, strict=True)) for title, values in panels.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"runs": [str(path) for path in run_dirs], "panels": rows}, indent=2) + "\n")
    _draw(panels, labels, out)
    width = max(map(len, labels)) + 2
    yield f"{'':{width}}" + "".join(f"{title:>28}" for title in panels)
    for number, label in enumerate(labels):
        yield f"{label:{width}}" + "".join(f"{values[number]:28.1f}" for values in panels.values())
    yield f"{out}, {out.with_suffix('.json')}"


def check_asked_alike(runs: Sequence[RunResults]) -> None:
    """Raise ValueError if a task that all runs have in common was evaluated in different ways."""
    asked = [{(result.task, result.shots): _how_asked(result) for result in run.results} for run in runs]
    first = runs[0]
    for task, shots in sorted(set.intersection(*map(set, asked))):
        for run, ways in zip(runs[1:], asked[1:], strict=True):
            here, there = asked[0][task, shots], ways[task, shots]
            unlike = [
                f"{name} is {here[name]!r} in {first.run_dir} and {there[name]!r} in {run.run_dir}"
                for name in here
                if here[name] != there[name]
            ]
            if unlike:
                what = f"{task} with {shots} shots was evaluated with different settings: {'; '.join(unlike)}"
                raise ValueError(f"{what}: evaluate both runs with the same options and files")


def _how_asked(result: Result) -> dict[str, Any]:
    """Settings that must be equal for two results of a task to be comparable."""
    settings = {name: result.setting.get(name) for name in _ASKED}
    return {**settings, "number of items": result.num_items + result.bad_items}


def panels_of(runs: Sequence[RunResults]) -> dict[str, list[float]]:
    """Return each panel's title -> each run's mean over the tasks that all runs have."""
    panels = {}
    for shots in sorted({result.shots for run in runs for result in run.results}):
        common = set.intersection(*(set(run.of(shots)) for run in runs))
        if common:
            what = "MM1's 7 tasks" if common == set(GROUPS["mm1"]) else f"{len(common)} tasks" if len(common) > 1 else min(common)
            panels[f"{shots} shots, {what}"] = [sum(run.of(shots)[task] for task in common) / len(common) for run in runs]
    cores = [textcore(run.results) for run in runs]
    for shots in sorted(set.intersection(*map(set, cores))):
        panels[f"TextCore, {shots} shots"] = [core[shots] for core in cores]
    return panels


def labels_of(configs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Label each run with the settings that differ between runs, preceded by its name if these labels are not unique."""
    flat = [_flat({"model": config["model"], "data.mixture": config["data"]["mixture"]}) for config in configs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if len({str(one.get(key)) for one in flat}) > 1]
    known = [key for key in keys if key in _NAMES] or keys
    labels = [", ".join(f"{_NAMES.get(key, key + ' ')}{_written(one.get(key))}" for key in known) for one in flat]
    return labels if len(set(labels)) == len(labels) else [f"{name} {label}".strip() for name, label in zip(names, labels, strict=True)]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict) and name != "data.mixture":
            found |= _flat(item, f"{name}.")
        else:
            found[name] = item
    return found


def _written(value: object) -> str:
    """Format a value; a mixture is written as the percentage of each source."""
    if isinstance(value, dict):
        return "/".join(f"{100 * weight:.0f}% {source}" for source, weight in value.items() if weight)
    return str(value)


def _draw(panels: dict[str, list[float]], labels: Sequence[str], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), _PANELS)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 1.2 + 2.8 * lines), squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, (title, values) in zip(axes.flat, panels.items(), strict=False):
        bars = place.bar(range(len(values)), values, color=[f"C{number % 10}" for number in range(len(values))])
        place.bar_label(bars, fmt="%.1f", fontsize=8)
        place.set_title(title, fontsize=9)
        place.set_xticks([])
        place.margins(y=0.15)
    figure.legend(bars, labels, loc="lower center", ncols=min(3, len(labels)), fontsize=8)
    figure.tight_layout(rect=(0, 0.04 + 0.035 * -(-len(labels) // 3), 1, 1))
    figure.savefig(out, dpi=120)
    pyplot.close(figure)

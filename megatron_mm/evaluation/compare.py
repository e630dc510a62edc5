"""Plots the results of several runs side by side, like MM1's figures 4 (connectors) and 5 (mixtures) for finished ablations.

Each panel has one bar per run: the mean over the tasks of one metric for which all runs have results with one number of demonstrations,
or TextCore. Tasks of different metrics have panels of their own, with one exception: if the tasks are MM1's seven, there is one mean over
CIDEr-D for captions and accuracy for questions, as in the paper, and its axis says so. Results that differ from the tasks' own settings
(`evaluation.settings`) have panels of their own, too. A run is labelled with the settings that differ between runs: connector, image
tokens, resolution, mixture, and the step if the runs were evaluated after different numbers of steps.

Only comparable results are compared: results for part of a task (`--limit`) are ignored, and runs are refused that have no setting of a
task in common, or that evaluated it with other prompts or another number of items.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mm.evaluation.results import Result, mean_stderr, read_results, textcore, with_stderr
from megatron_mm.evaluation.settings import differences, spelled
from megatron_mm.evaluation.tasks.registry import GROUPS, TEXTCORE
from megatron_mm.families.serialize import EXPORT_SETTINGS
from megatron_mm.platform.files import write_whole

_PANELS = 4
_NAMES = {
    "model.family": "",
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
    """The results of a run at its newest evaluated checkpoint, or of an exported model."""

    run_dir: Path
    """The run directory or the exported model."""
    config: dict[str, Any]
    """The settings that are known: `model` and `data` of a run, `model` of an export; empty for an export that does not state them."""
    results: list[Result]

    @property
    def step(self) -> int:
        return int(self.results[0].setting["model"]["step"])

    @property
    def when(self) -> str:
        """The training step of the results, or that they are of an export, which does not know its step."""
        return "export" if self.results[0].setting["model"]["checkpoint"] == "export" else f"step {self.step}"

    def of(self, shots: int, options: str) -> dict[str, Result]:
        """Results with a number of demonstrations and these options (`options_of`), by task."""
        return {result.task: result for result in self.results if result.shots == shots and options_of(result) == options}


@dataclass(frozen=True)
class Panel:
    """A mean that all runs have."""

    title: str
    metric: str
    """The metric of the values, or of each task's score of which they are the mean."""
    values: list[float]
    """One for each run."""
    stderrs: list[float | None]
    """Standard error of each value, over the items; None if it is not known."""


def options_of(result: Result) -> str:
    """How a result differs from the task's own setting, on one line; empty if it does not."""
    return spelled(differences(result.setting))


def read_run(run_dir: Path) -> RunResults:
    """Read the results of a run or of an exported model. Raises ValueError if it has no results of whole tasks."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} does not exist: give run directories or exported models that `megatron-mm evaluate` has evaluated")
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
    return RunResults(run_dir, _settings_of(run_dir), [one for one in found if one.setting["model"]["step"] == newest])


def _settings_of(run_dir: Path) -> dict[str, Any]:
    """The settings of a run or an exported model that are known. The config.json of an export is Hugging Face's; ours are beside it.

    Raises ValueError if the folder is neither.
    """
    for path in (run_dir / EXPORT_SETTINGS, run_dir / "config.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): restore it") from None
        if isinstance(found.get("model"), dict):
            return dict(found)
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir} is neither a run directory nor an exported model: it has no config.json")
    return {}


def compare(run_dirs: Sequence[Path], *, out: Path) -> Iterator[str]:
    """Write the picture and a .json file with its values; yield lines for the terminal."""
    if len(run_dirs) < 2:
        raise ValueError("--compare needs at least two runs")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    check_asked_alike(runs)
    labels = labels_of([run.config for run in runs], [run.run_dir.name for run in runs])
    if len({run.when for run in runs}) > 1:
        labels = [f"{label}, {run.when}" for label, run in zip(labels, runs, strict=True)]
    panels = panels_of(runs)
    if not panels:
        raise ValueError("the runs have no task and number of shots in common: evaluate all of them with the same --tasks and --shots")
    rows = {panel.title: dict(zip(labels, panel.values, strict=True)) for panel in panels}
    metrics = {panel.title: panel.metric for panel in panels}
    errors = {panel.title: dict(zip(labels, panel.stderrs, strict=True)) for panel in panels}
    document = {"runs": [str(path) for path in run_dirs], "panels": rows, "metrics": metrics, "stderr": errors}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out.with_suffix(".json"), json.dumps(document, indent=2) + "\n")
    _draw(panels, labels, out)
    width = max(map(len, labels)) + 2
    columns = [max(len(panel.title) + 2, 14) for panel in panels]
    yield f"{'':{width}}" + "".join(f"{panel.title:>{column}}" for panel, column in zip(panels, columns, strict=True))
    for number, label in enumerate(labels):
        cells = [with_stderr(panel.values[number], panel.stderrs[number]) for panel in panels]
        yield f"{label:{width}}" + "".join(f"{cell:>{column}}" for cell, column in zip(cells, columns, strict=True))
    for panel in panels:
        yield f"metric of {panel.title}: {panel.metric}"
    yield f"{out}, {out.with_suffix('.json')}"


def check_asked_alike(runs: Sequence[RunResults]) -> None:
    """Raise ValueError if a task that all runs have in common was evaluated in different ways."""
    asked: list[dict[tuple[str, int], dict[str, Result]]] = [{} for _ in runs]
    for run, found in zip(runs, asked, strict=True):
        for result in run.results:
            found.setdefault((result.task, result.shots), {})[options_of(result)] = result
    for task, shots in sorted(set.intersection(*map(set, asked))):
        ways = [found[task, shots] for found in asked]
        shared = [options for options in ways[0] if all(options in way for way in ways)]
        unlike = [line for options in shared for line in _differences(runs, [way[options] for way in ways])]
        if not shared:
            spelled_out = [" and ".join(options or "its own setting" for options in sorted(way)) for way in ways]
            unlike = [", ".join(f"{options} in {run.run_dir}" for options, run in zip(spelled_out, runs, strict=True))]
        if unlike:
            what = f"{task} with {shots} shots was evaluated with different settings: {'; '.join(unlike)}"
            raise ValueError(f"{what}: evaluate both runs with the same options and files")


def _differences(runs: Sequence[RunResults], results: Sequence[Result]) -> list[str]:
    """Lines that say in which settings the runs' results of a task differ from those of the first run."""
    here, first = _how_asked(results[0]), runs[0].run_dir
    return [
        f"{name} is {here[name]!r} in {first} and {there[name]!r} in {run.run_dir}"
        for run, there in zip(runs[1:], map(_how_asked, results[1:]), strict=True)
        for name in here
        if here[name] != there[name]
    ]


def _how_asked(result: Result) -> dict[str, Any]:
    """Settings that must be equal for two results of a task to be comparable."""
    settings = {name: result.setting.get(name) for name in _ASKED}
    return {**settings, "number of items": result.num_items + result.bad_items}


def panels_of(runs: Sequence[RunResults]) -> list[Panel]:
    """Return the means over the tasks that all runs have: those of the tasks' own settings first."""
    panels = []
    every = [result for run in runs for result in run.results]
    for options in sorted({options_of(result) for result in every}):
        after = f", {options}" if options else ""
        for shots in sorted({result.shots for result in every}):
            found = [run.of(shots, options) for run in runs]
            shared = set.intersection(*map(set, found))
            common = sorted(shared - set(TEXTCORE))
            for what, metric, tasks in _groups({task: found[0][task].metric for task in common}):
                values = [sum(own[task].score for task in tasks) / len(tasks) for own in found]
                errors = [mean_stderr([own[task] for task in tasks]) for own in found]
                panels.append(Panel(f"{shots} shots, {what}{after}", metric, values, errors))
            if shared & set(TEXTCORE) != set(TEXTCORE):
                panels += _part_of_textcore(found, sorted(shared & set(TEXTCORE)), title=f"{shots} shots, ", after=after)
        texts = [[one for one in run.results if options_of(one) == options and one.task in TEXTCORE] for run in runs]
        cores = [textcore(results) for results in texts]
        for shots in sorted(set.intersection(*map(set, cores))):
            metric = f"mean of accuracy, % ({len(TEXTCORE)} tasks)"
            errors = [mean_stderr([one for one in results if one.shots == shots]) for results in texts]
            panels.append(Panel(f"TextCore, {shots} shots{after}", metric, [core[shots] for core in cores], errors))
    return panels


def _part_of_textcore(found: Sequence[dict[str, Result]], tasks: list[str], *, title: str, after: str) -> Iterator[Panel]:
    """A panel of those of TextCore's tasks that all runs have, where they do not have all of them: no average of TextCore."""
    if not tasks:
        return
    what = tasks[0] if len(tasks) == 1 else f"{len(tasks)} of TextCore's {len(TEXTCORE)} tasks"
    metric = found[0][tasks[0]].metric if len(tasks) == 1 else f"mean of accuracy, % ({_tasks(tasks)})"
    values = [sum(own[task].score for task in tasks) / len(tasks) for own in found]
    yield Panel(f"{title}{what}{after}", metric, values, [mean_stderr([own[task] for task in tasks]) for own in found])


def _groups(metrics: dict[str, str]) -> Iterator[tuple[str, str, list[str]]]:
    """Divide tasks into those whose scores are averaged: MM1's seven together, others by metric.

    Args:
        metrics: task -> metric.

    Yields the group's title, its metric, and its tasks.
    """
    by_metric: dict[str, list[str]] = {}
    for task, metric in metrics.items():
        by_metric.setdefault(metric, []).append(task)
    if set(metrics) == set(GROUPS["mm1"]):
        each = [f"{metric} ({_tasks(tasks)})" for metric, tasks in by_metric.items()]
        yield f"MM1's {len(metrics)} tasks", f"mean of {' and '.join(each)}", list(metrics)
        return
    for metric, tasks in by_metric.items():
        one = len(tasks) == 1
        what = tasks[0] if one else f"{_tasks(tasks)} in {metric}"
        yield what, metric if one else f"mean of {metric} ({_tasks(tasks)})", tasks


def _tasks(tasks: Sequence[str]) -> str:
    return f"{len(tasks)} tasks" if len(tasks) > 1 else "1 task"


def labels_of(configs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Label each run with the settings that differ between runs, preceded by its name if these labels are not unique. A run without any of
    these settings, such as an export that does not state its own, is labelled with its name."""
    flat = [_flat({"model": config["model"]}) if "model" in config else {} for config in configs]
    mixtures = [config.get("data", {}).get("mixture") for config in configs]
    if None not in mixtures and all(flat):
        flat = [{**one, "data.mixture": mixture} for one, mixture in zip(flat, mixtures, strict=True)]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if len({str(one.get(key)) for one in flat if one}) > 1]
    known = [key for key in keys if key in _NAMES] or keys
    parts = [
        [
            f"{_NAMES.get(key, key + ' ')}{_written(one.get(key))}"
            for key in known
            if one and (key not in _NAMES or one.get(key) is not None)
        ]
        for one in flat
    ]
    labels = [", ".join(part) or name for part, name in zip(parts, names, strict=True)]
    if len(set(labels)) == len(labels):
        return labels
    return [label if label == name else f"{name} {label}" for name, label in zip(names, labels, strict=True)]


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


def _draw(panels: Sequence[Panel], labels: Sequence[str], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(panels), _PANELS)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 1.2 + 2.8 * lines), squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.axis("off")
    for place, panel in zip(axes.flat, panels, strict=False):
        errors = [error or 0.0 for error in panel.stderrs] if any(panel.stderrs) else None
        colours = [f"C{number % 10}" for number in range(len(labels))]
        bars = place.bar(range(len(labels)), panel.values, color=colours, yerr=errors, ecolor="0.4", capsize=3)
        place.bar_label(bars, fmt="%.1f", fontsize=8)
        place.set_title(textwrap.fill(panel.title, 34), fontsize=9)
        place.set_ylabel(textwrap.fill(panel.metric, 34), fontsize=8)
        place.set_xticks([])
        place.margins(y=0.15)
    figure.legend(bars, labels, loc="lower center", ncols=min(3, len(labels)), fontsize=8)
    figure.tight_layout(rect=(0, 0.04 + 0.035 * -(-len(labels) // 3), 1, 1))
    figure.savefig(out, dpi=120)
    pyplot.close(figure)

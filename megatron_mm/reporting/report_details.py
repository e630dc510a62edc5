"""Sections of a report without curves: captions, experts, events, configuration, files."""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.evaluation.results import with_stderr
from megatron_mm.evaluation.settings import differences, spelled
from megatron_mm.reporting.charts import Series, heat_map, line_chart
from megatron_mm.reporting.page import charts, missing, table
from megatron_mm.reporting.run_files import RunFiles

_MOST_SAMPLES = 16
_MOST_IMAGE_BYTES = 2_000_000
_MOST_EVENTS = 300


def benchmarks(run: RunFiles) -> str:
    """Scores of `megatron-mm evaluate`: a row for each task, number of shots and setting, a column for each evaluated step."""
    rows: dict[tuple[str, int, str], dict[int, str]] = {}
    for result in run.results:
        try:
            setting = result["setting"]
            part = "" if setting["limit"] is None else f", {result['num_items']} items"
            part += f", {options}" if (options := spelled(differences(setting))) else ""
            key = f"{result['title']}{part}", int(setting["shots"]), str(result["metric"])
            rows.setdefault(key, {})[int(setting["model"]["step"])] = with_stderr(float(result["scores"]["score"]), result.get("stderr"))
        except (KeyError, TypeError, ValueError):
            continue  # written by another version
    if not rows:
        return missing("No benchmarks: megatron-mm evaluate RUN_DIR --tasks ... writes them.")
    steps = sorted({step for scores in rows.values() for step in scores})[-6:]
    lines = [
        [html.escape(title), str(shots), *(scores.get(step, "–") for step in steps), html.escape(metric)]
        for (title, shots, metric), scores in sorted(rows.items())
    ]
    header = ["task", "shots", *(f"step {step:,}" for step in steps), "metric"]
    note = '<p class="note">±: one standard error, over the items</p>' if any(result.get("stderr") for result in run.results) else ""
    return "<h3>Benchmarks</h3>" + table(header, lines, numbers=range(1, len(header) - 1)) + note


def captions(run: RunFiles) -> str:
    """The newest captions of held-out images, with those of earlier evaluations."""
    if not run.captions.lines:
        return missing("No captions: eval.samples is 0, there are no pairs, or the run was made by a version that kept them only in W&B.")
    newest = run.captions.lines[-1]
    earlier = run.captions.lines[-4:-1]
    cards = []
    for number, sample in enumerate(newest.get("samples", [])[:_MOST_SAMPLES]):
        before = "".join(
            f'<br><span class="note">step {line["step"]}: {html.escape(str(line["samples"][number].get("generated")))}</span>'
            for line in earlier
            if number < len(line.get("samples", []))
        )
        cards.append(
            f'<div class="caption">{_image(run.path, str(sample.get("image", "")))}<b>{html.escape(str(sample.get("generated")))}</b><br>'
            f'<span class="note">true: {html.escape(str(sample.get("true")))}</span>{before}</div>'
        )
    return f'<h3>Captions at step {newest["step"]:,}</h3><div class="captions">{"".join(cards)}</div>'


def _image(run_dir: Path, name: str) -> str:
    """An image of the run directory, embedded in the page; a note if it is missing, too large, or outside the run directory."""
    path = run_dir / name
    inside = path.resolve().is_relative_to(run_dir.resolve())
    if not name or not inside or not path.is_file() or path.stat().st_size > _MOST_IMAGE_BYTES:
        return '<span class="note">(image not in the run directory)</span> '
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def experts(runs: Sequence[RunFiles]) -> str:
    """Balance of the experts over time, and the newest load of each."""
    parts = []
    for run in runs:
        curves = run.metrics.under("experts")
        if not curves:
            continue
        several = len(runs) > 1
        title = f": {run.name}" if several else ""
        imbalance = [
            Series(name.replace("_", " "), curves[name], number)
            for number, name in enumerate(("load_imbalance", "worst_load_imbalance"))
            if name in curves
        ]
        others = [
            line_chart([Series(name, curve, number)], title=f"{name.replace('_', ' ').capitalize()}{title}")
            for number, (name, curve) in enumerate(sorted(curves.items()))
            if "imbalance" not in name
        ]
        parts.append(
            charts(_load(run, title), line_chart(imbalance, title=f"Load imbalance{title}", unit="busiest expert / mean"), *others)
        )
    return "".join(parts) or missing("No sparse layers.")


def _load(run: RunFiles, title: str) -> str:
    for line in reversed(run.experts.lines):
        tokens = np.array(line.get("tokens", []), dtype=float)
        if tokens.ndim == 2 and tokens.size:
            share = tokens / np.maximum(tokens.mean(axis=1, keepdims=True), 1)
            return heat_map(
                share,
                title=f"Expert load{title}",
                note=f"steps {line.get('first_step')} to {line['step']}: tokens / equal share",
                rows=[str(layer) for layer in line.get("layers", range(len(share)))],
                row_title="layer",
                column_title="expert",
            )
    return ""


def events(runs: Sequence[RunFiles]) -> str:
    """Starts, resumes, skipped steps and alerts, as the run recorded them; for a run without events, as its metrics show them."""
    parts = []
    for run in runs:
        head = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        if run.events.lines:
            shown = run.events.lines[-_MOST_EVENTS:]
            rows = [
                [_when(line), f"{line['step']:,}", html.escape(str(line.get("kind"))), html.escape(str(line.get("text", "")))]
                for line in shown
            ]
            left_out = len(run.events.lines) - len(shown)
            note = f'<p class="note">the last {len(shown)}; {left_out} earlier ones are in events.jsonl</p>' if left_out else ""
            parts.append(head + note + table(["time (UTC)", "step", "event", ""], rows, numbers=[1]))
            continue
        found = [f"resumed after step {step}" for step in run.restarts()]
        skipped = run.metrics.curve("skipped")
        found += [f"step {step} skipped: the gradient was not finite" for step in skipped.steps[skipped.values > 0].tolist()]
        said = "".join(f"<li>{html.escape(line)}</li>" for line in found)
        parts.append(
            head
            + (f"<ul>{said}</ul>" if said else "")
            + missing("No events.jsonl: the run has not started, or was made by a version that did not write one.")
        )
    return "".join(parts)


def _when(line: dict[str, Any]) -> str:
    stamp = line.get("time")
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(stamp)) if isinstance(stamp, int | float) else "–"


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A configuration's fields by their dotted names, as JSON."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from flat(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, json.dumps(values)


def configuration(runs: Sequence[RunFiles]) -> str:
    """The fields that differ between the runs, and all fields."""
    fields = [dict(flat(run.config)) for run in runs]
    names = list(dict.fromkeys(name for one in fields for name in one))
    if not names or names == [""]:
        return missing("No config.json.")
    header = ["field", *(html.escape(run.name) for run in runs)]

    def rows(wanted: list[str]) -> list[list[str]]:
        return [
            [f"<code>{html.escape(name)}</code>", *(f"<code>{html.escape(one.get(name, '–'))}</code>" for one in fields)] for name in wanted
        ]

    different = [name for name in names if len({one.get(name) for one in fields}) > 1]
    parts = []
    if len(runs) > 1:
        parts.append("<h3>Differences</h3>" + (table(header, rows(different)) if different else missing("None.")))
    parts.append(f"<details><summary>All {len(names)} fields</summary>{table(header, rows(names))}</details>")
    return "".join(parts)


def files(runs: Sequence[RunFiles]) -> str:
    """The runs that the report was made from, with numbers of replaced and damaged lines."""
    rows = []
    for run in runs:
        damaged = ", ".join(f"{count} of {name}" for name, count in run.damaged.items())
        rows.append(
            [
                html.escape(str(run.path)),
                f"{len(run.metrics.steps):,}",
                f"{run.metrics.replaced:,}",
                f'<span class="warn">{damaged}</span>' if damaged else "none",
            ]
        )
    note = (
        '<p class="note">A damaged line is not a JSON object with a step: a process that was killed while it wrote left only a part of it. '
        "If steps were repeated after a resume, the values written last are shown.</p>"
    )
    return table(["run", "steps", "lines replaced by a later one", "damaged lines"], rows, numbers=[1, 2]) + note

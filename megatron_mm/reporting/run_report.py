"""The report of one or more runs as one HTML page: their results, in charts with a common step axis, and their differences."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_mm.platform.files import write_whole
from megatron_mm.reporting import page
from megatron_mm.reporting.charts import NUM_COLOURS, Mark, Series, line_chart, short, stacked_chart
from megatron_mm.reporting.page import Section, charts, missing
from megatron_mm.reporting.report_details import benchmarks, captions, configuration, events, experts, files
from megatron_mm.reporting.run_files import Curve, RunFiles, read_run

PHASES = ("data", "share", "encoder", "forward", "backward", "p2p", "reduce", "optimizer", "other")
"""Phases of a step in the order in which they are drawn."""
_PHASE_NAMES = {"data": "wait for data", "share": "sending texts", "p2p": "wait for other stages", "reduce": "gradient reduction"}
MOST_EVENTS = 60
"""Maximum number of vertical lines in a chart."""


def write_report(run_dirs: Sequence[Path], out: Path) -> list[RunFiles]:
    """Write the report of some runs; returns what was read. Raises ValueError if one is not a run directory, or `out` is a
    directory."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a directory: specify the file to write, such as --out {out / 'report.html'}")
    runs = [read_run(path) for path in run_dirs]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.path)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, report(runs))
    return runs


def report(runs: Sequence[RunFiles]) -> str:
    """The page."""
    makers: tuple[tuple[str, str, Callable[[Sequence[RunFiles]], str]], ...] = (
        ("loss", "Loss", _losses),
        ("evaluation", "Evaluation and captions", _evaluation),
        ("throughput", "Throughput and memory", _throughput),
        ("phases", "Time by phase", _phases),
        ("norms", "Learning rate and norms", _norms),
        ("data", "Data", _data),
        ("experts", "Experts", experts),
        ("plan", "Predicted and measured", _plan),
        ("events", "Events", events),
        ("configuration", "Configuration", configuration),
        ("files", "Files read", files),
    )
    sections = [Section(anchor, title, _or_why_not(make, runs)) for anchor, title, make in makers]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    return page.page(title, "".join(_summary(run, number, len(runs)) for number, run in enumerate(runs)), sections)


def _or_why_not(make: Callable[[Sequence[RunFiles]], str], runs: Sequence[RunFiles]) -> str:
    """Make a section. If a file is not as this version writes it, the section says what is wrong, and the other sections are not
    affected."""
    try:
        return make(runs)
    except Exception as error:  # files of another version, or changed by hand
        return missing(
            f"This section cannot be shown, because a file is not in the format of this version: {type(error).__name__}: {error}"
        )


# --------------------------------------------------------------------------------------------------------------- summary


def _of_planned(done: int, planned: int | None) -> str:
    if not planned:
        return "steps"
    return f"of {planned:,} steps" if done <= planned else f"steps; train.steps is {planned:,}"


def _summary(run: RunFiles, number: int, count: int) -> str:
    metrics, steps = run.metrics, run.metrics.steps
    done, planned = int(steps[-1]) if len(steps) else 0, run.planned_steps
    seconds = metrics.curve("seconds").values
    values = [
        (_of_planned(done, planned), f"{done:,}"),
        ("loss", _number(metrics.curve("loss").last)),
        ("held-out loss", _number(run.evaluations.curve("heldout/loss").last)),
        ("tokens", short(_total(run, "tokens"))),
        ("images", short(_total(run, "images"))),
        ("tokens/s, median", _number(_median(metrics.curve("tokens_per_s")), short)),
        ("MFU, median", _number(_median(metrics.curve("mfu")), lambda value: f"{100 * value:.1f}%")),
        ("time in steps", _duration(float(np.nansum(seconds))) if len(seconds) else "–"),
        ("restarts", str(len(run.restarts()))),
        ("skipped steps", _number(metrics.curve("skipped_steps").last, lambda value: f"{value:.0f}")),
    ]
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in values)
    recipe = run.config.get("recipe")
    about = f"{html.escape(str(recipe))}, " if recipe else ""
    head = f'<h3><span class="chip" style="--c:var(--c{number % NUM_COLOURS})"></span>{html.escape(run.name)}</h3>' if count > 1 else ""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    note = f'<p class="note">{about}{html.escape(str(run.path))}; report of {written}</p>'
    return f'{head}{note}<div class="tiles">{tiles}</div>'


def _total(run: RunFiles, name: str) -> float:
    total = run.metrics.curve(f"total_{name}")
    return total.last if len(total) else float(np.nansum(run.metrics.curve(name).values))


def _median(curve: Curve) -> float:
    finite = curve.values[np.isfinite(curve.values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _number(value: float, write: Callable[[float], str] = lambda value: f"{value:.4f}") -> str:
    return write(value) if math.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


# ---------------------------------------------------------------------------------------------------------------- charts


def marks(run: RunFiles) -> list[Mark]:
    """Resumes and alerts of a run, as vertical lines."""
    found = [Mark(step, "resumed", "resume") for step in run.restarts()]
    for line in run.events.lines:
        if line.get("kind") not in ("start", "resume", "end", "checkpoint"):
            found.append(Mark(line["step"], f"{line.get('kind')}: {line.get('text', '')}", "alert"))
    return found[:MOST_EVENTS]


def _of_runs(
    runs: Sequence[RunFiles],
    name: str,
    *,
    title: str,
    unit: str = "",
    from_zero: bool = False,
    scale: float = 1.0,
    most: float | None = None,
    at_times: bool = False,
) -> str:
    """Chart of a number in metrics.jsonl, with one line per run.

    Args:
        at_times: whether steps without the number are left out instead of drawn as gaps.
    """
    series = []
    for number, run in enumerate(runs):
        curve = run.metrics.curve(name)
        kept = np.isfinite(curve.values) if at_times else np.ones(len(curve), dtype=bool)
        if kept.any():
            series.append(Series(run.name, Curve(curve.steps[kept], curve.values[kept] * scale), number))
    lines = marks(runs[0]) if len(runs) == 1 else ()
    return line_chart(series, title=title, unit=unit, marks=lines, from_zero=from_zero, most=most)


def _by_part(run: RunFiles, curves: dict[str, Curve], *, title: str, unit: str = "", several: bool, from_zero: bool = False) -> str:
    """Chart of one run, with one line per part."""
    series = [Series(name, curve, number) for number, (name, curve) in enumerate(sorted(curves.items()))]
    return line_chart(series, title=_of_run(title, run, several), unit=unit, marks=marks(run), from_zero=from_zero)


def _of_run(title: str, run: RunFiles, several: bool) -> str:
    return f"{title}: {run.name}" if several else title


def _losses(runs: Sequence[RunFiles]) -> str:
    several = len(runs) > 1
    unit = "nats per supervised token"
    held_out = [
        Series(f"{run.name}, held out" if several else "held out", curve, number if several else 1, dashed=several)
        for number, run in enumerate(runs)
        if len(curve := run.evaluations.curve("heldout/loss"))
    ]
    found = charts(
        _of_runs(runs, "loss", title="Training loss", unit=unit),
        line_chart(held_out, title="Held-out loss", unit=unit, marks=marks(runs[0]) if not several else ()),
        *(_by_part(run, run.metrics.under("losses"), title="Training loss by source", unit=unit, several=several) for run in runs),
        *(
            _by_part(run, run.evaluations.under("heldout/loss"), title="Held-out loss by source", unit=unit, several=several)
            for run in runs
        ),
    )
    lines = [mark.kind for run in runs for mark in marks(run)] if not several else []
    said = [text for kind, text in (("resume", "green: the run was resumed"), ("alert", "red: a warning")) if kind in lines]
    note = f'<p class="note">Vertical lines on all charts: {", ".join(said)} (listed under Events)</p>' if said else ""
    return found + note if found else missing("No step has been written yet.")


def _evaluation(runs: Sequence[RunFiles]) -> str:
    parts = []
    for run in runs:
        names = [name for name in sorted(run.evaluations.columns) if name.startswith("heldout/")]
        head = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        body = ""
        if names:
            last = run.evaluations.steps[-8:]
            rows = [[f"{step:,}", *(_number(_at(run.evaluations.curve(name), int(step))) for name in names)] for step in last.tolist()]
            titles = ["step", *(html.escape(name.removeprefix("heldout/loss").lstrip("/") or "all") for name in names)]
            body = (
                page.table(titles, rows, numbers=range(len(titles))) + '<p class="note">held-out loss by source, the last evaluations</p>'
            )
        parts.append(head + (body or missing("No evaluation has been written.")) + benchmarks(run) + captions(run))
    return "".join(parts)


def _at(curve: Curve, step: int) -> float:
    found = curve.values[curve.steps == step]
    return float(found[-1]) if len(found) else math.nan


def _throughput(runs: Sequence[RunFiles]) -> str:
    found = charts(
        _of_runs(runs, "tokens_per_s", title="Tokens per second", unit="whole run, padding not counted", from_zero=True),
        _of_runs(runs, "mfu", title="MFU", unit="percent of a device's peak", scale=100, from_zero=True),
        _of_runs(runs, "tflops", title="TFLOP/s of one device", from_zero=True),
        _of_runs(runs, "seconds", title="Step time", unit="seconds", from_zero=True),
        _of_runs(runs, "memory_gb", title="Memory", unit="GB of the main process: GPU peak; on a CPU, resident", from_zero=True),
        line_chart(_most_memory(runs), title="Memory of the fullest process", unit="GB", from_zero=True),
    )
    return found or missing("No step has been written yet.")


def _most_memory(runs: Sequence[RunFiles]) -> list[Series]:
    """Memory of the process that uses most, per window of steps; one line per run that measured it."""
    series = []
    for number, run in enumerate(runs):
        lines = [line for line in run.phases.lines if isinstance(line.get("memory_gb"), int | float)]
        if lines:
            curve = Curve(np.array([line["step"] for line in lines]), np.array([line["memory_gb"] for line in lines], dtype=float))
            series.append(Series(run.name, curve, number))
    return series


def _phases(runs: Sequence[RunFiles]) -> str:
    several, parts = len(runs) > 1, []
    for run in runs:
        of_main = run.metrics.under("phases")
        found = [_stack(of_main, title=_of_run("Main process", run, several), run=run)]
        stages = len(run.phases.lines[-1].get("stages", [])) if run.phases.lines else 0
        for stage in range(stages if stages <= 16 else 0):
            lines = [line for line in run.phases.lines if len(line.get("stages", [])) == stages]
            steps = np.array([line["step"] for line in lines])
            curves = {name: Curve(steps, np.array([line["stages"][stage].get(name, 0.0) for line in lines])) for name in PHASES}
            title = "Mean over processes" if stages == 1 else f"Mean over processes of pipeline stage {stage}"
            found.append(_stack(curves, title=_of_run(title, run, several), run=run))
        shown = charts(*found)
        slow = [line["slow"] for line in run.phases.lines if line.get("slow")]
        note = f'<p class="note">{len(slow)} windows of steps had a slow process; they are listed under Events</p>' if slow else ""
        if run.phases.every > 1:
            note += f'<p class="note">For pipeline stages, one window of steps in {run.phases.every} is shown.</p>'
        parts.append(
            shown + note
            if shown
            else missing(f"{run.name} has no time by phase: no step yet, or trained by a version that did not measure it.")
        )
    return "".join(parts)


def _stack(curves: dict[str, Curve], *, title: str, run: RunFiles) -> str:
    series = [
        Series(_PHASE_NAMES.get(name, name), curves[name], number)
        for number, name in enumerate(PHASES)
        if name in curves and len(curves[name]) and np.nanmax(curves[name].values) > 0
    ]
    whole = [one for one in series if len(one.curve) == max(len(other.curve) for other in series)]
    return stacked_chart(whole, title=title, unit="seconds per step", marks=marks(run))


def _norms(runs: Sequence[RunFiles]) -> str:
    several = len(runs) > 1
    groups = (
        ("grad_norms", "Gradient norm by part", "before clipping"),
        ("param_norms", "Parameter norm by part", "before the step"),
        ("update_ratios", "Update ratio by part", "norm of the update / norm of the parameters"),
    )
    found = charts(
        _of_runs(runs, "lr", title="Learning rate"),
        _of_runs(runs, "grad_norm", title="Gradient norm", unit="whole model, before clipping"),
        *(_by_part(run, run.metrics.under(name), title=title, unit=unit, several=several) for name, title, unit in groups for run in runs),
    )
    lacking = [run.name for run in runs if not run.metrics.under("grad_norms")]
    note = missing(f"No norms by part: {', '.join(lacking)}.") if lacking and found else ""
    return (found or missing("No step has been written yet.")) + note


def _data(runs: Sequence[RunFiles]) -> str:
    several, parts = len(runs) > 1, []
    shares = [
        Series(run.name, Curve(waits.steps, 100 * waits.values / seconds.values), number)
        for number, run in enumerate(runs)
        if len(waits := run.metrics.curve("data_seconds")) and len(seconds := run.metrics.curve("seconds")) == len(waits)
    ]
    parts.append(
        charts(
            _of_runs(runs, "fill", title="Fill", unit="percent of a batch that is not padding", scale=100, most=100),
            _of_runs(
                runs,
                "balance",
                title="Balance",
                unit="percent: mean data-parallel rank's work / the busiest one's",
                scale=100,
                most=100,
                at_times=True,
            ),
            line_chart(shares, title="Wait for data", unit="percent of the step, main process", from_zero=True),
            _of_runs(runs, "images", title="Images per step", from_zero=True),
            *(
                _by_part(run, curves, title="Supervised tokens by source", unit=f"of a step; mean of {window} steps", several=several)
                for run in runs
                for curves, window in [_smoothed(run.metrics.under("source_tokens"))]
            ),
            *(
                _by_part(
                    run, run.metrics.under("bad_samples"), title="Samples that failed", unit="since step 0, by source", several=several
                )
                for run in runs
            ),
        )
    )
    for run in runs:
        if not run.metrics.under("bad_samples"):
            parts.append(f'<p class="note">{html.escape(run.name)}: no sample failed</p>')
    return "".join(parts) or missing("No step has been written yet.")


def _smoothed(curves: dict[str, Curve]) -> tuple[dict[str, Curve], int]:
    """(running means of curves; over how many steps, at most 100). The sources of single steps alternate, which no eye can follow."""
    window = min(100, max(1, max(map(len, curves.values()), default=0) // 30))
    found = {}
    for name, curve in curves.items():
        count = min(window, max(1, len(curve)))
        values = np.convolve(np.nan_to_num(curve.values), np.full(count, 1 / count), mode="valid")
        found[name] = Curve(curve.steps[count - 1 :], values)
    return found, window


def _plan(runs: Sequence[RunFiles]) -> str:
    found = []
    for run in runs:
        ratios = {
            title: curve
            for name, title in (("plan/ratio", "step time"), ("plan/memory_ratio", "memory"))
            if len(curve := run.plan.curve(name))
        }
        found.append(_by_part(run, ratios, title="Measured / predicted", unit="1 is as planned", several=len(runs) > 1))
    return charts(*found) or missing(
        "No prediction: the planner predicts steps only for GPUs that it knows, and these runs used none of them."
    )

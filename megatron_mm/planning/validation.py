"""Accuracy of the planner: predicted and published values, by source and kind, with a separate result for the half that was not used to
choose constants."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.planning.measurements import Measurement, Skipped, read_measurements


@dataclass(frozen=True)
class Compared:
    """A measured row and its prediction."""

    measured: Measurement
    seconds: float | None
    """Predicted / measured step time."""
    memory: float | None
    """Predicted / published memory."""
    state: float | None
    """Predicted / published memory that is allocated between steps."""
    held_out: bool
    limit: str


def compare(rows: Sequence[Measurement]) -> list[Compared]:
    """Predict every row. Within each source every second group of rows (a model on a GPU in a precision) is held out."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        seen = groups.setdefault(row.source, [])
        if row.group not in seen:
            seen.append(row.group)
    result = []
    for row in rows:
        predicted = row.predict()
        seconds = predicted.seconds / row.step_seconds if row.step_seconds else None
        use = predicted.memory[-1] if row.memory_of_last_rank else max(predicted.memory, key=lambda use: use.allocated)
        peak = use.reserved if row.memory_is_reserved else use.allocated
        memory = peak / row.memory_bytes if row.memory_bytes else None
        state = use.state / row.state_bytes if row.state_bytes else None
        result.append(Compared(row, seconds, memory, state, groups[row.source].index(row.group) % 2 == 1, predicted.limit))
    return result


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of values, with linear interpolation between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summary(kind: str, ratios: Sequence[float]) -> str:
    """Summarise |ratio - 1| as `dense: median 4.1% p90 9.0% of 120 rows`."""
    errors = [abs(ratio - 1) for ratio in ratios]
    return f"{kind}: median {100 * statistics.median(errors):.1f}% p90 {100 * percentile(errors, 0.9):.1f}% of {len(errors)} rows"


def report(path: Path, *, every_row: bool = False) -> Iterator[str]:
    """Lines for the terminal."""
    read = list(read_measurements(path))
    skipped = [row for row in read if isinstance(row, Skipped)]
    compared = compare([row for row in read if isinstance(row, Measurement)])
    skipped += [_without_values(row.measured) for row in compared if row.seconds is None and row.memory is None and row.state is None]
    timed = [row for row in compared if row.seconds is not None]
    yield f"step time, |predicted / measured - 1|, all rows of {path.name}"
    yield from _by_kind(timed)
    yield from _memory(compared)
    halves = ("first half of the groups (of throughput.csv: the half used to choose constants)", "second half, held out")
    for half, name in zip((False, True), halves, strict=True):
        yield f"\n{name}"
        yield from _by_kind([row for row in timed if row.held_out is half], indent="  ")
    yield "\na constant-MFU guess instead (the median MFU of the first half, by GPU and precision)"
    yield from _guess(timed)
    for source in dict.fromkeys(row.measured.source for row in compared):
        yield f"\n{source}"
        own = [row for row in timed if row.measured.source == source]
        yield from _by_kind(own, indent="  ")
        yield from _memory([row for row in compared if row.measured.source == source], indent="  ")
    if every_row:
        yield "\nrow  predicted / measured  memory  half  model  layout  limit  assumed"
        for row in compared:
            ratio = "-" if row.seconds is None else f"{row.seconds:.3f}"
            memory = "-" if row.memory is None else f"{row.memory:.3f}"
            held = "second" if row.held_out else "first"
            measured = row.measured
            where = f"{measured.model}  {measured.jobs[0].layout}  {row.limit}  {' '.join(measured.assumed)}"
            yield f"{measured.row}  {ratio}  {memory}  {held}  {where}"
    if skipped:
        yield f"\n{len(skipped)} rows not predicted"
        yield from (f"  {row.row} {row.source} {row.model}: {row.reason}" for row in skipped)


def _without_values(row: Measurement) -> Skipped:
    reason = "it has no step_time_s, tokens_per_s_per_gpu, tflops_causal_half or mem_gib to compare with"
    return Skipped(row.row, row.source, row.model, reason)


def _by_kind(rows: Sequence[Compared], indent: str = "") -> Iterator[str]:
    for kind in ("dense", "moe"):
        ratios = [row.seconds for row in rows if row.measured.kind == kind and row.seconds is not None]
        if ratios:
            yield indent + summary(kind, ratios)


def _memory(rows: Sequence[Compared], indent: str = "") -> Iterator[str]:
    for kind in ("dense", "moe"):
        ratios = [row.memory for row in rows if row.memory is not None and row.measured.kind == kind]
        if ratios:
            yield indent + summary(f"memory {kind}", ratios)
        ratios = [row.state for row in rows if row.state is not None and row.measured.kind == kind]
        if ratios:
            yield indent + summary(f"memory between steps {kind}", ratios)


def _guess(rows: Sequence[Compared]) -> Iterator[str]:
    def key(row: Compared) -> tuple[str, bool]:
        return row.measured.jobs[0].gpu.name, "fp8" in row.measured.group.lower()

    known: dict[tuple[str, bool], list[float]] = {}
    for row in rows:
        if not row.held_out:
            measured = row.measured
            known.setdefault(key(row), []).append(measured.flops_per_gpu / (measured.step_seconds or 1.0) / measured.peak)
    for kind in ("dense", "moe"):
        ratios = []
        for row in rows:
            measured = row.measured
            if measured.kind == kind and measured.step_seconds:
                of = known.get(key(row)) or [mfu for values in known.values() for mfu in values] or [0.4]
                ratios.append(measured.flops_per_gpu / (statistics.median(of) * measured.peak) / measured.step_seconds)
        if ratios:
            yield "  " + summary(kind, ratios)

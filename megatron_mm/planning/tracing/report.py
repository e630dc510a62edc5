"""The report of a trace for the terminal, and a plot of memory over a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mm.planning.hardware import GIGA, TERA
from megatron_mm.planning.tracing.trace import Trace

_SHOWN = 6


def describe_traces(traces: Sequence[Trace]) -> Iterator[str]:
    """Lines for each pipeline rank: memory at the peak by part and phase, FLOPs, messages."""
    yield "traced, one process per pipeline rank (allocated bytes, without libraries and fragmentation)"
    for trace in traces:
        before, peak, work = trace.built_bytes / GIGA, trace.peak_bytes / GIGA, trace.flops / TERA
        yield f"pipeline rank {trace.pipeline_rank}: {before:.2f} GB before the step, {peak:.2f} GB at the peak, {work:.1f} TFLOP"
        for label, size in list(trace.peak_parts.items())[:_SHOWN]:
            phase, part = label.split("|")
            yield f"    {size / GIGA:8.2f} GB  {part} ({phase})"
        for key, (number, sent) in sorted(trace.message_totals().items(), key=lambda entry: -entry[1][1])[:_SHOWN]:
            kind, group, members = key.split("|")
            yield f"    {sent / GIGA:8.2f} GB  {number} x {kind} over {members} ({group.removesuffix('_GROUP').lower().replace('_', ' ')})"


def draw_memory(traces: Sequence[Trace], path: Path) -> None:
    """Plot live bytes over the operations of a step, one line per pipeline rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 4))
    for trace in traces:
        points = trace.timeline
        axes.plot([p[0] for p in points], [p[1] / GIGA for p in points], label=f"pipeline rank {trace.pipeline_rank}", linewidth=0.8)
    axes.set_xlabel("operations since the start of building the model")
    axes.set_ylabel("live, GB")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

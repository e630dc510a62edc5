"""The simulated step as a picture, and as a trace for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mm.planning.pipeline import PipelineResult

COLOURS = {"forward": "#4c78a8", "backward": "#f58518"}


def draw_timeline(result: PipelineResult, path: Path, *, title: str) -> None:
    """Draw one row per pipeline rank and one bar per pass, with a legend; later chunks are paler."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    ranks = len(result.rank_end)
    chunks = 1 + max(event.stage for event in result.events) // ranks
    figure, axes = plt.subplots(figsize=(14, 1.6 + 0.45 * ranks), layout="constrained")
    for kind, colour in COLOURS.items():
        for chunk in range(chunks):
            bars = [e for e in result.events if e.kind == kind and e.stage // ranks == chunk]
            for rank in range(ranks):
                spans = [(e.begin, e.end - e.begin) for e in bars if e.rank == rank]
                axes.broken_barh(spans, (rank - 0.4, 0.8), facecolors=colour, alpha=_alpha(chunk, chunks), edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=10)
    names = {"forward": "forward pass of a micro-batch", "backward": "backward pass"}
    legend = [
        Patch(color=colour, alpha=_alpha(chunk, chunks), label=names[kind] + (f", chunk {chunk} of the rank" if chunks > 1 else ""))
        for kind, colour in COLOURS.items()
        for chunk in range(chunks)
    ]
    legend.append(Patch(facecolor="white", edgecolor="grey", label="waiting (pipeline bubble)"))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(5, len(legend)), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _alpha(chunk: int, chunks: int) -> float:
    return 1.0 - 0.6 * chunk / chunks


def write_trace(result: PipelineResult, path: Path) -> None:
    """Write the trace event format, with one thread per pipeline rank and times in microseconds."""
    events = [
        {
            "name": f"{event.kind} {event.micro_batch}",
            "cat": event.kind,
            "ph": "X",
            "ts": event.begin * 1e6,
            "dur": (event.end - event.begin) * 1e6,
            "pid": 0,
            "tid": event.rank,
            "args": {"stage": event.stage, "micro_batch": event.micro_batch},
        }
        for event in result.events
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

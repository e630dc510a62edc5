"""`prepare report`: statistics of a data set, computed from its indexes.

Counts and distributions of documents cover every sample. Those of image sizes cover evenly spread blocks with at most a million samples per
source, because they need the larger table of the index.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.data.prepare.find import find_sources
from megatron_mm.data.sources.index import SourceIndex, open_index
from megatron_mm.data.sources.index_files import META
from megatron_mm.data.sources.shard_table import ShardTable

_BLOCK = 1 << 20
"""Number of samples that are processed together."""
_IMAGE_SAMPLES, _IMAGE_BLOCKS = 1_000_000, 64
_SHARES = (0, 5, 25, 50, 75, 95, 100)
_BINS = 10.0 ** np.linspace(0, 7, 141)
"""Edges of the histogram of tokens: 20 per decade."""


@dataclass
class SourceReport:
    """Statistics of a source."""

    kind: str
    samples: int
    images: int
    text_tokens: int
    bytes: int
    """Total size of the shards, in bytes."""
    shards: int
    chat_template: str | None
    rejected: dict[str, int]
    dropped: dict[str, int]
    skipped: dict[str, int]
    text_tokens_of_a_sample: dict[str, float] = field(default_factory=dict)
    """Percentiles, by name ("50%")."""
    images_of_a_sample: dict[str, int] = field(default_factory=dict)
    """Number of samples by their number of images; "10+" for the rest."""
    image_width: dict[str, float] = field(default_factory=dict)
    image_height: dict[str, float] = field(default_factory=dict)
    token_histogram: list[int] = field(default_factory=list)
    """Number of samples by text tokens, between the edges `DataReport.token_edges`."""


@dataclass
class DataReport:
    """Statistics of a data set, by split and source."""

    path: str
    sources: dict[str, SourceReport]
    token_edges: list[float]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        lines = [f"{'source':28} {'kind':13} {'samples':>13} {'images':>13} {'text tokens':>15} {'GB':>9} {'rejected':>9}"]
        for name, source in self.sources.items():
            rejected = sum(source.rejected.values())
            share = rejected / max(1, rejected + source.samples)
            lines.append(
                f"{name:28} {source.kind:13} {source.samples:13,} {source.images:13,} {source.text_tokens:15,} "
                f"{source.bytes / 1e9:9.2f} {share:9.2%}"
            )
        for name, source in self.sources.items():
            lines += ["", f"{name}: {source.shards:,} shards" + (f", chat template {source.chat_template}" if source.chat_template else "")]
            lines.append(f"  text tokens of a sample  {_percentiles_line(source.text_tokens_of_a_sample)}")
            lines.append(f"  images of a sample       {'  '.join(f'{k}: {v:,}' for k, v in source.images_of_a_sample.items())}")
            if source.image_width:
                lines.append(f"  image width, pixels      {_percentiles_line(source.image_width)}")
                lines.append(f"  image height, pixels     {_percentiles_line(source.image_height)}")
            for what, counts in (
                ("rejected", source.rejected),
                ("dropped from samples", source.dropped),
                ("files skipped", source.skipped),
            ):
                if counts:
                    lines.append(f"  {what:24} {', '.join(f'{reason}: {count:,}' for reason, count in counts.items())}")
        return "\n".join(lines)


def _percentiles_line(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:,.0f}" for name, value in values.items())


def report(path: Path) -> DataReport:
    """Compute the statistics of every source under a path. Raises ValueError if a source has no index."""
    sources = {}
    for source in find_sources(path, ignore=("*",)):
        index = open_index(source, check=False)
        meta = json.loads((source / "index" / META).read_text())
        sources[f"{source.parent.name}/{source.name}"] = _source_report(index, meta)
    return DataReport(str(path), sources, token_edges=[float(edge) for edge in _BINS])


def _source_report(index: SourceIndex, meta: dict[str, Any]) -> SourceReport:
    histogram, images = np.zeros(len(_BINS) - 1, dtype=np.int64), np.zeros(11, dtype=np.int64)
    tokens = num_images = 0
    least, most = np.iinfo(np.int64).max, 0
    for begin in range(0, len(index), _BLOCK):
        sizes = index.sizes(slice(begin, min(begin + _BLOCK, len(index))))
        tokens += int(sizes.text_tokens.sum())
        num_images += int(sizes.num_images.sum())
        histogram += np.histogram(sizes.text_tokens.clip(1, _BINS[-1]), bins=_BINS)[0]
        images += np.bincount(sizes.num_images.clip(0, 10), minlength=11)
        least, most = min(least, int(sizes.text_tokens.min())), max(most, int(sizes.text_tokens.max()))
    widths, heights = _image_sizes(index)
    return SourceReport(
        kind=index.kind,
        samples=len(index),
        images=num_images,
        text_tokens=tokens,
        bytes=index.shards.bytes if isinstance(index.shards, ShardTable) else 0,
        shards=len(index.shards),
        chat_template=index.chat_template,
        rejected=dict(meta["rejected"]),
        dropped=dict(meta.get("dropped", {})),
        skipped=dict(meta.get("skipped", {})),
        text_tokens_of_a_sample=_percentiles_of(histogram, least, most),
        images_of_a_sample={f"{n}{'+' if n == 10 else ''}": int(count) for n, count in enumerate(images) if count},
        image_width=_percentiles(widths),
        image_height=_percentiles(heights),
        token_histogram=[int(count) for count in histogram],
    )


def _image_sizes(index: SourceIndex) -> tuple[np.ndarray, np.ndarray]:
    """Return the widths and heights of images in evenly spread blocks of samples."""
    block = max(1, min(len(index), _IMAGE_SAMPLES) // _IMAGE_BLOCKS)
    starts = np.unique(np.linspace(0, max(0, len(index) - block), _IMAGE_BLOCKS if len(index) > _IMAGE_BLOCKS else 1).astype(int))
    if len(index) <= _IMAGE_SAMPLES:
        starts, block = np.array([0]), len(index)
    found = [index.image_sizes(slice(int(start), int(start) + block)) for start in starts]
    return np.concatenate([sizes.widths for sizes in found]), np.concatenate([sizes.heights for sizes in found])


def _percentiles(values: np.ndarray) -> dict[str, float]:
    return {f"{share}%": float(np.percentile(values, share)) for share in _SHARES} if len(values) else {}


def _percentiles_of(histogram: np.ndarray, least: int, most: int) -> dict[str, float]:
    """Return percentiles of a histogram over `_BINS`: each is the upper edge of its bin, so at most 12% too large."""
    total = np.cumsum(histogram)
    if not len(total) or not total[-1]:
        return {}
    places = {f"{share}%": int(np.searchsorted(total, share / 100 * total[-1])) for share in _SHARES}
    found = {name: float(np.floor(_BINS[min(place + 1, len(_BINS) - 1)])) for name, place in places.items()}
    return {**{name: min(max(value, least), most) for name, value in found.items()}, "0%": least, "100%": most}


def check_picture(out: Path) -> None:
    """Raise ValueError if a picture cannot be written to a file because of its ending, or because it is a folder."""
    from matplotlib.backend_bases import FigureCanvasBase

    if out.is_dir():
        raise ValueError(f"--picture {out} is a folder: name a file in it, such as {out / 'report.png'}")
    if out.suffix and out.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--picture {out} ends in {out.suffix}: use .png, .pdf or .svg")


def draw_report(found: DataReport, out: Path) -> None:
    """Draw the report: text tokens per sample, images per sample, and rejected samples by reason."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sources = dict(reversed(found.sources.items()))  # bars are drawn from the bottom up
    height = max(4.5, 1.2 + 0.35 * len(sources))
    figure, (tokens, images, losses) = plt.subplots(1, 3, figsize=(18, height), layout="constrained", width_ratios=[1.2, 1, 1])
    edges = np.array(found.token_edges)
    for name, source in found.sources.items():
        counts = np.array(source.token_histogram)
        line = "-" if name.startswith("train") else "--"
        used = slice(max(0, int(np.argmax(counts > 0)) - 1), len(counts) - int(np.argmax(counts[::-1] > 0)) + 1)
        tokens.plot(edges[1:][used], (np.cumsum(counts) / max(1, counts.sum()))[used], line, drawstyle="steps-post", label=name)
    tokens.set(xscale="log", xlabel="text tokens", ylabel="share of samples with at most this many", ylim=(0, 1.02))
    tokens.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    numbers = [str(n) for n in range(10)] + ["10+"]
    by_number = {n: [100 * source.images_of_a_sample.get(n, 0) / max(1, source.samples) for source in sources.values()] for n in numbers}
    _stack(images, list(sources), by_number, colours=matplotlib.colormaps["viridis"](np.linspace(0.95, 0.1, len(numbers))))
    images.set(xlabel="samples by their number of images, %", xlim=(0, 100))
    reasons = sorted({reason for source in sources.values() for reason in source.rejected})
    seen = [max(1, source.samples + sum(source.rejected.values())) for source in sources.values()]
    by_reason = {r: [100 * s.rejected.get(r, 0) / n for s, n in zip(sources.values(), seen, strict=True)] for r in reasons}
    _stack(losses, list(sources), by_reason, colours=matplotlib.colormaps["tab20"](np.arange(len(reasons)) % 20))
    if not reasons:
        losses.barh(list(sources), [0.0] * len(sources))
        losses.text(0.5, 0.5, "none", transform=losses.transAxes, ha="center", va="center", fontsize=14, color="grey")
        losses.set_xlim(0, 1)
    losses.set(xlabel="samples rejected, % by reason")
    losses.tick_params(labelleft=False)
    figure.suptitle(found.path)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _stack(axes: Any, names: list[str], parts: dict[str, list[float]], *, colours: Any) -> None:
    """Draw a stacked bar for each name, without parts that are zero in all bars."""
    left = np.zeros(len(names))
    for (part, shares), colour in zip(parts.items(), colours, strict=True):
        if any(shares):
            axes.barh(names, shares, left=left, color=colour, label=part)
            left += np.array(shares)
    if any(left):
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

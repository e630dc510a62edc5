"""How long the plan of a global batch takes, beside the step that it is for, and how full its sequences are.

    .venv/bin/python benchmarks/plan_time.py

The batch is MM1's: 512 sequences of 4096 tokens, at most 16 images of 144 tokens, 45% interleaved, 45% pairs, 10% text, from an
index of made-up lengths. The step is MM1-30B's on 512 H100s at the throughput that `STEP_SECONDS` stands for. The baseline packs
the same windows first fit, in the order of the samples. `possible` is how full sequences could be at most: captions use up a
sequence's images before its tokens. The plan is made in a background thread while the step before runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mm.data.image_input import ImageInput
from megatron_mm.data.plan import packing
from megatron_mm.data.plan.filling import Limits
from megatron_mm.data.plan.plan import Plan
from megatron_mm.data.sources.index import ITEM, SAMPLE, SourceIndex
from megatron_mm.data.sources.source import Kind

STEP_SECONDS = 1.66
SEQUENCES, LENGTH, IMAGES = 512, 4096, 16
IMAGE = ImageInput(size=378, fill=(0, 0, 0), tokens=144)


def made_up_index(name: str, kind: Kind, *, samples: int, rng: np.random.Generator) -> SourceIndex:
    """An index with the lengths of its kind: captions of 30 to 60 tokens, documents with 1 to 8 images, texts of 100 to 8000."""
    images = {"pairs": np.ones(samples, int), "interleaved": rng.integers(1, 9, samples), "text": np.zeros(samples, int)}[kind]
    long = rng.lognormal(6, 0.9, samples).clip(100 if kind == "text" else 10, 8000).astype(int)
    tokens = rng.integers(30, 61, samples) if kind == "pairs" else long
    rows = np.zeros(samples, SAMPLE)
    rows["text_tokens"], rows["num_images"], rows["num_items"] = tokens, images, images + 1
    rows["first_item"] = np.concatenate([[0], np.cumsum(images + 1)[:-1]])
    items = np.zeros(int((images + 1).sum()), ITEM)
    items["is_image"] = 1
    items["is_image"][rows["first_item"]] = 0
    items["tokens"][rows["first_item"]] = tokens
    return SourceIndex(
        name=name, kind=kind, root=Path(name), shards=("0.tar",), tokenizer="", rejected={}, sample_rows=rows, item_rows=items
    )


def first_fit(sizes: np.ndarray, images: np.ndarray, limits: Limits, *, rng: np.random.Generator) -> np.ndarray:
    """The baseline: each piece into the first sequence that has room."""
    room = np.full(len(sizes), limits.sequence_length)
    slots = np.full(len(sizes), limits.max_images)
    bins, used = np.empty(len(sizes), dtype=np.int64), 1
    for piece, (size, wanted) in enumerate(zip(sizes.tolist(), images.tolist(), strict=True)):
        fits = (room[: used + 1] >= size) & (slots[: used + 1] >= wanted)
        bins[piece] = chosen = int(fits.argmax())
        room[chosen] -= size
        slots[chosen] -= wanted
        used = max(used, min(chosen + 1, len(sizes) - 1))
    return np.unique(bins, return_inverse=True)[1]


@dataclass(frozen=True)
class Measured:
    """Of the plans of some global batches."""

    mean: float
    """Seconds."""
    worst: float
    """Seconds."""
    fill: float
    """Part of the sequences that is not padding."""
    possible: float
    """What `fill` would be if of each source as few sequences were used as its tokens, or its images, need."""


def measure(batches: int) -> Measured:
    """Plan so many global batches, one after another."""
    rng = np.random.default_rng(0)
    kinds: tuple[Kind, ...] = ("interleaved", "pairs", "text")
    plan = Plan(
        [made_up_index(kind, kind, samples=200_000, rng=rng) for kind in kinds],
        weights=[0.45, 0.45, 0.10],
        limits=Limits(LENGTH, IMAGES),
        image=IMAGE,
        packing_window=4096,
        seed=0,
        global_batch_size=SEQUENCES,
        micro_batch_size=1,
    )
    state, seconds = plan.initial_state(), []
    tokens, images = np.zeros(3), np.zeros(3)
    for _ in range(batches):
        began = time.perf_counter()
        batch = plan.batch(state)
        for rank in range(32):
            batch.micro_batches_of(rank, 32)
        seconds.append(time.perf_counter() - began)
        for sequence in batch.sequences:
            tokens[sequence.source] += sequence.num_tokens
            images[sequence.source] += sequence.num_images
        state = batch.next_state
    filled = tokens.sum() / LENGTH
    needed = np.maximum(tokens / LENGTH, images / IMAGES).sum()
    return Measured(statistics.mean(seconds), max(seconds), fill=filled / (batches * SEQUENCES), possible=filled / needed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="global batches (default: %(default)s)")
    arguments = parser.parse_args()
    ours = measure(arguments.batches)
    packing.fill_sequences = first_fit
    baseline = measure(arguments.batches)
    print(f"{'':24} {'mean ms':>9} {'worst ms':>9} {'of a ' + str(STEP_SECONDS) + ' s step':>18} {'full':>8} {'possible':>9}")
    for name, found in (("this plan", ours), ("first fit (baseline)", baseline)):
        print(
            f"{name:24} {1e3 * found.mean:9.1f} {1e3 * found.worst:9.1f} {100 * found.mean / STEP_SECONDS:17.2f}% "
            f"{100 * found.fill:7.2f}% {100 * found.possible:8.2f}%"
        )
    print(f"time, this plan / first fit: {ours.mean / baseline.mean:.2f}")


if __name__ == "__main__":
    main()

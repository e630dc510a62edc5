"""How long the plan of a global batch takes, beside the step that it is for, and how full its sequences are.

    .venv/bin/python benchmarks/plan_time.py

The batch is MM1's: 512 sequences of 4096 tokens, at most 16 images of 144 tokens, 45% interleaved, 45% pairs, 10% text, from an
index of made-up lengths. The step is MM1-30B's on 512 H100s at the throughput that `STEP_SECONDS` stands for. The baseline packs
the same windows first fit, in the order of the samples. The plan is made in a background thread while the step before runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from megatron_mm.data import packing
from megatron_mm.data.filling import Limits
from megatron_mm.data.index import ITEM, SAMPLE, Kind, SourceIndex
from megatron_mm.data.plan import Plan

STEP_SECONDS = 1.66
SEQUENCES, LENGTH, IMAGES, IMAGE_TOKENS = 512, 4096, 16, 144


def made_up_index(name: str, kind: Kind, *, samples: int, rng: np.random.Generator) -> SourceIndex:
    """An index with the lengths of its kind: captions of 8 to 60 tokens, documents and web texts log-normal."""
    images = {"pairs": np.ones(samples, int), "interleaved": rng.integers(1, 9, samples), "text": np.zeros(samples, int)}[kind]
    tokens = rng.integers(8, 60, samples) if kind == "pairs" else rng.lognormal(6, 0.9, samples).astype(int) + 8
    rows = np.zeros(samples, SAMPLE)
    rows["text_tokens"], rows["num_images"], rows["num_items"] = tokens, images, images + 1
    rows["first_item"] = np.concatenate([[0], np.cumsum(images + 1)[:-1]])
    items = np.zeros(int((images + 1).sum()), ITEM)
    items["is_image"] = 1
    items["is_image"][rows["first_item"]] = 0
    items["tokens"][rows["first_item"]] = tokens
    return SourceIndex(name=name, kind=kind, root=Path(name), shards=("0.tar",), tokenizer="", rejected={}, samples=rows, items=items)


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


def measure(batches: int) -> tuple[float, float, float]:
    """Mean and worst seconds of a global batch's plan, and how full the batches are."""
    rng = np.random.default_rng(0)
    kinds: tuple[Kind, ...] = ("interleaved", "pairs", "text")
    plan = Plan(
        [made_up_index(kind, kind, samples=200_000, rng=rng) for kind in kinds],
        weights=[0.45, 0.45, 0.10],
        sequence_length=LENGTH,
        max_images=IMAGES,
        packing_window=4096,
        tokens_per_image=IMAGE_TOKENS,
        seed=0,
        global_batch_size=SEQUENCES,
        micro_batch_size=1,
    )
    state, seconds, fills = plan.initial_state(), [], []
    for _ in range(batches):
        began = time.perf_counter()
        batch = plan.batch(state)
        for rank in range(32):
            batch.micro_batches_of(rank, 32)
        seconds.append(time.perf_counter() - began)
        fills.append(batch.fill)
        state = batch.next_state
    return statistics.mean(seconds), max(seconds), statistics.mean(fills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="global batches (default: %(default)s)")
    arguments = parser.parse_args()
    ours = measure(arguments.batches)
    packing.fill_sequences = first_fit
    baseline = measure(arguments.batches)
    print(f"{'':24} {'mean ms':>9} {'worst ms':>9} {'of a ' + str(STEP_SECONDS) + ' s step':>18} {'full':>8}")
    for name, (mean, worst, fill) in (("this plan", ours), ("first fit (baseline)", baseline)):
        print(f"{name:24} {1e3 * mean:9.1f} {1e3 * worst:9.1f} {100 * mean / STEP_SECONDS:17.2f}% {100 * fill:7.2f}%")
    print(f"time, this plan / first fit: {ours[0] / baseline[0]:.2f}")


if __name__ == "__main__":
    main()

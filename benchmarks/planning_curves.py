"""Predicted step times of MM1 against GPUs, images and sequence length: tables for docs/planning.md.

    python benchmarks/planning_curves.py [--moe]

Everything here is predicted, with the error band that `megatron-mm plan` states; the layout of each row is the one that the search finds
for it, with a host that keeps up. The baseline of each table is its first row: the ratio beside each row is to that one's speed per GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning import search as searching
from megatron_mm.planning.hardware import GPUS, STACKS
from megatron_mm.planning.report import mfu
from megatron_mm.planning.search import Found, search
from megatron_mm.planning.workload import Workloads

H100 = GPUS["h100-sxm"]


def best(experiment: Experiment, gpus: int, *, images: int | None = None) -> Found | None:
    """The best layout, or None where none fits."""
    try:
        return search(experiment, H100, gpus, keep=1, loads=Workloads(experiment, images=images), software=STACKS["megatron"]).best[0]
    except ValueError:
        return None


def line(label: str, found: Found | None, baseline: Found | None) -> None:
    """A row of a table."""
    if found is None:
        print(f"| {label} | does not fit | | | | |", flush=True)
        return
    gpus, work = found.planned.job.layout.gpus, found.planned.work.whole
    speed = work.num_tokens / found.seconds / gpus
    first = baseline or found
    ratio = speed / (first.planned.work.whole.num_tokens / first.seconds / first.planned.job.layout.gpus)
    used = 100 * mfu(found.planned, found.prediction)
    cells = (label, f"{found.seconds:.3f}", f"{used:.1f}%", f"{speed:,.0f}", f"{ratio:.2f}", f"{found.planned.job.layout}")
    print("| " + " | ".join(cells) + " |", flush=True)


def table(title: str, rows: list[tuple[str, Experiment, int, int | None]]) -> None:
    """A table of (label, experiment, GPUs, images of a sequence)."""
    print(f"\n{title}\n\n| | step, s | of bf16 peak | tokens/s a GPU | ratio | layout |\n|---|---|---|---|---|---|", flush=True)
    baseline = None
    for label, experiment, gpus, images in rows:
        found = best(experiment, gpus, images=images)
        baseline = baseline or found
        line(label, found, baseline)


def with_length(experiment: Experiment, length: int) -> Experiment:
    """The same tokens in longer sequences, with as many images a token."""
    factor = length // experiment.data.sequence_length
    data = replace(experiment.data, sequence_length=length, max_images_per_sequence=experiment.data.max_images_per_sequence * factor)
    return replace(experiment, data=data, train=replace(experiment.train, global_batch_size=experiment.train.global_batch_size // factor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moe", action="store_true", help="the sparse model's table, which takes longer")
    given = parser.parse_args()
    searching.MICRO_BATCHES = (1, 2)  # the others are never the best here
    dense = get_recipe("mm1_30b")
    if given.moe:
        sparse = get_recipe("mm1_3b_moe")
        table("3B-MoE (64B), batch 512", [(f"{gpus} GPUs", sparse, gpus, None) for gpus in (64, 128, 256, 512, 1024)])
        return
    table("30B, batch 512", [(f"{gpus} GPUs", dense, gpus, None) for gpus in (64, 128, 256, 512, 1024, 2048, 4096)])
    table("30B on 512 GPUs, images of every sequence", [(f"{images}", dense, 512, images) for images in (0, 4, 8, 16)])
    table(
        "30B on 512 GPUs, sequence length", [(f"{length}", with_length(dense, length), 512, None) for length in (4096, 8192, 16384, 32768)]
    )


if __name__ == "__main__":
    main()

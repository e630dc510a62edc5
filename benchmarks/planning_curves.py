"""Predicted step times of MM1 against GPUs, images and sequence length: tables for docs/planning.md.

    python benchmarks/planning_curves.py [--search] [--moe]

All numbers are predictions, with the error band that `megatron-mm plan` states, and assume the host of published runs. The layout of each
row is the fastest of a few (`FEW`) that fits in memory, or with `--search` the one found by the search, which takes an hour on two cores.
The ratio in each row is its speed per GPU over that of the table's first row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning import search as searching
from megatron_mm.planning.hardware import GPUS, OURS
from megatron_mm.planning.memory import fits
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.report import mfu
from megatron_mm.planning.search import Found, search
from megatron_mm.planning.step import StepModel
from megatron_mm.planning.workload import Workloads

H100 = GPUS["h100-sxm"]
FEW = ((4, 2, 2), (4, 2, 1), (4, 1, 1), (2, 2, 2))
"""Tensor, pipeline and virtual degrees of the dense model."""
FEW_SPARSE = ((1, 1, 1), (2, 1, 1))
"""Tensor, pipeline and virtual degrees of the sparse model, which keeps its recipe's expert parallelism."""


def best_of_few(experiment: Experiment, gpus: int, *, images: int | None = None) -> Found | None:
    """Return the fastest of a few layouts that fit, with full recompute only if none fits without; None if none fits at all."""
    for recompute in (experiment.parallel.recompute, "full"):
        found = [
            one
            for degrees in (FEW if experiment.model.decoder.moe is None else FEW_SPARSE)
            for stage_layers in {experiment.parallel.stage_layers, None}
            for one in _with(
                replace(experiment.parallel, recompute=recompute, stage_layers=stage_layers), degrees, experiment, gpus, images
            )
            if fits(one.prediction.peak_bytes, H100)
        ]
        if found:
            return min(found, key=lambda one: one.seconds)
    return None


def _with(
    parallel: ParallelConfig, degrees: tuple[int, int, int], experiment: Experiment, gpus: int, images: int | None
) -> Iterator[Found]:
    """Yield the layout with these degrees and one or two sequences per micro-batch, if the batch and the stages allow it."""
    tensor, pipeline, virtual = degrees
    if parallel.stage_layers is not None and len(parallel.stage_layers) != pipeline * virtual:
        return
    parallel = replace(parallel, tensor=tensor, pipeline=pipeline, virtual=virtual)
    data, batch = gpus // (tensor * pipeline), experiment.train.global_batch_size
    for size in (2, 1):
        left = batch % (size * data) or (
            virtual > 1 and batch // (size * data) % pipeline
        )  # interleaving needs multiples of the pipeline size
        if not left:
            one = replace(experiment, parallel=parallel, train=replace(experiment.train, micro_batch_size=size))
            work = Workloads(one, images=images).of(data_size=data)
            planned = plan_recipe(one, H100, gpus, work=work, software=OURS)
            yield Found(planned, StepModel(planned.job).predict())


def best(experiment: Experiment, gpus: int, *, images: int | None = None) -> Found | None:
    """Return the best layout, or None if none fits."""
    try:
        return search(experiment, H100, gpus, keep=1, loads=Workloads(experiment, images=images)).best[0]
    except ValueError:
        return None


def line(label: str, found: Found | None, baseline: Found | None) -> None:
    """Print a row of a table."""
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


Choose = Callable[..., Found | None]


def table(title: str, rows: list[tuple[str, Experiment, int, int | None]], *, choose: Choose) -> None:
    """Print a table; `rows` are (label, experiment, GPUs, images per sequence)."""
    print(f"\n{title}\n\n| | step, s | of bf16 peak | tokens/s a GPU | ratio | layout |\n|---|---|---|---|---|---|", flush=True)
    baseline = None
    for label, experiment, gpus, images in rows:
        found = choose(experiment, gpus, images=images)
        baseline = baseline or found
        line(label, found, baseline)


def with_length(experiment: Experiment, length: int) -> Experiment:
    """Return the experiment with as many tokens per batch in longer sequences, with as many images per token."""
    factor = length // experiment.data.sequence_length
    data = replace(experiment.data, sequence_length=length, max_images_per_sequence=experiment.data.max_images_per_sequence * factor)
    return replace(experiment, data=data, train=replace(experiment.train, global_batch_size=experiment.train.global_batch_size // factor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--search", action="store_true", help="search the layout of each row")
    parser.add_argument("--moe", action="store_true", help="the sparse model's table alone")
    given = parser.parse_args()
    choose: Choose = best if given.search else best_of_few
    searching.MICRO_BATCHES = (1, 2)  # the others are never the best here
    dense, sparse = get_recipe("mm1_30b"), get_recipe("mm1_3b_moe")
    if not given.moe:
        table("30B, batch 512", [(f"{gpus} GPUs", dense, gpus, None) for gpus in (64, 256, 512, 1024, 2048, 4096)], choose=choose)
        table(
            "30B on 512 GPUs, images of a sequence, at most", [(f"{images}", dense, 512, images) for images in (0, 4, 8, 16)], choose=choose
        )
        lengths = [(f"{length}", with_length(dense, length), 512, None) for length in (4096, 8192, 16384, 32768)]
        table("30B on 512 GPUs, sequence length", lengths, choose=choose)
    table("3B-MoE (64B), batch 512", [(f"{gpus} GPUs", sparse, gpus, None) for gpus in (64, 128, 256, 512, 1024)], choose=choose)


if __name__ == "__main__":
    main()

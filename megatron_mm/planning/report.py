"""The output of `megatron-mm plan` for a recipe: whether it fits, the time of a step and its breakdown, and the cost of the run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.planning.hardware import GIGA, Gpu
from megatron_mm.planning.memory import fits
from megatron_mm.planning.recipe_job import Planned
from megatron_mm.planning.saves_and_start import describe_saves_and_start, save_cost
from megatron_mm.planning.search import SearchResult, options
from megatron_mm.planning.step import Prediction

ERROR_BAND = {"dense": 0.12, "moe": 0.20}
"""Relative error that nine of ten published step times do not exceed (docs/planning.md); for MoE including the experts' balance."""


def kind_of(planned: Planned) -> str:
    """Return "dense" or "moe"."""
    return "moe" if planned.experiment.model.decoder.moe is not None else "dense"


def mfu(planned: Planned, prediction: Prediction) -> float:
    """Model FLOPs utilisation, on real tokens, relative to the bf16 peak."""
    gpu = planned.job.gpu
    return planned.flops / planned.job.layout.gpus / prediction.seconds / (gpu.bf16_tflops * 1e12)


def describe(planned: Planned, prediction: Prediction, *, price: float | None = None) -> Iterator[str]:
    """Lines for the terminal.

    Args:
        price: price of a GPU-hour, in any currency.
    """
    experiment, job, work = planned.experiment, planned.job, planned.work.whole
    train, gpu, gpus = experiment.train, job.gpu, job.layout.gpus
    band = ERROR_BAND[kind_of(planned)]
    sequences, seconds = train.global_batch_size, prediction.seconds
    fill = work.num_tokens / (sequences * experiment.data.sequence_length)
    drawn = "lengths drawn: no data at data.path" if planned.work.drawn else "the data's own plan"
    yield f"{experiment.recipe} on {gpus} {gpu.name}: {job.layout}, {len(job.micro_batches)} micro-batches of {train.micro_batch_size}"
    yield (
        f"work     {sequences} sequences, {work.num_tokens:,} tokens ({100 * fill:.1f}% full), {work.num_images:,} images ({drawn}); "
        f"{planned.flops / 1e15:.1f} PFLOP"
    )
    yield from _memory(prediction, gpu)
    yield (
        f"step     {seconds:.3f} s, {seconds * (1 - band):.2f} to {seconds * (1 + band):.2f} with the error band of {100 * band:.0f}%; "
        f"{100 * mfu(planned, prediction):.1f}% of bf16 peak on real tokens, {work.num_tokens / seconds:,.0f} tokens/s"
    )
    for name, value in sorted(prediction.parts.items(), key=lambda part: -part[1]):
        if value > 0.0005 * seconds:
            yield f"         {value:8.3f} s  {100 * value / seconds:5.1f}%  {name}"
    yield f"limit    {prediction.limit}: the largest part of the time besides matrix products"
    yield from _run(planned, prediction, price=price)


def _memory(prediction: Prediction, gpu: Gpu) -> Iterator[str]:
    verdict = "yes" if fits(prediction.peak_bytes, gpu) else "NO"
    ranks = " ".join(f"{use.total / GIGA:.1f}" for use in prediction.memory)
    yield f"fits     {verdict}: {prediction.peak_bytes / GIGA:.1f} of {gpu.memory_gb:.0f} GB; by pipeline rank {ranks}"
    worst = max(prediction.memory, key=lambda use: use.total)
    parts = {
        "weights": worst.weights,
        "gradients": worst.gradients,
        "optimizer": worst.optimizer,
        "activations": worst.activations,
        "workspaces": worst.transient + worst.total - worst.allocated,
    }
    yield "         fullest rank: " + ", ".join(f"{name} {size / GIGA:.1f}" for name, size in parts.items()) + " GB"


def _run(planned: Planned, prediction: Prediction, *, price: float | None) -> Iterator[str]:
    experiment, gpus = planned.experiment, planned.job.layout.gpus
    steps, band = experiment.train.steps, ERROR_BAND[kind_of(planned)]
    stall = save_cost(planned.job).seconds
    stalls = steps // experiment.checkpoint.interval * stall
    hours = (steps * prediction.seconds + stalls) / 3600
    line = (
        f"run      {steps:,} steps: {hours / 24:.1f} days ({hours * (1 - band) / 24:.1f} to {hours * (1 + band) / 24:.1f}), "
        f"{hours * gpus:,.0f} GPU-hours"
    )
    yield line + (f", {hours * gpus * price:,.0f} at {price:g} a GPU-hour" if price is not None else "")
    share = 100 * stalls / (3600 * hours)
    yield f"         saves: {stall:.1f} s of waiting each, {share:.2f}% of the run; evaluation is not counted"
    yield from describe_saves_and_start(planned.job)


def table(result: SearchResult) -> Iterator[str]:
    """Lines with the best layouts of a search, and the options of the first."""
    yield (
        f"{result.considered} layouts, {result.simulated} simulated (the others cannot be better), {result.too_large} of these too large; "
        f"the best {len(result.best)}:"
    )
    yield "step s    MFU  memory GB  recompute    batch  layout                      besides products      layers of stages"
    for found in result.best:
        experiment, prediction = found.planned.experiment, found.prediction
        parallel = experiment.parallel
        recompute = f"{parallel.recompute}/{parallel.recompute_encoder or parallel.recompute}"
        layers = " ".join(map(str, parallel.stage_layers)) if parallel.stage_layers else "even"
        used = prediction.peak_bytes / GIGA
        yield (
            f"{prediction.seconds:6.3f} {100 * mfu(found.planned, prediction):5.1f}%  {used:9.1f}  {recompute:11s}  "
            f"{experiment.train.micro_batch_size:5d}  {found.planned.job.layout!s:26s}  {prediction.limit:20s}  {layers}"
        )
    yield "recompute: of the decoder / of the vision tower; batch: sequences per micro-batch; besides products: the largest part of the"
    yield "time besides matrix products; layers of stages: decoder layers of each stage in order, if uneven"
    best = result.best[0].planned.experiment
    yield f"\noptions of the first: {options(best.parallel, micro_batch_size=best.train.micro_batch_size)}"

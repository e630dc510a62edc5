"""The output of `megatron-mm plan` for a recipe: whether it fits, the time of a step and its breakdown, and the cost of the run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_mm.planning.hardware import GIGA, Gpu
from megatron_mm.planning.memory import fits
from megatron_mm.planning.recipe_job import Planned
from megatron_mm.planning.saves_and_start import describe_saves_and_start, save_cost
from megatron_mm.planning.search import SearchResult, options
from megatron_mm.planning.step import Prediction
from megatron_mm.reporting.units import scaled, size, spans

ERROR_BAND = {"dense": 0.12, "moe": 0.20}
"""Relative error that nine of ten published step times do not exceed (docs/planning.md); for MoE including the experts' balance."""


_LIMITS = {
    "element-wise kernels": "element-wise kernels (norms, activations, sums: they wait for the GPU's memory)",
    "messages of layers": "messages inside layers (tensor, sequence and expert parallelism)",
    "host": "pauses of the GPU (the CPU launches kernels more slowly than they run)",
    "pipeline bubble": "pauses of pipeline ranks (they wait for each other, at the beginning and the end of a step most of all)",
    "gradient reduction": "gradient reductions that do not overlap with the backward pass",
    "optimizer": "the optimizer's updates",
    "parameter gather": "gathers of updated parameters from other data-parallel ranks",
    "attention": "attention kernels",
    "jitter": "waits for the slowest process of each step",
}
"""What the parts of a step are, for the line that names the largest of them."""


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
    drawn = "lengths drawn at random, not those of a data set" if planned.work.drawn else "the data's own plan"
    yield f"{experiment.recipe} on {gpus} {gpu.name}: {job.layout}, {len(job.micro_batches)} micro-batches of {train.micro_batch_size}"
    yield (
        f"work     {sequences} sequences, {work.num_tokens:,} tokens ({100 * fill:.1f}% full), {work.num_images:,} images ({drawn}); "
        f"{scaled(planned.flops, 'FLOP')}"
    )
    yield from _memory(prediction, gpu)
    yield (
        f"step     {seconds:.3f} s, {seconds * (1 - band):.3g} to {seconds * (1 + band):.3g} with the error band of {100 * band:.0f}%; "
        f"{100 * mfu(planned, prediction):.1f}% of bf16 peak on real tokens, {work.num_tokens / seconds:,.0f} tokens/s"
    )
    for name, value in sorted(prediction.parts.items(), key=lambda part: -part[1]):
        if value > 0.0005 * seconds:
            yield f"         {f'{value:.3f} s' if seconds >= 1 else f'{1e3 * value:.2f} ms':>11}  {100 * value / seconds:5.1f}%  {name}"
    yield f"limit    besides matrix products, {_LIMITS.get(prediction.limit, prediction.limit)} take the most time"
    if fits(prediction.peak_bytes, gpu):
        yield from _run(planned, prediction, price=price)
    else:
        yield "run      not possible in this layout: add --search to find one that fits, or use more GPUs or GPUs with more memory"


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
    yield "         fullest rank: " + ", ".join(f"{name} {size(part)}" for name, part in parts.items())


def _run(planned: Planned, prediction: Prediction, *, price: float | None) -> Iterator[str]:
    experiment, gpus = planned.experiment, planned.job.layout.gpus
    steps, band = experiment.train.steps, ERROR_BAND[kind_of(planned)]
    stall = save_cost(planned.job).seconds
    stalls = steps // experiment.checkpoint.interval * stall
    hours = (steps * prediction.seconds + stalls) / 3600
    (whole, least, most), unit = spans(*(3600 * hours * factor for factor in (1, 1 - band, 1 + band)))
    line = f"run      {steps:,} steps: {whole} {unit} ({least} to {most}), {_few(hours * gpus)} GPU-hours"
    yield line + (f", {_few(hours * gpus * price)} at {price:g} a GPU-hour" if price is not None else "")
    share = 100 * stalls / (3600 * hours)
    yield f"         saves: {stall:.2g} s of waiting each, {share:.2f}% of the run; evaluation is not counted"
    yield from describe_saves_and_start(planned.job)


def _few(value: float) -> str:
    """Whole numbers, but two digits of small ones."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def table(result: SearchResult) -> Iterator[str]:
    """Lines with the best layouts of a search, and the options of the first."""
    yield (
        f"{result.considered} layouts, {result.simulated} simulated, {result.too_large} too large (the others cannot be better); "
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

"""Training steps on one device: time, throughput and memory by layer backend, precision and recompute. Used by `gpu_bench.py`.

Every case trains, under the recipe's freeze policy, on the same full sequences (for the MM1 models 4096 tokens with 14 images, for InfiMM
384 with 12, for Mono-InternVL 4096 with 8 tiles). They are in memory, so only the model is measured.
"""

from __future__ import annotations

import cProfile
import gc
import gzip
import pstats
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from benchmarks.gpu_cases import Case
from benchmarks.gpu_memory import memory_rows, optimizer_state
from benchmarks.parts import Row
from megatron_mm.config import Experiment, KernelConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.registry import family_of
from megatron_mm.flops import StepWork, mfu, peak_tflops
from megatron_mm.models.context import Kernels
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.run.data import image_input
from megatron_mm.run.start import check_shapes
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.router_graph import graph_routers
from megatron_mm.training.step import TrainingStep

MICRO_BATCHES = 4
"""Micro-batches of a step."""
WARM_UP = 3
"""Steps before the measured ones."""


def on_one_process(base: Experiment, case: Case) -> Experiment:
    """Return the experiment for one process, with a few micro-batches per step."""
    kernels = KernelConfig()
    if case.kernels != "all":
        kernels = KernelConfig(**{field.name: field.name == case.kernels for field in fields(Kernels)})
    return replace(
        base,
        kernels=replace(kernels, router_graph=case.router_graph),
        parallel=replace(base.parallel, tensor=1, pipeline=1, virtual=1, expert=1, stage_layers=None, recompute=case.recompute),  # type: ignore[arg-type]
        train=replace(
            base.train,
            global_batch_size=MICRO_BATCHES * case.micro_batch_size,
            micro_batch_size=case.micro_batch_size,
            precision=case.precision,  # type: ignore[arg-type]
            layers=case.layers,  # type: ignore[arg-type]
        ),
    )


def full_batch(settings: Experiment) -> PackedBatch:
    """Return sequences of one document each, with as many images as fit and are allowed, between equal stretches of text."""
    image, length, sequences = image_input(settings), settings.data.sequence_length, settings.train.micro_batch_size
    of_sequence = min(settings.data.max_images_per_sequence, length // (2 * image.tokens))
    begins = torch.arange(sequences).repeat_interleave(of_sequence) * length
    starts = begins + (torch.arange(of_sequence) * (length // of_sequence) + 1 + len(image.before)).repeat(sequences)
    total, images = sequences * length, len(starts)
    ids = torch.randint(5, settings.model.decoder.vocab_size, (total,), generator=torch.Generator().manual_seed(0))
    is_image = torch.zeros(total, dtype=torch.bool)
    is_image[(starts[:, None] + torch.arange(image.tokens)).flatten()] = True
    mask = (~is_image.roll(-1)).float()
    mask[length - 1 :: length] = 0
    return PackedBatch(
        token_ids=ids,
        labels=ids.roll(-1),
        loss_mask=mask,
        is_token=torch.ones(total, dtype=torch.bool),
        position_ids=torch.arange(length).repeat(sequences),
        source_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=(torch.arange(sequences + 1) * length).int(),
        max_seqlen=length,
        image_starts=starts,
        image_owners=torch.zeros(images, dtype=torch.int64),
        image_documents=torch.stack([begins, begins + length], dim=1),
        pixels=torch.randint(0, 256, (images, 3, image.size, image.size), dtype=torch.uint8),
    )


class Bench:
    """A model on this process and a batch to train it on."""

    def __init__(self, base: Experiment, case: Case) -> None:
        self.settings, self.case = on_one_process(base, case), case
        check_shapes(self.settings, 1)
        self.topology: Topology = topologies.initialize(self.settings.parallel, seed=1)
        self.on_gpu = self.topology.device.type == "cuda"
        self.model: list[DistributedDataParallel] = build_model(self.settings, self.topology)
        for module in self.model[0].modules():
            if case.fp8_recipe and getattr(getattr(module, "config", None), "fp8", None):
                module.config.fp8_recipe = case.fp8_recipe  # type: ignore[union-attr]
        graph_routers(self.settings, self.model, self.topology)
        self.optimizer = build_optimizer(self.settings, self.model)
        self.training_step = TrainingStep(self.settings, self.topology, self.model, self.optimizer, num_sources=1)
        self.batch = full_batch(self.settings).to(self.topology.device)
        self.steps_done = 0

    def step(self, micro_batches: int = MICRO_BATCHES) -> tuple[float, float]:
        """Run a step; return (seconds, loss)."""
        self.finish()
        began = time.perf_counter()
        self.steps_done += 1
        loss = self.training_step.run([self.batch] * micro_batches, step=self.steps_done).losses.mean
        self.finish()
        return time.perf_counter() - began, loss

    def finish(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def flops(self) -> float:
        """Return the FLOPs of a step."""
        tokens, length = MICRO_BATCHES * self.batch.num_tokens, self.settings.data.sequence_length
        work = StepWork(num_tokens=tokens, sum_squared_lengths=tokens * length, num_images=MICRO_BATCHES * self.batch.num_images)
        return family_of(self.settings.model).step_flops(self.settings.model, self.settings.train.freeze_policy, work)

    def close(self) -> None:
        """Free the largest tensors' device memory even if something still refers to them."""
        for tensor in _held(self.model, self.optimizer):
            tensor.untyped_storage().resize_(0)
        self.model, self.optimizer, self.training_step = [], None, None  # type: ignore[assignment]
        topologies.shutdown()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _held(model: list[DistributedDataParallel], optimizer: Any) -> list[torch.Tensor]:
    """Return weights, gradients and the optimizer's own tensors."""
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    held = [tensor for buffer in buffers for tensor in (buffer.param_data, buffer.grad_data) if tensor is not None]
    return [*held, *optimizer_state(optimizer)]


def time_cases(base: Experiment, cases: list[Case], *, steps: int) -> Iterator[Row]:
    """Yield a row for each case; after a failed case, a row with the error, and the next case begins."""
    baseline: float | None = None
    for case in cases:
        case = replace(case, micro_batch_size=max(case.micro_batch_size, base.train.micro_batch_size))
        try:
            row = _time(base, case, steps=steps)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            yield {"case": str(case), "failed": f"{type(error).__name__}: {lines[0][:200] if lines else ''}"}
            topologies.shutdown()
            continue
        baseline = baseline or row["tokens_per_s"]
        yield {**row, "speed": round(row["tokens_per_s"] / baseline, 3)}


def _time(base: Experiment, case: Case, *, steps: int) -> Row:
    began = time.perf_counter()
    bench = Bench(base, case)
    try:
        found = [bench.step() for _ in range(WARM_UP + steps)]
        warm = time.perf_counter() - began - sum(seconds for seconds, _ in found[WARM_UP:])
        seconds = sorted(seconds for seconds, _ in found[WARM_UP:])
        median, flops = statistics.median(seconds), bench.flops()
        name = torch.cuda.get_device_name(0) if bench.on_gpu else "CPU"
        used = mfu(flops / median / 1e12, peak_tflops(name, bench.settings.train.precision))
        return {
            "case": str(case),
            "ms": round(1e3 * median, 2),
            "ms_fastest": round(1e3 * seconds[0], 2),
            "ms_slowest": round(1e3 * seconds[-1], 2),
            "tokens_per_s": round(MICRO_BATCHES * bench.batch.num_tokens / median, 1),
            "tflops": round(flops / median / 1e12, 4),
            "mfu": None if used is None else round(used, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if bench.on_gpu else None,
            "first_loss": found[0][1],
            "last_loss": found[-1][1],
            "warm_up_s": round(warm, 1),
        }
    finally:
        bench.close()


# ------------------------------------------------------------------------------------------------------------ memory and profile


def look_inside(base: Experiment, case: Case, *, trace: Path | None) -> Iterator[Row]:
    """Break down the memory by part, beside what `plan` predicts, then the time of a step of one micro-batch.

    Args:
        trace: file to which the trace of that step is written.
    """
    bench = Bench(base, case)
    bench.step()
    yield from memory_rows(bench)
    yield from _host_profile(bench)
    if bench.on_gpu:
        yield from _profile(bench, trace)
    bench.close()


def _host_profile(bench: Bench) -> Iterator[Row]:
    """Yield the Python functions with the most own time in a step of one micro-batch; the profiler slows small ones down."""
    profile = cProfile.Profile()
    profile.enable()
    seconds, _ = bench.step(1)
    profile.disable()
    yield {"case": "a step of one micro-batch under cProfile", "ms": round(1e3 * seconds, 2)}
    found = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (path, _, name), (_, calls, own, cumulative, _) in sorted(found.items(), key=lambda item: -item[1][2])[:25]:
        where = f"{'/'.join(Path(path).parts[-2:])} {name}"
        yield {"case": where[:110], "own_ms": round(1e3 * own, 2), "with_calls_ms": round(1e3 * cumulative, 2), "calls": calls}


def _profile(bench: Bench, trace: Path | None) -> Iterator[Row]:
    """Yield the share of a step's time that the GPU is busy, and its kernels by time; otherwise it waits for launches."""
    seconds = statistics.median([bench.step(1)[0] for _ in range(5)])
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        bench.step(1)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    yield {
        "case": "a step of one micro-batch",
        "ms": round(1e3 * seconds, 2),
        "gpu_busy_ms": round(busy / 1e3, 2),
        "waiting_share": round(1 - busy / 1e6 / seconds, 4),
        "kernels": len(spans),
    }
    totals: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        totals[event.name].append((event.time_range.end - event.time_range.start) / 1e3)
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:30]:
        yield {"case": name[:110], "gpu_ms": round(sum(times), 3), "share": round(sum(times) / busy * 1e3, 4), "kernels": len(times)}
    if trace is not None:
        plain = trace.with_suffix("")
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(trace, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()

"""Traces whole training steps of one process of a layout, with the real model, schedule, DDP and distributed optimizer.

`trace_rank` traces one process of a layout; `trace_ranks` traces each pipeline rank in a separate process. `real_rank` runs the same step
on real tensors; tests compare the two.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from megatron_mm.config import Experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.planning.tracing.batches import packed_batch
from megatron_mm.planning.tracing.kernels import stand_ins
from megatron_mm.planning.tracing.recorder import Recorder
from megatron_mm.planning.tracing.world import META, answer_without_data, stand_in_world
from megatron_mm.planning.workload import Workload, Workloads
from megatron_mm.training import build
from megatron_mm.training import optimizer as optimizers
from megatron_mm.training import step as steps

SETTLE_SECONDS = 0.02
"""Wait after each real message, in seconds, until gloo's threads have released its tensors."""


@dataclass(frozen=True)
class Trace:
    """The memory, messages and operations of one process in a step."""

    rank: int
    pipeline_rank: int
    built_bytes: int
    """Live bytes before the step: weights, gradient buffers, optimizer state."""
    peak_bytes: int
    peak_parts: dict[str, int]
    """Live bytes at the peak, by `phase|part`."""
    phase_peaks: dict[str, int]
    timeline: list[tuple[int, int, str]]
    """(operations so far, live bytes, phase that begins or peaks)."""
    messages: dict[str, tuple[int, float]]
    """`kind|group|size|phase|part` -> (number of messages, bytes)."""
    products: list[tuple[str, list[list[int]], str, str, int, float]]
    """(operation, shapes, phase, part, number, FLOPs)."""
    flops: float
    launches: dict[str, int]
    """Number of operations that a device would run, by `phase|part`."""
    guessed: dict[str, int]
    seconds: float

    def message_totals(self) -> dict[str, tuple[int, float]]:
        """Return `kind|group|size` -> (number of messages, bytes)."""
        totals: dict[str, tuple[int, float]] = {}
        for key, (number, size) in self.messages.items():
            short = "|".join(key.split("|")[:3])
            before = totals.get(short, (0, 0.0))
            totals[short] = (before[0] + number, before[1] + size)
        return totals


def trace_rank(
    experiment: Experiment, *, rank: int, world_size: int, te: bool = True, gpu_messages: bool = True, work: Workload | None = None
) -> Trace:
    """Trace a simulated process. This changes modules of the calling process permanently, so call it in a separate process.

    Args:
        te: count the tensors that Transformer Engine's kernels save, instead of the torch backend's.
        gpu_messages: overlap messages between stages as on a GPU.
    """
    began = time.time()
    topology = stand_in_world(experiment, rank=rank, world_size=world_size)
    load = work or Workloads(experiment).of(data_size=topology.data_size)
    recorder = Recorder(on_meta=True, routed_rows=_routed(experiment, load))
    answer_without_data(experiment, recorder)
    with stand_ins(recorder, te=te):
        return _run(experiment, topology, recorder, load, device=META, te=te, gpu_messages=gpu_messages, began=began)


def trace_ranks(
    experiment: Experiment, *, world_size: int, te: bool = True, work: Workload | None = None, processes: int = 2
) -> list[Trace]:
    """Trace the first process of every pipeline rank, each in a separate process."""
    stride = world_size // experiment.parallel.pipeline
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        ranks = range(0, world_size, stride)
        traces = [pool.submit(trace_rank, experiment, rank=rank, world_size=world_size, te=te, work=work) for rank in ranks]
        return [trace.result() for trace in traces]


def real_rank(experiment: Experiment, *, work: Workload | None = None) -> Trace:
    """Trace this process of a real run, with the kernels that it has."""
    began = time.time()
    topology = topologies.initialize(experiment.parallel, seed=1)
    load = work or Workloads(experiment).of(data_size=topology.data_size)
    recorder = Recorder(on_meta=False, settle=lambda: time.sleep(SETTLE_SECONDS))
    return _run(experiment, topology, recorder, load, device=topology.device, te=False, gpu_messages=False, began=began)


def _routed(experiment: Experiment, load: Workload) -> int:
    moe, parallel = experiment.model.decoder.moe, experiment.parallel
    if moe is None:
        return 0
    return load.micro_batches[0].tokens // (parallel.tensor if parallel.sequence_parallel else 1) * moe.top_k


def _run(
    experiment: Experiment,
    topology: Topology,
    recorder: Recorder,
    load: Workload,
    *,
    device: torch.device,
    te: bool,
    gpu_messages: bool,
    began: float,
) -> Trace:
    _mark_phases(recorder)
    with recorder:
        model = build.build_model(experiment, topology)
        for chunk in model:
            _mark_parts(chunk.module, recorder)
        if te:
            _fuse(model, loss=experiment.kernels.cross_entropy is not False)
        if gpu_messages and experiment.parallel.virtual > 1:
            for chunk in model:
                chunk.module.config.overlap_p2p_comm, chunk.module.config.batch_p2p_comm = True, False
        recorder.enter("optimizer", "master weights")
        optimizer = optimizers.build_optimizer(experiment, model)
        recorder.enter("optimizer", "moments")
        optimizers.initialize_state(optimizer)
        recorder.enter("batch")
        batches = [packed_batch(experiment, micro, topology, device=device) for micro in load.micro_batches]
        recorder.messages.clear()
        recorder.products.clear()
        built = recorder.live
        recorder.start_peak()
        step = steps.TrainingStep(experiment, topology, model, optimizer, num_sources=len(experiment.data.sources))
        step.run(batches, step=1)
        recorder.enter("end")
    recorder.finish()
    return _report(recorder, topology, built=built, seconds=time.time() - began)


def _report(recorder: Recorder, topology: Topology, *, built: int, seconds: float) -> Trace:
    return Trace(
        rank=topology.rank,
        pipeline_rank=topology.pipeline_rank,
        built_bytes=built,
        peak_bytes=recorder.peak,
        peak_parts={"|".join(label): size for label, size in sorted(recorder.peak_parts.items(), key=lambda entry: -entry[1])},
        phase_peaks=dict(recorder.phase_peaks),
        timeline=recorder.timeline,
        messages={"|".join(map(str, dataclasses.astuple(key))): (v.count, v.amount) for key, v in recorder.messages.items()},
        products=[
            (key.operation, [list(shape) for shape in key.shapes], key.phase, key.part, v.count, v.amount)
            for key, v in recorder.products.items()
        ],
        flops=recorder.flops,
        launches={"|".join(label): number for label, number in recorder.launches.items()},
        guessed=dict(recorder.guessed),
        seconds=seconds,
    )


def _fuse(model: list[Any], *, loss: bool) -> None:
    """Switch on megatron-core's fused SwiGLU, and with `loss` Transformer Engine's loss, as on a GPU."""
    for chunk in model:
        if loss:
            chunk.module.language.config.cross_entropy_loss_fusion = True
            chunk.module.language.config.cross_entropy_fusion_impl = "te"
        for module in chunk.module.language.modules():
            if getattr(getattr(module, "config", None), "gated_linear_unit", False):
                module.config.bias_activation_fusion = True


def _mark_phases(recorder: Recorder) -> None:
    """Tell the recorder which phase of the step is running."""
    forward, backward, finalize, update = schedules.forward_step, schedules.backward_step, build.finalize_model_grads, steps.update

    def marked(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            recorder.enter(phase)
            result = function(*args, **kwargs)
            recorder.enter("schedule")
            return result

        return run

    schedules.forward_step, schedules.backward_step = marked(forward, "forward"), marked(backward, "backward")
    build.finalize_model_grads = marked(finalize, "reduction")
    steps.update = marked(update, "update")


def _mark_parts(chunk: Any, recorder: Recorder) -> None:
    """Tell the recorder which part of the model is running, forward and backward."""
    inside: list[str] = []
    parts = {name: module for name, module in chunk.named_children() if name != "language"}
    language = chunk.language
    if hasattr(language, "embedding"):
        parts["embedding"] = language.embedding
    parts.update({f"layers.{number}": layer for number, layer in enumerate(language.decoder.layers)})
    if hasattr(language, "output_layer"):
        parts["output"] = language.output_layer

    def enter(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            inside.append(recorder.part)
            recorder.part = name

        return hook

    def leave(name: str) -> Callable[..., None]:
        def begin(grads: Any) -> None:
            recorder.part = name

        def hook(module: Any, args: Any, out: Any) -> None:
            recorder.part = inside.pop()
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(begin)

        return hook

    for name, module in parts.items():
        label = "decoder layers" if name.startswith("layers.") else name
        module.register_forward_pre_hook(enter(label))
        module.register_forward_hook(leave(label))

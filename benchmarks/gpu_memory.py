"""Memory of a training step by part of the model: what this process holds, beside what `plan` predicts. Used by `gpu_steps.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.parts import Row
from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.flops import StepWork
from megatron_mm.planning.hardware import GPUS, OURS, Software
from megatron_mm.planning.recipe_job import plan_recipe
from megatron_mm.planning.step import StepModel
from megatron_mm.planning.workload import MicroBatch, Workload

if TYPE_CHECKING:
    from benchmarks.gpu_steps import Bench


@dataclass(frozen=True)
class ModelPart:
    """A part of the model whose memory is measured and predicted."""

    name: str
    modules: tuple[str, ...]
    """First parts of the names of its modules."""
    blocks: tuple[str, ...]
    """Names of its blocks in a plan (`planning.kernels.Block`)."""


PARTS = (
    ModelPart("image tower", ("vision", "patches"), ("patches", "tower layer")),
    ModelPart("connector", ("connector", "resampler", "projector"), ("connector", "resampler", "projector")),
    ModelPart("embedding", ("language.embedding",), ("embedding",)),
    ModelPart("decoder layers", ("language.decoder.layers",), ("layer", "sparse layer", "gated block")),
)
REST = "the rest"


def planned_step(settings: Experiment, batch: PackedBatch, *, micro_batches: int, software: Software = OURS) -> StepModel:
    """Return the plan of a step with equal micro-batches on one H200."""
    lengths = batch.cu_seqlens.diff().long()
    squares, tokens, images = int((lengths**2).sum()), batch.num_tokens, batch.num_images
    whole = StepWork(num_tokens=micro_batches * tokens, sum_squared_lengths=micro_batches * squares, num_images=micro_batches * images)
    work = Workload((MicroBatch(tokens, tokens, squares, images),) * micro_batches, whole, drawn=True)
    return StepModel(plan_recipe(settings, GPUS["h200"], 1, work=work, software=software).job)


def memory_rows(bench: Bench) -> Iterator[Row]:
    """Yield GiB found and planned of weights, of gradients, of optimizer state, and of what each part keeps for a micro-batch's backward
    pass. `bench` has done a step; on a GPU, its peak and that of a backward pass follow."""
    chunk = bench.model[0].module
    step = planned_step(bench.settings, bench.batch, micro_batches=1)
    use, blocks = step.predict().memory[0], step.job.kinds[0][0]
    weights, planned, kept_planned = Counter[str](), Counter[str](), Counter[str]()
    for name, parameter in chunk.named_parameters():
        weights[part_of(name)] += _bytes(parameter)
    for block in blocks:
        part = next((part.name for part in PARTS if block.name in part.blocks), REST)
        planned[part] += round(2 * (block.parameters + block.expert_parameters + block.frozen_parameters))
        kept_planned[part] += round(block.saved)
    for part in (*(part.name for part in PARTS), REST):
        yield _row(f"weights, {part}", weights[part], planned[part])
    wrapped = bench.model[0]
    gradients = sum(_bytes(buffer.grad_data) for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers))
    yield _row("gradients", gradients, use.gradients)
    yield _row("optimizer state", sum(map(_bytes, optimizer_state(bench.optimizer))), use.optimizer)
    if not bench.on_gpu:
        return
    yield _row("peak of a step", torch.cuda.max_memory_allocated(), use.allocated)
    kept, backward = _kept(bench)
    for part in (*(part.name for part in PARTS), REST):
        yield _row(f"kept for the backward pass, {part}", kept[part], kept_planned[part])
    yield _row("kept for the backward pass, in all", sum(kept.values()), use.activations)
    yield _row("peak of the backward pass above that", backward, use.transient)


def part_of(name: str) -> str:
    """Return the part of the model that a parameter or module belongs to.

    >>> part_of("language.decoder.layers.0.mlp"), part_of("language.decoder.final_layernorm")
    ('decoder layers', 'the rest')
    """
    return next((part.name for part in PARTS for module in part.modules if f"{name}.".startswith(f"{module}.")), REST)


def optimizer_state(optimizer: Any) -> list[torch.Tensor]:
    """Return the optimizer's moments and fp32 weights."""
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        found += [value for state in part.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        found += [parameter.data for group in part.optimizer.param_groups for parameter in group["params"]]
    return found


def _kept(bench: Bench) -> tuple[Counter[str], int]:
    """Run both passes of a micro-batch; return the bytes that each part keeps, and the bytes that the backward pass needs above them."""
    chunk, kept, hooks = bench.model[0].module, Counter[str](), []
    for name, module in chunk.named_modules():
        if is_whole(name):
            hooks += _watch(module, part_of(name), kept)
    bench.finish()
    before = torch.cuda.memory_allocated()
    with bench.model[0].no_sync():
        output = chunk(bench.batch)
        bench.finish()
        after = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output.sum().backward()
        bench.finish()
    for hook in hooks:
        hook.remove()
    chunk.zero_grad()
    kept[REST] = after - before - sum(kept.values())
    return kept, torch.cuda.max_memory_allocated() - after


def is_whole(name: str) -> bool:
    """Whether a module is a part of the model, or a layer of one.

    >>> [is_whole(name) for name in ("vision", "vision.norm", "language.decoder.layers", "language.decoder.layers.3")]
    [True, False, False, True]
    """
    layers = "language.decoder.layers"
    above, _, last = name.rpartition(".")
    return (above == layers and last.isdigit()) or any(name == module for part in PARTS for module in part.modules if module != layers)


def _row(case: str, found: float, planned: float) -> Row:
    return {"case": case, "gib": round(found / 2**30, 4), "planned_gib": round(planned / 2**30, 4)}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _watch(module: torch.nn.Module, name: str, kept: Counter[str]) -> list[Any]:
    begun: list[int] = []

    def before(*_: object) -> None:
        begun.append(torch.cuda.memory_allocated())

    def after(*_: object) -> None:
        kept[name] += torch.cuda.memory_allocated() - begun.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

"""Memory of each pipeline rank, in bytes: weights, gradients, optimizer state, activations at their peak, and the memory of libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mm.planning.hardware import Gpu
from megatron_mm.planning.job import Job

LIBRARIES = 3.0e9
"""Bytes of the CUDA context, NCCL's buffers, cuBLAS's and Transformer Engine's workspaces, which the allocator does not count."""
FRAGMENTATION = 0.04
"""Memory that the allocator holds and cannot use, relative to the allocated bytes."""
USABLE = 0.96
"""Fraction of the device's memory up to which a layout is considered to fit."""
USABLE_BY_RECIPES = 0.90
"""Fraction of the device's memory that the recipes' layouts may use. The rest is a reserve."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one process at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    transient: float
    update: float = 0.0
    """Bytes that exist only during the optimizer's update, after activations are freed."""

    @property
    def allocated(self) -> float:
        """Bytes that torch's allocator counts at the peak (torch.cuda.max_memory_allocated)."""
        return self.state + max(self.activations + self.transient, self.update)

    @property
    def state(self) -> float:
        """Bytes that are allocated between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def reserved(self) -> float:
        """Bytes that torch's allocator holds at the peak (torch.cuda.max_memory_reserved)."""
        return self.allocated * (1 + FRAGMENTATION)

    @property
    def total(self) -> float:
        """Bytes that the device must have."""
        return self.reserved + LIBRARIES


@dataclass(frozen=True)
class RankParameters:
    """Numbers of parameters on each process of a pipeline rank."""

    dense: float
    """Trainable parameters outside experts."""
    experts: float
    frozen: float


def parameters_of_ranks(job: Job) -> tuple[RankParameters, ...]:
    """Parameters of one process of each pipeline rank, without an encoder that runs outside the pipeline (`Job.beside`)."""
    return tuple(
        RankParameters(
            sum(block.parameters for block in blocks),
            sum(block.expert_parameters for block in blocks),
            sum(block.frozen_parameters for block in blocks),
        )
        for blocks in ([block for stage in stages for block in job.kinds[0][stage]] for stages in _stages_of_ranks(job))
    )


def share_of(job: Job, *, dense: float, experts: float, beside: float) -> float:
    """Return the number of parameters that one process owns, according to `Layout.sharding`.

    Args:
        dense, experts, beside: parameters on a process outside experts, in experts, and in an encoder outside the pipeline (`Job.beside`).
    """
    layout = job.layout
    copies, expert_copies = (layout.data * layout.context, layout.expert_data) if layout.sharding != "none" else (1, 1)
    return dense / copies + experts / expert_copies + beside / layout.gpus


def _stages_of_ranks(job: Job) -> list[list[int]]:
    layout = job.layout
    return [[chunk * layout.pipeline + rank for chunk in range(layout.virtual)] for rank in range(layout.pipeline)]


def memory_of_ranks(job: Job, saved_bytes: Sequence[float]) -> tuple[MemoryUse, ...]:
    """Memory of one process of each pipeline rank.

    Args:
        saved_bytes: largest number of bytes of activations that each rank holds at once.
    """
    layout, software = job.layout, job.software
    copies = layout.data * layout.context
    uses = []
    for rank, (held, stages) in enumerate(zip(parameters_of_ranks(job), _stages_of_ranks(job), strict=True)):
        blocks = [block for stage in stages for block in job.kinds[0][stage]]
        dense, experts, frozen = held.dense, held.experts, held.frozen
        # experts that only one process holds need not be gathered
        gathered = 1 if layout.expert_data > 1 else 0
        largest = max((block.parameters + block.frozen_parameters + gathered * block.expert_parameters for block in blocks), default=0.0)
        transient = max((block.transient for kind in job.kinds for stage in stages for block in kind[stage]), default=0.0)
        # shards of weights that are not the master weights; frozen ones have no master weights
        shards = 2 * (frozen / copies + (not software.casts_gathered_weights) * (dense / copies + experts / layout.expert_data))
        if layout.sharding == "full" and layout.pipeline > 1:
            # weights are gathered once per step and kept for all micro-batches; gradients are scattered after the last one
            weights = 2 * (dense + frozen + experts) + shards
            gradients = 4 * dense * (1 + 1 / copies) + 4 * experts * (1 + 1 / layout.expert_data)
        elif layout.sharding == "full":
            weights = shards + 2 * 2 * largest
            gradients = 4 * dense / copies + 4 * experts / layout.expert_data + software.gradient_bytes * largest
        else:
            weights = 2 * (dense + experts + frozen)
            gradients = software.gradient_bytes * (dense / (copies if layout.sharding == "gradients" else 1) + experts)
        if not software.fp8_weights:
            weights += 2 * sum(block.fp8_parameters for block in blocks)
        activations = saved_bytes[rank]
        activations += (job.micro_batches_at_once - 1) * max(sum(b.saved for b in kind[stage]) for kind in job.kinds for stage in stages)
        beside = job.beside  # its activations are kept from before the pipeline until after it
        weights += 2 * (beside.parameters + beside.frozen_parameters)
        gradients += software.gradient_bytes * beside.parameters
        owned = share_of(job, dense=dense, experts=experts, beside=beside.parameters)
        activations += beside.times * sum(block.saved for block in beside.blocks)
        transient = max([transient, *(block.transient for block in beside.blocks)])
        # gradients that are not kept in float32 are copied into it for the update (megatron-core's distributed optimizer)
        copied = 4 * owned if software.gradient_bytes < 4 and layout.sharding in ("none", "optimizer") else 0.0
        uses.append(MemoryUse(weights, gradients, software.optimizer_bytes * owned, activations, transient, copied))
    return tuple(uses)


def fits(peak_bytes: float, gpu: Gpu, *, usable: float = USABLE) -> bool:
    """Return whether a step with this peak is considered to fit."""
    return peak_bytes <= usable * gpu.memory_gb * 1e9

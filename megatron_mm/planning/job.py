"""A job to be planned: a model's work on a layout, a GPU and a software stack."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.planning.hardware import Gpu, Software
from megatron_mm.planning.kernels import Block
from megatron_mm.planning.layout import Layout


@dataclass(frozen=True)
class Beside:
    """Work that every process does before the pipeline begins, and its backward pass after the pipeline (`parallel.spread_encoder`)."""

    blocks: tuple[Block, ...] = ()
    """Blocks for the images that are encoded at once."""
    times: int = 0
    """Number of times that the blocks run in a step."""
    message_bytes: float = 0.0
    """Bytes of the features of a process's share of a step, which are sent to the first stage."""

    @property
    def parameters(self) -> float:
        return sum(block.parameters for block in self.blocks)

    @property
    def frozen_parameters(self) -> float:
        return sum(block.frozen_parameters for block in self.blocks)


@dataclass(frozen=True)
class Job:
    """The work of each micro-batch on each stage of a layout, on a GPU, with a software stack."""

    layout: Layout
    gpu: Gpu
    software: Software
    kinds: tuple[tuple[tuple[Block, ...], ...], ...]
    """Blocks of each kind of micro-batch on each stage: [kind][stage] -> blocks."""
    micro_batches: tuple[int, ...]
    """The kind of each micro-batch of a process, in order."""
    hidden_bytes: float
    """Bytes that a process sends to the next stage for a micro-batch."""
    overlap_parameter_gather: bool = True
    replicated_parameters: float = 0.0
    """Trainable parameters that are replicated in a tensor-parallel group; their gradients are summed over it after the backward passes."""
    beside: Beside = Beside()
    micro_batches_at_once: int = 1
    """Number of micro-batches that pass through the layers together: 2 with `parallel.overlap_experts`."""


LAST_OF_LAYER = ("layer", "sparse layer")
"""Names of the blocks with which a decoder layer ends; a gated block comes before."""


def divided(blocks: list[Block], counts: tuple[int, ...]) -> tuple[tuple[Block, ...], ...]:
    """Divide a model's blocks over stages with these numbers of decoder layers."""
    ends = [number + 1 for number, block in enumerate(blocks) if block.name in LAST_OF_LAYER]
    before = next((number for number, block in enumerate(blocks) if block.name in (*LAST_OF_LAYER, "gated block")), len(blocks))
    stages, begin, layers = [], 0, 0
    for stage, count in enumerate(counts):
        layers += count
        end = len(blocks) if stage == len(counts) - 1 else ends[layers - 1] if layers else before
        stages.append(tuple(blocks[begin:end]))
        begin = end
    return tuple(stages)

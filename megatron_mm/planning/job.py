"""A job to be planned: a model's work on a layout, a GPU and a software stack."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.planning.hardware import Gpu, Software
from megatron_mm.planning.kernels import Block
from megatron_mm.planning.layout import Layout


@dataclass(frozen=True)
class Beside:
    """What every process does before the pipeline begins, and the backward pass of it after the pipeline: `parallel.spread_encoder`."""

    blocks: tuple[Block, ...] = ()
    """For the images that go through the encoder together."""
    times: int = 0
    """How often, in a step."""
    message_bytes: float = 0.0
    """Features of a process's share of a step, which go to the first stage."""

    @property
    def parameters(self) -> float:
        return sum(block.parameters for block in self.blocks)

    @property
    def frozen_parameters(self) -> float:
        return sum(block.frozen_parameters for block in self.blocks)


@dataclass(frozen=True)
class Job:
    """What is planned: the work of each micro-batch on each stage of a layout, on a GPU, under a software stack."""

    layout: Layout
    gpu: Gpu
    software: Software
    kinds: tuple[tuple[tuple[Block, ...], ...], ...]
    """Micro-batches that differ: [kind][stage] -> blocks."""
    micro_batches: tuple[int, ...]
    """The kind of each micro-batch of a process, in order."""
    hidden_bytes: float
    """Of a message from stage to stage, of one process."""
    overlap_parameter_gather: bool = True
    replicated_parameters: float = 0.0
    """Trainable parameters that every process of a tensor-parallel group has whole: their gradients are summed over it after the step."""
    beside: Beside = Beside()
    micro_batches_at_once: int = 1
    """That go through the layers together: 2 with `parallel.overlap_experts`."""

"""Configuration of the number formats of gradients, optimizer state and FP8 products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats in addition to `train.precision`, which sets those of weights and activations. docs/performance.md says what each
    needs."""

    gradients: Literal["fp32", "bf16"] = "fp32"
    """Format of the buffers in which gradients are summed over micro-batches and reduced over data parallelism. bf16 saves 2 bytes per
    parameter and halves the messages, but rounds every sum."""
    exp_avg: Literal["fp32", "bf16"] = "fp32"
    """Format of Adam's first moment; bf16 saves 2 bytes per parameter, and needs Transformer Engine's Adam."""
    exp_avg_sq: Literal["fp32", "bf16"] = "fp32"
    """Format of Adam's second moment; bf16 saves and needs the same as for exp_avg."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 products are scaled under `train.precision fp8`: tensorwise has one scale per tensor, from its current values; delayed has
    one per tensor, from earlier steps; blockwise one per block of 128; mxfp8 one per 32 values (Blackwell GPUs)."""
    fp8_weights: bool = False
    """Under `train.precision fp8`, store the weights of FP8 products in FP8: one copy instead of a bf16 and an FP8 copy, and one byte
    instead of two per weight when updated weights are gathered over data parallelism. The optimizer keeps its fp32 master weights.
    Checkpoints contain the rounded weights in bf16 and the master weights; a resume uses the latter."""

    @property
    def low_precision_moments(self) -> bool:
        return (self.exp_avg, self.exp_avg_sq) != ("fp32", "fp32")

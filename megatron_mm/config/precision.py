"""In which number formats gradients, optimizer state and FP8 products are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PrecisionConfig:
    """Formats beside `train.precision`, which says what weights and activations are. docs/performance.md says what each needs."""

    gradients: Literal["fp32", "bf16"] = "fp32"
    """Buffers in which gradients are summed over micro-batches and reduced over data parallelism; bf16 takes 2 bytes a parameter less and
    half the messages, and rounds every sum."""
    exp_avg: Literal["fp32", "bf16"] = "fp32"
    """Adam's first moment; bf16 takes 2 bytes a parameter less, and needs Transformer Engine's Adam."""
    exp_avg_sq: Literal["fp32", "bf16"] = "fp32"
    """Adam's second moment, likewise."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Scales of FP8 products under `train.precision fp8`: of whole tensors as they are; of whole tensors, from earlier steps; of blocks of
    128; or of 32 values each (Blackwell GPUs)."""
    fp8_weights: bool = False
    """Under `train.precision fp8` the weights of FP8 products are FP8 themselves: one copy in place of a bf16 and an FP8 one, and a byte in
    place of two for each when updated weights are gathered over data parallelism. The optimizer's fp32 master weights are as ever.
    Checkpoints hold the rounded weights as bf16, and the master weights, which a resume takes."""

    @property
    def low_precision_moments(self) -> bool:
        return (self.exp_avg, self.exp_avg_sq) != ("fp32", "fp32")

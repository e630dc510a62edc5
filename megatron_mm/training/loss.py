"""Per-token loss: summed over everything, and divided once by the number of tokens in the global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from megatron_mm.data.batch import PackedBatch

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass
class LossTotals:
    """Sums of a step's losses and counted tokens by source, over all processes."""

    losses: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Loss per counted token, in nats; NaN if no token counts."""
        total = sum(self.tokens)
        return sum(self.losses) / total if total else float("nan")

    def by_source(self, names: list[str]) -> dict[str, float]:
        """Return the loss per counted token of each source that has any."""
        return {name: loss / count for name, loss, count in zip(names, self.losses, self.tokens, strict=True) if count}


def loss_function(batch: PackedBatch, *, num_sources: int) -> LossFunction:
    """Return the function that megatron-core's schedule calls with the last stage's output for one micro-batch.

    It takes per-token losses [1, t] and returns (sum of the losses that count, their number as int32, [2, num_sources] sums by source for
    the log). megatron-core adds up the numbers over micro-batches and data parallelism and divides the gradients once by the total.
    """

    def compute(losses_1t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        counted_t = losses_1t.flatten().float() * batch.loss_mask
        with torch.no_grad():
            sums = torch.zeros(2, num_sources, dtype=torch.float64, device=counted_t.device)
            sums[0].index_add_(0, batch.source_ids, counted_t.double())
            sums[1].index_add_(0, batch.source_ids, batch.loss_mask.double())
        return counted_t.sum(), batch.loss_mask.sum().int(), sums

    return compute


def own_losses(reported: list[torch.Tensor], *, contributes: bool, num_sources: int, device: torch.device) -> torch.Tensor:
    """Return this process's part of the sums of a step's losses and counted tokens: [2, num_sources] float64 on its device.

    Args:
        reported: [2, num_sources] for each micro-batch of this process; empty except on the last stage.
        contributes: this process reports for its data-parallel copy, so that nothing counts twice.
    """
    total = torch.zeros(2, num_sources, dtype=torch.float64, device=device)
    if contributes:
        for sums in reported:
            total += sums
    return total


def micro_batch_iterator(batches: list[PackedBatch], device: torch.device) -> Iterator[PackedBatch]:
    """Yield the micro-batches of a step in order, each moved to the device only when it is needed."""
    return (batch.to(device) for batch in batches)

"""Measurements of a step besides its loss: norms by part of the model, balance, memory."""

from __future__ import annotations

import torch

from megatron_mm.data.load.loader import StepBatch
from megatron_mm.families.registry import family_of
from megatron_mm.training.norms import NORMS, PartNorms
from megatron_mm.training.optimizer import learning_rate
from megatron_mm.training.trainer import Hook, StepRecord, Trainer


def is_due(step: int, interval: int) -> bool:
    """Whether a step is measured in detail: the first step, and every `interval`-th."""
    return interval > 0 and (step == 1 or step % interval == 0)


class Norms(Hook):
    """Computes norms by part of the model. It runs before the hook that writes a step's metrics, which reads `of_step`."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        family = family_of(trainer.experiment.model)
        self.interval = trainer.experiment.monitor.detail_interval
        self.parts = [*family.parts, "rest"]
        self.norms = PartNorms(trainer.model, trainer.optimizer, parts=self.parts, part_of=family.part_of)
        self.of_step: dict[str, dict[str, float]] = {}
        """`grad_norms`, `param_norms` and `update_ratios` of the newest step; empty if they were not measured."""
        self._last_lr: float | None = None
        """Learning rate of the previous step; None if that step was skipped or this process did not run it."""

    def tell(self, batch: StepBatch) -> tuple[float, ...] | torch.Tensor:
        if not is_due(self.trainer.state.step + 1, self.interval):
            return ()
        return self.norms.squares(lr=self._last_lr, device=self.trainer.topology.device)

    def after_step(self, record: StepRecord) -> None:
        told = record.told[self]
        self.of_step = self.norms.from_sums(told) if len(told) == len(NORMS) * len(self.parts) else {}
        experiment = self.trainer.experiment
        lr = learning_rate(record.step, experiment.optimizer, schedule_steps=experiment.train.schedule_steps)
        self._last_lr = None if record.result.update.skipped else lr


def balance(batch: StepBatch, *, data_size: int) -> float:
    """Planned work of the mean data-parallel rank divided by that of the busiest rank."""
    plan = batch.plan
    costs = [plan.batching.costs.of(work) for work in plan.works]
    ranks = [sum(costs[i] for group in rank for i in group) for rank in plan.batching.micro_batches(plan.works, data_size)]
    return sum(ranks) / len(ranks) / max(1, *ranks)


def memory_gb(device: torch.device) -> float:
    """Memory of this process, GB: peak allocation on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9

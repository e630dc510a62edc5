"""The training step: forward and backward of all micro-batches through megatron-core's pipeline schedule, then the update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.registry import pipeline_rows
from megatron_mm.parallel.pipeline import PlannedMessages
from megatron_mm.parallel.sums import sum_over_processes
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform.device import send
from megatron_mm.training.loss import LossFunction, LossTotals, loss_function, micro_batch_iterator, own_losses
from megatron_mm.training.optimizer import Update, learning_rate, squared_grad_norm, update
from megatron_mm.training.phases import StepClock
from megatron_mm.training.progress import Progress
from megatron_mm.training.routing import RoutingStats, own_records, routing_stats, weigh_tokens
from megatron_mm.training.spread_encoder import spread_encoder, wrapped_modules


@dataclass(frozen=True)
class StepResult:
    """Results of a training step; the same on every process."""

    losses: LossTotals
    update: Update
    lr: float
    routing: RoutingStats | None = None
    """Routing statistics of the sparse layers; None for a dense model."""
    told: tuple[float, ...] = ()
    """Sums over all processes of the numbers from `tell` (`TrainingStep.run`)."""


class TrainingStep:
    """Runs steps on this process's part of the model; without an optimizer it can only evaluate."""

    def __init__(
        self,
        experiment: Experiment,
        topology: Topology,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        *,
        num_sources: int,
        clock: StepClock | None = None,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            clock: times the phases of a step; None for no timing.
            progress: updated as the step proceeds, for a watchdog.
        """
        self.clock = clock
        self.experiment = experiment
        self.topology = topology
        self.model = model
        self.optimizer = optimizer
        self.num_sources = num_sources
        self.spread_encoder = spread_encoder(model)
        self.progress = progress or Progress()

    def run(self, micro_batches: list[PackedBatch], *, step: int, tell: Callable[[], Sequence[float] | torch.Tensor] = tuple) -> StepResult:
        """Train on one global batch.

        All sums over processes (losses, gradient norm, routing records, the numbers from `tell`) use a single message, and reading its
        result is the only time that this process waits for its device.

        Args:
            micro_batches: the micro-batches of this process.
            step: number of the step, counted from 1.
            tell: called once the passes are launched (a GPU may still be computing). Returns numbers to sum over all processes: floats, or
                a float64 tensor on the device.
        """
        assert self.optimizer is not None, "training needs an optimizer"
        config = self.experiment.optimizer
        lr = learning_rate(step, config, schedule_steps=self.experiment.train.schedule_steps)
        for module in wrapped_modules(self.model):
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        decoder = self.experiment.model.decoder
        weigh_tokens(decoder, self.model, micro_batches, device=self.topology.device)
        device = self.topology.device
        self.progress.enter("forward and backward")
        losses = self._pass(micro_batches, forward_only=False)
        self.progress.enter("sums over all processes")
        records = own_records(decoder, self.model, device=device)
        with self._phase("optimizer"):
            norm = squared_grad_norm(self.optimizer, device=device)
        numbers = tell()
        told = numbers if isinstance(numbers, torch.Tensor) else send(torch.tensor(tuple(numbers), dtype=torch.float64), device)
        with self._phase("reduce"):
            losses_of, records_of, (squared_norm,), told_of = sum_over_processes(losses, records, norm[None], told)
        routing = routing_stats(decoder, self.model, records_of)
        self.progress.enter("optimizer")
        grad_norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
        with self._phase("optimizer"):
            done = update(
                self.optimizer, grad_norm=grad_norm, lr=lr, weight_decay=config.weight_decay, clip_grad_norm=config.clip_grad_norm
            )
        return StepResult(losses=LossTotals(*losses_of.tolist()), update=done, lr=lr, routing=routing, told=tuple(told_of.tolist()))

    def _phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.clock is None else self.clock.phase(name)

    def evaluate(self, micro_batches: list[PackedBatch]) -> LossTotals:
        """Return the losses of one global batch, without training on it."""
        with self._evaluation_mode(), torch.no_grad():
            (losses,) = sum_over_processes(self._pass(micro_batches, forward_only=True))
        return LossTotals(*losses.tolist())

    def _pass(self, micro_batches: list[PackedBatch], *, forward_only: bool) -> torch.Tensor:
        """Run forward (and, unless `forward_only`, backward) passes on all micro-batches; return this process's part of the losses
        (`own_losses`)."""
        device = self.topology.device
        rows = [pipeline_rows(self.experiment, batch) for batch in micro_batches]
        encoded: list[torch.Tensor | None] = [None] * len(micro_batches)
        if self.spread_encoder is not None:
            encoded = self.spread_encoder.encode(micro_batches, device=device)
            micro_batches = [replace(batch, pixels=None) for batch in micro_batches]
        iterators = [zip(micro_batch_iterator(micro_batches, device), rows, encoded, strict=True) for _ in self.model]
        reported = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(micro_batches),
            seq_length=max(rows),  # not used: the plan determines the length of each micro-batch
            micro_batch_size=1,  # the packed sequences of a micro-batch are one row of tokens
            forward_only=forward_only,
            p2p_communicator=PlannedMessages(get_model_config(self.model[0]), rows=rows),
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        return own_losses(reported, contributes=self.topology.reports_loss, num_sources=self.num_sources, device=device)

    def _forward_step(
        self,
        batches: Iterator[tuple[PackedBatch, int, torch.Tensor | None]],
        chunk: DistributedDataParallel | GPTModel,
        return_schedule_plan: bool = False,
    ) -> tuple[torch.Tensor, LossFunction]:
        """Called by megatron-core's schedules. The one that runs plans (`parallel.overlap_experts`) passes the decoder inside a chunk."""
        self.progress.beat()
        batch, rows, encoded = next(batches)
        images: dict[str, Any] = {} if encoded is None else {"encoded": encoded}
        if return_schedule_plan:
            chunk = next(wrapped for wrapped in self.model if wrapped.module.language is chunk)
            images["as_plan"] = True
        return chunk(batch, pipeline_rows=rows, **images), loss_function(batch, num_sources=self.num_sources)

    def _evaluation_mode(self) -> _EvaluationMode:
        return _EvaluationMode(wrapped_modules(self.model))


class _EvaluationMode:
    """Context in which the chunks are in eval mode, without recompute."""

    def __init__(self, model: list[DistributedDataParallel]) -> None:
        self.model = model

    def __enter__(self) -> None:
        for chunk in self.model:
            chunk.eval()

    def __exit__(self, *exc: object) -> None:
        for chunk in self.model:
            chunk.train()

"""The training loop. Everything that is not the step itself is a hook; `run.start` assembles both."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_mm.config import Experiment
from megatron_mm.data.load.loader import StepBatch
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import engine
from megatron_mm.platform.device import send
from megatron_mm.training.checkpoint import Checkpointer, TrainState
from megatron_mm.training.phases import StepClock
from megatron_mm.training.progress import Progress
from megatron_mm.training.step import StepResult, TrainingStep

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """An endless iterator of this process's batches, such as `run.data.TrainingData`."""

    def __next__(self) -> StepBatch: ...

    @property
    def cursor(self) -> dict[str, Any]:
        """Position of the plan after the last batch, as JSON values."""

    def close(self) -> None:
        """Stop the loader's threads."""


@dataclass(frozen=True)
class StepRecord:
    """A finished step, as passed to hooks."""

    step: int
    result: StepResult
    batch: StepBatch
    seconds: float
    """Wall time of the whole step, including the wait for data."""
    data_seconds: float
    """Wall time of the wait for data."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the step by phase on this process (`training.phases`)."""
    told: dict[Hook, tuple[float, ...]] = field(default_factory=dict)
    """The numbers from each hook's `Hook.tell`, summed over all processes."""


class Hook:
    """Base class of hooks, which the trainer calls; every method does nothing by default."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def tell(self, batch: StepBatch) -> tuple[float, ...] | torch.Tensor:
        """Return numbers to sum over all processes in the step's single message; every process must return equally many.

        Called before the update of the step on `batch`, when its gradients are final. Return values computed on the device as a float64
        tensor, so that the process does not wait for them.
        """
        return ()

    def after_step(self, record: StepRecord) -> None:
        """Called after every step; `record.told[self]` holds the sums of the numbers from `tell` over all processes. A hook that reads
        weights first calls `Trainer.gather_weights` on all processes."""

    def predicted_seconds(self) -> dict[str, float]:
        """Return the predicted seconds of a step by cause; empty unless the hook has a prediction."""
        return {}

    def after_training(self) -> None:
        """Called once, after the last step or an agreed stop; not after a failure."""

    def close(self, *, failed: bool) -> None:
        """Called once at the end, also after a failure."""


class Trainer:
    """One run on this process: the loop over steps, and the objects that hooks may use."""

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        *,
        topology: Topology,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        data: Batches,
        checkpointer: Checkpointer,
        state: TrainState,
        hooks: Callable[[Trainer], Sequence[Hook]] = lambda trainer: (),
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            model: this process's pipeline chunks.
            data: batches, positioned to continue from `state`.
            state: current state of the run; the trainer updates it.
            progress: updated as the run proceeds, for a watchdog.
            hooks: creates the hooks, in the order in which they are called; called once the rest of the trainer is set up.
        """
        self.experiment = experiment
        self.run_dir = run_dir
        self.topology = topology
        self.model = model
        self.optimizer = optimizer
        self.data = data
        self.checkpointer = checkpointer
        self.state = state
        self.clock = StepClock(topology.device)
        self.clock.watch(model)
        self.progress = progress or Progress()
        self.step = TrainingStep(
            experiment,
            topology,
            model,
            optimizer,
            num_sources=len(experiment.data.sources),
            clock=self.clock,
            progress=self.progress,
        )
        self.should_stop = False
        """Set by a hook, on all processes: the run ends after the current step."""
        self.stopped_by: Hook | None = None
        """The first hook that set `should_stop`."""
        self.hooks = list(hooks(self))

    def fit(self) -> TrainState:
        """Train up to `train.steps`, or until a hook requests a stop; return the final state."""
        if self.state.step >= self.experiment.train.steps and self.topology.is_main:
            logger.info("the run has already completed its %d steps: use a larger --train.steps to continue", self.state.step)
        failed = True
        try:
            while self.state.step < self.experiment.train.steps and not self.should_stop:
                record = self._one_step()
                for hook in self.hooks:
                    self.progress.enter(type(hook).__name__)
                    hook.after_step(record)
                    if self.should_stop and self.stopped_by is None:
                        self.stopped_by = hook
            for hook in self.hooks:
                self.progress.enter(f"{type(hook).__name__} at the end")
                hook.after_training()
            failed = False
        finally:
            self.data.close()
            for hook in reversed(self.hooks):
                hook.close(failed=failed)
        return self.state

    def gather_weights(self) -> None:
        """Complete the weights of this process; called by all processes together, before a hook reads weights after a step.

        An update may leave each process with new values for its own share only, until the next forward pass
        (`parallel.overlap_param_gather`).
        """
        engine.gather_weights(self.model)

    def _one_step(self) -> StepRecord:
        began = time.perf_counter()
        self.clock.begin_step()
        self.progress.enter("wait for data", step=self.state.step + 1)
        batch = next(self.data)
        waited = time.perf_counter() - began
        told: dict[Hook, tuple[float, ...] | torch.Tensor] = {}

        def tell() -> torch.Tensor:
            told.update((hook, hook.tell(batch)) for hook in self.hooks)
            return _one_tensor(list(told.values()), self.topology.device)

        result = self.step.run(batch.micro_batches, step=self.state.step + 1, tell=tell)
        sums = iter(result.told)
        state = self.state
        state.step += 1
        state.plan = self.data.cursor
        state.tokens += batch.plan.num_tokens
        state.images += batch.plan.num_images
        state.skipped_steps += result.update.skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.update.skipped else 0
        seconds = time.perf_counter() - began
        return StepRecord(
            step=state.step,
            result=result,
            batch=batch,
            seconds=seconds,
            data_seconds=waited,
            phases=self.clock.end_step(seconds=seconds, data=waited - batch.sharing_seconds, share=batch.sharing_seconds),
            told={hook: tuple(itertools.islice(sums, len(values))) for hook, values in told.items()},
        )


def _one_tensor(told: Sequence[tuple[float, ...] | torch.Tensor], device: torch.device) -> torch.Tensor:
    """Concatenate the hooks' numbers to [numbers], float64, on the device; numbers from the CPU are sent in one copy."""
    numbers = send(
        torch.tensor([value for values in told if not isinstance(values, torch.Tensor) for value in values], dtype=torch.float64), device
    )
    parts, place = [], 0
    for values in told:
        if isinstance(values, torch.Tensor):
            parts.append(values)
        else:
            parts.append(numbers[place : place + len(values)])
            place += len(values)
    return torch.cat(parts) if parts else numbers

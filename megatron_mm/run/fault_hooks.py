"""Hooks that detect faults: gradients that are not finite, loss spikes, replicas of a parameter that differ, a lock that was taken over."""

from __future__ import annotations

import logging
import math
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.data.load.loader import StepBatch
from megatron_mm.reporting.run_files import LOCK_FILE
from megatron_mm.run.lock import RunLock
from megatron_mm.run.roll_back import RollBack
from megatron_mm.training.spread_encoder import wrapped_modules
from megatron_mm.training.trainer import Hook, StepRecord, Trainer

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 64
"""Number of recent losses whose median a spike is compared with."""
LEAST_STEPS = 16
"""Minimum number of recent losses; their median means little with fewer."""


class HoldsRunDirectory(Hook):
    """Ends a run whose lock was taken over, because another run now trains in its directory; on all processes after the same step."""

    def __init__(self, trainer: Trainer, lock: RunLock | None) -> None:
        super().__init__(trainer)
        self.lock = lock

    def tell(self, batch: StepBatch) -> tuple[float, ...]:
        return (float(self.lock is not None and self.lock.taken_by is not None),)

    def after_step(self, record: StepRecord) -> None:
        if any(record.told[self]):
            raise RuntimeError(
                f"this run no longer holds {self.trainer.run_dir / LOCK_FILE}: "
                f"{self.lock.taken_by if self.lock else 'see the first process'} does; nothing was written after step {record.step - 1}"
            )


class NonFiniteSteps(Hook):
    """Ends the run, or rolls it back, after `train.max_skipped_in_a_row` skipped steps in a row; on all processes after the same step.

    One skipped step means a bad batch. Many mean a model or a machine that no longer produces finite gradients, and data is skipped for
    nothing. The count is part of a checkpoint, so a run that is requeued in the middle of such steps does not start counting from 0.
    """

    def after_step(self, record: StepRecord) -> None:
        train, state = self.trainer.experiment.train, self.trainer.state
        limit = train.max_skipped_in_a_row
        if not limit or state.skipped_in_a_row < limit:
            return
        result, first = record.result, record.step - state.skipped_in_a_row + 1
        what = (
            f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, {first} to {record.step} (the last one: loss "
            f"{result.losses.mean}, gradient norm {result.update.grad_norm})"
        )
        self.trainer.checkpointer.finish()  # complete the earlier saves
        if train.after_skipped == "roll_back":
            raise RollBack(what, before_step=first, state=state)
        raise RuntimeError(
            f"{what}, and train.max_skipped_in_a_row is {limit}: see metrics.jsonl for where it began; to resume from before that, "
            "rename the later checkpoints, and lower the learning rate or change the data. With --train.after-skipped roll_back a run "
            "rolls back by itself, and --train.max-skipped-in-a-row 0 allows any number"
        )


class LossSpikes(Hook):
    """Warns when the loss is far above its recent median, and rolls the run back if `train.after_spike` is roll_back.

    The recent losses are part of a checkpoint, so a resumed run detects the same spikes.
    """

    def after_step(self, record: StepRecord) -> None:
        train, state, loss = self.trainer.experiment.train, self.trainer.state, record.result.losses.mean
        if not train.spike_ratio or record.result.update.skipped or not math.isfinite(loss):
            return
        recent = state.recent_losses
        usual = statistics.median(recent) if len(recent) >= LEAST_STEPS else math.inf
        state.recent_losses = [*recent, loss][-SPIKE_WINDOW:]
        if loss <= train.spike_ratio * usual:
            return
        what = f"step {record.step}: the loss is {loss:.4f}, more than {train.spike_ratio} times the {usual:.4f} of the steps before"
        if self.trainer.topology.is_main:
            logger.warning("%s", what)
        if train.after_spike == "roll_back":
            self.trainer.checkpointer.finish()
            raise RollBack(what, before_step=record.step, state=state)


@dataclass(frozen=True)
class Copies:
    """A process's copies of parameters that other processes hold, too."""

    host: str
    ranks: list[int]
    """Ranks of all processes that hold these parameters."""
    sums: dict[str, int]
    """Sum of each parameter's bits, by name."""


class ReplicaChecksums(Hook):
    """Checks every `train.checksum_interval` steps that data-parallel copies of the parameters are still the same, bit for bit.

    Copies are compared after the passes and before the update, because the distributed optimizer then sends the updated parameters to all
    processes, which repairs a wrong copy. Two numbers over each data-parallel group show whether all copies agree; only if they do not are
    details exchanged. A wrong value that the optimizer itself computed is the same in all copies, and is not detected.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.sums: dict[str, int] = {}
        """Sum of each parameter's bits at the last check, by name."""
        self.groups = {
            False: parallel_state.get_data_parallel_group(with_context_parallel=True),
            True: parallel_state.get_expert_data_parallel_group(),
        }
        """Groups of processes with the same parameters: of dense ones (False) and of experts (True)."""
        self.names = [
            (f"chunk {number}: {name}", parameter, not getattr(parameter, "allreduce", True))
            for number, chunk in enumerate(wrapped_modules(trainer.model))
            for name, parameter in chunk.module.named_parameters()
        ]

    def tell(self, batch: StepBatch) -> tuple[float, ...]:
        if (self.trainer.state.step + 1) % self.trainer.experiment.train.checksum_interval:
            return (0.0,)
        sums = torch.stack([_bits(parameter) for _, parameter, _ in self.names])
        is_expert = torch.tensor([expert for _, _, expert in self.names], device=sums.device)
        differs = 0.0
        for expert, group in self.groups.items():
            total = sums[is_expert == expert].sum()
            extremes = torch.stack([total, -total])
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
            differs += float(extremes[0] != -extremes[1])
        self.sums = {name: value for (name, _, _), value in zip(self.names, sums.tolist(), strict=True)}
        return (differs,)

    def after_step(self, record: StepRecord) -> None:
        if not any(record.told[self]):
            return
        mine = [
            Copies(socket.gethostname(), dist.get_process_group_ranks(group), {n: self.sums[n] for n, _, e in self.names if e == expert})
            for expert, group in self.groups.items()
        ]
        everywhere: list[list[Copies]] = [[]] * self.trainer.topology.world_size
        dist.all_gather_object(everywhere, mine)
        raise RuntimeError(
            f"copies of the same parameters differ before the update of step {record.step}: {odd_copies(everywhere)}. The memory or the "
            "arithmetic of that device is faulty. Nothing has been saved since: remove its node and start the same command again, "
            "which resumes from the newest checkpoint"
        )


def _bits(parameter: torch.Tensor) -> torch.Tensor:
    """The sum of a parameter's elements read as integers, [] int64: one flipped bit always changes it."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().reshape(-1).view(integers).sum(dtype=torch.int64)


def odd_copies(everywhere: Sequence[Sequence[Copies]]) -> str:
    """Describe which ranks have other parameters than most of their group, and how many: "rank 2 (node7) differs from ranks 0, 1 in
    ...".

    Args:
        everywhere: for each rank, its copies of each kind of parameter (dense, experts).
    """
    said = []
    for kind in range(len(everywhere[0])):
        for ranks in {tuple(copies[kind].ranks) for copies in everywhere}:
            groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
            for rank in ranks:
                groups.setdefault(tuple(sorted(everywhere[rank][kind].sums.items())), []).append(rank)
            if len(groups) < 2:
                continue
            usual, *others = sorted(groups, key=lambda sums: -len(groups[sums]))
            for sums in others:
                names = [name for (name, value), (_, expected) in zip(sums, usual, strict=True) if value != expected]
                odd = ", ".join(f"rank {rank} ({everywhere[rank][kind].host})" for rank in groups[sums])
                most = ", ".join(map(str, groups[usual]))
                tie = "; it cannot be determined which of them is wrong" if len(groups[sums]) == len(groups[usual]) else ""
                said.append(f"{odd} differs from ranks {most} in {len(names)} parameters, such as {names[0]}{tie}")
    return "; ".join(said)

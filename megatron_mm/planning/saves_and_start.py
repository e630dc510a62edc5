"""The costs of saves, resumes and the start of a run. Bytes and numbers are counted; rates and seconds were measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.planning.hardware import GIGA
from megatron_mm.planning.job import Job
from megatron_mm.planning.memory import parameters_of_ranks, share_of

COPY_GB_S = 1.2
"""Rate at which a process copies its state to the host when it saves, GB/s; training waits for that and no longer. That of one process on
an H200 (docs/gpu.md)."""
START_SECONDS = {"imports": (15.0, 19.0), "checks, data, groups, model and optimizer": (2.5, 3.0), "first step": (13.0, 25.0)}
"""Parts of a start, least and most. Imports and the first step, in which kernels are compiled and prepared: MM1 1.2B and 3B on one H200
(docs/gpu.md). The others: as one process of 512 of mm1_30b, on a CPU (benchmarks/start_time.py); none of them grows faster than the run."""


@dataclass(frozen=True)
class SaveCost:
    """Of the process that has most to write."""

    state_bytes: float
    """Master weights and moments: this process's share of its model-parallel rank's."""
    weight_bytes: float
    """Weights of the model, which data-parallel ranks write a part each."""

    @property
    def staged_bytes(self) -> float:
        """Copied to the host once, and then written."""
        return self.state_bytes + self.weight_bytes

    @property
    def seconds(self) -> float:
        """Training waits so long."""
        return self.staged_bytes / (COPY_GB_S * GIGA)


def save_cost(job: Job) -> SaveCost:
    """What a save asks of a process. A resume reads as many bytes, once each."""
    beside, costs = job.beside, []
    for held in parameters_of_ranks(job):
        owned = share_of(job, dense=held.dense, experts=held.experts, beside=beside.parameters)
        weights = share_of(job, dense=held.dense + held.frozen, experts=held.experts, beside=beside.parameters + beside.frozen_parameters)
        costs.append(SaveCost(job.software.optimizer_bytes * owned, 2 * weights))
    return max(costs, key=lambda cost: cost.staged_bytes)


def numbers_drawn(job: Job) -> float:
    """Random numbers of initial weights on the process that draws most: whole tensors, of which it keeps its tensor-parallel part."""
    layout, most = job.layout, 0.0
    for rank, held in enumerate(parameters_of_ranks(job)):
        whole = job.replicated_parameters if rank == 0 else 0.0
        most = max(most, (held.dense + held.frozen - whole) * layout.tensor + whole + held.experts * layout.expert_tensor)
    return most + job.beside.parameters + job.beside.frozen_parameters


def describe_saves_and_start(job: Job) -> Iterator[str]:
    """Lines for the terminal."""
    cost = save_cost(job)
    staged, state, weights = (size / GIGA for size in (cost.staged_bytes, cost.state_bytes, cost.weight_bytes))
    yield (
        f"save     the fullest process copies {staged:.2f} GB to its host (optimizer {state:.2f}, weights {weights:.2f}), for which "
        f"training waits {cost.seconds:.1f} s, and writes them while training continues; a resume reads as much"
    )
    least, most = (sum(bounds) for bounds in zip(*START_SECONDS.values(), strict=True))
    parts = ", ".join(f"{name} {low:.0f} to {high:.0f}" for name, (low, high) in START_SECONDS.items())
    yield (
        f"start    {least:.0f} to {most:.0f} s to the end of the first step ({parts}), and the time to draw "
        f"{numbers_drawn(job) / 1e9:.1f}e9 initial weights on the device and to connect the processes, which are not measured"
    )

"""The costs of saves, resumes and the start of a run. Bytes and drawn numbers are computed; rates and seconds were measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.planning.hardware import GIGA
from megatron_mm.planning.job import Job
from megatron_mm.planning.memory import parameters_of_ranks, share_of
from megatron_mm.reporting.charts import short
from megatron_mm.reporting.units import size

COPY_GB_S = 1.2
"""Rate, in GB/s, at which a process copies its state to the host for a save, measured with one process on an H200 (docs/gpu.md). Training
waits only for this copy. It is the rate of a first save: later ones keep the host memory, which has not been measured."""
START_SECONDS = {"imports": (15.0, 19.0), "checks, data, groups, model and optimizer": (2.5, 3.0), "first step": (13.0, 25.0)}
"""Shortest and longest time of each part of a start. Imports and the first step, in which kernels are compiled and prepared, were measured
with MM1 1.2B and 3B on one H200 (docs/gpu.md). The others were measured as one process of 512 of mm1_30b, on a CPU
(benchmarks/start_time.py); none of them grows faster than the run."""


@dataclass(frozen=True)
class SaveCost:
    """Cost of a save on the process that has the most to write."""

    state_bytes: float
    """Bytes of this process's share of its model-parallel rank's master weights and moments."""
    weight_bytes: float
    """Bytes of this process's share of its model-parallel rank's weights, which data-parallel ranks divide among them."""

    @property
    def staged_bytes(self) -> float:
        """Bytes that are copied to the host and then written."""
        return self.state_bytes + self.weight_bytes

    @property
    def seconds(self) -> float:
        """Time for which training waits."""
        return self.staged_bytes / (COPY_GB_S * GIGA)


def save_cost(job: Job) -> SaveCost:
    """Compute the cost of a save. A resume reads the same number of bytes, each once."""
    beside, costs = job.beside, []
    for held in parameters_of_ranks(job):
        owned = share_of(job, dense=held.dense, experts=held.experts, beside=beside.parameters)
        weights = share_of(job, dense=held.dense + held.frozen, experts=held.experts, beside=beside.parameters + beside.frozen_parameters)
        costs.append(SaveCost(job.software.optimizer_bytes * owned, 2 * weights))
    return max(costs, key=lambda cost: cost.staged_bytes)


def numbers_drawn(job: Job) -> float:
    """Largest count of random numbers that a process draws for initial weights. It draws whole tensors and keeps its part of each."""
    layout, most = job.layout, 0.0
    for rank, held in enumerate(parameters_of_ranks(job)):
        whole = job.replicated_parameters if rank == 0 else 0.0
        most = max(most, (held.dense + held.frozen - whole) * layout.tensor + whole + held.experts * layout.expert_tensor)
    return most + job.beside.parameters + job.beside.frozen_parameters


def describe_saves_and_start(job: Job) -> Iterator[str]:
    """Lines for the terminal."""
    cost = save_cost(job)
    staged, state, weights = (size(part) for part in (cost.staged_bytes, cost.state_bytes, cost.weight_bytes))
    yield (
        f"save     the fullest process copies {staged} to its host (optimizer {state}, weights {weights}), for which "
        f"training waits {cost.seconds:.2g} s, and writes them while training continues; a resume reads as much"
    )
    least, most = (sum(bounds) for bounds in zip(*START_SECONDS.values(), strict=True))
    parts = ", ".join(f"{name} {low:.0f} to {high:.0f}" for name, (low, high) in START_SECONDS.items())
    yield (
        f"start    {least:.0f} to {most:.0f} s to the end of the first step ({parts}), plus the time to draw "
        f"{short(numbers_drawn(job))} initial weights on the device and to connect the processes (not measured)"
    )

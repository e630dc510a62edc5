"""Degrees of parallelism -> process groups, and this process's ranks in them."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_mm.config import ParallelConfig
from megatron_mm.platform import cpu, engine
from megatron_mm.platform.device import communication_backend, grow_segments, local_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """Ranks of this process and sizes of its groups. Sizes multiply to the world size: tensor x pipeline x data."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    data_rank: int
    data_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes logs and names checkpoints."""
        return self.rank == 0

    @property
    def reports_loss(self) -> bool:
        """Whether this process reports the loss: in every data-parallel copy, one on the last stage, where the loss is known."""
        return self.is_last_stage and self.tensor_rank == 0


def world_size() -> int:
    """Number of processes of this run, according to torchrun; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def initialize(parallel: ParallelConfig, *, seed: int) -> Topology:
    """Join the process group that torchrun set up (or make one of a single process) and split it into megatron-core's groups."""
    cpu.install()
    engine.install()
    device = local_device()
    if parallel.expert_tensor > 1 and device.type != "cuda":
        raise ValueError(
            f"parallel.expert_tensor is {parallel.expert_tensor}, but gloo cannot gather the uneven numbers of tokens that this needs: "
            "use 1 on a CPU, or GPUs"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        grow_segments()
    timeout = timedelta(minutes=parallel.collective_timeout_minutes)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            store, rank, size = _meet(timeout)
            dist.init_process_group(communication_backend(device), store=store, rank=rank, world_size=size, timeout=timeout)
        else:
            dist.init_process_group(communication_backend(device), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel.data_parallel_size(dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():  # it is if a run restarts in the same processes
        make_groups(parallel, distributed_timeout_minutes=max(1, round(parallel.collective_timeout_minutes)))
    topology = _current(parallel, device=device)
    seed_everything(seed + 100 * topology.pipeline_rank + 10_000 * topology.data_rank)
    return topology


def _meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """torchrun's store, this process's rank, and the number of processes.

    When torchrun restarts the processes within a job, it keeps its store, which still has the addresses at which gloo's earlier processes
    listened (torch 2.13). So each start uses names of its own in the store.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store), rank, size


def make_groups(parallel: ParallelConfig, **options: Any) -> None:
    """Make megatron-core's process groups of a layout; `options` are its own. The additional gloo groups for data parallelism are left out:
    megatron-core uses them to send optimizer state, which is not done here."""
    parallel_state.initialize_model_parallel(
        create_gloo_process_groups=False,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        **options,
    )


def _current(parallel: ParallelConfig, *, device: torch.device) -> Topology:
    return Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        virtual_size=parallel.virtual,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, and megatron-core's tracker of tensor-parallel generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave all process groups."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def single_process_groups() -> ProcessGroupCollection:
    """Groups of only this process, for a module that it does not share with others (an image tower).

    The context-parallel group is such a group, because context parallelism is not used here.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    alone = groups.cp
    assert alone.size() == 1, "an image tower needs a group of one process"
    for name in ("tp", "pp", "mp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp"):
        setattr(groups, name, alone)
    return groups


def replicated_groups() -> ProcessGroupCollection:
    """Groups for a module that every process of the run holds whole: data parallelism over all processes, and nothing else."""
    groups, everybody = single_process_groups(), dist.group.WORLD
    for name in ("dp", "dp_cp", "intra_dp_cp", "intra_dist_opt"):
        setattr(groups, name, everybody)
    groups.expt_dp = groups.intra_expt_dp = groups.cp
    return groups


@contextlib.contextmanager
def pretend(parallel: ParallelConfig, *, pipeline_rank: int, seed: int = 0) -> Iterator[Topology]:
    """Act as one pipeline stage of a layout, without any other process, to build its model on the meta device.

    Collectives do nothing, so only construction works here, not a forward pass.
    """
    # A private module, but the only backend that makes groups of processes that do not exist.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu.install()
    engine.install()
    world_size = parallel.model_parallel_size * parallel.expert
    dist.init_process_group("fake", store=FakeStore(), rank=pipeline_rank * (world_size // parallel.pipeline), world_size=world_size)
    try:
        make_groups(parallel)
        seed_everything(seed)
        yield _current(parallel, device=torch.device("meta"))
    finally:
        shutdown()

"""Shares texts among the processes of one data-parallel rank that need the same ones, on the first and the last pipeline stage."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mm.parallel.topology import Topology


class TextGroup:
    """A gloo group, because token ids are read from disk and needed in host memory first. See `data.load.texts.TextSharing`."""

    def __init__(self, group: dist.ProcessGroup, ranks: list[int]) -> None:
        self._group, self._ranks = group, ranks

    @property
    def is_reader(self) -> bool:
        """Whether this process reads the texts: the first tensor-parallel rank of the first stage, which also reads images."""
        return dist.get_rank() == self._ranks[0]

    def share(self, values: np.ndarray) -> None:
        """Copy the reader's array into every process's array."""
        dist.broadcast(torch.from_numpy(values), src=self._ranks[0], group=self._group)


_made: dict[int, TextGroup | None] = {}


def text_group(topology: Topology, *, timeout: timedelta) -> TextGroup | None:
    """This process's group, made once for all loaders of a run; None if it needs no texts, or if no other process needs the same ones.

    All processes call it together.
    """
    needing = topology.tensor_size * min(2, topology.pipeline_size)
    if not dist.is_initialized() or needing == 1:
        return None
    key = id(dist.group.WORLD)  # a later initialisation makes other groups
    if key not in _made:
        _made.clear()
        _made[key] = _make_groups(topology, timeout=timeout)
    return _made[key]


def _make_groups(topology: Topology, *, timeout: timedelta) -> TextGroup | None:
    mine = None
    for data_rank in range(topology.data_size):
        # megatron-core counts ranks by tensor-parallel rank, then data-parallel rank, then pipeline stage.
        stages = dict.fromkeys([0, topology.pipeline_size - 1])
        first = [topology.tensor_size * (data_rank + topology.data_size * stage) for stage in stages]
        ranks = [rank + tensor_rank for rank in first for tensor_rank in range(topology.tensor_size)]
        # Not with use_local_synchronization: it hangs where another group has the same ranks (torch 2.13).
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if dist.get_rank() in ranks:
            in_model = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
            assert set(ranks) <= set(in_model), f"ranks {ranks} belong to several replicas of the model: {in_model}"
            mine = TextGroup(group, ranks)
    return mine

"""How expert-parallel groups are placed on nodes, and how much they send over the network.

megatron-core numbers the processes of a pipeline stage with expert tensor parallelism first and expert parallelism next, so a group of both
consists of consecutive processes. A group within one node exchanges tokens over NVLink. A group that spans several nodes sends them over
the network, but each of its processes holds fewer experts, whose gradients and weights go over the network once per step. Which is less
depends on the number of tokens per step: with many tokens, their exchange is larger; with few, the gradients are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from megatron_mm.config import Experiment, ParallelConfig

USUAL_GPUS = 8
"""GPUs per node if neither a launcher nor CUDA says how many there are."""


def gpus_per_node() -> int:
    """Number of processes of this run on each node, according to torchrun; without torchrun, the number of this machine's GPUs."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return torch.cuda.device_count() if torch.cuda.is_available() else USUAL_GPUS


def nodes_of_expert_group(parallel: ParallelConfig, *, world_size: int, gpus: int) -> int:
    """Maximum number of nodes that a group of processes which exchange tokens spans.

    >>> nodes_of_expert_group(ParallelConfig(expert=32), world_size=128, gpus=8)
    4

    Args:
        gpus: GPUs per node.
    """
    size = parallel.expert * parallel.expert_tensor
    return max((begin + size - 1) // gpus - begin // gpus + 1 for begin in range(0, max(world_size, size), size))


@dataclass(frozen=True)
class ExpertTraffic:
    """Bytes that a process sends over the network for its experts in a step, and bytes that it holds for them."""

    tokens: float
    """Tokens sent to experts and back, forward and backward, to other nodes only."""
    weights: float
    """Gradients and weights of its experts, reduced and gathered over their data parallelism."""
    held: float
    """Weights and gradients of its experts."""


def expert_traffic(experiment: Experiment, *, expert: int, world_size: int, gpus: int) -> ExpertTraffic:
    """Expert traffic of a sparse model with this expert-parallel degree, if routing is balanced.

    A step's tokens take 2 bytes per channel. They go to top_k experts in each sparse layer and come back, forward and backward: 4 times. If
    a group spans several nodes, only tokens to processes on other nodes count. Gradients have 4 or 2 bytes, weights 2.
    """
    decoder, parallel = experiment.model.decoder, experiment.parallel
    moe = decoder.moe
    assert moe is not None
    size = expert * parallel.expert_tensor
    tokens = experiment.train.global_batch_size * experiment.data.sequence_length * len(decoder.sparse_layers) / world_size
    away = max(0.0, 1 - gpus / size)
    of_expert = 3 * decoder.hidden_size * decoder.ffn_hidden_size / parallel.expert_tensor
    parameters = len(decoder.sparse_layers) / parallel.pipeline * moe.num_experts / expert * of_expert
    copies = world_size // (parallel.pipeline * size)
    gradient = 4 if experiment.precision.gradients == "fp32" else 2
    shared = (1 - 1 / copies) if copies * size > gpus else 0.0  # copies on one node reduce over NVLink
    return ExpertTraffic(
        tokens=4 * moe.top_k * tokens * decoder.hidden_size * 2 * away,
        weights=parameters * (gradient + 2) * shared,
        held=parameters * (gradient + 2),
    )

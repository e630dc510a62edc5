"""The contents of a checkpoint: the run's counters, and its tensors as pieces of global tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import fp8_weights
from megatron_mm.training.checkpoint.optimizer_state import optimizer_state
from megatron_mm.training.spread_encoder import wrapped_modules


@dataclass
class TrainState:
    """The state of a run apart from its tensors."""

    step: int = 0
    """Completed steps."""
    plan: dict[str, Any] | None = None
    """The plan's cursor, as returned by `PlanState.to_dict`; None before the first step."""
    skipped_steps: int = 0
    """Steps whose gradient was not finite."""
    skipped_in_a_row: int = 0
    """Number of consecutive skipped steps up to and including the last step."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps that were not skipped, oldest first, for detecting a spike."""
    best_heldout: float | None = None
    """The lowest held-out loss so far, if `checkpoint.best` is set."""
    best_step: int | None = None
    """Step with the lowest held-out loss."""
    tokens: int = 0
    """Tokens trained on, excluding padding."""
    images: int = 0
    """Images trained on."""
    bad_samples: dict[str, int] = field(default_factory=dict)
    """Samples that failed at run time, by source."""
    num_samples: dict[str, int] = field(default_factory=dict)
    """Samples in the index of each source that the run was last started with; empty in checkpoints of earlier versions."""


def model_state(model: list[DistributedDataParallel]) -> dict[str, Any]:
    """Return the weights of this process's chunks, `model0`, `model1`, ..., as pieces of global tensors; a spread encoder is the last."""
    modules = wrapped_modules(model)
    states = (module.module.sharded_state_dict(metadata=dict(STATE_METADATA)) for module in modules)
    return {f"model{i}": fp8_weights.with_values(state) for i, state in enumerate(states)}


def run_state(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer, topology: Topology, *, loading: bool, generators: bool = True
) -> dict[str, Any]:
    """Return weights, optimizer state and (if `generators`) random-number generators of this process, as pieces of global tensors."""
    chunks = model_state(model)
    state: dict[str, Any] = dict(chunks)
    # The optimizer looks up its parameters in all chunks at once, so they are merged; the prefix keeps their names apart.
    merged = {f"{i}.{name}": entry for i, chunk in enumerate(chunks.values()) for name, entry in chunk.items()}
    state["optimizer"] = optimizer_state(optimizer, merged, loading=loading)
    if generators:
        state["generators"] = generator_state(topology)
    return state


def to_be_forked(state: dict[str, Any]) -> dict[str, Any]:
    """Give each CPU tensor of the state a storage of its own over the same memory, and return the state.

    megatron-core's writer is a fork, which sees this process's memory as it is now. But megatron-core first copies a tensor that is part
    of a larger storage (weights are part of their buffer, boxes part of a run), while training waits.
    """
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor) and entry.data is not None and _is_part(entry.data):
            entry.data = _alone(entry.data)
    return state


def _is_part(tensor: torch.Tensor) -> bool:
    on_processor = tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return on_processor and tensor.is_contiguous() and 0 < tensor.numel() * tensor.itemsize < tensor.untyped_storage().size()


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor over the same memory, with a storage that covers only its own elements."""
    content = torch.from_numpy(tensor.detach().view(-1).view(torch.uint8).numpy())
    return content.view(tensor.dtype).view(tensor.shape)


def generator_state(topology: Topology) -> dict[str, ShardedTensor]:
    """Return this process's random-number generators, each as its row of a [world_size, bytes] tensor."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states.update({f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()})
    return {
        name: ShardedTensor.from_rank_offsets(
            f"generators.{name}", state.cpu().clone()[None], (0, topology.rank, topology.world_size), replica_id=0
        )
        for name, state in states.items()
    }


def restore_generators(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"][0].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0].cpu())
    tracker = {name.removeprefix("tracker."): state[0].cpu() for name, state in states.items() if name.startswith("tracker.")}
    get_cuda_rng_tracker().set_states(tracker)

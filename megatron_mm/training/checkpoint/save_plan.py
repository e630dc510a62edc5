"""The plan of which process writes which part of a checkpoint: made in the first saves of a run, and reused by all later ones.

Before a process can stage its bytes, three things must be known: which replica of a tensor is written (data-parallel ranks have the same
weights and share the work), what each process writes to which file, and where everything is in the finished checkpoint. All of this follows
from names, shapes and offsets, which do not change between saves. Without this plan, every process would gather the descriptions of all
pieces of all other processes twice in each save, and wait for the slowest process.

    first save     weights are distributed over data-parallel ranks (one message among them); the first process gathers all plans, and
                   validates that the pieces cover every element of their tensors exactly once
    second save    the plan is made again, and is the same
    later saves    no descriptions of pieces are exchanged
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

_NOTHING_TO_DEAL: Any = ()
"""Distribution for a single data-parallel rank, which writes everything it has."""


class SavePlans:
    """The save strategy of a run, and the structure of the state that it was made for."""

    def __init__(self) -> None:
        self._strategy: FullyParallelSaveStrategyWrapper | None = None
        self._structure: list[tuple[Any, ...]] | None = None

    def must_be_made(self, state: dict[str, Any]) -> bool:
        """Return whether there is no plan yet, or the structure of this process's state has changed since it was made."""
        return self._strategy is None or structure_of(state) != self._structure

    def strategy_for(self, state: dict[str, Any], *, anew: bool) -> FullyParallelSaveStrategyWrapper:
        """Return megatron-core's save strategy for this state. Called by all processes together.

        Args:
            anew: `must_be_made` returned True on some process.
        """
        if self._strategy is None or anew:
            self._structure = structure_of(state)
            self._strategy = _new_strategy(state)
        return self._strategy


def structure_of(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return everything that a plan depends on: name, type and place of each piece of this process."""
    return [
        (entry.key, entry.dtype, entry.local_shape, entry.global_shape, entry.global_offset, entry.replica_id)
        if isinstance(entry, ShardedTensor)
        else (entry.key, getattr(entry, "replica_id", None))
        for entry in nested_values(state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory | ShardedObject)
    ]


def _new_strategy(state: dict[str, Any]) -> FullyParallelSaveStrategyWrapper:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    base = TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)
    strategy = FullyParallelSaveStrategyWrapper(base, group, do_cache_distribution=True)
    apply_factories(state)  # in place, as the save itself would do next
    # The distribution is set here because the strategy, if it made its own, would validate on every process what the first process
    # validates anyway when it combines the plans (torch's `_validate_global_plan`).
    strategy.cached_distribution = determine_main_replica_uniform_distribution(state, group) or _NOTHING_TO_DEAL
    return strategy

"""The distributed optimizer's state as pieces of global tensors, each written by the process that holds it.

megatron-core splits the flat buffer of all parameters evenly over data parallelism, so a process has a run of consecutive elements of a few
parameters. Its own "fully reshardable" checkpoints first gather whole parameters on every process: 12 bytes for each parameter of a
model-parallel share. Here the process that has a run writes it as rectangular boxes of the parameter, under the same names and shapes. So
nothing is gathered, any layout can read what another one wrote, and older checkpoints can be read, too.

Worked example: a process has elements 2 to 9 (10 not included) of a parameter with 4 rows and 3 columns.

    . . 2
    3 4 5    -> row 0, column 2; rows 1 and 2; row 3, column 0
    6 7 8
    9 . .

The elements of a state are contiguous, so each box is a view of them: a save copies them once, and a load writes in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.platform.fp8_weights import weight_of

_STATES = ("param", "exp_avg", "exp_avg_sq")
"""Master weights and the two moments of Adam."""

_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""Keys by which megatron-core distinguishes parameter groups."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor whose elements are consecutive in memory."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    """Yield the boxes that elements [begin, end) of a contiguous tensor fill, in order: at most 2 * dimensions - 1."""
    if begin >= end:
        return
    if not shape:
        yield Box((), ())
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, last = begin // row, (end - 1) // row
    if first == last and end - begin < row:
        yield from _in_row(first, boxes(inner, begin - first * row, end - first * row))
        return
    if begin % row:
        yield from _in_row(first, boxes(inner, begin % row, row))
        first += 1
    whole = end // row - first
    if whole:
        yield Box((first, *(0 for _ in inner)), (whole, *inner))
    if end % row:
        yield from _in_row(last, boxes(inner, 0, end % row))


def _in_row(number: int, found: Iterator[Box]) -> Iterator[Box]:
    return (Box((number, *box.offset), (1, *box.shape)) for box in found)


def optimizer_state(optimizer: MegatronOptimizer, weights: dict[str, Any], *, loading: bool) -> dict[Any, Any]:
    """Return the state of an optimizer in the form that megatron-core's checkpoints take.

    Args:
        weights: the model's state, which maps each parameter to a piece of a global tensor.
        loading: the state will be loaded, so allocate it if it does not exist yet.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        return optimizer.sharded_state_dict(weights, is_loading=loading, metadata=dict(STATE_METADATA))
    entries = {
        id(weight_of(entry.data)): entry for entry in nested_values(weights) if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    states = [_state_of_part(part, entries, loading=loading) for part in parts if not is_beside(part)]
    for part in filter(is_beside, parts):
        _merge(states[0], _state_of_part(part, entries, loading=loading))
    if len(states) == 1:
        return states[0]
    for number, state in enumerate(states):
        add_prefix_for_sharding(state, f"chained_{number}.")
    return dict(enumerate(states))


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """Apply a loaded state to the optimizer. The tensors were loaded in place, so only the parameter groups remain."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        optimizer.load_state_dict(loaded)
        return
    own = [part for part in parts if not is_beside(part)]
    beside = [part for part in parts if is_beside(part)]
    states = [loaded] if len(own) == 1 else [loaded[number] for number in range(len(own))]
    for part, state in zip([*own, *beside], [*states, *(states[:1] * len(beside))], strict=True):
        part.load_state_dict({name: value for name, value in state.items() if not name.startswith("param_state")})


def _state_of_part(part: DistributedOptimizer, entries: dict[int, Any], *, loading: bool) -> dict[str, Any]:
    state = part.state_dict()
    if loading:
        part.load_state_dict(part.state_dict())  # allocates
    runs: dict[str, ShardedTensor] = {}
    for buffer in part.gbuf_ranges:
        for parameter, ranges in (item for buckets in buffer.values() for bucket in buckets for item in bucket["param_map"].items()):
            run = ranges["param"]
            tensors = part._get_main_param_and_optimizer_states(parameter)
            missing = [name for name in _STATES if name not in tensors]
            assert not missing, f"the optimizer has no {missing} yet: initialize_state creates them"
            for piece in _pieces(entries[id(parameter)], run.start, run.end, is_copied=not is_beside(part)):
                for name in _STATES:
                    key = f"optimizer.state.{name}.{piece.key}"
                    values = tensors[name].view(-1)[piece.first : piece.first + piece.numel]
                    runs[f"{key}{piece.offset}"] = piece.sharded(key, values)
    return {**state, "param_state": runs, "param_state_sharding_type": STATE_METADATA["distrib_optim_sharding_type"]}


def is_beside(part: MegatronOptimizer) -> bool:
    """Return whether the parameters of an optimizer part belong to no pipeline stage (`training.spread_encoder`). Checkpoints merge such a
    part into the first one, so their contents do not depend on whether the encoder is spread."""
    return getattr(part, "beside_pipeline", False)


def _merge(state: dict[str, Any], other: dict[str, Any]) -> None:
    """Add the pieces of another part to a part's state, and the parameter groups that the part lacks."""
    state["param_state"].update(other["param_state"])
    groups = state["optimizer"]["param_groups"]
    known = {tuple(group.get(key) for key in _GROUP_KEYS) for group in groups}
    groups += [g for g in other["optimizer"]["param_groups"] if tuple(g.get(key) for key in _GROUP_KEYS) not in known]


@dataclass(frozen=True)
class _Piece:
    """A box of a global tensor."""

    entry: ShardedTensor
    """The piece of the model's weights that contains it."""
    box: Box
    """Position and shape within the entry."""
    first: int
    """Index of its first element in the run."""
    is_copied: bool
    """Other tensor-parallel or pipeline ranks may have the same elements."""

    @property
    def key(self) -> str:
        return self.entry.key

    @property
    def numel(self) -> int:
        return self.box.numel

    @property
    def offset(self) -> tuple[int, ...]:
        """Offset in the global tensor."""
        stacked = self.entry.prepend_axis_num
        begin = self.entry.global_offset
        return (*begin[:stacked], *(a + b for a, b in zip(begin[stacked:], self.box.offset, strict=True)))

    def sharded(self, key: str, values: torch.Tensor) -> ShardedTensor:
        """Return the same box of another tensor. No other data-parallel rank has it, so this process writes it, unless another
        tensor-parallel or pipeline rank writes the same elements."""
        shape = (1,) * self.entry.prepend_axis_num + self.box.shape
        pipeline, tensor, _ = self.entry.replica_id
        return replace(
            self.entry,
            key=key,
            data=values.view(shape),
            dtype=values.dtype,
            local_shape=shape,
            global_offset=self.offset,
            axis_fragmentations=None,  # boxes make no regular grid
            replica_id=(pipeline, tensor, 0) if self.is_copied else (0, 0, 0),
            prepend_axis_num=0,
            allow_shape_mismatch=False,
        )


def _pieces(entry: ShardedTensor | ShardedTensorFactory, begin: int, end: int, *, is_copied: bool) -> Iterator[_Piece]:
    """Yield the boxes that elements [begin, end) of a parameter fill.

    A parameter may consist of several pieces of global tensors, such as both branches of a SwiGLU, each of consecutive elements.
    """
    whole = entry.data
    parts: dict[str, Any] = {"entry": replace(entry) if isinstance(entry, ShardedTensor) else entry}
    apply_factories(parts)
    for part in nested_values(parts):
        data = part.data
        assert data.is_contiguous() and data.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr(), part.key
        place = data.storage_offset() - whole.storage_offset()
        first, last = max(begin, place), min(end, place + data.numel())
        done = first
        for box in boxes(data.shape, first - place, last - place):
            yield _Piece(part, box, done - begin, is_copied)
            done += box.numel

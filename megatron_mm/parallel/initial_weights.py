"""Initial weights that do not depend on the layout.

Every parameter has one global name and one global shape, whatever the degrees of parallelism. Its initial value is drawn for the whole
parameter, by a generator seeded with (seed, global name), and each process keeps its own part. A process thus draws more numbers than it
needs (those of the whole tensor-parallel group), which takes some seconds, once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.transformer.module import MegatronModule

from megatron_mm.platform import engine, fp8_weights

STATE_METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
"""How checkpoints name tensors: each layer by its own number, optimizer state by parameter, so that any layout can read them."""


@torch.no_grad()
def initialize_weights(chunks: list[MegatronModule], *, seed: int) -> None:
    """Set every parameter of the pipeline chunks of this process in place.

    A parameter carries `init_value` (a constant), or `init_std` (a normal distribution around 0) and optionally `init_like`
    (`InitialValue.like`). A bias that carries neither is 0. Raises ValueError for any other parameter that carries neither, and
    AssertionError for one that has no global name.
    """
    for chunk in chunks:
        reached: set[int] = set()
        state = fp8_weights.with_values(chunk.sharded_state_dict(metadata=dict(STATE_METADATA)))
        for entry in nested_values(state):
            weight = fp8_weights.weight_of(entry.data) if isinstance(entry, ShardedTensor | ShardedTensorFactory) else None
            if isinstance(weight, torch.nn.Parameter):
                reached.add(id(weight))
                _initialize(entry, weight, seed=seed)
        missed = [name for name, parameter in chunk.named_parameters() if id(parameter) not in reached]
        assert not missed, f"parameters without a global name: {missed}"


def _initialize(entry: ShardedTensor | ShardedTensorFactory, weight: torch.nn.Parameter, *, seed: int) -> None:
    """Set a weight through `entry`, which has its global name. The entry's data is the weight's own memory, or the values that an FP8
    weight is made from."""
    rule = initial_value(entry.key, weight)
    if rule.constant is not None:
        entry.data.fill_(rule.constant)
    else:
        _draw_into(entry, rule, seed=seed)
    if entry.data is not weight:
        fp8_weights.set_values(weight, entry.data)


def _draw_into(entry: ShardedTensor | ShardedTensorFactory, rule: InitialValue, *, seed: int) -> None:
    pieces = {"piece": entry}
    apply_factories(pieces)  # a SwiGLU's two branches are one global matrix, of which a process holds two pieces
    which: tuple[object, ...] = ()
    whole = torch.empty(0)
    for piece in nested_values(pieces):
        stacked = piece.prepend_axis_num
        name, shape, row = rule.drawn_as(piece.key), piece.global_shape[stacked:], piece.global_offset[:stacked]
        if which != (name, shape, row):  # the two pieces of a SwiGLU are parts of one matrix, drawn once
            whole = torch.empty(0)  # free the previous one first
            which, whole = (name, shape, row), draw(name, shape, std=rule.std, seed=seed, row=row, device=piece.data.device)
        piece.data.copy_(whole[engine.place_of(piece)[stacked:]])


@dataclass(frozen=True)
class InitialValue:
    """Initial value of a parameter: a constant, or drawn from a normal distribution around 0."""

    constant: float | None
    std: float = 0.0
    like: tuple[str, str] | None = None
    """Initialise as a copy of another parameter: (part of this parameter's name, what the other's name has instead)."""

    def drawn_as(self, name: str) -> str:
        """The name under which the parameter `name` is drawn."""
        return name if self.like is None else name.replace(*self.like)


def initial_value(name: str, parameter: torch.Tensor) -> InitialValue:
    """The rule of `initialize_weights` for a parameter of this global name."""
    if hasattr(parameter, "init_value"):
        return InitialValue(float(parameter.init_value))
    if hasattr(parameter, "init_std"):
        like = getattr(parameter, "init_like", None)
        return InitialValue(0.0) if parameter.init_std == 0 else InitialValue(None, float(parameter.init_std), like)
    if parameter.ndim > 1 or not name.endswith("bias"):
        raise ValueError(
            f"parameter {name} of shape {list(parameter.shape)} has no initial value: give it `init_std` (a matrix) or `init_value` "
            "(1.0 for a norm's weight) where it is created, as megatron_mm.models.plain does"
        )
    return InitialValue(0.0)


def draw(
    name: str, shape: Sequence[int], *, std: float, seed: int, row: Sequence[int] = (), device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw a whole parameter in float32.

    Generators of different devices draw different numbers; every process of a run has the same kind of device.

    Args:
        row: index in a stack, such as one expert of a layer: each is drawn separately, under its own number.
    """
    generator = torch.Generator(device=device).manual_seed(_seed_of("/".join([name, *map(str, row)]), seed))
    return torch.empty(tuple(shape), dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1

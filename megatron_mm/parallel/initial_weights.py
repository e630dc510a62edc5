"""Initial weights that do not depend on the layout.

Every parameter has one global name and one global shape, whatever the degrees of parallelism. Its initial value is drawn
for the whole of it by a generator that is seeded with (seed, global name), and each process keeps its own part. That draws
more numbers than a process needs (its share of the tensor-parallel group's), which costs seconds, once.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.transformer.module import MegatronModule

STATE_METADATA = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
"""How checkpoints name things: each layer by its own number, optimizer state by parameter, so that any layout can read it."""


@torch.no_grad()
def initialize_weights(chunks: list[MegatronModule], *, seed: int) -> None:
    """Set every parameter of the pipeline chunks of this process in place.

    A parameter may carry `init_value` (a constant) or `init_std` (a normal distribution around 0). Without either a norm's
    weight is 1 and any other vector is 0. Raises AssertionError for a matrix that carries neither, or for a parameter
    that no rule reached.
    """
    for chunk in chunks:
        reached: set[int] = set()
        state = chunk.sharded_state_dict(metadata=dict(STATE_METADATA))
        for entry in nested_values(state):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(entry.data, torch.nn.Parameter):
                reached.add(id(entry.data))
                _initialize(entry, seed=seed)
        missed = [name for name, parameter in chunk.named_parameters() if id(parameter) not in reached]
        assert not missed, f"parameters without a global name: {missed}"


def _initialize(entry: ShardedTensor | ShardedTensorFactory, *, seed: int) -> None:
    value, std = _rule(entry.key, entry.data)
    if value is not None:
        entry.data.fill_(value)
        return
    pieces = {"piece": entry}
    apply_factories(pieces)  # a SwiGLU's two branches are one global matrix, of which a process holds two pieces
    for piece in nested_values(pieces):
        # Generators of different devices draw different numbers; every process of a run has the same kind of device.
        # Experts are one global tensor with an axis of experts in front; each is drawn by itself, under its own number.
        stacked = piece.prepend_axis_num
        name = "/".join([piece.key, *map(str, piece.global_offset[:stacked])])
        generator = torch.Generator(device=piece.data.device).manual_seed(_seed_of(name, seed))
        whole = torch.empty(piece.global_shape[stacked:], dtype=torch.float32, device=piece.data.device)
        whole.normal_(0.0, std, generator=generator)
        piece.data.copy_(whole[piece.global_slice()[stacked:]])


def _rule(name: str, parameter: torch.nn.Parameter) -> tuple[float | None, float]:
    """(constant, std): the constant where there is one, else the std of a normal distribution."""
    if hasattr(parameter, "init_value"):
        return float(parameter.init_value), 0.0
    if hasattr(parameter, "init_std"):
        return (0.0, 0.0) if parameter.init_std == 0 else (None, float(parameter.init_std))
    assert parameter.ndim <= 1, f"{name} of shape {tuple(parameter.shape)} has no init_std"
    return (1.0, 0.0) if name.endswith("norm.weight") else (0.0, 0.0)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1

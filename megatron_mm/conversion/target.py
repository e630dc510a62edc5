"""The tensors of a recipe's model, without allocating them: global name, shape, type, and initial value.

The model itself provides this list: it is built on the meta device, for a single process without process groups, and lists its tensors as
it does for a checkpoint. So there is no second list of names to maintain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.conversion.files import TensorInfo
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA, InitialValue, draw, initial_value
from megatron_mm.training.build import build_chunks


@dataclass(frozen=True)
class Target:
    """A tensor that a checkpoint of the model holds."""

    name: str
    info: TensorInfo
    initial: InitialValue
    stacked: bool
    """Whether it is a stack, for example of experts, whose rows are converted and drawn one by one."""

    def draw(self, *, seed: int, row: int | None) -> torch.Tensor:
        """Draw its initial value, or that of one row of a stack, as `initialize_weights` would on a CPU."""
        shape = self.info.shape if row is None else self.info.shape[1:]
        if self.initial.constant is not None:
            return torch.full(shape, self.initial.constant, dtype=self.info.dtype)
        rows = () if row is None else (row,)
        return draw(self.initial.drawn_as(self.name), shape, std=self.initial.std, seed=seed, row=rows).to(self.info.dtype)


def model_targets(experiment: Experiment) -> dict[str, Target]:
    """Return every tensor of the experiment's model, by name, in the model's order."""
    parallel = ParallelConfig()
    found: dict[str, Target] = {}
    with topologies.pretend(parallel, pipeline_rank=0) as topology:
        # FP8 training keeps its weights in bfloat16, and building them needs no FP8 kernels.
        precision = "bf16" if experiment.train.precision == "fp8" else experiment.train.precision
        one_process = replace(experiment, parallel=parallel, train=replace(experiment.train, precision=precision))
        for chunk in build_chunks(one_process, topology):
            for entry in nested_values(chunk.sharded_state_dict(metadata=dict(STATE_METADATA))):
                if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                    found[entry.key] = _target(entry)
    return found


def _target(entry: ShardedTensor | ShardedTensorFactory) -> Target:
    initial = initial_value(entry.key, entry.data)
    if isinstance(entry, ShardedTensorFactory):
        first = next(piece for piece in nested_values({"piece": entry.build()}) if isinstance(piece, ShardedTensor))
        return Target(entry.key, TensorInfo(tuple(first.global_shape), first.dtype), initial, stacked=first.prepend_axis_num > 0)
    return Target(entry.key, TensorInfo(tuple(entry.global_shape), entry.dtype), initial, stacked=entry.prepend_axis_num > 0)

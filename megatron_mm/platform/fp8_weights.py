"""Support for weights that are Transformer Engine's FP8 tensors (`PrecisionConfig.fp8_weights`) in code that handles weights by name.

Such a tensor reports the type bf16, but stores one byte per number and a scale. It has no memory into which initial values could be drawn,
or of which a checkpoint could take pieces. So in a model's state it is replaced with a bf16 tensor of its values (`with_values`), and
loaded values are rounded again (`set_values`). If there is an optimizer, its fp32 master weights are the precise ones:
`round_master_weights` makes all weights from them, as the end of each step does, so that a resume starts with exactly the weights that the
run had.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_mm.platform.engine import parts_of


def is_fp8(weight: Any) -> bool:
    return isinstance(weight, torch.Tensor) and is_float8tensor(weight)


@torch.no_grad()
def values_of(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight: a new bf16 tensor [...] if it is an FP8 tensor, else the weight itself."""
    return dequantize_fp8_tensor(weight.detach()) if is_fp8(weight) else weight


def with_values(state: dict[str, Any]) -> dict[str, Any]:
    """A module's state (pieces of global tensors by name), with FP8 weights replaced in place with their values. `weight_of` finds the
    weights again."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and is_fp8(entry.data):
            values = values_of(entry.data)
            values.fp8_weight = entry.data  # type: ignore[attr-defined]
            entry.data = values
    return state


def weight_of(data: Any) -> Any:
    """The FP8 weight whose values these are; any other tensor itself."""
    return getattr(data, "fp8_weight", data)


@torch.no_grad()
def set_values(weight: torch.Tensor, values: torch.Tensor) -> None:
    """Set an FP8 weight to bf16 values, rounded. Master weights that are later made from it start with the unrounded values."""
    weight.copy_(values)
    precise = getattr(weight, "get_high_precision_init_val", lambda: None)()
    if precise is not None:
        precise.copy_(values)


def round_master_weights(optimizer: MegatronOptimizer) -> None:
    """Make all weights from the master weights that a checkpoint contained; called by all processes. The checkpoint's own weights may have
    been in FP8."""
    chunks: dict[int, Any] = {}
    for part in parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._copy_main_params_to_model_params()
            if not part.ddp_config.overlap_param_gather:  # else the next forward pass gathers them
                chunks.update((id(chunk), chunk) for chunk in part.model_chunks)
    for chunk in chunks.values():
        chunk.start_param_sync()

"""Modules that are replicated on every process of a tensor-parallel group, each of which runs them on its own share of the input (image
encoders)."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


def mark_replicated(module: torch.nn.Module) -> None:
    """Mark the module's parameters, so that their gradients are summed over the group and counted once in the gradient norm."""
    for parameter in module.parameters():
        parameter.encodes_shares = True  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        parameter.sequence_parallel = False  # type: ignore[attr-defined]


def replicated_state(module: torch.nn.Module, *, prefix: str) -> ShardedStateDict:
    """The module's parameters for a checkpoint, as replicas: the first process that holds one writes it."""
    state = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, torch.nn.Parameter)}
    sharded = make_sharded_tensors_for_checkpoint(
        state,
        prefix,
        tensor_parallel_layers_axis_map={},
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    for entry in sharded.values():  # every pipeline rank may hold a copy
        entry.replica_id = (pipeline, *entry.replica_id[1:])
    for name, layer in module.named_modules():
        if isinstance(layer, TransformerLayer):  # a layer's spec says which of its names differ from the checkpoint's
            names = layer.submodules_config.sharded_state_dict_keys_map
            apply_prefix_mapping(sharded, {f"{prefix}{name}.{ours}": f"{prefix}{name}.{theirs}" for ours, theirs in names.items()})
    return sharded

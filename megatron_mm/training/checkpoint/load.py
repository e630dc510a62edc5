"""Loads weights from a checkpoint, from any layout into any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import Experiment
from megatron_mm.parallel.topology import Topology
from megatron_mm.platform import common_state, fp8_weights, part_reader, safe_objects
from megatron_mm.training.checkpoint.compatible import check_same_model
from megatron_mm.training.checkpoint.integrity import agree, verify
from megatron_mm.training.checkpoint.names import TENSORS, belongs_to_model
from megatron_mm.training.checkpoint.positions import Interpolation, stored_tensors
from megatron_mm.training.checkpoint.state import model_state
from megatron_mm.training.spread_encoder import wrapped_modules

_NAMED = 40
"""Maximum number of tensors that an error names."""


def load_weights(experiment: Experiment, topology: Topology, model: list[DistributedDataParallel], checkpoint: Path) -> None:
    """Load the weights alone, from any layout into any layout; positions for another image size are interpolated.

    Raises ValueError if the checkpoint is damaged or of another model, or if a tensor is missing or unexpected.
    """
    check_same_model(experiment, checkpoint, with_optimizer=False)
    verify(checkpoint, topology)
    state = model_state(model)
    with shared_metadata(checkpoint, topology):
        _check_names(state, checkpoint)
        interpolation = Interpolation.needed(experiment, checkpoint)
        interpolation.ask(state)
        asked = {chunk: dict(entries) for chunk, entries in state.items()}
        loaded = dist_checkpointing.load(
            state,
            str(checkpoint / TENSORS),
            sharded_strategy=load_strategy(),
            strict=StrictHandling.RAISE_UNEXPECTED,
        )
    interpolation.answer(asked, loaded)
    if topology.is_main:
        interpolation.say()
    for index, chunk in enumerate(wrapped_modules(model)):
        load_chunk(chunk.module, loaded[f"model{index}"])


def _check_names(state: dict[str, Any], checkpoint: Path) -> None:
    """Raise ValueError if the checkpoint lacks weights of the model or has weights that the model does not have, listing them."""
    pieces = {chunk: dict(entries) for chunk, entries in state.items()}
    apply_factories(pieces)  # in place
    mine = {entry.key for entry in nested_values(pieces) if isinstance(entry, ShardedTensor)}
    group = parallel_state.get_model_parallel_group()  # every data-parallel copy has the same names
    names: list[set[str]] = [set()] * group.size()
    dist.all_gather_object(names, mine, group=group)
    wanted = set().union(*names)
    stored = {name for name in stored_tensors(checkpoint) if belongs_to_model(name)}
    for what, missed in (("lacks", wanted - stored), ("has, in addition to the model's,", stored - wanted)):
        if missed:
            named = ", ".join(sorted(missed)[:_NAMED]) + (", ..." if len(missed) > _NAMED else "")
            raise ValueError(f"checkpoint {checkpoint} {what} {len(missed)} tensors: {named}")


def load_chunk(chunk: torch.nn.Module, state: dict[str, Any]) -> None:
    """Copy weights into a pipeline chunk; every weight must be present. Transformer Engine's `_extra_state` is not saved, so it may be
    missing."""
    missing, unexpected = chunk.load_state_dict(state, strict=False)
    for name, weight in chunk.named_parameters():
        if fp8_weights.is_fp8(weight):
            fp8_weights.set_values(weight, state[name])
    missing = [name for name in missing if "._extra_state" not in name]
    assert not missing and not unexpected, f"the checkpoint lacks {missing} and has {unexpected}"


@contextlib.contextmanager
def shared_metadata(checkpoint: Path, topology: Topology) -> Iterator[None]:
    """Within this context, all processes use the checkpoint's metadata (the locations of its pieces) that the first process has read.

    The metadata grows with the number of processes that wrote the checkpoint, so it should not be read by each. Called by all processes
    together. Raises ValueError on all of them if the metadata cannot be read.
    """
    part_reader.install()
    folder, found, problem = checkpoint / TENSORS, [b""], ""
    if topology.is_main:
        try:
            found = [(folder / part_reader.METADATA).read_bytes()]
        except OSError as error:
            problem = f"checkpoint {checkpoint} cannot be read ({error}): restore it or remove it"
    agree(problem, world_size=topology.world_size, device=topology.device)
    dist.broadcast_object_list(found, src=0)
    part_reader.give_metadata(folder, found[0])
    try:
        yield
    finally:
        part_reader.give_metadata(folder, None)


def load_strategy() -> FullyParallelLoadStrategyWrapper:
    """Return a strategy that reads each stored element only once for all data-parallel processes that need it."""
    safe_objects.install()
    common_state.install()
    return FullyParallelLoadStrategyWrapper(common_state.LoadStrategy(), parallel_state.get_data_parallel_group(with_context_parallel=True))

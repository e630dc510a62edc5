"""Upcycling: a sparse model in which every expert starts as a copy of the dense model's MLP (arXiv 2212.05055).

The gate weights of a token's experts add up to 1, so the new sparse model computes the same as the dense one. Routers have their initial
weights, and the optimizer state is new. Every process loads its own part of the dense checkpoint, whatever layout wrote it: each of its
experts loads the dense layer's MLP by name. Only the sparse layers of the recipe are changed; the MLPs of the image tower are not.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of
from megatron_mm.families.serialize import load_experiment, save_experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.initial_weights import STATE_METADATA
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import (
    TENSORS,
    Checkpointer,
    TrainState,
    completed_checkpoints,
    load_strategy,
    model_differences,
    verify,
)
from megatron_mm.training.optimizer import build_optimizer, initialize_state

logger = logging.getLogger(__name__)

_EXPERTS = ".mlp.experts.experts."
_ROUTER = ".mlp.router."


def upcycle(dense: Path, run_dir: Path, experiment: Experiment) -> Path:
    """Make a run directory whose checkpoint of step 0 holds the sparse model; training resumes from it. Return the checkpoint.

    Called by all processes of the experiment's layout together.

    Raises ValueError if the models differ in more than experts, the layout does not fit, or the run already has a checkpoint.
    """
    check_upcycling(experiment, dense)
    family_of(experiment.model).check_layout(experiment.model, experiment.parallel, topologies.world_size())
    if completed_checkpoints(run_dir):
        raise ValueError(f"{run_dir} has checkpoints already: choose another run directory")
    experiment = replace(experiment, data=replace(experiment.data, tokenizer=dense / "tokenizer.model"))
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    try:
        model = build_model(experiment, topology)
        load_dense(topology, model, dense)
        optimizer = build_optimizer(experiment, model)  # after the weights: it copies them
        initialize_state(optimizer)
        checkpointer = Checkpointer(experiment, topology, run_dir, model, optimizer)
        checkpointer.save(TrainState())
        checkpointer.finish()
        if topology.is_main:
            save_experiment(experiment, run_dir / "config.json")
        return run_dir / "checkpoints" / "step_00000000"
    finally:
        topologies.shutdown()


def check_upcycling(experiment: Experiment, dense: Path) -> None:
    """Raise ValueError if a dense checkpoint is not the sparse experiment's backbone; the message names the first difference."""
    saved = load_experiment(dense / "experiment.json")
    decoder = experiment.model.decoder
    if decoder.moe is None:
        raise ValueError(f"recipe {experiment.recipe} has no experts: choose a sparse one, such as mm1_3b_moe")
    if saved.model.decoder.moe is not None:
        raise ValueError(f"checkpoint {dense} is already sparse ({saved.recipe}): use a dense one")
    backbone = replace(experiment.model, decoder=replace(decoder, moe=None))
    for name, ours, theirs in model_differences(backbone, saved.model):
        raise ValueError(
            f"checkpoint {dense} is not the backbone of {experiment.recipe}: model.{name} is {theirs!r} in the "
            f"checkpoint and {ours!r} in the recipe"
        )


def load_dense(topology: Topology, model: list[DistributedDataParallel], dense: Path) -> None:
    """Load a dense checkpoint's weights into a sparse model in place; routers are not changed."""
    verify(dense, topology)
    wanted: dict[str, ShardedTensor] = {}
    targets: dict[str, list[torch.Tensor]] = {}
    for chunk in model:
        state: dict[str, Any] = {"chunk": chunk.module.sharded_state_dict(metadata=dict(STATE_METADATA))}
        apply_factories(state)
        for entry in nested_values(state):
            if isinstance(entry, ShardedTensor) and _ROUTER not in entry.key:
                source = _of_dense_layer(entry) if _EXPERTS in entry.key else entry
                part = f"{source.key}{source.global_offset}"  # the experts of a layer need the same parts: each is read once
                wanted[part] = replace(source, data=torch.empty_like(source.data))
                targets.setdefault(part, []).append(entry.data)
    loaded = dist_checkpointing.load(
        dict(wanted),
        str(dense / TENSORS),
        sharded_strategy=load_strategy(),
        validate_access_integrity=False,  # several processes read the same parts
        strict=StrictHandling.RAISE_UNEXPECTED,
    )
    with torch.no_grad():
        for part, places in targets.items():
            for place in places:
                place.copy_(loaded[part])  # a parameter, or a view of one half of it


def _of_dense_layer(expert: ShardedTensor) -> ShardedTensor:
    """Describe one expert's part of a stack as the same part of the dense layer's MLP, without the experts' axis."""
    stacked = expert.prepend_axis_num
    return ShardedTensor(
        key=expert.key.replace(_EXPERTS, ".mlp."),
        data=expert.data,
        dtype=expert.dtype,
        local_shape=expert.local_shape,
        global_shape=expert.global_shape[stacked:],
        global_offset=expert.global_offset[stacked:],
        axis_fragmentations=expert.axis_fragmentations[stacked:],
        replica_id=expert.replica_id,
        prepend_axis_num=0,
    )

"""Freezes the parameters that are not trainable in a stage of training.

A family defines freeze policies (`Family.freeze_policies`), and a recipe selects one (`train.freeze_policy`). Parameters are frozen before
the data-parallel wrapper is built, so that frozen ones get no gradient buffer and no optimizer state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of


def trainable_patterns(experiment: Experiment) -> tuple[str, ...]:
    """Return regular expressions; a parameter is trainable if one of them matches the beginning of its global name.

    Raises ValueError if the model's family has no freeze policy of that name.
    """
    return family_of(experiment.model).trainable_patterns(experiment.train.freeze_policy)


def is_trainable(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the beginning of a parameter's name."""
    return any(re.match(pattern, name) for pattern in patterns)


def freeze(chunk: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Make the parameters of a pipeline chunk trainable whose names match a pattern, and freeze the others.

    Each chunk numbers its decoder layers from 0, so patterns cannot distinguish layers.

    Raises ValueError if a parallel linear layer's bias would train without its weight: neither megatron-core's layers nor Transformer
    Engine's compute its gradient then.
    """
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_trainable(name, patterns))
    for name, module in chunk.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, torch.nn.Linear) or not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor):
            continue
        if weight.ndim == 2 and bias.requires_grad and not weight.requires_grad:
            raise ValueError(
                f"the freeze policy trains {name}.bias but not {name}.weight, and a parallel layer computes gradients of both or of none: "
                "change its patterns to train or to freeze both"
            )


def check_patterns(experiment: Experiment, names: Iterable[str]) -> None:
    """Raise ValueError if a pattern of the freeze policy matches no parameter of the whole model. Called by all processes together.

    Args:
        names: names of the parameters on this process.
    """
    patterns, names = trainable_patterns(experiment), list(names)
    matched = [any(re.match(pattern, name) for name in names) for pattern in patterns]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everywhere: list[list[bool]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, matched)
        matched = [any(flags) for flags in zip(*everywhere, strict=True)]
    wrong = [pattern for pattern, found in zip(patterns, matched, strict=True) if not found]
    if wrong:
        parts = sorted({name.partition(".")[0] for name in names})
        raise ValueError(
            f"freeze policy {experiment.train.freeze_policy!r} of {experiment.model.family} models has patterns that match no parameter: "
            f"{wrong}; names begin with {parts}: correct the pattern"
        )

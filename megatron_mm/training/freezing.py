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
    """Regular expressions, one of which matches the beginning of the global name of every trainable parameter.

    Raises ValueError if the model's family has no freeze policy of that name.
    """
    return family_of(experiment.model).trainable_patterns(experiment.train.freeze_policy)


def freeze(chunk: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Make those parameters of a pipeline chunk trainable whose names a pattern matches, and freeze the others.

    A chunk numbers its decoder layers from its own first one; patterns do not tell layers apart.
    """
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))


def check_patterns(experiment: Experiment, names: Iterable[str]) -> None:
    """Raise ValueError where a pattern of the freeze policy matches no parameter of the whole model, which would stay frozen.

    Args:
        names: of the parameters on this process; all processes call this together.
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

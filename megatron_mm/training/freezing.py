"""What learns in a stage of training.

A family names its policies (`Family.freeze_policies`), a recipe picks one (`train.freeze_policy`). Other parameters are frozen before the
data-parallel wrapper sees it, so that it gets no gradient buffer and no optimizer state.
"""

from __future__ import annotations

import re

import torch

from megatron_mm.config import Experiment
from megatron_mm.families.registry import family_of


def learning_patterns(experiment: Experiment) -> tuple[str, ...]:
    """Regular expressions, one of which begins the global name of every parameter that learns.

    Raises ValueError where the model's family has no policy of that name.
    """
    return family_of(experiment.model).trainable_patterns(experiment.train.freeze_policy)


def freeze(chunk: torch.nn.Module, learning: tuple[str, ...]) -> None:
    """Let those parameters of a pipeline chunk learn whose names a pattern begins, and freeze the others.

    A chunk numbers its decoder layers from its own first one; patterns do not tell layers apart.
    """
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(any(re.match(pattern, name) for pattern in learning))

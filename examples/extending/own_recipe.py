"""A recipe that is not in the package: a recipe of the package, and what differs from it.

megatron-mm train examples/extending/own_recipe.py:wide_mm1 --run-dir runs/wide --data.path data/demo
"""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import get_recipe


def wide_mm1() -> Experiment:
    """`debug_mm1` with a wider decoder, a mixture of two sources, and half of the steps."""
    base = get_recipe("debug_mm1")
    decoder = replace(base.model.decoder, hidden_size=192, head_dim=48, ffn_hidden_size=512)
    return replace(
        base,
        recipe="wide_mm1",
        model=replace(base.model, decoder=decoder),
        data=replace(base.data, mixture={"pairs": 0.7, "text": 0.3}),
        train=replace(base.train, steps=200, schedule_steps=200),
    )

"""Recipes: functions that return a complete Experiment. `RECIPES` is every one that the command line knows."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mm.config import Experiment
from megatron_mm.recipes import debug, infimm, mm1, mono_internvl

RECIPES: dict[str, Callable[[], Experiment]] = {
    recipe.__name__: recipe for recipe in (*debug.RECIPES, *mm1.RECIPES, *infimm.RECIPES, *mono_internvl.RECIPES)
}


def get_recipe(name: str) -> Experiment:
    """The experiment of a recipe. Raises ValueError that lists the recipes where there is none of that name."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()

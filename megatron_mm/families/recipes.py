"""Recipes: functions that return a complete Experiment. `RECIPES` is every one that the command line knows."""

from __future__ import annotations

from collections.abc import Callable

from megatron_mm.config import Experiment
from megatron_mm.families import debug_recipes as debug
from megatron_mm.families.infimm import recipes as infimm
from megatron_mm.families.mm1 import recipes as mm1
from megatron_mm.families.mono_internvl import recipes as mono_internvl

RECIPES: dict[str, Callable[[], Experiment]] = {
    recipe.__name__: recipe for recipe in (*debug.RECIPES, *mm1.RECIPES, *infimm.RECIPES, *mono_internvl.RECIPES)
}


def get_recipe(name: str) -> Experiment:
    """The experiment of a recipe. Raises ValueError that lists the recipes where there is none of that name."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()

"""Recipes: functions that return a complete Experiment. `RECIPES` is every one that the command line knows."""

from __future__ import annotations

from megatron_mm.config import Experiment
from megatron_mm.families.base import Recipe
from megatron_mm.families.registry import FAMILIES


def _collect() -> dict[str, Recipe]:
    """The recipes of all families by name, those for a laptop first."""
    recipes = {recipe.__name__: recipe for family in FAMILIES.values() for recipe in family.recipes}
    return dict(sorted(recipes.items(), key=lambda item: not item[0].startswith("debug_")))


RECIPES = _collect()


def get_recipe(name: str) -> Experiment:
    """The experiment of a recipe. Raises ValueError that lists the recipes where there is none of that name."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()

"""Recipes: functions that return a complete Experiment. `RECIPES` is every one that the command line knows."""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config import Experiment
from megatron_mm.config.references import absolute, is_reference, load_object
from megatron_mm.families.base import Recipe
from megatron_mm.families.registry import FAMILIES


def _collect() -> dict[str, Recipe]:
    """The recipes of all families by name, those for a laptop first."""
    recipes = {recipe.__name__: recipe for family in FAMILIES.values() for recipe in family.recipes}
    return dict(sorted(recipes.items(), key=lambda item: not item[0].startswith("debug_")))


RECIPES = _collect()


def get_recipe(name: str) -> Experiment:
    """The experiment of a recipe: of a name in `RECIPES`, or of a function that returns one, as FILE.py:FUNCTION or MODULE:FUNCTION.
    The experiment of a function says in `extensions` where it came from, so that a resume, an evaluation or a conversion finds what the
    file registers.

    Raises ValueError that lists the recipes where there is none of that name, and where the function returns no experiment.
    """
    if is_reference(name):
        return _recipe_of_file(name)
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def _recipe_of_file(reference: str) -> Experiment:
    recipe = load_object(reference)
    experiment = recipe() if callable(recipe) else recipe
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{reference} is no recipe: it gives {type(experiment).__name__} instead of an Experiment")
    place = absolute(reference.rpartition(":")[0])
    return replace(experiment, extensions=tuple(dict.fromkeys([*experiment.extensions, place])))

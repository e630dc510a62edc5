"""Recipes: functions that return a complete Experiment. `RECIPES` contains all recipes that the command line knows."""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.config import Experiment
from megatron_mm.config.checks import check_types
from megatron_mm.config.references import absolute, is_reference, line_in, load_object
from megatron_mm.families.base import Recipe
from megatron_mm.families.registry import FAMILIES


def _collect() -> dict[str, Recipe]:
    """Return the recipes of all families by name, beginning with those for a laptop (debug_...)."""
    recipes = {recipe.__name__: recipe for family in FAMILIES.values() for recipe in family.recipes}
    return dict(sorted(recipes.items(), key=lambda item: not item[0].startswith("debug_")))


RECIPES = _collect()


def get_recipe(name: str) -> Experiment:
    """Return the experiment of a recipe, given as a name in `RECIPES` or as a function, FILE.py:FUNCTION or MODULE:FUNCTION.

    For a function, the experiment's `extensions` record its file or module, so that a resume, an evaluation or a conversion runs the
    registrations in it again.

    Raises ValueError if there is no recipe of that name (listing the recipes), or if the function fails or does not return an experiment
    whose fields have values of their types.
    """
    if is_reference(name):
        return _recipe_of_file(name)
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def _recipe_of_file(reference: str) -> Experiment:
    recipe, place = load_object(reference), absolute(reference.rpartition(":")[0])
    try:
        experiment = recipe() if callable(recipe) else recipe
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"recipe {reference} failed{line_in(place, error)}: {kind}{error}") from error
    if not isinstance(experiment, Experiment):
        raise ValueError(f"{reference} is not a recipe: it returns {type(experiment).__name__} instead of an Experiment")
    try:
        check_types(experiment)
    except ValueError as error:
        raise ValueError(f"recipe {reference}: {error}") from None
    return replace(experiment, extensions=tuple(dict.fromkeys([*experiment.extensions, place])))

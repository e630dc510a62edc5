"""The recipe argument of a command, and the list of recipes in its help."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from megatron_mm.cli.command import Parser, choices
from megatron_mm.config import Experiment


def add_recipe(parser: Parser) -> None:
    """Add the recipe as the first argument."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="name of a recipe, or FILE.py:FUNCTION or MODULE:FUNCTION; if given, --help lists every field with the recipe's value",
    )


def recipe_of(given: argparse.Namespace) -> Experiment:
    """The experiment of the recipe `given.recipe`. If there is no such recipe, raises ValueError with the closest name."""
    from megatron_mm.config.references import is_reference
    from megatron_mm.families.recipes import RECIPES, get_recipe

    if given.recipe.endswith(".py"):
        raise ValueError(f"{given.recipe} is a file: name a function in it, {given.recipe}:FUNCTION")
    if given.recipe not in RECIPES and not is_reference(given.recipe):
        if given.after is not None:
            raise ValueError(f"no recipe given before {given.after}: the name of a recipe comes first, and then the options of its fields")
        raise ValueError(f"unknown recipe {given.recipe!r}: {choices(given.recipe, RECIPES)}")
    return get_recipe(given.recipe)


def list_recipes() -> str:
    """The list of recipes for a command's help."""
    from megatron_mm.families.recipes import RECIPES

    return "recipes:\n" + textwrap.fill(", ".join(RECIPES), width=100, initial_indent="  ", subsequent_indent="  ")


def experiment_in(path: Path) -> Experiment | None:
    """The experiment of a checkpoint, or of a run directory's newest checkpoint, found without importing torch; None if there is none."""
    from megatron_mm.families.serialize import load_experiment

    step_folders = "step_" + 8 * "[0-9]"  # training.checkpoint.names.STEP_FOLDERS
    complete = sorted(path.glob(f"checkpoints/{step_folders}/manifest.json"))
    folder = complete[-1].parent if complete else path
    return load_experiment(folder / "experiment.json") if (folder / "experiment.json").is_file() else None

"""megatron_mm.json of an exported model: its recipe and the settings that determine its answers, so that `evaluate` need not be told them.

Paths, names and everything else about the training run stay out of it: an export is made to be published.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.families.recipes import RECIPES, get_recipe
from megatron_mm.families.serialize import EXPORT_SETTINGS, from_dict, to_dict

_DATA = ("sequence_length", "to_rgb", "min_tiles", "max_tiles", "chat_template", "caption_prompt")
"""Fields of `Experiment.data` that describe how prompts and images are written."""
_CARD_LINE = re.compile(r"^\| recipe \| `([^`]+)` \|$", re.MULTILINE)
_CARD_TEMPLATE = re.compile(r"^Chats are written with the template `([^`]+)`", re.MULTILINE)
"""The recipe and the chat template in the README.md of an export; those of earlier versions state them there alone."""


def write_export_settings(out: Path, experiment: Experiment) -> None:
    """Write the settings into an export."""
    data = to_dict(experiment.data)
    document = {
        "recipe": experiment.recipe,
        "model": to_dict(experiment.model),
        "data": {name: data[name] for name in _DATA},
        "train": {"precision": experiment.train.precision},
    }
    (out / EXPORT_SETTINGS).write_text(json.dumps(document, indent=2) + "\n")


def read_export_settings(export: Path) -> Experiment | None:
    """Return the experiment of an export: that of its recipe, with the export's own settings. None if it states no recipe, or one that this
    version does not have (a recipe of the publisher's own).

    Raises ValueError that names the file if it is damaged.
    """
    path = export / EXPORT_SETTINGS
    if not path.is_file():
        return _recipe_of_card(export / "README.md")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        recipe, model, data, train = (document[name] for name in ("recipe", "model", "data", "train"))
        if recipe not in RECIPES:
            return None
        experiment = get_recipe(recipe)
        return replace(
            experiment,
            model=from_dict(ModelConfig, model, where=f"{path}: model"),
            data=replace(experiment.data, **_known(data, of=experiment.data)),
            train=replace(experiment.train, **_known(train, of=experiment.train)),
        )
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): restore it, or remove it and give --recipe") from None


def _known(values: dict[str, Any], *, of: object) -> dict[str, Any]:
    """Return the values of fields that this version has."""
    return {name: value for name, value in values.items() if hasattr(of, name)}


def _recipe_of_card(card: Path) -> Experiment | None:
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    recipe, template = _CARD_LINE.search(text), _CARD_TEMPLATE.search(text)
    if recipe is None or recipe[1] not in RECIPES:
        return None
    experiment = get_recipe(recipe[1])
    return replace(experiment, data=replace(experiment.data, chat_template=template[1] if template is not None else None))

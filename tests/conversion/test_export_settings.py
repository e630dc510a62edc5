"""An export states its recipe and settings, so that it is evaluated without --recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.conversion.export_settings import read_export_settings, write_export_settings
from megatron_mm.conversion.model_card import write_model_card
from megatron_mm.families.recipes import RECIPES, get_recipe
from megatron_mm.families.serialize import EXPORT_SETTINGS
from megatron_mm.run.evaluate_tasks import open_target


@pytest.mark.parametrize("name", ["debug_mm1_sft", "mm1_3b_moe", "infimm_zephyr_7b_ift", "mono_internvl_2b_s2"])
def test_settings_come_back_with_what_options_changed(name: str, tmp_path: Path) -> None:
    recipe = get_recipe(name)
    decoder = replace(recipe.model.decoder, num_layers=2 * recipe.model.decoder.num_layers)
    changed = replace(
        recipe,
        model=replace(recipe.model, decoder=decoder),
        data=replace(recipe.data, path=Path("/home/me/secret"), chat_template="vicuna", to_rgb="pillow"),
        train=replace(recipe.train, precision="fp32"),
    )
    write_export_settings(tmp_path, changed)
    assert "secret" not in (tmp_path / EXPORT_SETTINGS).read_text()
    found = read_export_settings(tmp_path)
    assert found == replace(changed, data=replace(changed.data, path=recipe.data.path))


def _export(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def test_an_export_of_an_earlier_version_states_its_recipe_in_its_card(tmp_path: Path) -> None:
    (checkpoint := tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"step": 1}')
    experiment = get_recipe("debug_mm1")
    write_model_card(_export(tmp_path), experiment, checkpoint, part="whole", dtype="float32")
    assert read_export_settings(tmp_path) == experiment
    chat = replace(experiment, data=replace(experiment.data, chat_template="vicuna"))
    write_model_card(tmp_path, chat, checkpoint, part="whole", dtype="float32")
    assert read_export_settings(tmp_path) == chat


def test_an_export_without_a_known_recipe_needs_one(tmp_path: Path) -> None:
    export = _export(tmp_path)
    assert read_export_settings(export) is None
    write_export_settings(export, replace(get_recipe("debug_mm1"), recipe="my_recipe"))
    assert "my_recipe" not in RECIPES and read_export_settings(export) is None
    with pytest.raises(ValueError, match="is an exported model that states no recipe of this version: name it, such as --recipe mm1_3b"):
        open_target(export, None, out=None)
    for text in ("{", "[]", json.dumps({"recipe": "debug_mm1"})):
        (export / EXPORT_SETTINGS).write_text(text)
        with pytest.raises(ValueError, match=rf"{EXPORT_SETTINGS} is damaged .*: restore it, or remove it and give --recipe"):
            read_export_settings(export)

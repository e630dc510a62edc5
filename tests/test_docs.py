"""All files, commands, recipes and options named in the documentation exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_mm.cli.command import Group
from megatron_mm.cli.main import COMMANDS
from megatron_mm.cli.overrides import overrides_of
from megatron_mm.families.recipes import RECIPES, get_recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/**/*.md")])
DOCUMENTS.remove(ROOT / "CHANGELOG.md")  # it also names removed things
FOLDERS = ("", "megatron_mm", "megatron_mm/planning", "benchmarks/anchors", "tests", "docs", "tests/conversion")
"""Folders that paths in the text may be relative to."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    quoted = re.findall(r"`([\w./-]+\.(?:py|md|sh|slurm|csv))`", text)
    listed = re.findall(r"^ {4,}((?:\w+/)+\w+\.(?:py|md))\b", text, re.MULTILINE)  # README's map
    linked = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if "://" not in link]
    places = [document.parent, *(ROOT / folder for folder in FOLDERS)]
    missing = {name for name in [*quoted, *listed, *linked] if not any((place / name).exists() for place in places)}
    assert not missing, f"{document.name} names files that are not there: {sorted(missing)}"


def _commands(group: Group, words: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, Group):
            yield from _commands(command, f"{words}{name} ")
        else:
            yield f"{words}{name}"


def test_every_command_is_in_the_list_of_commands() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    missing = [command for command in _commands(COMMANDS) if f"`{command}" not in text]
    assert not missing, f"docs/commands.md lacks {missing}"


def test_every_recipe_is_in_the_list_of_recipes() -> None:
    """Shortened names, `mm1_ablation_*` and `infimm_zephyr_7b_{pt,mtt,ift}`, are expanded first."""
    text = (ROOT / "docs" / "recipes.md").read_text()
    patterns = [name.replace("*", r"\w+") for name in re.findall(r"`([\w*]+)`", text)]
    for stem, endings in re.findall(r"`(\w+)\{([\w,]+)\}`", text):
        patterns += [stem + ending for ending in endings.split(",")]
    missing = [name for name in RECIPES if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not missing, f"docs/recipes.md lacks {missing}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_fields_that_are_named_as_options_exist(document: Path) -> None:
    known = {
        name
        for recipe in ("debug_mm1", "debug_infimm", "debug_mono_internvl")
        for o in overrides_of(get_recipe(recipe))
        for name in o.names
    }
    known |= {o.negative for recipe in ("debug_mm1", "debug_infimm") for o in overrides_of(get_recipe(recipe)) if o.negative}
    named = set(re.findall(r"--(?:data|train|parallel|model|optimizer|checkpoint|eval|monitor)\.[a-z0-9.-]*[a-z0-9]", document.read_text()))
    assert not named - known, f"{document.name} names options that are not there: {sorted(named - known)}"

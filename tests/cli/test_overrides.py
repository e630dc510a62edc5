"""Every field of an experiment is an option: parsing of its words, allowed values, and errors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_mm.cli.overrides import apply_overrides, field_texts, overrides_of
from megatron_mm.cli.values import parse_words, placeholder
from megatron_mm.config import DataConfig, Experiment, MoEConfig
from megatron_mm.families.recipes import RECIPES, get_recipe


def override(experiment: Experiment, **options: str) -> Experiment:
    """Apply options given as `train__steps="5"`; words are separated by spaces."""
    words = {"--" + name.replace("__", ".").replace("_", "-"): value.split() for name, value in options.items()}
    known = overrides_of(experiment)
    assert set(words) <= {option.name for option in known}
    return apply_overrides(experiment, known, words)


DEBUG = get_recipe("debug_mm1")


@pytest.mark.parametrize(
    ("hint", "words", "value"),
    [
        (int, "3", 3),
        (float, "3", 3.0),
        (float, "1e-3", 0.001),
        (str, "text", "text"),
        (Path, "a/b", Path("a/b")),
        (bool, "", True),
        (bool, "False", False),
        (bool | None, "None", None),
        (bool | None, "true", True),
        (int | None, "none", None),
        (int | None, "4", 4),
        (Literal["a", "b"], "b", "b"),
        (tuple[int, ...], "1 2 3", (1, 2, 3)),
        (tuple[int, ...], "", ()),
        (tuple[int, ...] | None, "None", None),
        (tuple[float, int], "1 2", (1.0, 2)),
        (dict[str, float], "a=1 b-c=0.5", {"a": 1.0, "b-c": 0.5}),
    ],
)
def test_words_of_every_kind_of_field(hint: Any, words: str, value: object) -> None:
    found = parse_words("--x", hint, words.split())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("hint", "words", "message"),
    [
        (int, "many", "--x is 'many', but takes an integer"),
        (int | None, "many", "--x is 'many', but takes an integer or None"),
        (int, "", "--x takes an integer, but got no value"),
        (int, "1 2", "--x takes an integer, but got 2 values: '1 2'"),
        (float, "1,5", "--x is '1,5', but takes a number"),
        (bool, "maybe", "--x is 'maybe', but takes True or False"),
        (Literal["fp32", "bf16"], "bf61", "--x is 'bf61', but takes one of fp32, bf16: did you mean bf16?"),
        (tuple[int, ...], "1 b", "--x is 'b', but takes an integer"),
        (tuple[int, int], "1", "--x takes 2 values (INTEGER INTEGER), but got 1: '1'"),
        (dict[str, float], "pairs", "--x takes NAME=NUMBER, for example pairs=0.5, not 'pairs'"),
        (dict[str, float], "pairs=all", "--x pairs is 'all', but takes a number"),
    ],
)
def test_words_that_do_not_fit(hint: Any, words: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_words("--x", hint, words.split())
    assert str(error.value) == message


def test_fields_of_parts_and_of_the_experiment() -> None:
    changed = override(DEBUG, train__steps="5", init_from="/runs/one", parallel__sequence="False", data__jpeg_quality="5 90")
    expected = replace(
        DEBUG,
        train=replace(DEBUG.train, steps=5),
        init_from=Path("/runs/one"),
        parallel=replace(DEBUG.parallel, sequence=False),
        data=replace(DEBUG.data, jpeg_quality=(5, 90)),
    )
    assert changed == expected
    assert override(DEBUG) == DEBUG


def test_a_part_checks_all_its_new_values_at_once() -> None:
    """Either alone would be refused: interleaving needs a pipeline, and stage_layers a number for each stage."""
    changed = override(DEBUG, parallel__virtual="2", parallel__pipeline="2", parallel__stage_layers="1 1 1 1")
    assert (changed.parallel.virtual, changed.parallel.stage_layers) == (2, (1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"^train\.steps is 0, but must be positive$"):
        override(DEBUG, train__steps="0")
    with pytest.raises(ValueError, match=r"^model\.connector\.depth is 0, but must be positive$"):
        override(DEBUG, model__connector__depth="0")


def test_a_mixture_is_replaced_or_changed_in_one_entry() -> None:
    assert override(DEBUG, data__mixture="video=1").data.mixture == {"video": 1.0}
    assert override(DEBUG, data__mixture__pairs="0.7").data.mixture == {**DEBUG.data.mixture, "pairs": 0.7}


def test_a_part_may_be_added_changed_and_taken_away() -> None:
    dense, sparse = DEBUG.model.decoder, get_recipe("debug_mm1_moe").model.decoder
    added = override(DEBUG, model__decoder__moe__num_experts="4", model__decoder__moe__every_n_layers="2")
    assert added.model.decoder == replace(dense, moe=MoEConfig(num_experts=4, every_n_layers=2))
    changed = override(get_recipe("debug_mm1_moe"), model__decoder__moe__z_loss="0.5").model.decoder
    assert sparse.moe is not None and changed == replace(sparse, moe=replace(sparse.moe, z_loss=0.5))
    assert override(get_recipe("debug_mm1_moe"), model__decoder__moe="None").model.decoder.moe is None
    with pytest.raises(
        ValueError,
        match=r"does not have the part model\.decoder\.moe: to add it, also set --model\.decoder\.moe\.num-experts and --model\.decod",
    ):
        override(DEBUG, model__decoder__moe__top_k="1")


@pytest.mark.parametrize("name", ["debug_mm1", "debug_infimm", "debug_mono_internvl", "debug_mm1_moe"])
def test_every_field_has_a_text_a_kind_and_a_name_of_its_own(name: str) -> None:
    options = overrides_of(RECIPES[name]())
    assert len({option.name for option in options}) == len(options) > 70
    for option in options:
        assert option.text or option.key is not None, f"{option.name} has no docstring"
        placeholder(option.hint)
    negatives = {option.negative for option in options if option.negative is not None}
    assert {"--checkpoint.no-asynchronous", "--model.decoder.no-tied-embeddings"} <= negatives


@dataclass(frozen=True)
class _Base:
    """A part."""

    first: int = 1
    """Of the base,
    in two lines."""
    untold: int = 2


@dataclass(frozen=True)
class _Derived(_Base):
    """A part that inherits."""

    second: dict[str, float] = field(default_factory=dict)
    """Of the class itself."""


def test_texts_are_the_docstrings_below_the_fields() -> None:
    assert field_texts(_Derived) == {"first": "Of the base, in two lines.", "second": "Of the class itself."}
    assert field_texts(DataConfig)["sequence_length"] == "Tokens of a packed sequence, including image tokens."

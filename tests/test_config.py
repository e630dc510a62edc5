"""A wrong value is refused when the configuration is created, with an error that names both numbers and the fix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_mm.config import (
    ConnectorConfig,
    DataConfig,
    DecoderConfig,
    Experiment,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    VisionConfig,
)
from megatron_mm.config.checks import check_types, nearest
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import RECIPES, get_recipe
from megatron_mm.families.serialize import from_dict, to_dict
from megatron_mm.parallel.stages import layers_per_stage

DEBUG = get_recipe("debug_mm1")
assert isinstance(DEBUG.model, MM1Config)
DECODER, VISION, CONNECTOR = DEBUG.model.decoder, DEBUG.model.vision, DEBUG.model.connector


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (DEBUG.kernels, {"tower_graph": 0}, "kernels.tower_graph is 0, but must be positive"),
        (DECODER, {"num_layers": 0}, "num_layers is 0, but must be positive"),
        (DECODER, {"num_query_groups": 3}, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        (DECODER, {"head_dim": 7}, "head_dim 7 is odd"),
        (VISION, {"image_size": 2}, "image_size 2 is smaller than one patch of 4 pixels"),
        (VISION, {"num_attention_heads": 5}, "vision hidden_size 64 is not a multiple of its num_attention_heads 5"),
        (CONNECTOR, {"num_tokens": 50}, "pools to a square grid, but num_tokens is 50"),
        (DEBUG.model, {"connector": replace(CONNECTOR, num_tokens=144)}, "needs a 12x12 grid, but the tower gives only 8x8"),
        (DEBUG.parallel, {"virtual": 2}, "parallel.virtual is 2, but interleaving needs"),
        (DEBUG.parallel, {"pipeline": 2, "stage_layers": (4,)}, "parallel.stage_layers has 1 numbers, but pipeline 2 x virtual 1 makes 2"),
        (DEBUG.data, {"mixture": {}}, "data.mixture is empty"),
        (DEBUG.data, {"mixture": {"pairs": -1.0}}, "gives source 'pairs' the weight -1.0"),
        (DEBUG.optimizer, {"min_lr": 1.0}, "min_lr is 1.0, but must be between 0 and peak_lr"),
        (DEBUG.train, {"micro_batch_size": 3}, "train.global_batch_size 16 is not a multiple of train.micro_batch_size 3"),
        (DEBUG.checkpoint, {"keep": 0}, "keep is 0, but must be positive"),
    ],
)
def test_wrong_values_are_named(part: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(part, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize("recipe", RECIPES)
def test_values_of_recipes_have_the_types_of_their_fields(recipe: str) -> None:
    check_types(get_recipe(recipe))


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("num-heads", ": did you mean num-attention-heads?"),
        ("lr", ": did you mean peak-lr or min-lr?"),
        ("num-layer", ": did you mean num-layers?"),
        ("zzz", ""),
    ],
)
def test_the_nearest_name_contains_the_word_or_is_spelled_like_it(word: str, meant: str) -> None:
    assert nearest(word, ["num-layers", "num-attention-heads", "peak-lr", "min-lr", "peak-lr"]) == meant


def test_layers_and_stages_must_add_up() -> None:
    with pytest.raises(ValueError, match="stage_layers"):
        layers_per_stage(ParallelConfig(pipeline=2, stage_layers=(1, 2)), num_layers=4)


def test_micro_batches_of_a_process() -> None:
    assert DEBUG.num_micro_batches(2) == 2
    with pytest.raises(ValueError, match="is not a multiple of micro_batch_size 4 x data-parallel size 3 = 12"):
        DEBUG.num_micro_batches(3)


def test_fields_that_are_unknown_or_missing_are_named() -> None:
    values = to_dict(DEBUG)
    with pytest.raises(ValueError, match=r"config.train has unknown fields \['stepz'\]; the fields of TrainConfig are"):
        from_dict(Experiment, {**values, "train": {**values["train"], "stepz": 1}})
    without = {name: value for name, value in values["optimizer"].items() if name != "peak_lr"}
    with pytest.raises(ValueError, match=r"config.optimizer lacks the fields \['peak_lr'\]"):
        from_dict(Experiment, {**values, "optimizer": without})
    with pytest.raises(ValueError, match="has the unknown model family 'gpt5'; this version has"):
        from_dict(Experiment, {**values, "model": {**values["model"], "family": "gpt5"}})


@pytest.mark.parametrize(
    "kind", [DecoderConfig, VisionConfig, ConnectorConfig, DataConfig, OptimizerConfig, TrainConfig, ParallelConfig, Experiment]
)
def test_every_part_is_frozen(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_a_field_of_an_earlier_version_is_read_under_its_name_of_now() -> None:
    """Checkpoints written before `train.freeze_policy` had its present name contain `train.policy`."""
    values = to_dict(replace(DEBUG, train=replace(DEBUG.train, freeze_policy="s2")))
    earlier = {("policy" if name == "freeze_policy" else name): value for name, value in values["train"].items()}
    assert from_dict(Experiment, {**values, "train": earlier}).train.freeze_policy == "s2"
    with pytest.raises(ValueError, match=r"config.train has unknown fields \['policy'\]"):
        from_dict(Experiment, {**values, "train": {**values["train"], "policy": "s2"}})

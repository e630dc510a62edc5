"""Recipes: their resolved values do not change unnoticed, and their sizes are the published ones.

`python tests/families/test_recipes.py` writes the golden files anew.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mm.config import ParallelConfig
from megatron_mm.families.infimm.config import InfiMMConfig
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.recipes import non_embedding_parameters, peak_learning_rate
from megatron_mm.families.recipes import RECIPES, get_recipe
from megatron_mm.families.serialize import load_experiment, save_experiment, to_dict
from megatron_mm.flops import decoder_matmul_parameters
from megatron_mm.run.data import image_input
from megatron_mm.run.dry_run import stage_parameters

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> str:
    return json.dumps(to_dict(get_recipe(name)), indent=2) + "\n"


@pytest.mark.parametrize("name", RECIPES)
def test_the_resolved_values_are_those_of_the_golden_file(name: str) -> None:
    assert (GOLDEN / f"{name}.json").read_text() == golden(name)


@pytest.mark.parametrize("name", RECIPES)
def test_an_experiment_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    save_experiment(get_recipe(name), tmp_path / "experiment.json")
    assert load_experiment(tmp_path / "experiment.json") == get_recipe(name)


def totals(name: str, **parallel: object) -> dict[str, int]:
    """Return the parameters by part over all stages, with one tensor-parallel process's share of the decoder."""
    experiment = get_recipe(name)
    if parallel:
        experiment = replace(experiment, parallel=ParallelConfig(**parallel))  # type: ignore[arg-type]
    found: dict[str, int] = {}
    for stage in stage_parameters(experiment):
        for part, count in stage.held.items():
            found[part] = found.get(part, 0) + count
    return found


@pytest.mark.parametrize(
    ("name", "billions", "without_embeddings"),
    [("mm1_1b", 1.296, 1.195), ("mm1_3b", 3.065, 2.914), ("mm1_7b", 7.047, 6.845), ("mm1_30b", 30.290, 29.963)],
)
def test_decoders_have_their_sizes(name: str, billions: float, without_embeddings: float) -> None:
    found = totals(name, tensor=1)
    assert found["language"] / 1e9 == pytest.approx(billions, rel=2e-3)
    model = get_recipe(name).model
    assert isinstance(model, MM1Config)
    assert non_embedding_parameters(model.decoder) / 1e9 == pytest.approx(without_embeddings, rel=1e-3)
    assert found["vision"] == 631_371_520


def test_mm1_30b_on_its_own_layout() -> None:
    """Four stages: a process holds a quarter of each, but all norms and image parts; the tied table is on the first and the last."""
    stages = stage_parameters(get_recipe("mm1_30b"))
    assert len(stages) == 4
    assert stages[0].held["vision"] == 631_371_520 and stages[0].held["connector"] == 69_599_040
    assert all(set(stage.held) == {"language"} for stage in stages[1:])
    layer = (4 * 6656 * 6656 + 3 * 6656 * 17920) // 4 + 2 * 6656
    table = 49152 * 6656 // 4
    expected = [layers * layer for layers in (10, 15, 16, 15)]
    expected[0] += table
    expected[-1] += table + 6656
    assert [stage.held["language"] for stage in stages] == expected


@pytest.mark.parametrize("name", [name for name in RECIPES if "ablation" in name and "mix" not in name] + ["debug_mm1"])
def test_every_variant_builds(name: str) -> None:
    found = totals(name)
    assert set(found) == {"vision", "connector", "language"}


@pytest.mark.parametrize("connector", ["average", "attention", "c_abstractor"])
def test_variants_differ_in_what_they_name(connector: str) -> None:
    base, variant = to_dict(get_recipe("mm1_ablation")), to_dict(get_recipe(f"mm1_ablation_{connector}_64"))
    assert variant["model"]["connector"]["kind"] == connector and variant["model"]["connector"]["num_tokens"] == 64
    for part in ("data", "optimizer", "train", "parallel"):
        assert base[part] == variant[part]


@pytest.mark.parametrize(("name", "billions", "active_billions"), [("mm1_3b_moe", 63.93, 4.033), ("mm1_7b_moe", 47.62, 8.356)])
def test_sparse_decoders_have_their_sizes(name: str, billions: float, active_billions: float) -> None:
    """All parameters are within 1% of the published size; the active ones are those that a token is multiplied with."""
    experiment = get_recipe(name)
    assert isinstance(experiment.model, MM1Config)
    assert totals(name, tensor=1)["language"] / 1e9 == pytest.approx(billions, rel=1e-3)
    assert decoder_matmul_parameters(experiment.model.decoder) / 1e9 == pytest.approx(active_billions, rel=1e-3)


def test_a_process_holds_its_share_of_the_experts() -> None:
    """With expert 32, a process of mm1_3b_moe holds the dense weights and two whole experts in each of 13 sparse layers."""
    (stage,) = stage_parameters(get_recipe("mm1_3b_moe"))
    width, mlp = 3072, 3 * 3072 * 8064
    dense = 13 * mlp + 26 * 4 * width * width + 49152 * width
    assert stage.held["language"] == dense + 13 * 2 * mlp + 13 * 64 * width + 53 * width


def test_sparse_models_learn_as_fast_as_their_backbones() -> None:
    for name in ("mm1_3b", "mm1_7b"):
        assert get_recipe(f"{name}_moe").optimizer == get_recipe(name).optimizer


@pytest.mark.parametrize(
    ("model", "tower", "language", "gated_layers"),
    [
        ("zephyr_7b", 304_432_832, 7_241_748_480, 16),
        ("llama_13b", 1_012_588_928, 13_015_884_800, 10),
        ("vicuna_13b", 4_350_556_928, 13_015_884_800, 10),
    ],
)
def test_infimm_models_have_their_sizes(model: str, tower: int, language: int, gated_layers: int) -> None:
    """Published sizes of towers and language models (with two more tokens); gated blocks of 8 heads of 64 and feed-forwards of 4 widths."""
    name = f"infimm_{model}_pt"
    experiment = get_recipe(name)
    assert isinstance(experiment.model, InfiMMConfig)
    found = totals(name, tensor=1)
    assert found["vision"] == tower
    width, seen = experiment.model.decoder.hidden_size, experiment.model.vision.hidden_size
    block = 2 * 512 * width + 1024 * seen + 8 * width**2 + 4 * width + 2
    assert found["language"] == language + gated_layers * block


def test_infimm_stages_differ_in_what_table_7_says() -> None:
    for model in ("zephyr_7b", "llama_13b", "vicuna_13b"):
        pt, mtt, ift = (get_recipe(f"infimm_{model}_{stage}") for stage in ("pt", "mtt", "ift"))
        assert pt.model == mtt.model == ift.model, "one stage begins with the weights of another"
        assert [e.optimizer.peak_lr for e in (pt, mtt, ift)] == [1e-4, 1e-5, 5e-6]
        assert [e.optimizer.beta2 for e in (pt, mtt, ift)] == [0.95, 0.999, 0.999]
        assert [e.train.steps for e in (pt, mtt, ift)] == [285_000, 10_000, 6_000]
        assert ift.train.freeze_policy == ("ift" if model == "llama_13b" else "ift_frozen_language")


def test_mono_internvl_has_its_size() -> None:
    """3,111,355,392 parameters with the 92553 rows of the released vocabulary; ours is padded to 92672 rows, in embedding and output."""
    found = sum(totals("mono_internvl_2b_s1_1", tensor=1).values())
    assert found - 2 * (92672 - 92553) * 2048 == 3_111_355_392


def test_mono_internvl_stages_see_as_many_patches_as_the_paper_says() -> None:
    stages = [get_recipe(f"mono_internvl_2b_{stage}") for stage in ("s1_1", "s1_2", "s1_3", "s2")]
    assert len({stage.model for stage in stages}) == 1, "one stage begins with the weights of another"
    tokens = [256 * image_input(stage).max_tiles for stage in stages]
    assert tokens == [1280, 1792, 3328, 6400]
    assert all(count + 2 <= stage.data.sequence_length for count, stage in zip(tokens, stages, strict=True))
    assert sum(stage.train.steps for stage in stages[:3]) == 646_000


def test_peak_learning_rates_follow_equation_1() -> None:
    assert peak_learning_rate(30e9) == pytest.approx(2.2e-5, rel=0.02)
    assert get_recipe("mm1_30b").optimizer.peak_lr == pytest.approx(2.2e-5, rel=0.02)
    assert get_recipe("mm1_1b").optimizer.peak_lr == pytest.approx(8.6e-5, rel=0.02)


def test_an_unknown_recipe_lists_all() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'mm1_99b': choose one of debug_mm1, .*mm1_30b"):
        get_recipe("mm1_99b")


if __name__ == "__main__":
    for name in RECIPES:
        (GOLDEN / f"{name}.json").write_text(golden(name))

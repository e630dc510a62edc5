"""A dry run describes a run: the parameters of each stage, which of them are trainable, and what is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mm.config import Experiment, ModelConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.dry_run import describe, stage_parameters, stage_table


def changed(experiment: Experiment, **parts: dict[str, Any]) -> Experiment:
    return replace(experiment, **{part: replace(getattr(experiment, part), **fields) for part, fields in parts.items()})


def test_only_the_bridge_of_infimm_is_trainable_in_pretraining() -> None:
    """With tensor 2 a process holds half of the matrices of 16 gated blocks, and all of their norms, gates and the resampler."""
    (stage,) = stage_parameters(changed(get_recipe("infimm_zephyr_7b_pt"), parallel={"tensor": 2}))
    width, tower, inner = 4096, 1024, 512
    block = (2 * width * inner + 2 * inner * tower + 8 * width * width) // 2 + 4 * width + 2
    layer = 2 * (2 * tower) + 4 * inner * tower + 2 * tower + 8 * tower * tower
    resampler = 64 * tower + 6 * layer + 2 * tower
    assert stage.trainable == {"resampler": resampler, "language": 16 * block}
    assert stage.held["vision"] == 304_432_832 and stage.held["language"] > 10 * 2**28


@pytest.mark.parametrize(("stage", "attention"), [("s1_1", False), ("s1_2", False), ("s1_3", True)])
def test_visual_experts_and_in_the_end_attention_are_trainable_in_mono_internvl(stage: str, attention: bool) -> None:
    (parameters,) = stage_parameters(changed(get_recipe(f"mono_internvl_2b_{stage}"), parallel={"tensor": 1}))
    width, query, groups = 2048, 2048, 2 * 8 * 128
    expected = 24 * (3 * width * 8192 + attention * (width * (query + groups) + query * width))
    assert parameters.trainable["language"] == expected
    assert parameters.held["patches"] - parameters.trainable["patches"] == 1024, "the class embedding takes no part"
    assert parameters.trainable["projector"] == parameters.held["projector"]


def test_a_stage_may_have_nothing_or_all_trainable() -> None:
    """On four stages of one layer each, debug_infimm has a gated block on the second and the fourth."""
    four = changed(get_recipe("debug_infimm"), parallel={"pipeline": 4})
    bridge = list(stage_table(changed(four, train={"freeze_policy": "pt"})))
    assert "the trainable ones under freeze policy pt" in bridge[0]
    assert "trainable 100,224 (resampler 100,224)" in bridge[1] and bridge[3].endswith("; trainable 0")
    everything = list(stage_table(four))
    assert "trainable" in everything[1] and all(line.endswith("; all trainable") for line in everything[2:])


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            "debug_infimm",
            {"train": {"freeze_policy": "s2"}},
            "train.freeze_policy is 's2', but must be one of the policies of infimm models",
        ),
        (
            "debug_infimm",
            {"train": {"global_batch_size": 12}, "parallel": {"pipeline": 2, "virtual": 2}},
            "interleaved schedule needs micro-batches in multiples of",
        ),
        (
            "infimm_zephyr_7b_pt",
            {"train": {"fewest_micro_batches": True}, "parallel": {"pipeline": 2}},
            "train.fewest_micro_batches is True, but parallel.pipeline is 2",
        ),
        (
            "debug_mm1_moe",
            {"parallel": {"expert": 2, "overlap_experts": True}},
            "parallel.overlap_experts is True, but megatron-core overlaps only in bf16",
        ),
        (
            "debug_mm1",
            {"kernels": {"router": True}, "train": {"precision": "bf16"}},
            "kernels.router is True, but the model has no experts",
        ),
        (
            "debug_mm1",
            {"train": {"layers": "torch", "precision": "fp8"}},
            "train.precision is fp8, which needs a GPU with Transformer Engine",
        ),
        ("debug_mm1", {"monitor": {"run_name": "https://user:pass@host/data"}}, "monitor.run_name seems to contain a password or a key"),
    ],
)
def test_what_would_not_run_is_refused(recipe: str, changes: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(describe(changed(get_recipe(recipe), **changes)))


def test_files_of_a_run_are_checked_where_they_exist(demo_data: Path, tmp_path: Path) -> None:
    """Others are only named: they may be on the machine of the run."""
    debug = changed(get_recipe("debug_mm1"), data={"path": demo_data, "tokenizer": tmp_path / "none.model"})
    lines = list(describe(replace(debug, init_from=tmp_path / "none")))
    assert f"tokenizer {tmp_path / 'none.model'} does not exist (use --data.tokenizer)" in lines
    assert lines[-1] == f"no check of its beginning: init_from {tmp_path / 'none'} does not exist (use --init-from)"
    with pytest.raises(ValueError, match="is neither a complete checkpoint nor a run directory with one"):
        list(describe(replace(debug, init_from=tmp_path)))
    with pytest.raises(ValueError, match=r"there is no file .*none.py: correct the path"):
        list(describe(replace(debug, extra_hooks=("none.py:Hook",))))
    with pytest.raises(ValueError, match=r"tokens, but model\.decoder\.vocab_size is 64: raise it"):
        list(describe(replace(debug, data=changed(debug, data={"tokenizer": None}).data, model=small_vocabulary(debug))))


def small_vocabulary(experiment: Experiment) -> ModelConfig:
    return replace(experiment.model, decoder=replace(experiment.model.decoder, vocab_size=64))


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("debug_mm1", {"train": {"precision": "fp8"}, "precision": {"fp8_recipe": "mxfp8", "exp_avg": "bf16"}}),
        ("debug_mm1", {"train": {"layers": "te", "precision": "bf16"}, "kernels": {"cross_entropy": True, "tower_graph": 8}}),
        ("debug_mm1", {"train": {"precision": "bf16"}, "parallel": {"tensor": 2, "overlap_tensor": True}, "eval": {"samples": 0}}),
        (
            "debug_mm1_moe",
            {
                "train": {"precision": "fp8"},
                "parallel": {"expert": 2, "overlap_experts": True, "delay_weight_gradients": True, "expert_dispatch": "deepep"},
                "kernels": {"router": True, "token_permutation": True},
            },
        ),
    ],
)
def test_options_for_a_cluster_pass_on_a_machine_without_gpus(recipe: str, changes: dict[str, dict[str, Any]]) -> None:
    lines = list(describe(changed(get_recipe(recipe), **changes)))
    assert "this machine has no GPU: what the options need of GPUs, nodes and packages is checked when the run starts" in lines


def test_a_machine_with_gpus_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    debug = get_recipe("debug_mm1")
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformer_engine" else here(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    with pytest.raises(ValueError, match="fp8, which needs a GPU with Transformer Engine"):
        list(describe(changed(debug, train={"precision": "fp8"})))
    assert not [line for line in describe(debug) if "has no GPU" in line]

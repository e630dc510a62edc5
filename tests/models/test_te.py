"""The Transformer Engine backend is equivalent to the torch backend: same names, initial weights, losses and checkpoints.

These tests run Transformer Engine's own Python layers with kernels written in PyTorch (`support.te`); `make gpu-check` tests the real
kernels on a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small import small_experiment
from support.te import python_of_transformer_engine

from megatron_mm.config import Experiment
from megatron_mm.families.recipes import RECIPES
from megatron_mm.run.start import check

TESTS = Path(__file__).parents[1]


FAMILIES = ("mm1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("infimm", "mono_internvl")))
MODELS = [
    ("mm1", "fp32"),
    ("mm1", "experts"),
    *(pytest.param(name, "fp32", marks=pytest.mark.slow) for name in ("infimm", "mono_internvl")),
]
"""Families, with te_program's names of their variants."""


@functools.cache
def found(family: str) -> dict[str, Any]:
    """Run te_program for a family (once); return its output."""
    return json.loads(program("te_program.py", family)[-1])


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_checkpoints_name_everything_alike(family: str, model: str) -> None:
    names = found(family)[model]["torch"]["names"]
    assert found(family)[model]["te"]["names"] == names and not any("_extra_state" in name for name in names)
    layer = "language.decoder.layers.1"
    expected = {
        "mm1": ("vision.transformer.layers.0.input_layernorm.bias", f"{layer}.input_layernorm.weight"),
        "infimm": (f"{layer}.gated.attention_norm.bias", f"{layer}.gated.linear_kv.weight", f"{layer}.pre_mlp_layernorm.weight"),
        "mono_internvl": (f"{layer}.mlp.visual.linear_fc1.weight", f"{layer}.pre_mlp_layernorm.weight"),
    }
    assert set(expected[family]) <= set(names)


@pytest.mark.parametrize(("family", "model"), MODELS)
def test_losses_are_the_same(family: str, model: str) -> None:
    """From the same initial weights; fp32 sums in another order account for 1e-6 after four steps."""
    runs = found(family)[model]
    assert runs["te"]["losses"] == pytest.approx(runs["torch"]["losses"], rel=1e-6)


@pytest.mark.parametrize(("family", "model"), MODELS)
@pytest.mark.parametrize(("written", "read"), [("torch", "te"), ("te", "torch")])
def test_a_checkpoint_of_one_backend_goes_on_with_the_other(family: str, model: str, written: str, read: str) -> None:
    runs = found(family)[model]
    assert runs[read][f"from {written}"] == pytest.approx(runs[written]["losses"][2:], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_the_same(family: str) -> None:
    """With no image, one and several, gates open: in fp32 up to the order of sums, in bf16 as close as plain PyTorch's bf16."""
    passes = found(family)["passes"]
    images = passes.pop("images")
    assert images[0] == 0 and max(images) > 2 and 1 in images
    for fp32 in ("te fp32", "te deterministic"):
        assert max(passes[fp32]["logits"]) < 1e-6 and max(passes[fp32]["gradients"]) < 1e-5
    for part in ("logits", "gradients"):
        assert 1e-4 < max(passes["te bf16"][part]) < 1.5 * max(passes["torch bf16"][part])


@pytest.mark.parametrize("family", FAMILIES)
def test_pytorch_attends_to_packed_documents_in_deterministic_runs(family: str) -> None:
    """Transformer Engine attends only in MM1's tower, whose images are not packed."""
    expected = {"TorchDotProductAttention", *({"CachedAttention"} if family == "mm1" else ())}
    assert set(found(family)["passes"]["te deterministic"]["core attention"]) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_rounds_and_no_more(family: str) -> None:
    """Logits are within 3% of fp32's; losses of four steps are close to bf16's, and bit-identical if layers are recomputed. A stale copy of
    the weights would be noticed: each step's batch is evaluated first, and must have the same loss in training."""
    bf16, fp8 = (found(family)["passes"][f"te {precision}"] for precision in ("bf16", "fp8"))
    assert max(bf16["logits"]) < 1e-2 and 1e-2 < max(fp8["logits"]) < 3e-2
    assert max(bf16["gradients"]) < max(fp8["gradients"]) < 0.25
    losses = found(family)["losses"]
    assert losses["fp8"] != losses["bf16"] and losses["fp8"] == pytest.approx(losses["bf16"], rel=1e-3)
    assert losses["fp8 recomputed"] == losses["fp8"]
    assert found(family)["recipes"] == ["Float8CurrentScalingQuantizer"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_two_processes_are_those_of_one(family: str) -> None:
    """Tensor and sequence parallelism on te against plain PyTorch on one process: the norm of every parameter's gradient."""
    norms = found(family)["cut"]
    cut = [name for name, (_, *here) in norms.items() if len(here) == 1]
    copies = [name for name, (_, *here) in norms.items() if len(here) == 2]
    expected = {
        "mm1": ("mlp.linear_fc2.weight", "input_layernorm.weight"),
        "infimm": ("gated.linear_kv.weight", "gated.attention_gate"),
        "mono_internvl": ("mlp.visual.linear_fc1.weight", "pre_mlp_layernorm.weight"),
    }
    assert any(name.endswith(expected[family][0]) for name in cut) and any(name.endswith(expected[family][1]) for name in copies)
    largest = max(whole for whole, *_ in norms.values())
    for name, (whole, *here) in norms.items():
        assert here == pytest.approx([whole] * len(here), rel=1e-4, abs=1e-7 * largest), name


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_fp8_products_refuse_are_known(family: str) -> None:
    """Sizes that the check before the start refuses would indeed fail, and its error names the size."""
    misfits = found(family)["misfits"]
    assert len(misfits) == {"mm1": 4, "infimm": 7, "mono_internvl": 4}[family]
    for name, (products, refusal) in misfits.items():
        assert "FP8" in products, name
        assert f"but {name} is" in refusal


# ------------------------------------------------------------------------------------------------------------- at full size


def program(name: str, *arguments: str, timeout: float = 240) -> list[str]:
    """Run a program of this folder in a process of its own; return the lines that it prints."""
    if python_of_transformer_engine() is None:
        pytest.skip("no transformer-engine here: see `make test-te`")
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def check_stages(precision: str, *recipes: str) -> None:
    for line in program("te_recipes.py", precision, *recipes, timeout=1500):
        found = json.loads(line)
        assert found["differences"] == [] and found["entries"] > 100 and found["parameters"] > 5e8, found


def test_stages_at_full_size_have_the_same_names_shapes_places_and_types() -> None:
    check_stages("fp8", "mm1_30b")


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_stages_of_every_recipe_at_full_size(precision: str) -> None:
    check_stages(precision, *(name for name in RECIPES if not name.startswith("debug")))


@pytest.mark.slow
def test_forward_passes_stay_on_the_gpu() -> None:
    """Every family in bf16 and FP8 on fake GPU tensors: all weights and buffers are on the GPU, and no operation mixes devices."""
    seen = json.loads(program("te_fake_cuda.py")[-1])
    refused = seen.pop("mixed devices")
    assert "cuda:0" in refused and "cpu" in refused
    assert seen.keys() == {f"{family} {precision}" for family in ("mm1", "infimm", "mono_internvl") for precision in ("bf16", "fp8")}
    for devices, logits in seen.values():
        assert devices == ["cuda:0"] and len(logits) == 4 and all(shape.endswith("128] on cuda:0") for shape in logits)


def test_what_was_written_down_of_the_extension_is_what_a_compiled_one_has() -> None:
    """If one is installed, it has the same functions, parameters (as many, if it does not name them) and enumerations."""
    lines = program("te_interface.py")
    if lines == ["not compiled"]:
        pytest.skip("Transformer Engine is here without its extension")
    assert lines == []


# -------------------------------------------------------------------------------------------------------- sizes of products


def _with(experiment: Experiment, **decoder: int) -> Experiment:
    model = replace(experiment.model, decoder=replace(experiment.model.decoder, **decoder))
    return replace(experiment, model=model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_hidden_size": 72}, "model.decoder.ffn_hidden_size is 72"),
        ({"hidden_size": 72}, "model.decoder.hidden_size is 72"),
        ({"num_query_groups": 1, "head_dim": 12}, "num_query_groups) x head_dim is 120"),
    ],
)
def test_sizes_that_fp8_products_refuse_are_found_before_the_start(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(_with(small_experiment(precision="fp8"), **changes), tmp_path)

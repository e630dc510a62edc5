"""The Transformer Engine backend is the torch backend by other means: same names, same initial weights, same losses, same checkpoints.

It runs here on a stand-in (`stand_in_te`); what the real kernels compute is checked on a GPU by `make gpu-check`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small import small_experiment

from megatron_mm.config import Experiment
from megatron_mm.parallel.build import choose_backend
from megatron_mm.training.run import check

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("te_program.py"))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["fp32", "experts"])
def test_checkpoints_name_everything_alike(found: dict[str, Any], model: str) -> None:
    names = found[model]["torch"]["names"]
    assert len(names) > 70 and found[model]["te"]["names"] == names
    assert "vision.transformer.layers.0.input_layernorm.bias" in names and not any("_extra_state" in name for name in names)


@pytest.mark.parametrize("model", ["fp32", "experts"])
def test_losses_are_the_same(found: dict[str, Any], model: str) -> None:
    """From the same initial weights; 1e-6 is what fp32 sums in another order leave after four steps."""
    assert found[model]["te"]["losses"] == pytest.approx(found[model]["torch"]["losses"], rel=1e-6)


@pytest.mark.parametrize("model", ["fp32", "experts"])
@pytest.mark.parametrize(("written", "read"), [("torch", "te"), ("te", "torch")])
def test_a_checkpoint_of_one_backend_goes_on_with_the_other(found: dict[str, Any], model: str, written: str, read: str) -> None:
    assert found[model][read][f"from {written}"] == pytest.approx(found[model][written]["losses"][2:], rel=1e-6)


def test_fp8_scales_tensors_as_they_are_and_uses_the_weights_of_its_step(found: dict[str, Any]) -> None:
    """The stand-in rounds nothing in FP8, so what is left of a difference to bf16 would be old copies of weights."""
    assert found["recipes"] == ["Float8CurrentScaling"]
    assert found["fp8"]["te"] == found["bf16"]["te"]


# ------------------------------------------------------------------------------------------------------------ which backend


@pytest.fixture
def te_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name == "transformer_engine" else here(name))


@pytest.mark.usefixtures("te_is_installed")
@pytest.mark.parametrize(
    ("layers", "precision", "on_gpu", "backend"),
    [
        ("auto", "bf16", True, "te"),
        ("auto", "fp8", True, "te"),
        ("te", "bf16", True, "te"),
        ("auto", "fp32", True, "torch"),
        ("torch", "bf16", True, "torch"),
        ("auto", "bf16", False, "torch"),
    ],
)
def test_auto_takes_te_where_it_has_the_kernels(layers: str, precision: str, on_gpu: bool, backend: str) -> None:
    assert choose_backend(small_experiment(layers=layers, precision=precision), on_gpu=on_gpu) == backend


@pytest.mark.usefixtures("te_is_installed")
@pytest.mark.parametrize(
    ("layers", "precision", "on_gpu", "message"),
    [
        ("te", "fp32", True, "has no fp32 attention: use --train.precision bf16 or --train.layers torch"),
        ("te", "bf16", False, "needs a GPU"),
        ("torch", "fp8", True, "needs a GPU with Transformer Engine: use --train.precision bf16"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(layers: str, precision: str, on_gpu: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_backend(small_experiment(layers=layers, precision=precision), on_gpu=on_gpu)


def _with(experiment: Experiment, sequence_length: int = 96, **decoder: int) -> Experiment:
    model = replace(experiment.model, decoder=replace(experiment.model.decoder, **decoder))  # type: ignore[attr-defined]
    return replace(experiment, model=model, data=replace(experiment.data, sequence_length=sequence_length))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 100}, "data.sequence_length x train.micro_batch_size is 100"),
        ({"ffn_hidden_size": 72}, "model.decoder.ffn_hidden_size is 72"),
        ({"hidden_size": 72}, "model.decoder.hidden_size is 72"),
        ({"num_query_groups": 1}, "model.decoder.num_query_groups x head_dim is 8"),
    ],
)
def test_sizes_that_fp8_products_refuse_are_found_before_the_start(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check(_with(small_experiment(precision="fp8"), **changes), tmp_path)

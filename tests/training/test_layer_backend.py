"""The layer backend is Transformer Engine where it can run; the log says which one is used, why, and what a missing package costs."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.small import small_experiment

from megatron_mm.config import Experiment
from megatron_mm.models.context import Kernels
from megatron_mm.platform import engines
from megatron_mm.run.machine_checks import check_machine
from megatron_mm.training.layer_backend import choose_backend, log_layers

REPOSITORY = Path(__file__).parents[2]


def bf16(*, layers: str = "auto") -> Experiment:
    return small_experiment(layers=layers, precision="bf16")


@pytest.fixture
def te_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name == "transformer_engine" else here(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


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


@pytest.mark.usefixtures("te_is_installed")
@pytest.mark.parametrize("with_flash_attn", [False, True])
def test_a_gpu_without_packed_attention_takes_torch_and_says_so(
    with_flash_attn: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On an A100, cuDNN has no such kernel, but flash-attn does."""
    here = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (SimpleNamespace() if with_flash_attn else None) if name == "flash_attn" else here(name)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    auto, experiment = choose_backend(bf16(), on_gpu=True), bf16()
    log_layers(experiment, backend=auto, kernels=Kernels(), on_gpu=True)
    if with_flash_attn:
        assert auto == "te" and not any(record.levelno >= logging.WARNING for record in caplog.records)
        return
    assert auto == "torch" and "compute capability 8.0" in caplog.text and "install flash-attn, or use --train.layers torch" in caplog.text
    for train in ({"layers": "te", "precision": "bf16"}, {"layers": "auto", "precision": "fp8"}):
        with pytest.raises(ValueError, match=r"compute capability 8\.0, .* needs 9\.0, and the package flash-attn.*: install it, or use"):
            choose_backend(small_experiment(**train), on_gpu=True)


def without_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a machine with a GPU and without Transformer Engine."""
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformer_engine" else here(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)


def test_a_gpu_without_te_is_told_what_that_costs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    without_te(monkeypatch)
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        check_machine(bf16())
    assert "layers: plain PyTorch (Transformer Engine is not installed); fused kernels: none; precision: bf16" in caplog.text
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "took 327 ms per step as plain PyTorch and 257 ms with it" in warning and "docs/gpu.md" in warning
    measured = (REPOSITORY / "docs" / "gpu.md").read_text()
    assert "| torch bf16 | 327 |" in measured and "| te bf16, fused | 257 |" in measured


def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    without_te(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        check_machine(bf16())
    assert not caplog.records


@pytest.mark.parametrize(
    ("layers", "precision", "on_gpu", "why"),
    [
        ("torch", "bf16", True, "train.layers is torch"),
        ("auto", "fp32", True, "Transformer Engine has no fp32 attention"),
        ("auto", "bf16", False, "there is no GPU"),
    ],
)
def test_nobody_is_warned_of_a_choice(layers: str, precision: str, on_gpu: bool, why: str, caplog: pytest.LogCaptureFixture) -> None:
    experiment = small_experiment(layers=layers, precision=precision)
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        log_layers(experiment, backend="torch", kernels=Kernels(), on_gpu=on_gpu)
    assert [record.getMessage() for record in caplog.records] == [
        f"layers: plain PyTorch ({why}); fused kernels: none; precision: {precision}"
    ]


def test_layers_and_kernels_in_use_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(engines, "installed", lambda package: "2.20.2")
    with caplog.at_level(logging.INFO, logger="megatron_mm"):
        log_layers(bf16(), backend="te", kernels=Kernels(weight_gradients=True, router=True), on_gpu=True)
    assert "layers: Transformer Engine 2.20.2; fused kernels: weight_gradients, router; precision: bf16" in caplog.text

"""Chooses the layer backend of a run, and logs what was chosen and why."""

from __future__ import annotations

import logging
from dataclasses import fields

from megatron_mm.config import Experiment
from megatron_mm.models.context import Kernels
from megatron_mm.models.layers import Backend
from megatron_mm.platform import engines
from megatron_mm.training.machine import THIS_MACHINE, Machine

logger = logging.getLogger(__name__)

PLAIN_IS_SLOWER = "on an H200, layers of MM1 30B took 327 ms per step as plain PyTorch and 257 ms with it in bf16"
"""Measured (docs/gpu.md, "What training costs"; benchmarks/results/h200_20261126). Small models that wait for the host gain less."""


def choose_backend(experiment: Experiment, *, on_gpu: bool, machine: Machine = THIS_MACHINE) -> Backend:
    """Return the layer backend for `train.layers`. Where a GPU lacks Transformer Engine or a kernel of it, auto uses plain PyTorch.

    Raises ValueError if Transformer Engine is requested, or needed for FP8, but it or its attention over packed documents is missing; and
    if it is requested in fp32, for which its attention has no kernel.
    """
    train = experiment.train
    has_te = on_gpu and machine.has("transformer_engine")
    missing = machine.packed_attention_missing() if has_te and train.layers != "torch" and train.precision != "fp32" else ""
    if missing and (train.layers == "te" or train.precision == "fp8"):
        raise ValueError(
            f"train.layers is {train.layers} and train.precision {train.precision}, but {missing}: install it, or use "
            "--train.layers torch and --train.precision bf16"
        )
    if missing:
        return "torch"
    if train.layers == "te" and not has_te:
        raise ValueError("train.layers is te, but Transformer Engine needs a GPU and its package: install it or use --train.layers torch")
    if train.precision == "fp8" and (not has_te or train.layers == "torch"):
        raise ValueError("train.precision is fp8, which needs a GPU with Transformer Engine: use --train.precision bf16 here")
    if train.layers == "te" and train.precision == "fp32":
        raise ValueError(
            "train.layers is te, but Transformer Engine has no fp32 attention: use --train.precision bf16 or --train.layers torch"
        )
    return "te" if has_te and train.layers != "torch" and train.precision != "fp32" else "torch"


def log_layers(experiment: Experiment, *, backend: Backend, kernels: Kernels, on_gpu: bool, machine: Machine = THIS_MACHINE) -> None:
    """Log the layer backend, the fused kernels and the precision, and warn if auto falls back to plain PyTorch on a GPU. Called by the main
    process, once per start."""
    train = experiment.train
    used = ", ".join(field.name for field in fields(kernels) if getattr(kernels, field.name)) or "none"
    if backend == "te":
        version = engines.installed("transformer-engine") or "of an unknown version"
        logger.info("layers: Transformer Engine %s; fused kernels: %s; precision: %s", version, used, train.precision)
        return
    why, remedy = _why_plain(experiment, on_gpu=on_gpu, machine=machine)
    logger.info("layers: plain PyTorch (%s); fused kernels: %s; precision: %s", why, used, train.precision)
    if remedy:
        logger.warning("layers are plain PyTorch, because %s; %s: %s, or use --train.layers torch", why, PLAIN_IS_SLOWER, remedy)


def _why_plain(experiment: Experiment, *, on_gpu: bool, machine: Machine) -> tuple[str, str]:
    """Return why layers are plain PyTorch, and what to install if they need not be; empty if nothing would change that."""
    if experiment.train.layers == "torch":
        return "train.layers is torch", ""
    if not on_gpu:
        return "there is no GPU", ""
    if experiment.train.precision == "fp32":
        return "Transformer Engine has no fp32 attention", ""
    if not machine.has("transformer_engine"):
        return "Transformer Engine is not installed", "install it as docs/gpu.md says (pip install --no-build-isolation -e '.[gpu]')"
    return machine.packed_attention_missing(), "install flash-attn"

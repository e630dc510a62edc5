"""Decides which fused kernels a run uses: those requested, as far as they are available."""

from __future__ import annotations

from dataclasses import fields

import torch

from megatron_mm.config import EvaConfig, Experiment
from megatron_mm.models.context import Kernels
from megatron_mm.models.layers import Backend
from megatron_mm.training.machine import THIS_MACHINE, Machine


def choose_kernels(experiment: Experiment, *, backend: Backend, machine: Machine = THIS_MACHINE) -> Kernels:
    """Return the kernels that this run uses on a layer backend.

    Raises ValueError if a requested kernel cannot run here, naming it and the reason.
    """
    missing = _missing(experiment, backend=backend, machine=machine)
    chosen = {}
    for field in fields(Kernels):
        wanted, why = getattr(experiment.kernels, field.name), missing[field.name]
        if wanted and why:
            raise ValueError(f"kernels.{field.name} is True, but {why}: leave it unset to use the kernel wherever it can run")
        chosen[field.name] = not why if wanted is None else wanted
    return Kernels(**chosen)


def _missing(experiment: Experiment, *, backend: Backend, machine: Machine) -> dict[str, str]:
    """Return, for each kernel, the reason why it cannot run here; empty if it can."""
    no_te = "" if backend == "te" else "it is part of Transformer Engine, but layers are plain PyTorch here"
    no_triton = no_te or ("" if machine.has("triton") else "it needs Triton, which is not installed")
    no_experts = "" if experiment.model.decoder.moe is not None else "the model has no experts"
    no_eva = "" if isinstance(getattr(experiment.model, "vision", None), EvaConfig) else "the model has no EVA tower"
    return {
        "weight_gradients": no_te,
        "cross_entropy": no_triton,
        "token_permutation": no_triton or no_experts,
        "router": no_te or no_experts,
        "eva_tower": no_te or no_eva,
    }


def fuse_weight_gradients(chunks: list[torch.nn.Module]) -> None:
    """Make Transformer Engine's layers add weight gradients to `main_grad`, the buffer that the data-parallel wrapper has assigned.

    megatron-core's option `gradient_accumulation_fusion` is not used, because it also affects megatron-core's own output layer, which then
    needs apex.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]

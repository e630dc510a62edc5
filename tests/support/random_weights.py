"""Weights that hide nothing: every parameter random, also those that modules start at zero or one."""

from __future__ import annotations

import torch


@torch.no_grad()
def randomize(module: torch.nn.Module, *, seed: int = 0) -> None:
    """Normal distributions: 1 / sqrt(fan-in) wide for matrices, 0.2 for tables and vectors; around 1 for norms' weights, else around 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm)}
    layers = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    for parameter in module.parameters():
        spread = parameter[0].numel() ** -0.5 if id(parameter) in layers else 0.2
        parameter.copy_(float(id(parameter) in norms) + spread * torch.randn(parameter.shape, generator=generator))

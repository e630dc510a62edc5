"""Random values for every parameter, including those that modules initialise to zero or one, so that no error is hidden."""

from __future__ import annotations

import torch


@torch.no_grad()
def randomize(module: torch.nn.Module, *, seed: int = 0) -> None:
    """Draw normal values of standard deviation 1 / sqrt(fan-in) for matrices, else 0.2; of mean 1 for norms' weights, else 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm)}
    layers = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    for parameter in module.parameters():
        spread = parameter[0].numel() ** -0.5 if id(parameter) in layers else 0.2
        parameter.copy_(float(id(parameter) in norms) + spread * torch.randn(parameter.shape, generator=generator))

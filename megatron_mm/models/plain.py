"""Layers of plain torch, allocated and marked with their initial scale, for modules that are whole on every process."""

from __future__ import annotations

import torch
from torch import nn


def linear(input_size: int, output_size: int, *, bias: bool = True, dtype: torch.dtype) -> nn.Linear:
    """A linear layer whose weights will be drawn at 1 / sqrt(fan-in)."""
    device = torch.get_default_device()  # skip_init knows nothing of `with torch.device(...)`
    layer = nn.utils.skip_init(nn.Linear, input_size, output_size, bias=bias, dtype=dtype, device=device)
    layer.weight.init_std = input_size**-0.5
    return layer


def norm(size: int, *, dtype: torch.dtype, epsilon: float = 1e-5) -> nn.LayerNorm:
    """A LayerNorm; its weight begins as 1."""
    return nn.LayerNorm(size, eps=epsilon, dtype=dtype)

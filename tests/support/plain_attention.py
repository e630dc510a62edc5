"""Attention and rotary positions written out, for the plain models of the tests.

Shape legend: n sequences, a heads, s tokens, d head width.
"""

from __future__ import annotations

import torch


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[n, s, a * d] -> [n, a, s, d]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """[n, a, s, d] -> [n, s, a * d]."""
    return x.transpose(1, 2).flatten(2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax attention of [n, a, s, d] over [n, a, keys, d].

    Args:
        mask: [s, keys] bool, True where a query may attend. A query without any key gets an average, which the caller must replace.
    """
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ v


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions 0, 1, 2, ... on [n, a, s, d]: channel i of the first half and channel i of the second are a pair."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), frequencies)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)

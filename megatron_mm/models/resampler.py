"""Flamingo's Perceiver resampler (arXiv 2204.14198, section 3.1.1): the tower's features of an image -> a fixed number of latents.

Learned latents attend, layer after layer, to the features and to themselves. It is a plain torch module. Every process has all of it, and
runs it on its own share of the images. Weights are allocated and marked with their initial scale: 1 / sqrt(fan-in) for matrices, less with
increasing depth for those that write to the residual stream, and 1 for latents.

Shape legend: n images, s tokens of the tower, v tower width, k latents, a heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config import ResamplerConfig
from megatron_mm.models.plain import linear, norm


class PerceiverResampler(nn.Module):
    """Features [n, s, v] -> latents [n, k, v]."""

    def __init__(self, config: ResamplerConfig, *, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, width, dtype=dtype))
        self.latents.init_std = 1.0  # type: ignore[attr-defined]
        self.layers = nn.ModuleList(ResamplerLayer(config, width=width, dtype=dtype) for _ in range(config.num_layers))
        self.norm = norm(width, dtype=dtype)
        for name, parameter in self.named_parameters():
            if name.endswith("output.weight"):
                parameter.init_std /= math.sqrt(2 * config.num_layers)  # type: ignore[attr-defined]

    def forward(self, features_nsv: torch.Tensor) -> torch.Tensor:
        """[n, s, v] -> [n, k, v]."""
        latents_nkv = self.latents.expand(features_nsv.shape[0], -1, -1)
        for layer in self.layers:
            latents_nkv = layer(latents_nkv, features_nsv)
        return self.norm(latents_nkv)


class ResamplerLayer(nn.Module):
    """Attention of the latents to features and latents, then a feed-forward network; the outputs of both are added to the latents."""

    def __init__(self, config: ResamplerConfig, *, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        inner = config.num_attention_heads * config.head_dim
        self.feature_norm = norm(width, dtype=dtype)
        self.latent_norm = norm(width, dtype=dtype)
        self.query = linear(width, inner, bias=False, dtype=dtype)
        self.key_value = linear(width, 2 * inner, bias=False, dtype=dtype)
        self.output = linear(inner, width, bias=False, dtype=dtype)
        self.ffn_norm = norm(width, dtype=dtype)
        self.ffn_hidden = linear(width, config.ffn_multiplier * width, bias=False, dtype=dtype)
        self.ffn_output = linear(config.ffn_multiplier * width, width, bias=False, dtype=dtype)

    def forward(self, latents_nkv: torch.Tensor, features_nsv: torch.Tensor) -> torch.Tensor:
        """([n, k, v], [n, s, v]) -> [n, k, v]."""
        normed_nkv = self.latent_norm(latents_nkv)
        seen = self.key_value(torch.cat([self.feature_norm(features_nsv), normed_nkv], dim=1))
        query, key, value = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (self.query(normed_nkv), *seen.chunk(2, dim=-1)))
        attended_nka = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        latents_nkv = latents_nkv + self.output(attended_nka)
        return latents_nkv + self.ffn_output(F.gelu(self.ffn_hidden(self.ffn_norm(latents_nkv))))

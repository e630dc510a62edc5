"""EVA-CLIP image towers (arXiv 2303.15389), as InfiMM uses them: all tokens of the last layer, before the final norm.

This tower is plain PyTorch, whereas `models/vision.py` uses megatron-core's layers. It is frozen in every stage of InfiMM, so it only runs
forward passes, in its parameters' type, and every process has all of it. No part of it is parallel, in FP8, recomputed or differentiated,
so the only benefit of Transformer Engine's layers would be fused attention, which torch's scaled-dot-product attention provides as well.
The features that distinguish EVA's layers (biases on queries and values but not on keys, LayerNorms inside attention and MLP, rotary
positions for patches but not for the class token, norms after a branch instead of before it) would each require a class of its own in
megatron-core.

Checkpoints contain the final norm and the head to CLIP's shared space. They are kept, so that a checkpoint is complete after import and
export, but `EvaTower.forward` does not use them.

Shape legend: n images, g patches along one side, p = g * g patches, s = 1 + p tokens (class token first), v tower width, a heads, d head
width, f width of the MLP.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import jit
from torch import nn

from megatron_mm.config import EvaConfig
from megatron_mm.models.plain import ImageConvolution, PixelNormalization, linear, norm

_ALIGNED = 8
"""Rows of a multiple of this many numbers suit tensor cores in bf16."""
_PADDED = 64
"""Other rows are padded to a multiple of this many numbers (`PaddedSwiGLU`)."""


class EvaTower(nn.Module):
    """EVA-CLIP's vision transformer: pixels [n, 3, H, W] -> tokens [n, s, v]; n may be 0.

    Weights are allocated and marked with their initial scale: 1 / sqrt(fan-in) for matrices, less with increasing depth for matrices that
    write to the residual stream.
    """

    def __init__(self, config: EvaConfig, *, dtype: torch.dtype, fused: bool = False) -> None:
        """
        Args:
            dtype: type of the parameters and of all computations except rotations.
            fused: rotate with Transformer Engine's kernel, and compute the SwiGLU with a compiled one, in rows that suit tensor cores
                (`config.KernelConfig.eva_tower`).
        """
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embedding = _patch_convolution(config, dtype=dtype)
        self.class_embedding = _vector(width, std=width**-0.5, dtype=dtype)
        self.position_embedding = _vector(config.num_tokens, width, std=width**-0.5, dtype=dtype)
        self.layers = nn.ModuleList(EvaLayer(config, dtype=dtype, fused=fused) for _ in range(config.num_layers))
        self.norm = norm(width, epsilon=config.norm_epsilon, dtype=dtype)
        self.head = linear(width, config.output_size, dtype=dtype)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                parameter.init_std /= math.sqrt(2 * config.num_layers)  # type: ignore[attr-defined]
        self.normalize = PixelNormalization(config.mean, config.std)
        angles = rotary_angles(config)
        self.turn = None if angles is None else (FusedTurn if fused else Turn)(angles)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            pixels: [n, 3, H, W] uint8, RGB, H = W = `config.image_size`.

        Returns:
            [n, s, v] in the parameters' type: the last layer's tokens before the final norm, class token first, then the
            patches row by row.
        """
        size = self.config.image_size
        assert pixels.shape[1:] == (3, size, size), f"pixels of shape {tuple(pixels.shape)}, but the tower takes [n, 3, {size}, {size}]"
        normalised = self.normalize(pixels).to(self.class_embedding.dtype)
        patches_npv = self.patch_embedding(normalised).flatten(2).transpose(1, 2)
        class_n1v = self.class_embedding.expand(pixels.shape[0], 1, -1)
        tokens_nsv = torch.cat([class_n1v, patches_npv], dim=1) + self.position_embedding
        for layer in self.layers:
            tokens_nsv = layer(tokens_nsv, self.turn)
        return tokens_nsv


class EvaLayer(nn.Module):
    """Attention and MLP, each with a norm before or after it: [n, s, v] -> [n, s, v]."""

    def __init__(self, config: EvaConfig, *, dtype: torch.dtype, fused: bool) -> None:
        super().__init__()
        self.post_norm = config.block == "post_norm"
        self.attention_norm = norm(config.hidden_size, epsilon=config.norm_epsilon, dtype=dtype)
        self.attention = EvaAttention(config, dtype=dtype)
        self.mlp_norm = norm(config.hidden_size, epsilon=config.norm_epsilon, dtype=dtype)
        self.mlp = _mlp(config, dtype=dtype, fused=fused)

    def forward(self, x_nsv: torch.Tensor, turn: nn.Module | None) -> torch.Tensor:
        """
        Args:
            turn: rotates queries and keys [n, s, a, d]; None without rotary positions.
        """
        if self.post_norm:
            x_nsv = x_nsv + self.attention_norm(self.attention(x_nsv, turn))
            return x_nsv + self.mlp_norm(self.mlp(x_nsv))
        x_nsv = x_nsv + self.attention(self.attention_norm(x_nsv), turn)
        return x_nsv + self.mlp(self.mlp_norm(x_nsv))


class EvaAttention(nn.Module):
    """Attention of every token to every token of its image.

    The three projections are one matrix, with the rows of queries first, as in the checkpoints of EVA01-g and EVA02-bigE. Those of EVA02-L
    have three matrices instead, which hold the same rows.
    """

    def __init__(self, config: EvaConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = linear(width, 3 * width, bias=False, dtype=dtype)
        self.q_bias = _vector(width, std=0.0, dtype=dtype)
        self.v_bias = _vector(width, std=0.0, dtype=dtype)
        self.inner_norm = norm(width, epsilon=config.norm_epsilon, dtype=dtype) if config.swiglu else nn.Identity()
        self.output = linear(width, width, dtype=dtype)

    def forward(self, x_nsv: torch.Tensor, turn: nn.Module | None) -> torch.Tensor:
        """[n, s, v] -> [n, s, v]; turn as in `EvaLayer.forward`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q_nsad, k_nsad, v_nsad = F.linear(x_nsv, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        if turn is not None:
            q_nsad, k_nsad = turn(q_nsad), turn(k_nsad)
        q_nasd, k_nasd, v_nasd = (x.transpose(1, 2) for x in (q_nsad, k_nsad, v_nsad))
        attended_nsv = F.scaled_dot_product_attention(q_nasd, k_nasd, v_nasd).transpose(1, 2).flatten(2)
        return self.output(self.inner_norm(attended_nsv))


class EvaMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: EvaConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.up = linear(width, inner, dtype=dtype)
        self.down = linear(inner, width, dtype=dtype)

    def forward(self, x_nsv: torch.Tensor) -> torch.Tensor:
        """[n, s, v] -> [n, s, v]."""
        return self.down(F.gelu(self.up(x_nsv)))


class EvaSwiGLU(nn.Module):
    """SiLU of one branch times the other, a LayerNorm of that, and a linear layer."""

    def __init__(self, config: EvaConfig, *, dtype: torch.dtype, fused: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.gated = jit.jit_fuser(_gated) if fused else _gated
        self.gate = linear(width, inner, dtype=dtype)
        self.up = linear(width, inner, dtype=dtype)
        self.inner_norm = norm(inner, epsilon=config.norm_epsilon, dtype=dtype)
        self.down = linear(inner, width, dtype=dtype)

    def forward(self, x_nsv: torch.Tensor) -> torch.Tensor:
        """[n, s, v] -> [n, s, v]."""
        return self.down(self.inner_norm(self.gated(self.gate(x_nsv), self.up(x_nsv))))


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


class PaddedSwiGLU(EvaSwiGLU):
    """`EvaSwiGLU` whose products have rows of a padded width, for widths that do not suit tensor cores, such as EVA02-L's 2730.

    cuBLAS uses its fast kernels only if every row of a bf16 matrix begins at a multiple of 16 bytes, that is, of 8 numbers. Here rows are
    padded with zeros to a multiple of 64 numbers. The products work on tiles of at least 64 columns in any case, so this takes them no
    longer than a multiple of 8 would, and rows begin at cache lines of 128 bytes.

    Parameters are those of `EvaSwiGLU`. Each forward pass copies the three matrices into padded ones (17 MB per layer of EVA02-L), which is
    little work next to the products. No copy has to follow when weights are loaded, trained or moved. One product computes both branches.
    """

    blank: torch.Tensor

    def __init__(self, config: EvaConfig, *, dtype: torch.dtype) -> None:
        super().__init__(config, dtype=dtype, fused=False)
        self.gated_norm = jit.jit_fuser(_gated_norm)
        blank = torch.zeros(-config.ffn_hidden_size % _PADDED, config.hidden_size, dtype=dtype)
        self.register_buffer("blank", blank, persistent=False)

    def forward(self, x_nsv: torch.Tensor) -> torch.Tensor:
        """[n, s, v] -> [n, s, v]."""
        gate_up = torch.cat([self.gate.weight, self.blank, self.up.weight, self.blank])
        biases = torch.cat([self.gate.bias, self.blank[:, 0], self.up.bias, self.blank[:, 0]])
        down = torch.cat([self.down.weight, self.blank.T], dim=1)
        product = F.linear(x_nsv, gate_up, biases)
        return F.linear(self.gated_norm(product, self.inner_norm.weight, self.inner_norm.bias, self.inner_norm.eps), down, self.down.bias)


def _gated_norm(product: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """SiLU of one branch times the other, and a LayerNorm of that over the true width, in float32.

    Args:
        product: [n, s, 2 * padded width]: the gate and the other branch, each filled up with zeros.
        weight, bias: [f], those of the norm.

    Returns:
        [n, s, padded width], filled up with zeros.
    """
    gate, up = product.float().chunk(2, dim=-1)
    width, padded = len(weight), gate.shape[-1]
    gated = F.silu(gate) * up  # 0 in the padding
    mean = gated.sum(dim=-1, keepdim=True) / width
    centred = torch.where(torch.arange(padded, device=gated.device) < width, gated - mean, 0.0)
    variance = centred.square().sum(dim=-1, keepdim=True) / width
    weight, bias = (F.pad(x.float(), (0, padded - width)) for x in (weight, bias))
    return (centred * torch.rsqrt(variance + epsilon) * weight + bias).to(product.dtype)


def _mlp(config: EvaConfig, *, dtype: torch.dtype, fused: bool) -> nn.Module:
    if not config.swiglu:
        return EvaMLP(config, dtype=dtype)
    if fused and config.ffn_hidden_size % _ALIGNED:
        return PaddedSwiGLU(config, dtype=dtype)
    return EvaSwiGLU(config, dtype=dtype, fused=fused)


def rotary_angles(config: EvaConfig) -> torch.Tensor | None:
    """Return the angle by which every pair of a head's channels is rotated: [s, d / 2], or None without rotary positions.

    The angles of the first half of the pairs depend on the row of the patch, those of the second half on its column. Positions are scaled
    to the grid of pre-training, so they do not depend on the image size. The class token's angles are 0, so it is not rotated.

    Worked example: heads of width 8 (4 pairs), 2 x 2 patches, a grid of 4. Rows and columns are at positions 0 and 2, and the frequencies
    of two pairs are 10000^0 = 1 and 10000^(-1/2) = 0.01. The patch in row 1 and column 0 is rotated by 2, 0.02 (row), 0, 0 (column).
    """
    if config.rotary_grid is None:
        return None
    pairs = config.head_dim // 4  # for one axis
    frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    positions = torch.arange(config.grid_size, dtype=torch.float32) / config.grid_size * config.rotary_grid
    angles_gf = torch.outer(positions, frequencies)
    rows = angles_gf.repeat_interleave(config.grid_size, dim=0)
    columns = angles_gf.repeat(config.grid_size, 1)
    return torch.cat([torch.zeros(1, 2 * pairs), torch.cat([rows, columns], dim=1)])


class Turn(nn.Module):
    """Rotates the pairs of neighbouring channels 0-1, 2-3, ... of [n, s, a, d] by angles, in float32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, angles: torch.Tensor) -> None:
        """
        Args:
            angles: [s, d / 2].
        """
        super().__init__()
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, x_nsad: torch.Tensor) -> torch.Tensor:
        even, odd = x_nsad[..., 0::2].float(), x_nsad[..., 1::2].float()
        turned = torch.stack([even * self.cos - odd * self.sin, even * self.sin + odd * self.cos], dim=-1)
        return turned.flatten(3).to(x_nsad.dtype)


class FusedTurn(nn.Module):
    """`Turn` with Transformer Engine's rotary kernel, which takes the angle of each channel: [s, 1, 1, d]."""

    angles: torch.Tensor

    def __init__(self, angles: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("angles", angles.repeat_interleave(2, dim=1)[:, None, None], persistent=False)

    def forward(self, x_nsad: torch.Tensor) -> torch.Tensor:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

        return apply_rotary_pos_emb(x_nsad, self.angles, tensor_format="bshd", interleaved=True, fused=True)


def _vector(*shape: int, std: float, dtype: torch.dtype) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype))
    parameter.init_std = std  # type: ignore[attr-defined]
    return parameter


def _patch_convolution(config: EvaConfig, *, dtype: torch.dtype) -> nn.Conv2d:
    patch, device = config.patch_size, torch.get_default_device()
    layer = nn.utils.skip_init(ImageConvolution, 3, config.hidden_size, patch, stride=patch, dtype=dtype, device=device)
    layer.weight.init_std = (3 * patch**2) ** -0.5
    return layer

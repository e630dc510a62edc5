"""FP8 tensors with a scale for each block: of 128 values of a row, or of 128 rows and columns (weights).

The tensors are Transformer Engine's own, as is their dequantization; this file computes their data and scales.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

BLOCK = 128


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any, *, float8: torch.dtype) -> Any:
    assert not getattr(quantizer, "all_gather_usage", False), "no kernel of the compact format here"
    if output is None:
        output = _empty(tensor, quantizer)
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).float()
    for side, data, scales in (
        (rows, output._rowwise_data, output._rowwise_scale_inv),
        (rows.t(), output._columnwise_data, output._columnwise_scale_inv),
    ):
        if data is not None:
            _fill(side, data, scales, quantizer, float8=float8)
    return output


def _empty(tensor: torch.Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    columns, square = tensor.shape[-1], quantizer.block_scaling_dim == 2
    rows = tensor.numel() // columns
    parts: dict[str, Any] = {}
    for side, wanted, shape, (r, c) in (
        ("rowwise", quantizer.rowwise_usage, tensor.shape, (rows, columns)),
        ("columnwise", quantizer.columnwise_usage, (columns, *tensor.shape[:-1]), (columns, rows)),
    ):
        scales = (-(-r // BLOCK), _by_four(-(-c // BLOCK))) if square else (-(-c // BLOCK), _by_four(r))
        parts[f"{side}_data"] = torch.empty(shape, dtype=torch.uint8) if wanted else None
        parts[f"{side}_scale_inv"] = torch.empty(scales) if wanted else None
    if hasattr(quantizer, "all_gather_usage"):  # before 2.20
        parts["data_format"] = importlib.import_module("transformer_engine_torch").Float8BlockScaleTensorFormat.GEMM_READY
    kind = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "is_2D_scaled": square}
    return Float8BlockwiseQTensor(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, **kind, **parts)


def _by_four(size: int) -> int:
    return -(-size // 4) * 4


def _fill(rows_rc: torch.Tensor, data: torch.Tensor, scales: torch.Tensor, quantizer: Any, *, float8: torch.dtype) -> None:
    """Round [r, c] block by block into `data`, and write the inverse scales to `scales`.

    These are [c / 128, r] for blocks of a row, [r / 128, c / 128] for square blocks, with the last dimension padded to a multiple of 4.
    """
    largest, square = torch.finfo(float8).max, quantizer.block_scaling_dim == 2
    (rows, columns), height = rows_rc.shape, BLOCK if square else 1
    padded = F.pad(rows_rc, (0, -columns % BLOCK, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height))  # [r / height, height, c / 128, 128]
    amax = blocks.abs().amax(dim=(1, 3)).clamp(min=quantizer.amax_epsilon)
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    if quantizer.force_pow_2_scales:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    rounded = (blocks * scale[:, None, :, None]).clamp(-largest, largest).flatten(2).flatten(0, 1)[:rows, :columns]
    data.copy_(rounded.to(float8).view(torch.uint8).reshape(data.shape))
    factors = 1 / scale if square else (1 / scale).t()
    scales.zero_()
    scales[: factors.shape[0], : factors.shape[1]] = factors


def _places(count: int, w: int, start_offset: int, block_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block row and block column of `count` consecutive elements of a matrix of width w."""
    place = start_offset + torch.arange(count)
    return place // w // block_len, place % w // block_len


def fp8_block_scaling_compute_partial_amax(tensor: torch.Tensor, amax: torch.Tensor, w: int, start_offset: int, block_len: int) -> None:
    """Update the largest values of a matrix's blocks with a run of its elements."""
    places = _places(tensor.numel(), w, start_offset, block_len)
    flat = places[0] * amax.shape[1] + places[1]
    amax.view(-1).scatter_reduce_(0, flat, tensor.detach().abs().float().view(-1), "amax")


def fp8_block_scaling_partial_cast(
    inp: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, w: int, start_offset: int, block_len: int, out_dtype: Any
) -> None:
    """Round a run of a matrix's elements with the scales of their blocks."""
    float8 = {"kFloat8E4M3": torch.float8_e4m3fn, "kFloat8E5M2": torch.float8_e5m2}[out_dtype.name]
    largest = torch.finfo(float8).max
    scaled = inp.detach().float().view(-1) * scale[_places(inp.numel(), w, start_offset, block_len)]
    out.copy_(scaled.clamp(-largest, largest).to(float8).view(torch.uint8))

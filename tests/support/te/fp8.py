"""FP8 tensors: rounding and scaling of whole tensors, with a scale from the current tensor (current) or a given one (delayed); scales per
block are in `blocks.py`.

Data are bytes of float8; their value times `scale_inv` is the represented value. A tensor may be stored unchanged (row-wise), with its last
dimension first (column-wise, for products that need this), or both.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from support.te import blocks

TEX: Any = None
"""The extension, for its enumerations."""
QUANTIZERS: set[str] = set()
"""Kinds of quantizers that have been used."""
DTYPES = {
    "kByte": torch.uint8,
    "kInt16": torch.int16,
    "kInt32": torch.int32,
    "kInt64": torch.int64,
    "kFloat32": torch.float32,
    "kFloat16": torch.float16,
    "kBFloat16": torch.bfloat16,
    "kFloat8E4M3": torch.float8_e4m3fn,
    "kFloat8E5M2": torch.float8_e5m2,
}


def bind(module: types.ModuleType) -> None:
    global TEX
    TEX = module


def dtype_of(value: Any) -> torch.dtype:
    """Return torch's dtype for the extension's; torch's own dtypes are returned unchanged."""
    return value if isinstance(value, torch.dtype) else DTYPES[TEX.DType(int(value)).name]


def is_quantized(tensor: Any) -> bool:
    return hasattr(tensor, "_fp8_dtype")


def value_of(tensor: Any) -> torch.Tensor:
    """Return a tensor's value: FP8 tensors as float32, others unchanged."""
    if not is_quantized(tensor):
        return tensor
    if hasattr(tensor, "_rowwise_scale_inv"):
        return tensor.dequantize(dtype=torch.float32)
    float8 = dtype_of(tensor._fp8_dtype)
    if tensor._data is not None:
        return tensor._data.view(float8).float() * tensor._scale_inv
    return first_dimension_last(tensor._transpose.view(float8).float() * tensor._scale_inv)


def last_dimension_first(data: torch.Tensor) -> torch.Tensor:
    return data.permute(-1, *range(data.dim() - 1)).contiguous()


def first_dimension_last(data: torch.Tensor) -> torch.Tensor:
    return data.permute(*range(1, data.dim()), 0).contiguous()


def scale_for(tensor: torch.Tensor, quantizer: Any, largest: float) -> torch.Tensor:
    """Return the factor [1] float32 that the tensor is multiplied by before it is rounded."""
    if (
        type(quantizer).__name__ == "Float8Quantizer"
    ):  # delayed: scale from earlier steps; this step's largest value is recorded for later ones
        if quantizer.amax.numel():  # empty when master weights, whose scale is known, are rounded
            quantizer.amax.copy_(torch.maximum(quantizer.amax, _largest(tensor).reshape(quantizer.amax.shape)))
        return quantizer.scale.reshape(1)
    amax = _largest(tensor)
    if quantizer.with_amax_reduction:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    amax = amax.clamp(min=quantizer.amax_epsilon)
    scale = torch.where(amax > 0, largest / amax, torch.ones_like(amax))
    return (torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale).reshape(1)


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().amax().float() if tensor.numel() else torch.zeros((), device=tensor.device)


def quantize(tensor: Any, quantizer: Any, output: Any = None) -> Any:
    """Round as the quantizer specifies, into `output` if it is given."""
    kind = type(quantizer).__name__
    assert kind in ("Float8Quantizer", "Float8CurrentScalingQuantizer", "Float8BlockQuantizer"), f"no kernel of {kind} here"
    QUANTIZERS.add(kind)
    tensor = value_of(tensor).detach()
    float8 = dtype_of(quantizer.dtype)
    if kind == "Float8BlockQuantizer":
        return blocks.quantize(tensor, quantizer, output, float8=float8)
    largest = torch.finfo(float8).max
    scale = scale_for(tensor, quantizer, largest)
    data = (tensor.float() * scale).clamp(-largest, largest).to(float8).view(torch.uint8).contiguous()
    if output is None:
        row = data if quantizer.rowwise_usage else None
        column = last_dimension_first(data) if quantizer.columnwise_usage else None
        return _made(tensor, quantizer, row, column, 1 / scale)
    output._scale_inv.copy_(1 / scale)
    if output._data is not None:
        output._data.copy_(data.view(output._data.shape))
    if output._transpose is not None:
        output._transpose.copy_(last_dimension_first(data).view(output._transpose.shape))
        output._transpose_invalid = False
    return output


def _made(tensor: torch.Tensor, quantizer: Any, row: torch.Tensor | None, column: torch.Tensor | None, scale_inv: torch.Tensor) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    parts = {
        "data": row,
        "fp8_scale_inv": scale_inv,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": column,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        takes_dtype = "fake_dtype" in (Float8TensorStorage.__new__.__kwdefaults__ or {})
        return Float8TensorStorage(**parts, **({"fake_dtype": tensor.dtype} if takes_dtype else {}))
    return Float8Tensor(shape=tensor.shape, dtype=tensor.dtype, requires_grad=False, device=tensor.device, **parts)


def quantize_kernel(tensor: Any, quantizer: Any, output: Any) -> Any:
    return quantize(tensor, quantizer, output)


def dequantize(input: Any, otype: Any) -> torch.Tensor:
    return value_of(input).to(dtype_of(otype))


def bgrad_quantize(input: torch.Tensor, quantizer: Any) -> list[Any]:
    """Return [sum over rows (a bias's gradient), rounded tensor]."""
    return [input.reshape(-1, input.shape[-1]).float().sum(0).to(input.dtype), quantize(input, quantizer)]


def split_quantize(tensor: torch.Tensor, split_sections: list[int], quantizer_list: list[Any]) -> list[Any]:
    """Round parts along the first dimension, each with its own scale."""
    return [quantize(part, quantizer) for part, quantizer in zip(tensor.split(list(split_sections)), quantizer_list, strict=True)]


def create_empty_quantized_tensor(quantizer: Any, shape: list[int], dtype: Any, device: Any) -> Any:
    return quantize(torch.zeros(*shape, dtype=dtype_of(dtype)), quantizer)


def fp8_transpose(input: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    turned = last_dimension_first(input)
    if out is None:
        return turned
    out.copy_(turned.view(out.shape))
    return out


def compute_amax(input: torch.Tensor, amax: torch.Tensor) -> None:
    amax.copy_(_largest(input).reshape(amax.shape))


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: torch.Tensor,
    amax_histories: list[torch.Tensor],
    scales: list[torch.Tensor],
    amax_compute_algo: str,
    fp8_dtype: Any,
    margin: float,
) -> None:
    """Delayed scaling, after a step: record the largest values over all processes, and compute the next step's scales from the history."""
    largest = torch.finfo(dtype_of(fp8_dtype)).max / 2**margin
    begin = 0
    for history, scale in zip(amax_histories, scales, strict=True):
        seen = amax_reduction_buffer[begin : begin + scale.numel()]
        begin += scale.numel()
        amax = history[0].clone() if amax_compute_algo == "most_recent" else torch.maximum(history.amax(0), seen)
        history.copy_(history.roll(-1, 0))
        if history.shape[0] > 1:
            history[-2].copy_(seen)
        history[0].zero_()
        amax = torch.maximum(amax, seen)
        usable = (amax > 0) & amax.isfinite()
        scale.copy_(torch.where(usable, largest / amax.clamp(min=1e-30), scale))


KERNELS: dict[str, Callable[..., Any]] = {
    "quantize": quantize_kernel,
    "dequantize": dequantize,
    "bgrad_quantize": bgrad_quantize,
    "split_quantize": split_quantize,
    "create_empty_quantized_tensor": create_empty_quantized_tensor,
    "fp8_transpose": fp8_transpose,
    "compute_amax": compute_amax,
    "fp8_block_scaling_compute_partial_amax": blocks.fp8_block_scaling_compute_partial_amax,
    "fp8_block_scaling_partial_cast": blocks.fp8_block_scaling_partial_cast,
    "fused_amax_and_scale_update_after_reduction": fused_amax_and_scale_update_after_reduction,
}

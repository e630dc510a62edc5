"""Kernels of Transformer Engine's extension in PyTorch: products, norms, attention, rotary embedding, padding, optimizer.

Each takes, by name, the parameters of the compiled function that it uses. Sums are computed in float32, results are rounded to the
requested type, and inputs that a compiled kernel refuses are refused here.

Shape legend: t tokens, n heads, d head width, s sequence, b batch.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from support.te.fp8 import dtype_of, is_quantized, quantize, value_of

TEX: Any = None
"""The extension, for its enumerations."""
ASKED: list[dict[str, Any]] = []
"""Layout, mask, window and shapes of each call of attention."""


def bind(module: types.ModuleType) -> None:
    global TEX
    TEX = module


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


# ------------------------------------------------------------------------------------------------------------- matrix products


def check_fp8_product(a: Any, b: Any, *, rows: int, inner: int, columns: int) -> None:
    """Check cuBLAS's requirements for FP8: both operands in FP8, and sizes that are multiples of 16 (inner) or 8 (rows, columns)."""
    if not is_quantized(a) and not is_quantized(b):
        return
    assert is_quantized(a) and is_quantized(b), "FP8 products refuse an operand that is not FP8"
    for name, size, multiple in (("inner size", inner, 16), ("rows", rows, 8), ("columns", columns, 8)):
        assert size % multiple == 0, f"FP8 products refuse {rows} x {inner} x {columns}: its {name} is no multiple of {multiple}"


def product(a: Any, transa: bool, b: Any, transb: bool) -> torch.Tensor:
    """Return [rows of b, columns of a] float32: cuBLAS's column-major a times b, which is b times a for row-major tensors."""
    left, right = _rows(value_of(b)), _rows(value_of(a))
    assert is_quantized(a) or left.dtype == right.dtype, f"a product of {left.dtype} and {right.dtype}"
    left, right = (left.t() if transb else left), (right.t() if transa else right)
    check_fp8_product(a, b, rows=left.shape[0], inner=left.shape[1], columns=right.shape[1])
    return left.float() @ right.float()


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: torch.Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: torch.Tensor | None,
    gelu: bool,
    grad: bool,
    accumulate: bool,
    comm_overlap: Any,
    extra_output: Any,
    alpha: float,
) -> list[Any]:
    assert comm_overlap is None and not gelu, "neither overlapped communication nor a fused GELU here"
    made = product(A, transA, B, transB) * (1.0 if alpha is None else alpha)
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = _rows(value_of(B)).float().sum(0).to(bias.dtype)
    elif bias is not None:
        made = made + bias.float()
    if D is not None:
        made = _put(made, D, accumulate=accumulate)
    else:
        own = value_of(A).dtype if not is_quantized(A) else torch.bfloat16
        made = made.to(own if output_dtype is None else dtype_of(output_dtype))
        if not transB:
            made = made.view(*value_of(B).shape[:-1], made.shape[-1])
    return [made if quantizer is None else quantize(made, quantizer), bias_gradient, None, extra_output]


def _put(made: torch.Tensor, into: torch.Tensor, *, accumulate: bool) -> torch.Tensor:
    made = made.to(into.dtype).view(into.shape)
    return into.add_(made) if accumulate else into.copy_(made)


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    D: list[torch.Tensor],
    m_splits: list[int],
    bias: list[torch.Tensor],
    single_output: bool,
    grad: bool,
    accumulate: bool,
) -> list[torch.Tensor]:
    outputs = list(D[0].split(list(m_splits))) if single_output else D
    for index, (a, b, out) in enumerate(zip(A, B, outputs, strict=True)):
        if 0 in (value_of(a).numel(), value_of(b).numel()):
            if not accumulate:
                out.zero_()
            continue
        made = product(a, transa, b, transb)
        if bias and bias[index].numel() and not grad:
            made = made + bias[index].float()
        _put(made, out, accumulate=accumulate)
    return bias


# ----------------------------------------------------------------------------------------------------------------------- norms


def _given(out: torch.Tensor, ln_out: Any, quantizer: Any, otype: Any) -> Any:
    out = out.to(dtype_of(otype))
    if quantizer is not None:
        return quantize(out, quantizer, ln_out)
    return out if ln_out is None else ln_out.copy_(out.view(ln_out.shape))


def rmsnorm_fwd(input: torch.Tensor, weight: torch.Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any) -> list[Any]:
    assert input.is_contiguous()
    scale = torch.rsqrt(input.float().square().mean(-1) + eps)
    return [_given(input.float() * scale[..., None] * weight.float(), ln_out, quantizer, otype), None, scale]


def rmsnorm_bwd(dz: torch.Tensor, x: torch.Tensor, rsigma: torch.Tensor, gamma: torch.Tensor) -> list[Any]:
    normal, gradient, scale = _normal(dz, x, rsigma, None)
    weighed = gradient * gamma.float()
    into_x = scale * (weighed - normal * (weighed * normal).mean(-1, keepdim=True))
    return [into_x.to(x.dtype), _rows(gradient * normal).sum(0).to(gamma.dtype)]


def rmsnorm_bwd_add(dz: torch.Tensor, x: torch.Tensor, add: torch.Tensor, rsigma: torch.Tensor, gamma: torch.Tensor) -> list[Any]:
    into_x, into_gamma = rmsnorm_bwd(dz, x, rsigma, gamma)
    return [into_x + add.view(into_x.shape), into_gamma]


def layernorm_fwd(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any
) -> list[Any]:
    assert input.is_contiguous()
    mean = input.float().mean(-1)
    centred = input.float() - mean[..., None]
    scale = torch.rsqrt(centred.square().mean(-1) + eps)
    return [_given(centred * scale[..., None] * weight.float() + bias.float(), ln_out, quantizer, otype), mean, scale]


def layernorm_bwd(dz: torch.Tensor, x: torch.Tensor, mu: torch.Tensor, rsigma: torch.Tensor, gamma: torch.Tensor) -> list[Any]:
    normal, gradient, scale = _normal(dz, x, rsigma, mu)
    weighed = gradient * gamma.float()
    into_x = scale * (weighed - weighed.mean(-1, keepdim=True) - normal * (weighed * normal).mean(-1, keepdim=True))
    return [into_x.to(x.dtype), _rows(gradient * normal).sum(0).to(gamma.dtype), _rows(gradient).sum(0).to(gamma.dtype)]


def _normal(
    dz: torch.Tensor, x: torch.Tensor, rsigma: torch.Tensor, mu: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (x normalised, gradient, scale), all float32 and of x's shape or broadcastable to it."""
    scale = rsigma.view(x.shape[:-1])[..., None]
    centred = x.float() if mu is None else x.float() - mu.view(x.shape[:-1])[..., None]
    return centred * scale, dz.float().view(x.shape), scale


# ------------------------------------------------------------------------------------------------------------------- attention


def get_fused_attn_backend(fused_attn_params: Any) -> tuple[Any, str]:
    """Interface since 2.20, with one object; earlier versions pass separate arguments (`get_fused_attn_backend_of_arguments`)."""
    return _attention_kernel(dtype_of(fused_attn_params.qkv_dtype)), ""


def get_fused_attn_backend_of_arguments(q_dtype: Any) -> Any:
    return _attention_kernel(dtype_of(q_dtype))


def _attention_kernel(dtype: torch.dtype) -> Any:
    """Return cuDNN's kernel, which takes 16-bit numbers, packed (thd) on compute capability 9.0 (as simulated here) and later."""
    name = "NVTE_F16_arbitrary_seqlen" if dtype in (torch.float16, torch.bfloat16) else "NVTE_No_Backend"
    return getattr(TEX.NVTE_Fused_Attn_Backend, name)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    layout: Any,
    mask: Any,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Attention over packed [t, n, d], document by document, or over [s, b, n, d]; the result has q's type."""
    layout, mask = TEX.NVTE_QKV_Layout(int(layout)).name, TEX.NVTE_Mask_Type(int(mask)).name
    causal = "CAUSAL" in mask

    def of_one(*qkv_tnd: torch.Tensor) -> torch.Tensor:
        q_bntd, k_bntd, v_bntd = (x.transpose(0, 1)[None] for x in qkv_tnd)
        out = F.scaled_dot_product_attention(q_bntd, k_bntd, v_bntd, is_causal=causal, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    if "SB" in layout:
        assert "PADDING" not in mask
        out = [of_one(*(x[:, row] for x in (q, k, v))) for row in range(q.shape[1])]
        return torch.stack(out, dim=1)
    assert "T" in layout and "PADDING" in mask, (layout, mask)
    assert all(bounds.dtype == torch.int32 for bounds in cu_seqlens) and len(cu_seqlens[0]) == len(cu_seqlens[1])
    of_q, of_kv = (bounds.diff().tolist() for bounds in cu_seqlens)
    assert sum(of_q) == len(q) and sum(of_kv) == len(k), "documents that do not fill the tokens"
    return torch.cat([of_one(*document) for document in zip(q.split(of_q), k.split(of_kv), v.split(of_kv), strict=True)])


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    p_dropout: float,
    qkv_layout: Any,
    bias_type: Any,
    attn_mask_type: Any,
    window_size: Any,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    s_quantizer: Any,
) -> list[Any]:
    assert p_dropout == 0.0 and s_quantizer is None and int(bias_type) == int(TEX.NVTE_Bias_Type.NVTE_NO_BIAS)
    assert all(x.dtype in (torch.float16, torch.bfloat16) for x in (Q, K, V)), "fused attention takes 16-bit numbers"
    for longest, bounds in ((max_seqlen_q, cu_seqlens_q), (max_seqlen_kv, cu_seqlens_kv)):
        assert longest >= int(bounds.diff().max()), "a document that is longer than the longest"
    ASKED.append(
        {"layout": int(qkv_layout), "mask": int(attn_mask_type), "window": tuple(window_size), "q": tuple(Q.shape), "k": tuple(K.shape)}
    )
    bounds = (cu_seqlens_q, cu_seqlens_kv)
    with torch.no_grad():
        out = attend(Q, K, V, scale=attn_scale, layout=qkv_layout, mask=attn_mask_type, cu_seqlens=bounds)
    return [out.contiguous(), torch.zeros(1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    attn_scale: float,
    qkv_layout: Any,
    attn_mask_type: Any,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_kv: torch.Tensor,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    dO: torch.Tensor,
) -> list[Any]:
    inputs = [x.detach().requires_grad_() for x in (Q, K, V)]
    with torch.enable_grad():
        out = attend(*inputs, scale=attn_scale, layout=qkv_layout, mask=attn_mask_type, cu_seqlens=(cu_seqlens_q, cu_seqlens_kv))
    gradients = torch.autograd.grad(out, inputs, dO.view(out.shape))
    return [*(gradient.contiguous() for gradient in gradients), None, None]


def convert_thd_to_bshd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, b: int, max_seq_len: int) -> torch.Tensor:
    """Unpack documents into one padded row each."""
    out = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for row, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        out[row, : end - begin] = tensor[begin:end]
    return out


def convert_bshd_to_thd(tensor: torch.Tensor, cu_seqlens: torch.Tensor, t: int) -> torch.Tensor:
    out = tensor.new_zeros(t, *tensor.shape[2:])
    for row, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        out[begin:end] = tensor[row, : end - begin]
    return out


# ---------------------------------------------------------------------------------------------------------------------- others


def _rotate(tensor_tnd: torch.Tensor, freqs: torch.Tensor, cu_seqlens: torch.Tensor, *, back: bool) -> torch.Tensor:
    """Rotate pairs of channels, one of each half of a head, by the angle of their position in the document."""
    places = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    angles = freqs[places].flatten(1)[:, None].float()
    width = angles.shape[-1]
    turned, rest = tensor_tnd[..., :width].float(), tensor_tnd[..., width:]
    sine = angles.sin()
    first, second = turned.chunk(2, -1)
    crossed = torch.cat([-second, first], -1) * sine
    if back:
        sine_first, sine_second = sine.chunk(2, -1)
        crossed = torch.cat([second * sine_second, -first * sine_first], -1)
    return torch.cat([(turned * angles.cos() + crossed).to(tensor_tnd.dtype), rest], -1)


def _turn(tensor_nsad: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring channels by the angle of their position, which is the same for both."""
    angles = freqs.flatten(1)[: tensor_nsad.shape[1], None].float()
    even, odd = tensor_nsad[..., 0::2].float(), tensor_nsad[..., 1::2].float()
    cos, sin = angles.cos()[..., 0::2], angles.sin()[..., 0::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(3).to(tensor_nsad.dtype)


def fused_rope_forward(input: torch.Tensor, freqs: torch.Tensor, qkv_format: Any, interleaved: bool, cu_seqlens: Any) -> torch.Tensor:
    if interleaved:
        assert int(qkv_format) == int(TEX.NVTE_QKV_Format.NVTE_BSHD) and freqs.dtype == torch.float32
        return _turn(input, freqs)
    assert int(qkv_format) == int(TEX.NVTE_QKV_Format.NVTE_THD)
    return _rotate(input, freqs, cu_seqlens, back=False)


def fused_rope_backward(
    output_grads: torch.Tensor, freqs: torch.Tensor, qkv_format: Any, interleaved: bool, cu_seqlens: Any
) -> torch.Tensor:
    if interleaved:
        assert int(qkv_format) == int(TEX.NVTE_QKV_Format.NVTE_BSHD)
        return _turn(output_grads, -freqs)
    return _rotate(output_grads, freqs, cu_seqlens, back=True)


def _route(logits: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax over the chosen experts (0 for others), and a mask of the chosen experts."""
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(topk, dim=1).indices, True)
    return logits.masked_fill(~chosen, -torch.inf).softmax(dim=1), chosen


def fused_topk_with_score_function_fwd(
    logits: torch.Tensor, topk: int, use_pre_softmax: bool, num_groups: Any, score_function: str, expert_bias: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert (use_pre_softmax, score_function) == (False, "softmax") and expert_bias is None and not num_groups
    weights, chosen = _route(logits.float(), topk)
    return weights.to(logits.dtype), chosen, weights


def fused_topk_with_score_function_bwd_of_arguments(
    routing_map: torch.Tensor, intermediate_output: torch.Tensor, grad_probs: torch.Tensor
) -> torch.Tensor:
    weights, gradient = intermediate_output, grad_probs * routing_map
    return weights * (gradient - (weights * gradient).sum(dim=1, keepdim=True))


def fused_topk_with_score_function_bwd(
    routing_map: torch.Tensor, intermediate_output: torch.Tensor, grad_probs: torch.Tensor, grad_logits: torch.Tensor
) -> None:
    grad_logits.copy_(fused_topk_with_score_function_bwd_of_arguments(routing_map, intermediate_output, grad_probs))


def fused_multi_row_padding(input: torch.Tensor, output: torch.Tensor, input_row_list: list[int], padded_input_row_list: list[int]) -> None:
    for part, padded in zip(input.split(list(input_row_list)), output.split(list(padded_input_row_list)), strict=True):
        padded[: len(part)] = part
        padded[len(part) :] = 0


def fused_multi_row_unpadding(
    input: torch.Tensor, output: torch.Tensor, input_row_list: list[int], unpadded_input_row_list: list[int]
) -> None:
    for padded, part in zip(input.split(list(input_row_list)), output.split(list(unpadded_input_row_list)), strict=True):
        part.copy_(padded[: len(part)])


def multi_tensor_l2norm(tensor_lists: list[list[torch.Tensor]], per_tensor_python: Any) -> tuple[torch.Tensor, torch.Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]] or [torch.zeros(())])
    return norms.norm().reshape(1), norms if per_tensor_python else torch.empty(0)


def multi_tensor_scale(tensor_lists: list[list[torch.Tensor]], scale: Any) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_compute_scale_and_scale_inv(
    tensor_lists: list[list[torch.Tensor]], max_fp8: float, force_pow_2_scales: bool, epsilon: float
) -> None:
    """Compute scales and inverse scales; `tensor_lists` are (largest values, scales, inverse scales)."""
    for amax, scale, inverse in zip(*tensor_lists, strict=True):
        made = torch.where(amax > 0, max_fp8 / amax.clamp(min=epsilon), torch.ones_like(amax))
        scale.copy_(torch.exp2(torch.floor(torch.log2(made))) if force_pow_2_scales else made)
        inverse.copy_(1 / scale)


def multi_tensor_adam(
    tensor_lists: list[list[torch.Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW step on (gradients, weights, first moments, second moments) and, if given, fp32 copies of the weights."""
    assert mode == 1, "weight decay is decoupled"
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, weight, first, second, *master in zip(*tensor_lists, strict=True):
        first.mul_(beta1).add_(gradient.float(), alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        exact = master[0] if master else weight
        change = (first / corrections[0]) / ((second / corrections[1]).sqrt() + epsilon) + weight_decay * exact.float()
        exact.copy_(exact.float() - lr * change)
        weight.copy_(exact)


KERNELS: dict[str, Callable[..., Any]] = {
    name: kernel
    for name, kernel in list(globals().items())
    if isinstance(kernel, types.FunctionType) and kernel.__module__ == __name__ and not name.startswith("_")
} | {
    "multi_tensor_scale_tensor": multi_tensor_scale,
    "device_supports_multicast": lambda: True,
    "ubuf_built_with_mpi": lambda: False,
    "get_cudnn_version": lambda: 91900,
    "get_cublasLt_version": lambda: 130100,
    "get_num_cublas_streams": lambda: 4,
    "get_stream_priority_range": lambda: (0, -5),
}

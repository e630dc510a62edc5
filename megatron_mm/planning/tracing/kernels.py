"""Stand-ins for kernels while a step is traced: they allocate and save the same tensors as the kernels, and compute nothing.

There are two sets (`stand_ins`). The default stands in for the torch backend on a CPU: attention document by document, which saves the same
tensors as `torch.nn.functional.scaled_dot_product_attention`. With `te` they stand in for Transformer Engine's kernels
(`te_saves.TE_SAVES`); megatron-core's fused SwiGLU, which saves its input (core/fusions/fused_bias_swiglu.py, SwiGLUFunction), is switched
on by `trace`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.enums import AttnMaskType

from megatron_mm.models import layers as layer_modules
from megatron_mm.planning.tracing.recorder import Recorder


@contextlib.contextmanager
def stand_ins(recorder: Recorder, *, te: bool) -> Iterator[None]:
    """Replace kernels that cannot run on meta tensors, and, with `te`, those that save other tensors than the torch backend's."""
    with contextlib.ExitStack() as stack:
        attend = _te_attention if te else _document_attention
        stack.enter_context(patch.object(layer_modules.TorchDotProductAttention, "forward", _attention(recorder, attend)))
        stack.enter_context(patch.object(torch.nn.functional, "scaled_dot_product_attention", _plain_attention(recorder)))
        if te:
            from megatron.core import activations
            from megatron.core.models.common.language_module import language_module
            from megatron.core.transformer import attention as attention_module

            stack.enter_context(patch.object(layer_modules.TorchNorm, "forward", _te_norm))
            stack.enter_context(patch.object(language_module, "te_parallel_cross_entropy", _te_loss))
            stack.enter_context(patch.object(activations, "quick_gelu", _KeepsInput.apply))
            stack.enter_context(patch.object(attention_module, "apply_rotary_pos_emb", lambda t, *args, **kwargs: _Rotary.apply(t)))
        yield


class _FusedAttention(torch.autograd.Function):
    """Queries [..., heads, d], keys, values -> output; saves all of them and one number per row and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, flops: float, recorder: Recorder) -> torch.Tensor:
        out = torch.zeros((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        sums = torch.zeros(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.flops, ctx.recorder = flops, recorder
        recorder.add_product("attention", (query.shape, key.shape), flops)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.recorder.add_product("attention backward", (query.shape, key.shape), 2.5 * ctx.flops)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), None, None


def _plain_attention(recorder: Recorder) -> Any:
    """What modules outside megatron-core's layers call (EVA towers, resampler): [..., s, d]. On meta tensors, torch would count it as two
    matrix products instead of one kernel."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
        pairs = query.shape[:-1].numel() * key.shape[-2] / (2 if is_causal else 1)
        return _FusedAttention.apply(query, key, value, 4.0 * pairs * query.shape[-1], recorder)

    return attend


def _attention(recorder: Recorder, attend: Any) -> Any:
    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        causal = attn_mask_type is AttnMaskType.causal
        if packed_seq_params is None:
            pairs = query.shape[0] * key.shape[0] * query.shape[1] / (2 if causal else 1)
            flops = 4.0 * pairs * query.shape[2] * query.shape[3]
            if attend is _te_attention:
                query, key, value = _te_layout(query, key, value)
            return _FusedAttention.apply(query, key, value, flops, recorder).flatten(2)
        lengths = [bounds.diff().tolist() for bounds in (packed_seq_params.cu_seqlens_q, packed_seq_params.cu_seqlens_kv)]
        return attend(recorder, query, key, value, *lengths, causal)

    return forward


def _flops(query: torch.Tensor, pairs: int, causal: bool) -> float:
    return 4.0 * pairs * query.shape[-2] * query.shape[-1] / (2 if causal else 1)


def _te_layout(*qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as Transformer Engine passes them to its kernel (get_qkv_layout in
    attention/dot_product_attention/utils.py): views of one buffer as they are, otherwise contiguous copies of those that are not."""
    first = qkv[0]
    buffer = first.untyped_storage()._cdata
    if all(x.untyped_storage()._cdata == buffer and x.shape == first.shape and x.stride() == first.stride() for x in qkv):
        return qkv
    return tuple(x.contiguous() for x in qkv)


def _te_attention(
    recorder: Recorder, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of_queries: list[int], of_keys: list[int], causal: bool
) -> torch.Tensor:
    """Attend to all documents in one kernel."""
    pairs = sum(q * k for q, k in zip(of_queries, of_keys, strict=True))
    query, key, value = _te_layout(query, key, value)
    return _FusedAttention.apply(query, key, value, _flops(query, pairs, causal), recorder).flatten(1)


def _document_attention(
    recorder: Recorder, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of_queries: list[int], of_keys: list[int], causal: bool
) -> torch.Tensor:
    """Run one kernel per document and concatenate their outputs, as the torch backend does."""
    documents = zip(query.split(of_queries), key.split(of_keys), value.split(of_keys), strict=True)
    outputs = []
    for q, k, v in documents:
        flops = _flops(q, q.shape[0] * k.shape[0], causal)
        outputs.append(_FusedAttention.apply(q, k, v, flops, recorder))
    return torch.cat(outputs).flatten(1)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device))
        ctx.has_bias = bias is not None
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight), torch.zeros_like(weight) if ctx.has_bias else None


def _te_norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    return _Norm.apply(hidden, self.weight, self.bias)


class _Loss(torch.autograd.Function):
    """Logits [t, b, v] -> loss of each token [t, b]. The gradient overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits)
        return torch.zeros(logits.shape[:-1], dtype=torch.float32, device=logits.device)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = ctx.saved_tensors[0]
        return logits


def _te_loss(logits: torch.Tensor, labels: torch.Tensor, tp_group: Any, *options: Any) -> torch.Tensor:
    """Gather the statistics of each process's part of the vocabulary (three numbers per token), and keep nothing but the logits."""
    size = tp_group.size()
    if size > 1:
        own = torch.zeros(3 * labels.numel(), dtype=torch.float32, device=logits.device)
        torch.distributed.all_gather_into_tensor(own.new_empty(size * len(own)), own, group=tp_group)
    return _Loss.apply(logits)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(grads[0])


class _KeepsInput(torch.autograd.Function):
    """A compiled activation, which saves its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])

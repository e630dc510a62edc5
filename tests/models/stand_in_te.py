"""A stand-in for Transformer Engine, in plain PyTorch on a CPU: the part of its interface that megatron-core calls for our layers.

It computes what Transformer Engine's modules compute, keeps their parameters' names and shapes, and takes no argument that theirs
do not take. So what is ours of the `te` backend (specs, names in checkpoints, initial weights, what attention is told of packed documents)
runs without a GPU; the kernels are checked by `make gpu-check`. FP8 products are not rounded here, but refuse the sizes that real ones
refuse, and use the copies of the weights that were made when a module was last told of a new step, as real ones do. Products of any
precision refuse input of another type than their weights'.

`install()` comes before anything imports megatron-core.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

VERSION = "2.8.0"
RECIPES: list[object] = []
"""The recipes of the FP8 contexts that were entered."""


class Float8CurrentScaling:
    def __init__(self, fp8_format: str = "hybrid", fp8_dpa: bool = False) -> None:
        assert fp8_format == "hybrid" and not fp8_dpa


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: object = None, fp8_group: object = None) -> Iterator[None]:
    previous = FP8GlobalStateManager.enabled
    FP8GlobalStateManager.enabled = enabled
    RECIPES.append(fp8_recipe)
    try:
        yield
    finally:
        FP8GlobalStateManager.enabled = previous


class FP8GlobalStateManager:
    enabled = False

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled


class _Base(torch.nn.Module):
    """What real modules do to every state dict: add a pickle."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("our checkpoints hold none")


class Linear(_Base):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: object = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: object = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation and parallel_mode in (None, "column", "row")
        self.parallel_mode, self.return_bias, self.use_bias = parallel_mode, return_bias, bias
        self.tp_group, self.tp_size, self.sequence_parallel = tp_group, tp_size, sequence_parallel and tp_size > 1
        in_features //= tp_size if parallel_mode == "row" else 1
        out_features //= tp_size if parallel_mode == "column" else 1
        self.in_features, self.out_features = in_features, out_features
        self.save_original_input = False
        self.weight = torch.nn.Parameter(torch.full((out_features, in_features), torch.nan, dtype=params_dtype, device=device))
        self.bias = torch.nn.Parameter(torch.full((out_features,), torch.nan, dtype=params_dtype, device=device)) if bias else None
        assert init_method is not None
        init_method(self.weight)
        self.weight.tensor_model_parallel, self.weight.partition_stride = True, 1
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        weight = _product_weight(self, self.weight, is_first_microbatch)
        assert self.bias is None or self.tp_size == 1, "we have no cut layer with a bias"
        out = F.linear(_checked(self._of_all(inp), self.weight), weight, None if self.return_bias else self.bias)
        out = self._summed(out)
        return (out, self.bias) if self.return_bias else out

    def _of_all(self, inp: torch.Tensor) -> torch.Tensor:
        """What goes into a matrix that is cut by column: every process's tokens, whose gradients are summed over the group."""
        if self.parallel_mode != "column" or self.tp_size == 1:
            return inp
        if self.sequence_parallel:
            return mappings().gather_from_sequence_parallel_region(inp, tensor_parallel_output_grad=True, group=self.tp_group)
        return mappings().copy_to_tensor_model_parallel_region(inp, group=self.tp_group)

    def _summed(self, out: torch.Tensor) -> torch.Tensor:
        """What comes out of a matrix that is cut by row: the sum over the group, or this process's tokens of it."""
        if self.parallel_mode != "row" or self.tp_size == 1:
            return out
        if self.sequence_parallel:
            return mappings().reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return mappings().reduce_from_tensor_model_parallel_region(out, group=self.tp_group)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **linear: Any,
    ) -> None:
        assert not return_layernorm_output and not zero_centered_gamma
        super().__init__(in_features, out_features, **linear)
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = torch.nn.Parameter(torch.full((in_features,), torch.nan, dtype=self.weight.dtype))
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.full((in_features,), torch.nan, dtype=self.weight.dtype))
        else:
            self.layer_norm_bias = None
        for parameter in (self.layer_norm_weight, self.layer_norm_bias):
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = _normed(inp, self.normalization, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(normed, is_first_microbatch)


class GroupedLinear(_Base):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: object = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: object = "cuda",
        ub_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not bias and not return_bias
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8_meta, self.fp8, self.fp8_calibration = {"fp8_checkpoint": False}, False, False
        for index in range(num_gemms):
            weight = torch.full((out_features, in_features), torch.nan, dtype=params_dtype, device=device)
            setattr(self, f"weight{index}", torch.nn.Parameter(weight))

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """megatron-core calls it before a state dict is loaded."""

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        assert isinstance(m_splits, list) and len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0]
        parts = inp.split(m_splits)
        return torch.cat([F.linear(part, getattr(self, f"weight{index}")) for index, part in enumerate(parts)])


class RMSNorm(_Base):
    kind = "RMSNorm"

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        device: object = "cuda",
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), torch.nan, dtype=params_dtype, device=device))
        self.bias = torch.nn.Parameter(torch.full_like(self.weight, torch.nan)) if self.kind == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = bool(sequence_parallel)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return _normed(inp, self.kind, self.weight, self.bias, self.eps)


class LayerNorm(RMSNorm):
    kind = "LayerNorm"


class DotProductAttention(_Base):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: object = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0.0 and attention_type in ("self", "cross") and softmax_scale is None
        self.attention_type = attention_type
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        self.heads, self.groups, self.width = num_attention_heads // tp_size, groups // tp_size, kv_channels

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        assert attention_mask is None and cu_seqlens_q_padded is None and cu_seqlens_kv_padded is None
        assert key.shape[-2:] == (self.groups, self.width) and query.shape[-2:] == (self.heads, self.width)
        if qkv_format == "sbhd":
            assert attn_mask_type == "no_mask" and query.dim() == 4, attn_mask_type
            return _attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), causal=False).permute(2, 0, 1, 3).flatten(2)
        assert qkv_format == "thd" and attn_mask_type in ("padding", "padding_causal") and query.dim() == 3
        _check_bounds(query, bounds=cu_seqlens_q, longest=max_seqlen_q)
        _check_bounds(key, bounds=cu_seqlens_kv, longest=max_seqlen_kv)
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None and cu_seqlens_q.shape == cu_seqlens_kv.shape
        # One product over all documents with a mask: another way to the same numbers than the torch backend's.
        of_queries, of_keys = (torch.repeat_interleave(torch.arange(len(x) - 1), x.diff().long()) for x in (cu_seqlens_q, cu_seqlens_kv))
        visible = of_queries[:, None] == of_keys
        if attn_mask_type == "padding_causal":
            assert self.attention_type == "self" and torch.equal(cu_seqlens_q, cu_seqlens_kv)
            order = torch.arange(query.shape[0])
            visible = visible & (order[:, None] >= order)
        out = _attend(*(x.transpose(0, 1)[None] for x in (query, key, value)), mask=visible)
        return out[0].transpose(0, 1).flatten(1)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[..., Any] | None = None,
    tp_group: object = None,
) -> Any:
    """Recompute in the backward pass, in the FP8 context of the forward pass."""
    assert not distribute_saved_activations
    enabled = FP8GlobalStateManager.enabled

    def recomputed(*inputs: Any) -> Any:
        with fp8_autocast(enabled=enabled, fp8_recipe=RECIPES[-1]):
            return function(*inputs)

    return torch.utils.checkpoint.checkpoint(recomputed, *args, use_reentrant=True)


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> torch.Tensor:
    assert tensor_format == "thd" and fused and not interleaved and cp_size == 1 and cu_seqlens is not None
    places = torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()])
    angles = freqs[places].squeeze(1).float()
    one, other = t.float().chunk(2, dim=-1)
    return (t.float() * angles.cos() + torch.cat([-other, one], dim=-1) * angles.sin()).to(t.dtype)


def mappings() -> Any:
    """Communication of tensor parallelism with its gradients. megatron-core's, which Transformer Engine's own equals; it is not
    imported before the stand-in is installed."""
    return importlib.import_module("megatron.core.tensor_parallel.mappings")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)


def _normed(inp: torch.Tensor, kind: str, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if kind == "LayerNorm":
        return F.layer_norm(inp, weight.shape, weight, bias, eps)
    return F.rms_norm(inp, weight.shape, weight, eps)


def _check_bounds(rows: torch.Tensor, *, bounds: torch.Tensor | None, longest: int | None) -> None:
    """What attention is told of packed rows: [t, n, d] and the places where documents begin and end."""
    assert bounds is not None and bounds.dtype == torch.int32 and bounds.dim() == 1
    assert bounds[0] == 0 and bounds[-1] == rows.shape[0], f"documents up to row {int(bounds[-1])}, but there are {rows.shape[0]}"
    assert isinstance(longest, int) and longest == int(bounds.diff().max())
    assert rows.stride(-1) == 1


def _checked(inp: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In FP8 the inner size of a product is a multiple of 16: of the forward one, of that for the gradient of the input (the weight's
    rows), of that for the gradient of the weight (the input's rows; without it the forward one asks for 8).
    """
    assert inp.dtype == weight.dtype, f"products of {inp.dtype} with {weight.dtype}"
    if FP8GlobalStateManager.enabled:
        rows, backward = inp.shape[:-1].numel(), torch.is_grad_enabled()
        of_rows = 16 if backward and weight.requires_grad else 8
        of_outputs = 16 if backward and inp.requires_grad else 8
        sizes = {"rows": (rows, of_rows), "input width": (inp.shape[-1], 16), "output width": (weight.shape[0], of_outputs)}
        for name, (size, multiple) in sizes.items():
            assert size > 0 and size % multiple == 0, f"FP8 products refuse {name} {size}, which is no multiple of {multiple}"
    return inp


def _product_weight(module: Any, weight: torch.Tensor, is_first_microbatch: bool | None) -> torch.Tensor:
    if not FP8GlobalStateManager.enabled or is_first_microbatch is None:
        return weight
    if is_first_microbatch:
        module.weight_of_this_step = weight.detach().clone()
    return module.weight_of_this_step + (weight - weight.detach())


def _unused(name: str) -> type:
    return type(name, (), {})


def install() -> None:
    """Put the stand-in where `import transformer_engine` finds it."""
    assert not any(name.startswith("megatron.core") for name in sys.modules), "install the stand-in before megatron-core is imported"
    members: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        "common": {},
        "common.recipe": {
            "Format": types.SimpleNamespace(HYBRID="hybrid", E4M3="e4m3"),
            "DelayedScaling": _unused("DelayedScaling"),
            "Float8CurrentScaling": Float8CurrentScaling,
        },
        "pytorch": {
            **{kind.__name__: kind for kind in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)},
            "fp8_autocast": fp8_autocast,
        },
        "pytorch.fp8": {"FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": fp8_autocast},
        "pytorch.distributed": {
            "CudaRNGStatesTracker": _unused("CudaRNGStatesTracker"),
            "activation_recompute_forward": None,
            "checkpoint": checkpoint,
        },
        "pytorch.attention": {},
        "pytorch.attention.rope": {"apply_rotary_pos_emb": apply_rotary_pos_emb},
        "pytorch.module": {},
        "pytorch.module.base": {"get_dummy_wgrad": None},
        "pytorch.ops": {name: _unused(name) for name in ("Sequential", "FusibleOperation")},
        "pytorch.tensor": {"QuantizedTensor": _unused("QuantizedTensor")},
        "pytorch.router": dict.fromkeys(("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")),
    }
    for name, values in members.items():
        module = types.ModuleType(".".join(filter(None, ["transformer_engine", name])))
        module.__dict__.update(values, __path__=[], __spec__=importlib.machinery.ModuleSpec(module.__name__, None))
        sys.modules[module.__name__] = module
        if name:
            parent, _, last = module.__name__.rpartition(".")
            setattr(sys.modules[parent], last, module)

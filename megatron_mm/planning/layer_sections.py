"""The sections of a decoder layer, attention, network and experts, as kernels of one process for one micro-batch.

Shape legend: t tokens of the micro-batch on this process's context share, r rows of them between tensor-parallel layers (t / tensor under
sequence parallelism), h width.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_mm.planning.decoder_shape import DecoderShape, Tokens, Trained
from megatron_mm.planning.kernels import Attention, Kernel, Message, Product, Stream
from megatron_mm.planning.layout import Layout

ROUTER_OPERATIONS, PERMUTE_OPERATIONS, SORT_OPERATIONS = 50, 10, 8
"""Operations of torch in one pass through megatron-core's router (probabilities, top-k, losses, counts), permutation and sorting by expert.
They are chosen to explain the functional tests with experts, given the time per operation of the tests without. A trace of the torch
backend has 0.6 of them (`tests/planning/test_host.py`); the rest accounts for waiting until the split sizes are on the host."""
LATENT_OPERATIONS = 30
"""Additional operations of latent attention: rotary positions on part of each head, splitting and concatenation."""
CLAMP_BYTES, CLAMP_BYTES_BACK = 8, 10
"""Bytes per number that enters an activation clamped by separate kernels (megatron-core's weighted_bias_quick_geglu_impl). Forward, both
halves are clamped (read and written) and concatenated; backward, their gradients are masked and concatenated."""
BIAS_BYTES, BIAS_BYTES_BACK, BIAS_OPERATIONS, BIAS_OPERATIONS_BACK = 28, 40, 3, 7
"""Bytes per output of an expert with a bias, and operations per expert (TEGroupedMLP._apply_bias). Forward, the bias times a token's
probability is added in float32, and the experts' outputs are concatenated and cast; backward, there are also the gradients of bias and
probability."""
ROTARY_BYTES, ROTARY_BYTES_BACK = 24, 20
"""Bytes per number of queries and keys that are rotated by separate kernels (core/models/common/embeddings/rope_utils.py,
_apply_rotary_pos_emb_bshd). Forward: halves are negated and exchanged (3 numbers read or written per number), multiplied by sines and by
cosines (2 each), added (3), copied (2). Backward: two products (4), halves (1), their sum (3), the parts joined (2)."""
CHECKPOINT_OPERATIONS = 8
"""Operations with which recomputing a module saves and restores the random-number state, in the forward and again in the backward pass."""
ATTENTION_TENSORS, MLP_TENSORS, ROUTER_TENSORS = 4, 3, 2


def linear(rows: float, cols: float, inner: float, *, fp8: bool, trained: Trained, count: int = 1) -> tuple[list[Kernel], list[Kernel]]:
    """Kernels of a linear layer, forward and backward. In FP8 they include the casts of its input, weights and output gradient."""
    forward: list[Kernel] = [Product(rows, cols, inner, count, fp8)]
    backward: list[Kernel] = []
    passes = 0.5 if trained.inputs and trained.weights else 1.0
    if trained.inputs:
        backward.append(Product(rows, inner, cols, count, fp8, passes))
    if trained.weights:
        backward.append(Product(cols, inner, rows, count, fp8, passes))
    if fp8:
        # read 2 bytes (twice, for the largest value), write 1 and its transpose; the same for weights, once per micro-batch
        forward.append(Stream(count * 8 * rows * inner, kernels=2))
        forward.append(Stream(count * 6 * cols * inner, part="other" if count == 1 else "expert weight cast"))
        if backward:
            backward.append(Stream(count * 8 * rows * cols, kernels=2))
    return forward, backward


def tensor_messages(layout: Layout, size: float, *, trained: Trained, entering: bool) -> tuple[list[Kernel], list[Kernel]]:
    """Messages of a tensor-parallel pair of linear layers: before the first (entering) or after the second."""
    if layout.tensor == 1:
        return [], []
    if not layout.sequence:
        whole: list[Kernel] = [Message("all_reduce", size, "tensor")]
        return ([], whole) if entering else (whole, [])
    gather, scatter = Message("all_gather", size, "tensor"), Message("reduce_scatter", size, "tensor")
    if not entering:
        return [scatter], [gather]
    again = [Message("all_gather", size, "tensor", beside_product=True)] if trained.weights else []
    return [gather], [*again, scatter]


def _projections(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, fp8: bool, trained: Trained
) -> tuple[list[Kernel], list[Kernel], float, float, float]:
    """Projections to queries, keys and values: (forward, backward, widths of queries, of keys and values, of core attention's output)."""
    t, h, tp = tokens.tokens, shape.hidden_size, layout.tensor
    if shape.latents is None:
        q, kv = shape.widths(tp)
        return *linear(t, q + 2 * kv, h, fp8=fp8, trained=trained), q, kv, q
    small, heads = shape.latents, shape.heads / tp
    q, keys, out = heads * small.key_dim, heads * (small.plain + small.value), heads * small.value
    rows = layout.rows(t)
    products = [(rows, small.keys + small.rotary, h), (t, keys, small.keys)]
    products += [(rows, small.queries, h), (t, q, small.queries)] if small.queries else [(t, q, h)]
    forward: list[Kernel] = []
    backward: list[Kernel] = []
    for sizes in products:
        once, back = linear(*sizes, fp8=fp8, trained=trained)
        forward, backward = forward + once, back + backward
    moved = 4 * t * (2 * q + keys)
    forward.append(Stream(moved, kernels=LATENT_OPERATIONS))
    backward.append(Stream(moved, kernels=LATENT_OPERATIONS))
    return forward, backward, q, keys / 2, out


def attention_section(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, fp8: bool, trained: Trained
) -> tuple[list[Kernel], list[Kernel], Attention, Attention]:
    """Norm, projections, rotary positions, core attention, residual: (forward, backward, core forward, core backward)."""
    t, h, tp = tokens.tokens, shape.hidden_size, layout.tensor
    rows = layout.rows(t)
    qkv, qkv_back, q, kv, inner = _projections(shape, layout, tokens, fp8=fp8, trained=trained)
    masks = 2 * rows * h if shape.dropout else 0.0
    core = Attention(
        tokens.pairs,
        tokens.length,
        shape.heads / tp,
        shape.score_dim,
        causal=shape.causal,
        dropout=shape.dropout,
        windowed=tokens.windowed,
    )
    core_back = replace(core, backward=True)
    enter, enter_back = tensor_messages(layout, 2 * t * h, trained=trained, entering=True)
    leave, leave_back = tensor_messages(layout, 2 * t * h, trained=trained, entering=False)
    out, out_back = linear(t, h, inner, fp8=fp8, trained=trained)
    context: list[Kernel] = []
    context_back: list[Kernel] = []
    if layout.context > 1:
        # keys and values of the other ranks pass by; the outputs of attention to each rank's share are combined in float32
        turns = layout.context - 1
        context = [
            Message("ring", 2 * 2 * t * kv, "context"),
            Stream(10 * turns * t * q, turns),
        ]
        back = Message("ring", 2 * 4 * t * kv, "context")
        context_back = [*context[:1], back, Stream(12 * turns * t * (q + 2 * kv), 2 * turns)]
    rotary = rotary_back = Stream(4 * t * (q + kv), kernels=2)
    if not shape.fuses_rotary:
        rotary = Stream(ROTARY_BYTES * t * (q + kv), kernels=12)
        rotary_back = Stream(ROTARY_BYTES_BACK * t * (q + kv), kernels=10)
    forward = [
        Stream(4 * rows * h),
        *enter,
        *qkv,
        *([Stream(4 * t * (q + kv), kernels=2)] if shape.norms_heads else []),
        rotary,
        *context,
        core,
        *out,
        *leave,
        Stream(6 * rows * h + masks),
    ]
    backward = [
        Stream(4 * rows * h + masks),
        *leave_back,
        *out_back,
        core_back,
        *context_back,
        rotary_back,
        *([Stream(8 * t * (q + kv), kernels=4)] if shape.norms_heads else []),
        *enter_back,
    ]
    backward += [*qkv_back, Stream(8 * rows * h, kernels=2)]
    return forward, backward, core, core_back


def mlp_section(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, ffn: float, fp8: bool, trained: Trained, with_messages: bool = True
) -> tuple[list[Kernel], list[Kernel]]:
    """Norm, two linear layers around an activation, residual: (forward, backward)."""
    t, h, tp, b = tokens.tokens, shape.hidden_size, layout.tensor, shape.branches
    rows = layout.rows(t)
    enter, enter_back = tensor_messages(layout, 2 * t * h, trained=trained, entering=True) if with_messages else ([], [])
    leave, leave_back = tensor_messages(layout, 2 * t * h, trained=trained, entering=False) if with_messages else ([], [])
    first, first_back = linear(t, b * ffn / tp, h, fp8=fp8, trained=trained)
    second, second_back = linear(t, h, ffn / tp, fp8=fp8, trained=trained)
    forward = [Stream(4 * rows * h), *enter, *first, Stream(2 * (b + 1) * t * ffn / tp), *second, *leave, Stream(6 * rows * h)]
    backward = [Stream(4 * rows * h), *leave_back, *second_back, Stream(2 * (2 * b + 1) * t * ffn / tp), *enter_back, *first_back]
    return forward, [*backward, Stream(8 * rows * h, kernels=2)]


def expert_section(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, fp8: bool, trained: Trained
) -> tuple[list[Kernel], list[Kernel]]:
    """Norm, router, permutation, exchange, grouped products, exchange back, residual: (forward, backward)."""
    t, h, b, ffn = tokens.tokens, shape.hidden_size, shape.branches, shape.expert_ffn / layout.expert_tensor
    local = layout.rows(t)
    routed = local * shape.top_k * shape.capacity
    sent = 2 * routed * h
    here = max(1, shape.experts // layout.expert)
    arrived = routed * layout.expert_tensor
    message = Message("all_to_all", sent, "expert", copies=shape.top_k, rows=routed, machines=shape.routed_machines)
    exchange: list[Kernel] = [message] if layout.expert > 1 else []
    spread: list[Kernel] = [Message("all_gather", sent * layout.expert_tensor, "expert_tensor")] if layout.expert_tensor > 1 else []
    gather: list[Kernel] = [Message("reduce_scatter", sent * layout.expert_tensor, "expert_tensor")] if layout.expert_tensor > 1 else []
    first, first_back = linear(arrived / here, b * ffn, h, fp8=fp8, trained=trained, count=here)
    second, second_back = linear(arrived / here, h, ffn, fp8=fp8, trained=trained, count=here)
    router: list[Kernel] = [
        Product(local, shape.experts, h),
        Stream(12 * local * shape.experts, kernels=ROUTER_OPERATIONS, part="router"),
    ]
    permute = Stream(2 * (local + routed) * h, kernels=PERMUTE_OPERATIONS, part="permutation")
    sort = Stream(4 * arrived * h, kernels=SORT_OPERATIONS, part="sorting")
    activation = [Stream(2 * (b + 1) * arrived * ffn, part="expert activation")]
    activation_back = [Stream(2 * (2 * b + 1) * arrived * ffn, part="expert activation")]
    bias: list[Kernel] = []
    bias_back: list[Kernel] = []
    if shape.expert_biases:
        activation.append(Stream(CLAMP_BYTES * arrived * b * ffn, kernels=4, part="expert activation"))
        activation_back.append(Stream((CLAMP_BYTES_BACK + 2) * arrived * b * ffn, kernels=5 + here, part="expert activation"))
        bias = [Stream(BIAS_BYTES * arrived * h, kernels=BIAS_OPERATIONS * here, part="expert bias")]
        bias_back = [Stream(BIAS_BYTES_BACK * arrived * h, kernels=BIAS_OPERATIONS_BACK * here, part="expert bias")]
    shared: list[Kernel] = []
    shared_back: list[Kernel] = []
    if shape.shared_ffn:
        shared, shared_back = mlp_section(shape, layout, tokens, ffn=shape.shared_ffn, fp8=fp8, trained=trained)
    forward = [Stream(4 * local * h), *router, permute, *exchange, *spread, sort, *first, *activation, *second, *bias, sort, *gather]
    forward += [*exchange, permute, Stream(6 * local * h), *shared]
    backward = [Stream(4 * local * h), permute, *exchange, *spread, sort, *bias_back, *second_back, *activation_back, *first_back, sort]
    backward += [*gather, *exchange, permute, *router, Stream(8 * local * h, kernels=2), *shared_back]
    return forward, backward


def tensors_of_layer(shape: DecoderShape, layout: Layout, *, sparse: bool) -> int:
    """Number of parameter tensors of a layer; every expert of this process has its own."""
    if not sparse:
        return ATTENTION_TENSORS + MLP_TENSORS
    experts = 2 * max(1, shape.experts // layout.expert)
    return ATTENTION_TENSORS + ROUTER_TENSORS + experts + (2 if shape.shared_ffn else 0)

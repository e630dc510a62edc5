"""A decoder's layers, embedding and output as blocks: kernels of one process for one micro-batch.

Shape legend: t tokens of the micro-batch on this process's context share, r rows of them between tensor-parallel layers (t / tensor under
sequence parallelism), h width.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.config import DecoderConfig
from megatron_mm.planning.kernels import Attention, Block, Kernel, Message, Product, Stream
from megatron_mm.planning.layout import Layout

Recompute = frozenset[str]
"""What is recomputed: "full" (whole layers) or modules: "core_attn", "mlp", "layernorm", "moe", "moe_act"."""


@dataclass(frozen=True)
class DecoderShape:
    """A decoder as kernels see it."""

    num_layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocab: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    sparse_layers: tuple[int, ...] = ()
    capacity: float = 1.0
    """Tokens that the fullest process's experts get, of the mean."""
    tied: bool = False
    dropout: bool = False
    causal: bool = True

    @classmethod
    def of(cls, decoder: DecoderConfig, *, imbalance: float = 1.0) -> DecoderShape:
        moe = decoder.moe
        return cls(
            num_layers=decoder.num_layers,
            hidden_size=decoder.hidden_size,
            heads=decoder.num_attention_heads,
            kv_heads=decoder.num_query_groups,
            head_dim=decoder.head_dim,
            ffn=decoder.ffn_hidden_size,
            gated=True,
            vocab=decoder.vocab_size,
            experts=moe.num_experts if moe else 0,
            top_k=moe.top_k if moe else 0,
            expert_ffn=decoder.ffn_hidden_size if moe else 0,
            sparse_layers=decoder.sparse_layers,
            capacity=imbalance if moe else 1.0,
            tied=decoder.tied_embeddings,
        )

    @property
    def branches(self) -> int:
        return 2 if self.gated else 1

    def mlp_parameters(self, ffn: int) -> float:
        return (self.branches + 1) * self.hidden_size * ffn

    @property
    def attention_parameters(self) -> float:
        return self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def parameters(self) -> float:
        """Of the whole model, norms left out."""
        sparse = len(self.sparse_layers)
        total = self.num_layers * self.attention_parameters + (self.num_layers - sparse) * self.mlp_parameters(self.ffn)
        expert = (
            self.experts * self.mlp_parameters(self.expert_ffn) + self.mlp_parameters(self.shared_ffn) + self.hidden_size * self.experts
        )
        return total + sparse * expert + self.vocab * self.hidden_size * (1 if self.tied else 2)


@dataclass(frozen=True)
class Tokens:
    """A micro-batch on one context share."""

    tokens: float
    """t: computed, padding included."""
    pairs: float
    """Causal query-key pairs (half of the sum of squared lengths) on this process."""
    length: float
    """Mean length of the document that a token is in."""

    @classmethod
    def whole(cls, *, sequences: float, length: float, context: int = 1) -> Tokens:
        """Sequences of one document each."""
        return cls(tokens=sequences * length / context, pairs=sequences * length * length / 2 / context, length=length)


@dataclass(frozen=True)
class Trained:
    """What the backward pass computes for a block."""

    weights: bool = True
    inputs: bool = True
    """Gradients of its inputs: something before it is trainable."""


def linear(rows: float, cols: float, inner: float, *, fp8: bool, trained: Trained, count: int = 1) -> tuple[list[Kernel], list[Kernel]]:
    """Kernels of a linear layer, forward and backward; in FP8 with the casts of its input and of the gradient of its output."""
    forward: list[Kernel] = [Product(rows, cols, inner, count, fp8)]
    backward: list[Kernel] = []
    if trained.inputs:
        backward.append(Product(rows, inner, cols, count, fp8))
    if trained.weights:
        backward.append(Product(cols, inner, rows, count, fp8))
    if fp8:
        # read 2 bytes (once more for the largest value), write 1 and its transpose; weights likewise, once a micro-batch
        forward.append(Stream(count * (8 * rows * inner + 6 * cols * inner), kernels=3))
        if backward:
            backward.append(Stream(count * 8 * rows * cols, kernels=2))
    return forward, backward


def _tensor_messages(layout: Layout, size: float, *, trained: Trained, entering: bool) -> tuple[list[Kernel], list[Kernel]]:
    """Messages around a tensor-parallel pair of linears: before its first (entering) or after its last."""
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


def attention_section(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, fp8: bool, trained: Trained
) -> tuple[list[Kernel], list[Kernel], Attention, Attention]:
    """Norm, projections, rotary positions, core attention, residual: (forward, backward, core forward, core backward)."""
    t, h, tp = tokens.tokens, shape.hidden_size, layout.tensor
    rows = t / tp if layout.sequence else t
    q, kv = shape.heads * shape.head_dim / tp, shape.kv_heads * shape.head_dim / min(tp, shape.kv_heads or 1)
    masks = 2 * rows * h if shape.dropout else 0.0
    core = Attention(tokens.pairs, tokens.length, shape.heads / tp, shape.head_dim, causal=shape.causal, dropout=shape.dropout)
    core_back = Attention(
        tokens.pairs, tokens.length, shape.heads / tp, shape.head_dim, backward=True, causal=shape.causal, dropout=shape.dropout
    )
    enter, enter_back = _tensor_messages(layout, 2 * t * h, trained=trained, entering=True)
    leave, leave_back = _tensor_messages(layout, 2 * t * h, trained=trained, entering=False)
    qkv, qkv_back = linear(t, q + 2 * kv, h, fp8=fp8, trained=trained)
    out, out_back = linear(t, h, q, fp8=fp8, trained=trained)
    context: list[Kernel] = []
    context_back: list[Kernel] = []
    if layout.context > 1:
        # keys and values of the other shares pass by; what attention to each share gives is joined in float32
        turns = layout.context - 1
        context = [
            Message("all_gather", 2 * 2 * t * kv * layout.context, "context", beside_product=True),
            Stream(10 * turns * t * q, turns),
        ]
        back = Message("all_gather", 2 * 4 * t * kv * layout.context, "context", beside_product=True)
        context_back = [*context[:1], back, Stream(12 * turns * t * (q + 2 * kv), 2 * turns)]
    forward = [
        Stream(4 * rows * h),
        *enter,
        *qkv,
        Stream(4 * t * (q + kv), kernels=2),
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
        Stream(4 * t * (q + kv), kernels=2),
        *enter_back,
    ]
    backward += [*qkv_back, Stream(8 * rows * h, kernels=2)]
    return forward, backward, core, core_back


def mlp_section(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, ffn: float, fp8: bool, trained: Trained, with_messages: bool = True
) -> tuple[list[Kernel], list[Kernel]]:
    """Norm, two linears around an activation, residual."""
    t, h, tp, b = tokens.tokens, shape.hidden_size, layout.tensor, shape.branches
    rows = t / tp if layout.sequence else t
    enter, enter_back = _tensor_messages(layout, 2 * t * h, trained=trained, entering=True) if with_messages else ([], [])
    leave, leave_back = _tensor_messages(layout, 2 * t * h, trained=trained, entering=False) if with_messages else ([], [])
    first, first_back = linear(t, b * ffn / tp, h, fp8=fp8, trained=trained)
    second, second_back = linear(t, h, ffn / tp, fp8=fp8, trained=trained)
    forward = [Stream(4 * rows * h), *enter, *first, Stream(2 * (b + 1) * t * ffn / tp), *second, *leave, Stream(6 * rows * h)]
    backward = [Stream(4 * rows * h), *leave_back, *second_back, Stream(2 * (2 * b + 1) * t * ffn / tp), *enter_back, *first_back]
    return forward, [*backward, Stream(8 * rows * h, kernels=2)]


def expert_section(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, fp8: bool, trained: Trained
) -> tuple[list[Kernel], list[Kernel]]:
    """Norm, router, permutation, exchange, grouped products, exchange back, residual."""
    t, h, b, ffn = tokens.tokens, shape.hidden_size, shape.branches, shape.expert_ffn / layout.expert_tensor
    local = t / layout.tensor if layout.sequence else t
    routed = local * shape.top_k * shape.capacity
    sent = 2 * routed * h
    here = max(1, shape.experts // layout.expert)
    arrived = routed * layout.expert_tensor
    exchange: list[Kernel] = [Message("all_to_all", sent, "expert", copies=shape.top_k)] if layout.expert > 1 else []
    spread: list[Kernel] = [Message("all_gather", sent * layout.expert_tensor, "expert_tensor")] if layout.expert_tensor > 1 else []
    gather: list[Kernel] = [Message("reduce_scatter", sent * layout.expert_tensor, "expert_tensor")] if layout.expert_tensor > 1 else []
    first, first_back = linear(arrived / here, b * ffn, h, fp8=fp8, trained=trained, count=here)
    second, second_back = linear(arrived / here, h, ffn, fp8=fp8, trained=trained, count=here)
    router: list[Kernel] = [Product(local, shape.experts, h), Stream(12 * local * shape.experts, kernels=180)]
    permute = Stream(4 * routed * h, kernels=20)
    sort = Stream(4 * arrived * h, kernels=10)
    activation, activation_back = Stream(2 * (b + 1) * arrived * ffn), Stream(2 * (2 * b + 1) * arrived * ffn)
    shared: list[Kernel] = []
    shared_back: list[Kernel] = []
    if shape.shared_ffn:
        shared, shared_back = mlp_section(shape, layout, tokens, ffn=shape.shared_ffn, fp8=fp8, trained=trained)
    forward = [Stream(4 * local * h), *router, permute, *exchange, *spread, sort, *first, activation, *second, sort, *gather, *exchange]
    forward += [permute, Stream(6 * local * h), *shared]
    backward = [Stream(4 * local * h), permute, *exchange, *spread, sort, *second_back, activation_back, *first_back, sort, *gather]
    backward += [*exchange, permute, *router, Stream(8 * local * h, kernels=2), *shared_back]
    return forward, backward


def decoder_layer(
    shape: DecoderShape,
    layout: Layout,
    tokens: Tokens,
    *,
    sparse: bool,
    fp8: bool,
    recompute: Recompute,
    trained: Trained,
    unfused: bool = False,
) -> Block:
    """One layer."""
    attention, attention_back, core, _ = attention_section(shape, layout, tokens, fp8=fp8, trained=trained)
    if sparse:
        mlp, mlp_back = expert_section(shape, layout, tokens, fp8=fp8, trained=trained)
    else:
        mlp, mlp_back = mlp_section(shape, layout, tokens, ffn=shape.ffn, fp8=fp8, trained=trained)
    forward, backward = (*attention, *mlp), (*mlp_back, *attention_back)
    t, h, tp = tokens.tokens, shape.hidden_size, layout.tensor
    rows = t / tp if layout.sequence else t
    kept = saved_by_layer(shape, layout, tokens, sparse=sparse, unfused=unfused)
    if "full" in recompute:
        return _finish(
            shape, layout, sparse, trained, forward, (*forward, *backward), kept={"input": 2 * rows * h}, transient=sum(kept.values())
        )
    if "core_attn" in recompute:
        backward = (core, *backward)
        kept.pop("scores", None)
    if ("mlp" in recompute and not sparse) or ("moe" in recompute and sparse):
        backward = (*(k for k in mlp if not isinstance(k, Stream) or k.kernels > 0), *backward)
        kept = {name: size for name, size in kept.items() if not name.startswith("mlp")}
        kept["mlp input"] = 2 * rows * h
    if "mlp_half" in recompute:  # every second product again, as torchtitan's selective recomputation does
        backward = (*(k for i, k in enumerate(k for k in forward if isinstance(k, Product)) if i % 2 == 0), *backward)
        outputs = t * (shape.heads + 2 * shape.kv_heads) * shape.head_dim / tp + 2 * rows * h + t * shape.branches * shape.ffn / tp
        kept = {"input": 2 * rows * h, "attention output": kept["attention output"], "products": outputs}
    if "layernorm" in recompute:
        backward = (Stream(8 * rows * h, kernels=2), *backward)
        kept.pop("norms", None)
    if "moe_act" in recompute and sparse:
        backward = (Stream(2 * (shape.branches + 1) * t * shape.top_k / tp * shape.expert_ffn), *backward)
        kept.pop("mlp activation", None)
    return _finish(shape, layout, sparse, trained, forward, backward, kept=kept, transient=0.0)


def saved_by_layer(shape: DecoderShape, layout: Layout, tokens: Tokens, *, sparse: bool, unfused: bool = False) -> dict[str, float]:
    """Bytes that a layer keeps for its backward pass in bf16, by what they are.

    As Transformer Engine's modules keep them (module/layernorm_linear.py: input, its norm's statistics, and the normalised input that the
    weight's gradient needs; module/linear.py: input; attention: queries, keys, values, output and one number for each row; the activation:
    its input).
    """
    t, h, tp, b = tokens.tokens, shape.hidden_size, layout.tensor, shape.branches
    rows = t / tp if layout.sequence else t
    q, kv = shape.heads * shape.head_dim / tp, shape.kv_heads * shape.head_dim / min(tp, shape.kv_heads or 1)
    kept = {
        "input": 4 * rows * h,
        "norms": 4 * rows * h,
        "qkv": 2 * t * (q + 2 * kv),
        "attention output": 2 * t * q + 4 * t * shape.heads / tp,
    }
    if unfused:
        kept["scores"] = 2 * tokens.pairs * 2.5 * 2 * shape.heads / tp
    if not sparse:
        return {**kept, "mlp hidden": 2 * b * t * shape.ffn / tp, "mlp activation": 2 * t * shape.ffn / tp}
    local = t / tp if layout.sequence else t
    arrived = local * shape.top_k * shape.capacity * layout.expert_tensor
    ffn = shape.expert_ffn / layout.expert_tensor
    kept["mlp permuted"] = 2 * 2 * local * shape.top_k * shape.capacity * h + 2 * arrived * h
    kept["mlp router"] = 12 * local * shape.experts
    kept["mlp hidden"] = 2 * b * arrived * ffn + 2 * b * t * shape.shared_ffn / tp
    kept["mlp activation"] = 2 * arrived * ffn + 2 * t * shape.shared_ffn / tp
    return kept


def _finish(
    shape: DecoderShape,
    layout: Layout,
    sparse: bool,
    trained: Trained,
    forward: tuple[Kernel, ...],
    backward: tuple[Kernel, ...],
    *,
    kept: dict[str, float],
    transient: float,
) -> Block:
    dense = shape.attention_parameters / layout.tensor + 2 * shape.hidden_size
    experts = 0.0
    if sparse:
        dense += shape.hidden_size * shape.experts + shape.mlp_parameters(shape.shared_ffn) / layout.tensor
        experts = shape.experts / layout.expert * shape.mlp_parameters(shape.expert_ffn) / layout.expert_tensor
    else:
        dense += shape.mlp_parameters(shape.ffn) / layout.tensor
    if not trained.weights and not trained.inputs:
        backward, kept = (), {}
    return Block(
        name="sparse layer" if sparse else "layer",
        forward=forward,
        backward=backward,
        parameters=dense if trained.weights else 0.0,
        expert_parameters=experts if trained.weights else 0.0,
        frozen_parameters=0.0 if trained.weights else dense + experts,
        saved=sum(kept.values()),
        transient=transient,
    )


def embedding(shape: DecoderShape, layout: Layout, tokens: Tokens, *, trained: Trained) -> Block:
    """The embedding table."""
    t, h = tokens.tokens, shape.hidden_size
    message = Message("reduce_scatter" if layout.sequence else "all_reduce", 2 * t * h, "tensor")
    back = Message("all_gather", 2 * t * h, "tensor")
    count = shape.vocab * h / layout.tensor
    messages = layout.tensor > 1
    return Block(
        name="embedding",
        forward=(Stream(4 * t * h, kernels=3), *((message,) if messages else ())),
        backward=(Stream(8 * t * h, kernels=3), *((back,) if messages and layout.sequence else ())) if trained.weights else (),
        parameters=count if trained.weights else 0.0,
        frozen_parameters=0.0 if trained.weights else count,
    )


def output(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, trained: Trained, owns_table: bool, fused: bool = False, copies: bool = False
) -> Block:
    """Final norm, output layer, cross-entropy in float32.

    Args:
        owns_table: the output layer's table is not the embedding's on the same process.
        fused: the loss is computed without a float32 copy of the logits.
        copies: the loss keeps several of them.
    """
    t, h, v = tokens.tokens, shape.hidden_size, shape.vocab / layout.tensor
    enter, enter_back = _tensor_messages(layout, 2 * t * h, trained=trained, entering=True)
    product, product_back = linear(t, v, h, fp8=False, trained=trained)
    logits = t * v
    count = v * h if owns_table else 0.0
    return Block(
        name="output",
        forward=(Stream(4 * t * h / layout.tensor), *enter, *product, Stream((8 if fused else 26) * logits, kernels=8)),
        backward=(Stream((4 if fused else 12) * logits, kernels=3), *enter_back, *product_back, Stream(8 * t * h / layout.tensor)),
        parameters=count if trained.weights else 0.0,
        frozen_parameters=0.0 if trained.weights else count,
        saved=(2 if fused else 4) * logits + 4 * t * h / layout.tensor,
        transient=(2 if fused else 12 if copies else 8) * logits,
    )

"""A decoder's layers, embedding and output as blocks: kernels of one process for one micro-batch, and what they store for the backward
pass.

Shape legend: as in layer_sections.
"""

from __future__ import annotations

from megatron_mm.planning.decoder_shape import DecoderShape, Recompute, Tokens, Trained
from megatron_mm.planning.kernels import Block, Kernel, Message, Product, Stream
from megatron_mm.planning.layer_sections import (
    CHECKPOINT_OPERATIONS,
    LATENT_OPERATIONS,
    attention_section,
    expert_section,
    linear,
    mlp_section,
    tensor_messages,
    tensors_of_layer,
)
from megatron_mm.planning.layout import Layout


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
    """Block of one layer."""
    attention, attention_back, core, _ = attention_section(shape, layout, tokens, fp8=fp8, trained=trained)
    if sparse:
        mlp, mlp_back = expert_section(shape, layout, tokens, fp8=fp8, trained=trained)
    else:
        mlp, mlp_back = mlp_section(shape, layout, tokens, ffn=shape.ffn, fp8=fp8, trained=trained)
    forward, backward = (*attention, *mlp), (*mlp_back, *attention_back)
    t, h, tp = tokens.tokens, shape.hidden_size, layout.tensor
    rows = layout.rows(t)
    kept = saved_by_layer(shape, layout, tokens, sparse=sparse, fp8=fp8, unfused=unfused, weights=trained.weights)
    extra = (Stream(0.0, kernels=CHECKPOINT_OPERATIONS),) * len(recompute)
    forward, backward = (*forward, *extra), (*extra, *backward)
    if "full" in recompute:
        return _finish(
            shape,
            layout,
            sparse,
            trained,
            forward,
            (*forward, *backward),
            kept={"input": 2 * rows * h},
            transient=sum(kept.values()),
            fp8=fp8,
        )
    if "core_attn" in recompute:
        backward = (core, *backward)
        kept.pop("scores", None)
    if ("mlp" in recompute and not sparse) or ("moe" in recompute and sparse):
        backward = (*(k for k in mlp if not isinstance(k, Stream) or k.kernels > 0), *backward)
        kept = {name: size for name, size in kept.items() if not name.startswith("mlp")}
        kept["mlp input"] = 2 * rows * h
    if "mlp_half" in recompute:  # recomputes every second product, like torchtitan's selective recomputation
        backward = (*(k for i, k in enumerate(k for k in forward if isinstance(k, Product)) if i % 2 == 0), *backward)
        outputs = t * (shape.heads + 2 * shape.kv_heads) * shape.head_dim / tp + 2 * rows * h + t * shape.branches * shape.ffn / tp
        kept = {"input": 2 * rows * h, "attention output": kept["attention output"], "products": outputs}
    if "mla_up_proj" in recompute and shape.latents is not None:
        widths = (shape.latents.keys, shape.latents.queries)
        again = [kernel for kernel in attention if isinstance(kernel, Product) and kernel.inner in widths]
        backward = (*again, Stream(0.0, kernels=LATENT_OPERATIONS), *backward)
        kept["qkv"] -= 2 * t * (shape.heads / tp) * (2 * shape.latents.key_dim + shape.latents.value)
    if "layernorm" in recompute:
        backward = (Stream(8 * rows * h, kernels=2), *backward)
        kept.pop("norms", None)
    if "moe_act" in recompute and sparse:
        backward = (*(kernel for kernel in mlp if isinstance(kernel, Stream) and kernel.part == "expert activation"), *backward)
        kept.pop("mlp activation", None)
    return _finish(shape, layout, sparse, trained, forward, backward, kept=kept, transient=0.0, fp8=fp8)


def saved_by_layer(
    shape: DecoderShape, layout: Layout, tokens: Tokens, *, sparse: bool, fp8: bool = False, unfused: bool = False, weights: bool = True
) -> dict[str, float]:
    """Bytes that a layer keeps for its backward pass, by kind of tensor: 2 per number, and in FP8 1 per number for inputs of products.

    These are the tensors that Transformer Engine's modules keep (module/layernorm_linear.py: input, its norm's statistics, and the
    normalised input that the weight's gradient needs; module/linear.py: input; attention: queries, keys, values, output and one number per
    row and head; the activation: its input). Attention copies values if queries and keys were rotated into new tensors (get_qkv_layout in
    attention/dot_product_attention/utils.py), so the projection's output is not kept beside them.

    Args:
        weights: the layer's weights are trained. The inputs of products are kept only for the gradients of weights.
    """
    t, h, tp, b = tokens.tokens, shape.hidden_size, layout.tensor, shape.branches
    rows = layout.rows(t)
    q, kv = shape.widths(tp)
    taken = 1 if fp8 else 2
    qkv, inner = q + 2 * kv, q
    if shape.latents is not None:
        small, heads = shape.latents, shape.heads / tp
        qkv = heads * (2 * small.key_dim + small.value) + 2 * (small.queries + small.keys + small.rotary)
        inner = heads * small.value
    kept = {
        "input": 4 * rows * h,
        "norms": 2 * taken * rows * h,
        "qkv": 2 * t * qkv,
        "attention output": (3 if fp8 else 2) * t * inner + 4 * t * shape.heads / tp,
    }
    if shape.dropout:
        kept["masks"] = 2 * rows * h
    if unfused:
        kept["scores"] = 2 * tokens.pairs * 2.5 * 2 * shape.heads / tp
    if not weights:
        del kept["norms"]
    if not sparse:
        activation = {"mlp activation": taken * t * shape.ffn / tp} if weights else {}
        return {**kept, "mlp hidden": 2 * b * t * shape.ffn / tp, **activation}
    arrived = rows * shape.top_k * shape.capacity * layout.expert_tensor
    ffn = shape.expert_ffn / layout.expert_tensor
    kept["mlp permuted"] = 2 * rows * shape.top_k * shape.capacity * h + taken * arrived * h * weights
    kept["mlp router"] = 12 * rows * shape.experts
    kept["mlp hidden"] = 2 * b * arrived * ffn + 2 * b * t * shape.shared_ffn / tp
    kept["mlp activation"] = taken * (arrived * ffn + t * shape.shared_ffn / tp) * weights
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
    fp8: bool,
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
        tensors=tensors_of_layer(shape, layout, sparse=sparse) if trained.weights else 0,
        fp8_parameters=dense + experts if fp8 else 0.0,
    )


def embedding(shape: DecoderShape, layout: Layout, tokens: Tokens, *, trained: Trained) -> Block:
    """Block of the embedding table."""
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
    """Block of the final norm, the output layer and cross-entropy in float32.

    Args:
        owns_table: the output layer's table is not the embedding table of the same process.
        fused: the loss is computed without a float32 copy of the logits, and their gradient overwrites them; the gradients of the output
            layer's input and of its weight are computed while it exists. Otherwise a copy is kept, and while it is made the bf16 logits
            exist, too (core/tensor_parallel/cross_entropy.py).
        copies: the loss is plain torch's, whose backward pass holds the bf16 logits, their log-softmax and two gradients in float32.
    """
    t, h, v = tokens.tokens, shape.hidden_size, shape.vocab / layout.tensor
    enter, enter_back = tensor_messages(layout, 2 * t * h, trained=trained, entering=True)
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
        transient=2 * t * h + 2 * v * h * trained.weights if fused else (10 if copies else 2) * logits,
    )

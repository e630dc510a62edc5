"""Jobs for plain decoders, the models of published measurements."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Literal

from megatron_mm.planning.decoder_block import decoder_layer, embedding, output
from megatron_mm.planning.decoder_shape import DecoderShape, Recompute, Tokens, Trained
from megatron_mm.planning.hardware import Gpu, Software
from megatron_mm.planning.job import Job
from megatron_mm.planning.kernels import Block, Stream
from megatron_mm.planning.layer_sections import linear
from megatron_mm.planning.layout import Layout

WINDOW_TOKENS = 1000
"""Cost of windowed attention in addition to the window itself, in tokens. For GPT-OSS (a window of 128 in documents of 4096) cuDNN takes
0.75 of the time of full causal attention in the forward pass, and 0.54 in the backward pass (cudnn-frontend,
benchmark/sdpa_benchmark_training/results/gpt_oss)."""


def _joined(shape: DecoderShape, layout: Layout, tokens: Tokens, *, fp8: bool) -> Block:
    """Block before a layer of multi-token prediction: concatenates and projects the last layer's output and the next token's embedding."""
    t, h, tp = tokens.tokens, shape.hidden_size, layout.tensor
    forward, backward = linear(t, h / tp, 2 * h, fp8=fp8, trained=Trained())
    return Block(
        name="joined",
        forward=(Stream(8 * t * h, kernels=4), *forward),
        backward=(*backward, Stream(8 * t * h, kernels=4)),
        parameters=2 * h * h / tp,
        saved=4 * t * h,
        tensors=3,
    )


LAYERS_OF_LAST = 3
"""Number of layers that the last stage has fewer than the others under multi-token prediction, as in Megatron-Bridge's layout of
DeepSeek-V3 (set_deepseek_v3_pipeline_model_parallel_layout)."""


def _layers(shape: DecoderShape, layout: Layout) -> tuple[int, ...]:
    """Number of decoder layers of each stage."""
    if shape.predicted_ahead and layout.stages > 1 and layout.stage_layers is None:
        each = -(-(shape.num_layers + LAYERS_OF_LAST) // layout.stages)
        last = shape.num_layers - each * (layout.stages - 1)
        if last >= 0:
            return (each,) * (layout.stages - 1) + (last,)
    return layout.layers(shape.num_layers)


Adapters = Literal["none", "queries", "all"]
"""Products with low-rank adapters: none, the one projection to queries, keys and values, or every weight of attention and MLP."""


def _with_adapters(
    layer: Block, shape: DecoderShape, layout: Layout, tokens: Tokens, adapters: Adapters, *, sparse: bool, again: bool
) -> Block:
    """Add low-rank adapters to a layer's products; experts have none.

    Their products are so narrow that reading and writing takes all of their time. In 2 bytes per number, for widths `inputs` and `outputs`:
    forward, the input is read, the adapter's output written, and then added to the layer's output (two read, one written); backward, the
    output's gradient is read twice, the input once, and the adapter's part of the input's gradient is written and added. The inputs of
    products, which a frozen layer does not need, are kept for the adapters, whole under sequence parallelism, too (Megatron-Bridge,
    peft/lora.py).

    Args:
        again: the layer is recomputed.
    """
    if adapters == "none":
        return layer
    t, h, tp = tokens.tokens, shape.hidden_size, layout.tensor
    q, kv = shape.widths(tp)
    inputs, outputs, count = float(h), q + 2 * kv, 1
    kept = 2 * t * h
    if adapters == "all":
        inputs, outputs, count = 3 * h + q, outputs + h, 4
    if adapters == "all" and not sparse:
        b, ffn = shape.branches, shape.ffn / tp
        inputs, outputs, count = inputs + b * h + ffn, outputs + h + b * ffn, count + b + 1
        kept += 2 * t * (h + ffn)
    once = Stream(2 * t * (inputs + 4 * outputs), kernels=4 * count)
    back = Stream(2 * t * (2 * outputs + 5 * inputs), kernels=6 * count)
    return replace(
        layer,
        forward=(*layer.forward, once),
        backward=(*((once,) if again else ()), back, *layer.backward),
        saved=layer.saved + (0.0 if again else kept),
    )


def _layer_blocks(
    shape: DecoderShape,
    layout: Layout,
    tokens: Tokens,
    software: Software,
    *,
    fp8: bool,
    recompute: Recompute,
    adapters: Adapters,
    trained: Trained,
) -> list[Block]:
    """Block of each layer; equal layers share theirs."""
    pairs = min(tokens.pairs, tokens.tokens * (shape.window + WINDOW_TOKENS))
    near = replace(tokens, pairs=pairs, windowed=True) if shape.window else tokens
    unfused = software.attention == "unfused"

    @cache
    def made(sparse: bool, windowed: bool, again: Recompute) -> Block:
        seen = near if windowed else tokens
        layer = decoder_layer(shape, layout, seen, sparse=sparse, fp8=fp8, recompute=again, trained=trained, unfused=unfused)
        return _with_adapters(layer, shape, layout, tokens, adapters, sparse=sparse, again="full" in again)

    blocks = []
    for layer in range(shape.num_layers):
        again = recompute
        if "every second layer" in recompute:
            again = frozenset({"full"}) if layer % 2 else frozenset()
        blocks.append(made(layer in shape.sparse_layers, bool(shape.window) and layer % 2 == 0, again))
    return blocks


def decoder_job(
    shape: DecoderShape,
    layout: Layout,
    gpu: Gpu,
    software: Software,
    *,
    sequence_length: int,
    micro_batch_size: int,
    num_micro_batches: int,
    fp8: bool,
    recompute: Recompute,
    adapters: Adapters = "none",
    document_length: float | None = None,
) -> Job:
    """Job of a decoder on full sequences.

    Args:
        document_length: mean number of tokens in the documents of a sequence; by default it is one document.
        adapters: low-rank adapters that are trained in place of the weights. Their own weights are so few that they are left out.
    """
    tokens = Tokens.whole(sequences=micro_batch_size, length=sequence_length, context=layout.context)
    if document_length is not None:
        tokens = replace(tokens, pairs=tokens.tokens * document_length / 2, length=document_length)
    trained = Trained(weights=adapters == "none")
    layers = _layer_blocks(shape, layout, tokens, software, fp8=fp8, recompute=recompute, adapters=adapters, trained=trained)
    counts = _layers(shape, layout)
    table = output(
        shape,
        layout,
        tokens,
        trained=trained,
        owns_table=not shape.tied or len(counts) > 1,
        fused=software.fuses_loss,
        copies=software.copies_logits,
    )
    ahead = (layers[-1], _joined(shape, layout, tokens, fp8=fp8), replace(table, parameters=0.0))
    ends = list(itertools.accumulate(counts))
    stages = [tuple(layers[end - count : end]) for end, count in zip(ends, counts, strict=True)]
    stages[0] = (embedding(shape, layout, tokens, trained=trained), *stages[0])
    stages[-1] = (*stages[-1], table, *(ahead * shape.predicted_ahead))
    rows = tokens.tokens / layout.tensor if layout.sequence or software.scatters_sends else tokens.tokens
    return Job(
        layout=layout,
        gpu=gpu,
        software=software,
        kinds=(tuple(stages),),
        micro_batches=(0,) * num_micro_batches,
        hidden_bytes=2 * rows * shape.hidden_size,
    )

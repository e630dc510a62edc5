"""Jobs of plain decoders: what published measurements are of."""

from __future__ import annotations

from megatron_mm.planning.decoder_block import decoder_layer, embedding, output
from megatron_mm.planning.decoder_shape import DecoderShape, Recompute, Tokens, Trained
from megatron_mm.planning.hardware import Gpu, Software
from megatron_mm.planning.job import Job
from megatron_mm.planning.kernels import Block
from megatron_mm.planning.layout import Layout


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
) -> Job:
    """A decoder on full sequences of one document each."""
    tokens = Tokens.whole(sequences=micro_batch_size, length=sequence_length, context=layout.context)
    trained = Trained()
    made = {
        sparse: decoder_layer(
            shape,
            layout,
            tokens,
            sparse=sparse,
            fp8=fp8,
            recompute=recompute,
            trained=trained,
            unfused=software.attention == "unfused",
        )
        for sparse in {layer in shape.sparse_layers for layer in range(shape.num_layers)}
    }
    counts = layout.layers(shape.num_layers)
    stages: list[tuple[Block, ...]] = []
    first = 0
    for stage, count in enumerate(counts):
        blocks = [made[layer in shape.sparse_layers] for layer in range(first, first + count)]
        first += count
        if stage == 0:
            blocks.insert(0, embedding(shape, layout, tokens, trained=trained))
        if stage == len(counts) - 1:
            blocks.append(
                output(
                    shape,
                    layout,
                    tokens,
                    trained=trained,
                    owns_table=not shape.tied or len(counts) > 1,
                    fused=software.fuses_loss,
                    copies=software.copies_logits,
                )
            )
        stages.append(tuple(blocks))
    rows = tokens.tokens / layout.tensor if layout.sequence else tokens.tokens
    return Job(
        layout=layout,
        gpu=gpu,
        software=software,
        kinds=(tuple(stages),),
        micro_batches=(0,) * num_micro_batches,
        hidden_bytes=2 * rows * shape.hidden_size,
    )

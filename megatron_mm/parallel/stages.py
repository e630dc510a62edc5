"""What lives on which pipeline stage.

A pipeline has `pipeline * virtual` stages in the order in which a micro-batch passes them; stage k is chunk k // pipeline
of pipeline rank k % pipeline. The first stage holds the image encoder, the connector and the embedding table; the last one
the final norm and the output layer. What passes from stage to stage is the hidden states alone ([t, 1, h], or a
tensor-parallel rank's part of them): token ids, positions, document boundaries and labels are known to every stage from the
plan, and image features have become hidden states before the first stage ends.
"""

from __future__ import annotations

from megatron_mm.config import ParallelConfig


def layers_per_stage(parallel: ParallelConfig, *, num_layers: int) -> tuple[int, ...]:
    """Decoder layers of each stage, in pipeline order.

    Without `parallel.stage_layers` the layers are spread as evenly as they go, and what is left over goes to the middle
    stages, because the first stage also embeds and encodes and the last one also computes the logits: 56 layers on 10
    stages are 5 6 6 6 6 6 6 5 5 5, with the last ones short.

    Raises ValueError where explicit numbers do not add up, or there are more stages than layers.
    """
    stages = parallel.pipeline * parallel.virtual
    if parallel.stage_layers is not None:
        if sum(parallel.stage_layers) != num_layers:
            raise ValueError(
                f"parallel.stage_layers {parallel.stage_layers} add up to {sum(parallel.stage_layers)} layers, "
                f"but the decoder has {num_layers}"
            )
        return parallel.stage_layers
    base, left = divmod(num_layers, stages)
    if base == 0:
        raise ValueError(
            f"pipeline {parallel.pipeline} x virtual {parallel.virtual} = {stages} stages, but the decoder has only {num_layers} layers: "
            "lower one of them, or give parallel.stage_layers with zeros"
        )
    # Stages 1, 2, ... get the extra layers; stage 0 and, as long as possible, the last ones do not.
    return tuple(base + (1 <= stage <= left) for stage in range(stages))


def pipeline_layout(parallel: ParallelConfig, *, num_layers: int) -> list[list[str]]:
    """The same as megatron-core's `pipeline_model_parallel_layout`: one list of layer types for each stage."""
    layout = [["decoder"] * count for count in layers_per_stage(parallel, num_layers=num_layers)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout

"""Which parts of a model each pipeline stage has, and what stages send each other.

A pipeline has `pipeline * virtual` stages in the order in which a micro-batch passes them; stage k is chunk k // pipeline of pipeline rank
k % pipeline. The first stage has the image encoder, the connector and the embedding table; the last one has the final norm and the output
layer. A stage sends the next one a single tensor [rows, 1, h], or a tensor-parallel rank's part of it. Its first rows are the hidden states
[t, 1, h]. Every stage knows token ids, positions, document boundaries and labels from the plan. In MM1 nothing else is sent, because image
features become hidden states within the first stage.

If later stages attend to the images themselves (InfiMM), the latents [m, 1, v] follow the hidden states, in as many rows of width h as they
need. So they are part of the same messages, in both directions: each stage adds its gradient of the latents to that of the stages after it,
and the sum arrives at the resampler. Alternatives: sending pixels, or encoding the images again on every stage, would need no such
gradient, but every stage would have to hold the tower; a separate channel would need a second schedule of messages that stays in step with
the first. The number of rows in a micro-batch's messages follows from the plan (`parallel.pipeline`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_mm.config import ParallelConfig


def most_in_flight(parallel: ParallelConfig, *, pipeline_rank: int = 0) -> int:
    """Return how many micro-batches at most wait for their backward passes in a chunk of a pipeline rank."""
    waiting = parallel.pipeline - pipeline_rank if parallel.virtual == 1 else 2 * parallel.pipeline
    return waiting + parallel.overlaps_experts


def layers_per_stage(parallel: ParallelConfig, *, num_layers: int) -> tuple[int, ...]:
    """Decoder layers of each stage, in pipeline order.

    Without `parallel.stage_layers` the layers are spread as evenly as possible, and the remaining ones go to the middle stages, because the
    first stage also embeds and encodes and the last one also computes the logits: 56 layers on 10 stages are 5 6 6 6 6 6 6 5 5 5, with the
    last ones short.

    Raises ValueError if explicit numbers do not add up, or there are more stages than layers.
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
    """The layout in the form of megatron-core's `pipeline_model_parallel_layout`: one list of layer types for each stage."""
    layout = [["decoder"] * count for count in layers_per_stage(parallel, num_layers=num_layers)]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def rows_for(num_vectors: int, *, width: int, hidden_size: int) -> int:
    """Number of rows of width hidden_size that num_vectors vectors of another width need: 3 vectors of 10 in rows of 16 take 2."""
    return -(-num_vectors * width // hidden_size)


def attach(hidden: torch.Tensor, states: torch.Tensor, *, rows: int) -> torch.Tensor:
    """Append cross-attention states to hidden states, padded with zeros.

    Args:
        hidden: [t, 1, h].
        states: cross-attention states [m, 1, v].
        rows: number of rows of the result.

    Returns:
        [rows, 1, h].
    """
    flat = states.flatten().to(hidden.dtype)
    width = hidden.shape[-1]
    padding = (rows - hidden.shape[0]) * width - flat.numel()
    assert padding >= 0, f"{flat.numel()} numbers do not fit into {rows - hidden.shape[0]} rows of {width}"
    return torch.cat([hidden, F.pad(flat, (0, padding)).view(-1, 1, width)])


def detach_states(sent: torch.Tensor, *, num_hidden: int, num_states: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `attach`: (hidden [num_hidden, 1, h], states [num_states, 1, width])."""
    hidden, rest = sent[:num_hidden], sent[num_hidden:]
    return hidden, rest.flatten()[: num_states * width].view(num_states, 1, width)

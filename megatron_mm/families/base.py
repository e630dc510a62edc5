"""What a model family gives to the rest of the stack, so that nothing else knows a family by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.transformer.module import MegatronModule

from megatron_mm.config import ModelConfig, ParallelConfig
from megatron_mm.data.image_input import ImageInput
from megatron_mm.flops import StepWork
from megatron_mm.models.context import ChunkContext


@dataclass(frozen=True)
class ModelFamily:
    """A family's entry in `megatron_mm.families.registry.FAMILIES`."""

    build: Callable[[ModelConfig, ChunkContext], MegatronModule]
    """Make one pipeline chunk. Its weights are allocated, not initialised; it has `config`, `set_input_tensor`,
    `pre_process`, `post_process`, `share_embeddings_and_output_weights`, `shared_embedding_or_output_weight`."""
    check_layout: Callable[[ModelConfig, ParallelConfig, int], None]
    """Raise ValueError where a layout on a number of processes cannot hold the model."""
    image_input: Callable[[ModelConfig], ImageInput]
    step_flops: Callable[[ModelConfig, str, StepWork], float]
    """FLOPs of training on a step's work under a policy, as `flops` counts them."""
    policies: dict[str, tuple[str, ...]]
    """What `train.policy` may be, and what learns then: regular expressions, one of which begins a learning parameter's name."""
    special_tokens: tuple[str, ...] = ("<pad>", "<image>")
    """Control tokens that the model needs, in the order in which they get ids after those of a tokenizer that lacks them."""
    takes_tiles: bool = False
    """Images may be cut into tiles (`data.max_tiles`)."""
    pipeline_rows: Callable[[ModelConfig, ParallelConfig, int, int], int] = lambda model, parallel, num_tokens, num_images: num_tokens
    """Rows [rows, 1, hidden_size] that go from stage to stage for a micro-batch of so many tokens and at most so many images."""
    fp8_sizes: Callable[[ModelConfig, ParallelConfig], dict[str, tuple[int, int]]] = lambda model, parallel: {}
    """Sizes of FP8 products beside the decoder's own: the number of vectors or their width, and over how many processes it is cut."""

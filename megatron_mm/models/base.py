"""What a model family gives to the rest of the stack, so that nothing else knows a family by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_mm.config import ModelConfig, ParallelConfig, Precision
from megatron_mm.data.image_input import ImageInput as ImageInput  # part of what a family gives
from megatron_mm.models.layers import Backend
from megatron_mm.planning.flops import StepWork


class ImageSharing(Protocol):
    """How the processes of a tensor-parallel group share the images of a micro-batch (parallel.images)."""

    def gather(self, owned: torch.Tensor, *, owners: torch.Tensor) -> torch.Tensor:
        """Features of the images that this process encoded -> features of all images, with gradients back to each owner.

        Args:
            owned: [max(1, num_owned), k, h], in the order of the images; one row that no image uses where num_owned is 0.
            owners: [num_images] on the CPU: the rank that encoded each image.

        Returns:
            [num_images, k, h].
        """
        ...

    def local_tokens(self, num_tokens: int) -> range:
        """The tokens, of num_tokens, whose embeddings this process holds: a part of them under sequence parallelism."""
        ...


@dataclass(frozen=True)
class ChunkContext:
    """Everything that the construction of one pipeline chunk depends on, besides the model's own config."""

    parallel: ParallelConfig
    precision: Precision
    backend: Backend
    on_gpu: bool
    """Use what needs CUDA: fused activations, overlapped point-to-point messages."""
    sequence_length: int
    """Tokens of a packed sequence."""
    stage: int
    """Stage in pipeline order, from 0 to pipeline * virtual - 1."""
    encoder_groups: ProcessGroupCollection
    """Process groups of this process alone, for modules that it shares with nobody."""
    sharing: ImageSharing

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def pre_process(self) -> bool:
        """This chunk holds the encoder and the embeddings."""
        return self.stage == 0

    @property
    def post_process(self) -> bool:
        """This chunk holds the final norm and the output layer."""
        return self.stage == self.parallel.pipeline * self.parallel.virtual - 1

    @property
    def virtual_stage(self) -> int | None:
        """Index of the chunk on its pipeline rank, as megatron-core wants it: None without interleaving."""
        return self.stage // self.parallel.pipeline if self.parallel.virtual > 1 else None


def fill_colour(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """A tower's mean as a colour."""
    red, green, blue = (round(255 * channel) for channel in mean)
    return red, green, blue


@dataclass(frozen=True)
class ModelFamily:
    """A family's entry in `megatron_mm.models.FAMILIES`."""

    build: Callable[[ModelConfig, ChunkContext], MegatronModule]
    """Make one pipeline chunk. Its weights are allocated, not initialised; it has `config`, `set_input_tensor`,
    `pre_process`, `post_process`, `share_embeddings_and_output_weights`, `shared_embedding_or_output_weight`."""
    check_layout: Callable[[ModelConfig, ParallelConfig, int], None]
    """Raise ValueError where a layout on a number of processes cannot hold the model."""
    image_input: Callable[[ModelConfig], ImageInput]
    step_flops: Callable[[ModelConfig, str, StepWork], float]
    """FLOPs of training on a step's work under a policy, as `planning.flops` counts them."""
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

"""Everything that the construction of a pipeline chunk depends on, besides the model's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.config import ParallelConfig, Precision
from megatron_mm.models.layers import Backend


class ImageSharing(Protocol):
    """How the processes of a tensor-parallel group share the images of a micro-batch (parallel.images)."""

    def gather(self, owned: torch.Tensor, *, owners: torch.Tensor) -> torch.Tensor:
        """Gather the features of all images from those that each process encoded; the backward pass returns gradients to each owner.

        Args:
            owned: [max(1, num_owned), k, h], in the order of the images; if num_owned is 0, one unused row.
            owners: [num_images] on the CPU: the rank that encoded each image.

        Returns:
            [num_images, k, h].
        """
        ...

    def local_tokens(self, num_tokens: int) -> range:
        """Return the range of tokens whose embeddings this process holds: all, or a part of them under sequence parallelism."""
        ...


@dataclass(frozen=True)
class Kernels:
    """The fused kernels in use (`config.KernelConfig`, with its automatic choices resolved)."""

    weight_gradients: bool = False
    cross_entropy: bool = False
    token_permutation: bool = False
    router: bool = False
    eva_tower: bool = False


@dataclass(frozen=True)
class ChunkContext:
    """Everything that the construction of one pipeline chunk depends on, besides the model's own config."""

    parallel: ParallelConfig
    precision: Precision
    backend: Backend
    on_gpu: bool
    """Use features that need CUDA, such as overlapped point-to-point messages."""
    sequence_length: int
    """Tokens of a packed sequence."""
    stage: int
    """Stage in pipeline order, from 0 to pipeline * virtual - 1."""
    tensor_rank: int
    """Which part of the split weights this process holds: its position in the tensor-parallel group."""
    encoder_groups: ProcessGroupCollection
    """Process groups of this process alone, for modules that are not split over processes."""
    sharing: ImageSharing
    kernels: Kernels = Kernels()
    fp8_recipe: str = "tensorwise"
    """`config.PrecisionConfig.fp8_recipe`."""
    fp8_weights: bool = False
    """`config.PrecisionConfig.fp8_weights`."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    @property
    def pre_process(self) -> bool:
        """True if this chunk holds the embeddings."""
        return self.stage == 0

    @property
    def holds_encoder(self) -> bool:
        """True if this chunk holds the image encoder."""
        return self.pre_process and not self.parallel.spread_encoder

    @property
    def post_process(self) -> bool:
        """True if this chunk holds the final norm and the output layer."""
        return self.stage == self.parallel.pipeline * self.parallel.virtual - 1

    @property
    def virtual_stage(self) -> int | None:
        """Index of the chunk on its pipeline rank in megatron-core's convention: None without interleaving."""
        return self.stage // self.parallel.pipeline if self.parallel.virtual > 1 else None

"""How a model is cut over processes, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config.checks import require, require_positive

RecomputeModule = Literal["core_attn", "mlp", "layernorm", "moe", "moe_act"]


IMAGES_AT_ONCE = 16
"""Images that go through the encoder together at most, where every pipeline rank encodes."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is cut over the processes; the data-parallel size is what is left of the world size."""

    tensor: int = 1
    """Tensor-parallel degree: processes that share every layer."""
    pipeline: int = 1
    """Pipeline-parallel degree: stages of consecutive layers."""
    virtual: int = 1
    """Model chunks on each pipeline stage (interleaved schedule); 1 is plain 1F1B."""
    expert: int = 1
    """Expert-parallel degree, taken out of the data-parallel size; 1 for a dense model. Groups on several nodes send tokens over the
    network, those on one node more gradients: a run says how much of each before it starts."""
    expert_tensor: int = 1
    """Tensor-parallel degree inside each expert, a divisor of tensor; 1 keeps experts whole. More than 1 needs GPUs."""
    sequence: bool | None = None
    """Split activations between the tensor-parallel processes along the sequence; None means: where tensor > 1."""
    stage_layers: tuple[int, ...] | None = None
    """Decoder layers of each stage in pipeline order (pipeline * virtual numbers); None splits as evenly as possible,
    the first and last stages getting the smaller shares."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel processes (ZeRO-1)."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = True
    """Gather updated parameters while the next forward pass already runs; needs distributed_optimizer, CUDA and pipeline 1
    or virtual > 1, and is ignored elsewhere."""
    overlap_tensor: bool = False
    """Exchange parts of a sequence between tensor-parallel processes while products run on other parts, through Transformer Engine's user
    buffers. These have one size: every micro-batch is padded to `micro_batch_size` full sequences."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, those of `recompute_modules`, or whole layers."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """What selective recompute computes again: the attention core, dense MLPs, norms, whole layers of experts, or the experts' activation.
    Norms and the experts' activation cost little and need no second pass of a product."""
    recompute_encoder: Literal["none", "selective", "full"] | None = None
    """The same for the image tower, which keeps more than a decoder layer and costs less to run again; None means: as recompute."""
    spread_encoder: bool = False
    """Every pipeline rank holds the image encoder and encodes its share of a step's images before the pipeline begins; the first stage
    gets the features and sends their gradients back. Then the encoder holds up no stage, and its state is sharded over all processes.
    Each process keeps the encoder's weights, gradients, and activations of its share of a whole step."""
    recompute_encoder_modules: tuple[RecomputeModule, ...] | None = None
    """`recompute_modules` of the image tower; None means: those of recompute_modules that it has."""
    expert_dispatch: Literal["alltoall", "deepep", "hybridep"] = "alltoall"
    """How tokens go to the experts of other processes: all-to-all, or the kernels of the package deep_ep."""
    max_expert_load: float | None = None
    """Bound on the memory that a collapsing router may take: tokens that the experts of one process receive, in multiples of an equal
    share. What is beyond goes to no expert, is counted as dropped, and warned of. None has no bound."""
    collective_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run instead of hanging it."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "pipeline", "virtual", "expert", "expert_tensor", "collective_timeout_minutes")
        require(
            self.virtual == 1 or self.pipeline > 1,
            f"parallel.virtual is {self.virtual}, but interleaving needs parallel.pipeline > 1: set one of them",
        )
        require(
            not self.spread_encoder or self.pipeline > 1,
            "parallel.spread_encoder is True, but parallel.pipeline is 1: there are no other stages to encode images",
        )
        require(
            not self.spread_encoder or self.distributed_optimizer,
            "parallel.spread_encoder is True, but parallel.distributed_optimizer is False: set one of them otherwise",
        )
        require(
            self.tensor % self.expert_tensor == 0,
            f"parallel.expert_tensor {self.expert_tensor} does not divide parallel.tensor {self.tensor}: use a divisor of it, or 1",
        )
        require(
            self.max_expert_load is None or self.max_expert_load >= 1,
            f"parallel.max_expert_load is {self.max_expert_load}, but processes with an equal share have 1: use 2 to 4, or None",
        )
        if self.stage_layers is not None:
            stages = self.pipeline * self.virtual
            require(
                len(self.stage_layers) == stages,
                f"parallel.stage_layers has {len(self.stage_layers)} numbers, but pipeline {self.pipeline} x virtual {self.virtual} "
                f"makes {stages} stages: give one number for each",
            )

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence and self.tensor > 1

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in world_size processes. Raises ValueError where the degrees do not divide it."""
        require(
            world_size % self.model_parallel_size == 0,
            f"{world_size} processes cannot be cut into tensor {self.tensor} x pipeline {self.pipeline} = {self.model_parallel_size}: "
            f"start a multiple of {self.model_parallel_size} processes or change --parallel.tensor / --parallel.pipeline",
        )
        data = world_size // self.model_parallel_size
        require(
            data % self.expert == 0,
            f"parallel.expert {self.expert} does not divide the data-parallel size {data} ({world_size} processes / tensor {self.tensor} / "
            f"pipeline {self.pipeline}): use one of {[degree for degree in range(1, data + 1) if data % degree == 0]}",
        )
        return data

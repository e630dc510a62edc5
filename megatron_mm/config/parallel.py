"""Configuration of parallelism: how a model is split over processes, and how these communicate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config.checks import require, require_positive

RecomputeModule = Literal["core_attn", "mlp", "layernorm", "moe", "moe_act"]


IMAGES_AT_ONCE = 16
"""Maximum number of images that pass through the encoder together, if every pipeline rank encodes."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is split over processes. The data-parallel size follows: the number of processes divided by tensor * pipeline."""

    tensor: int = 1
    """Tensor-parallel degree: processes that share every layer."""
    pipeline: int = 1
    """Pipeline-parallel degree: stages of consecutive layers."""
    virtual: int = 1
    """Model chunks on each pipeline stage (interleaved schedule); 1 uses plain 1F1B."""
    expert: int = 1
    """Expert-parallel degree, a divisor of the data-parallel size; 1 for a dense model. Groups that span several nodes send tokens over the
    network; groups within a node send more gradients. A run logs how much of each before it starts."""
    expert_tensor: int = 1
    """Tensor-parallel degree within each expert, a divisor of tensor; 1 keeps experts whole. More than 1 needs GPUs."""
    sequence: bool | None = None
    """Split activations along the sequence between the tensor-parallel processes; None does so if tensor > 1."""
    stage_layers: tuple[int, ...] | None = None
    """Number of decoder layers on each stage, in pipeline order (pipeline * virtual numbers); None splits as evenly as possible, with the
    smaller shares on the first and last stages."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel processes (ZeRO-1)."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass is still running."""
    overlap_param_gather: bool = True
    """Gather updated parameters while the next forward pass is already running; needs distributed_optimizer, CUDA, and pipeline 1 or
    virtual > 1, and is ignored otherwise."""
    overlap_tensor: bool = False
    """Exchange parts of a sequence between tensor-parallel processes while matrix products run on other parts, through Transformer Engine's
    user buffers. These have a fixed size, so every micro-batch is padded to `micro_batch_size` full sequences."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Which activations are recomputed in the backward pass: none, those of `recompute_modules`, or those of whole layers."""
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)
    """What selective recompute recomputes: the attention core, dense MLPs, norms, whole layers of experts, or the activation inside
    experts. Norms and the activation inside experts cost little, because no matrix product is computed twice."""
    recompute_encoder: Literal["none", "selective", "full"] | None = None
    """Which activations of the image tower are recomputed; its layers store more than a decoder layer and are cheaper to recompute. None
    uses the value of recompute."""
    spread_encoder: bool = False
    """Every pipeline rank has the image encoder and encodes its share of a step's images before the pipeline begins; the first stage
    receives the features and sends their gradients back. The encoder then delays no stage, and its optimizer state is sharded over all
    processes. Each process stores the encoder's weights, gradients, and the activations of its share of a whole step."""
    recompute_encoder_modules: tuple[RecomputeModule, ...] | None = None
    """`recompute_modules` for the image tower; None uses those of recompute_modules that the tower has."""
    expert_dispatch: Literal["alltoall", "deepep", "hybridep"] = "alltoall"
    """How tokens are sent to experts on other processes: by all-to-all, or with the kernels of the package deep_ep."""
    overlap_experts: bool = False
    """Send tokens between experts while another micro-batch computes: the forward pass of one micro-batch and the backward pass of the
    previous one run through the layers together. Needs bf16 or FP8, pipeline 1 or virtual > 1, and memory for a second micro-batch."""
    delay_weight_gradients: bool = False
    """With overlap_experts, compute the weight gradients of each part of a layer after the gradients of its inputs, while tokens travel.
    Needs Transformer Engine's layers and a decoder without frozen weights. megatron-core's `delay_wgrad_compute`."""
    max_expert_load: float | None = None
    """Limit on the tokens that the experts of one process receive, as a multiple of an equal share, so that a collapsing router cannot
    exhaust memory. Tokens beyond it go to no expert; they are counted as dropped, and a warning is logged. None sets no limit."""
    collective_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run, so that it does not hang."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "pipeline", "virtual", "expert", "expert_tensor", "collective_timeout_minutes")
        require(
            self.virtual == 1 or self.pipeline > 1,
            f"parallel.virtual is {self.virtual}, but interleaving needs parallel.pipeline > 1: "
            "raise parallel.pipeline, or set parallel.virtual to 1",
        )
        require(
            not self.spread_encoder or self.pipeline > 1,
            "parallel.spread_encoder is True, but parallel.pipeline is 1, so there are no other stages to encode images: "
            "change one of them",
        )
        require(
            not self.spread_encoder or self.distributed_optimizer,
            "parallel.spread_encoder is True, but needs parallel.distributed_optimizer, which is False: change one of them",
        )
        require(
            self.tensor % self.expert_tensor == 0,
            f"parallel.expert_tensor {self.expert_tensor} does not divide parallel.tensor {self.tensor}: use a divisor of it, or 1",
        )
        require(
            self.max_expert_load is None or self.max_expert_load >= 1,
            f"parallel.max_expert_load is {self.max_expert_load}, but must be at least 1, which is an equal share: use 2 to 8, or None",
        )
        if self.stage_layers is not None:
            stages = self.pipeline * self.virtual
            require(
                len(self.stage_layers) == stages,
                f"parallel.stage_layers has {len(self.stage_layers)} numbers, but pipeline {self.pipeline} x virtual {self.virtual} "
                f"makes {stages} stages: give one number per stage",
            )

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence and self.tensor > 1

    @property
    def overlaps_experts(self) -> bool:
        """Whether tokens are sent between experts while another micro-batch computes: overlap_experts is set, and there are several
        expert-parallel processes."""
        return self.overlap_experts and self.expert > 1

    @property
    def delays_weight_gradients(self) -> bool:
        """Whether weight gradients are delayed: delay_weight_gradients is set, and tokens are sent while another micro-batch computes."""
        return self.delay_weight_gradients and self.overlaps_experts

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    def data_parallel_size(self, world_size: int) -> int:
        """Number of model replicas in world_size processes. Raises ValueError if the degrees do not divide it."""
        require(
            world_size % self.model_parallel_size == 0,
            f"{world_size} processes cannot be divided into groups of tensor {self.tensor} x pipeline {self.pipeline} = "
            f"{self.model_parallel_size}: "
            f"start a multiple of {self.model_parallel_size} processes or change --parallel.tensor / --parallel.pipeline",
        )
        data = world_size // self.model_parallel_size
        require(
            data % self.expert == 0,
            f"parallel.expert {self.expert} does not divide the data-parallel size {data} ({world_size} processes / tensor {self.tensor} / "
            f"pipeline {self.pipeline}): use one of {[degree for degree in range(1, data + 1) if data % degree == 0]}",
        )
        return data

"""The layout of a job: degrees of parallelism, the groups that follow from them, and what is sharded over data-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_mm.config import ParallelConfig
from megatron_mm.planning.hardware import Dispatcher, Gpu
from megatron_mm.planning.kernels import Group
from megatron_mm.planning.network import Members, Network

Sharding = Literal["none", "optimizer", "gradients", "full"]
"""What data-parallel ranks shard: nothing, the optimizer (ZeRO-1), also gradients (ZeRO-2), also weights (ZeRO-3, FSDP)."""


@dataclass(frozen=True)
class Layout:
    """How GPUs share a model. Ranks are numbered as in megatron-core: tensor, context, data, pipeline, from innermost to outermost."""

    gpus: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    sequence: bool = True
    """Activations between tensor-parallel layers are split along the sequence."""
    sharding: Sharding = "optimizer"
    folded: bool = True
    """Expert-parallel groups may span data- and context-parallel ranks. Otherwise they span only data-parallel ranks, which are further
    apart."""
    stage_layers: tuple[int, ...] | None = None

    @property
    def data(self) -> int:
        return self.gpus // (self.tensor * self.pipeline * self.context)

    @property
    def expert_data(self) -> int:
        """Number of copies of an expert."""
        return max(1, self.gpus // (self.pipeline * self.expert * self.expert_tensor))

    @property
    def stages(self) -> int:
        return self.pipeline * self.virtual

    def rows(self, tokens: float) -> float:
        """Rows of a micro-batch on this process between tensor-parallel layers."""
        return tokens / self.tensor if self.sequence else tokens

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Number of decoder layers of each stage. Remaining layers go to the stages after the first, as in `parallel.stages`."""
        if self.stage_layers is not None:
            return self.stage_layers
        base, left = divmod(num_layers, self.stages)
        return tuple(base + (1 <= stage <= left) for stage in range(self.stages)) if left else (base,) * self.stages

    def network(self, gpu: Gpu, *, dispatcher: Dispatcher = "alltoall") -> Network:
        near = self.tensor * self.context
        expert_stride = self.expert_tensor * (1 if self.folded else self.context)
        groups: dict[Group, Members] = {
            "tensor": Members(self.tensor, 1),
            "context": Members(self.context, self.tensor),
            "data": Members(self.data * self.context, self.tensor),
            "pipeline": Members(self.pipeline, near * self.data),
            "expert_tensor": Members(self.expert_tensor, 1),
            "expert": Members(self.expert, expert_stride),
            "expert_data": Members(self.expert_data, self.expert_tensor * self.expert),
        }
        return Network(gpu, groups, dispatcher)

    @classmethod
    def of(cls, parallel: ParallelConfig, gpus: int) -> Layout:
        """The layout of a training run."""
        return cls(
            gpus=gpus,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual,
            expert=parallel.expert,
            expert_tensor=parallel.expert_tensor,
            sequence=parallel.sequence_parallel,
            sharding="optimizer" if parallel.distributed_optimizer else "none",
            stage_layers=parallel.stage_layers,
        )

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        parts += [f"VPP{self.virtual}"] if self.virtual > 1 else []
        parts += [f"EP{self.expert}"] if self.expert > 1 else []
        parts += [f"ETP{self.expert_tensor}"] if self.expert_tensor > 1 else []
        parts += [f"CP{self.context}"] if self.context > 1 else []
        return " ".join([*parts, f"DP{self.data}"])

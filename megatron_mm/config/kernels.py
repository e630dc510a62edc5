"""Configuration of fused kernels and of CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.config.checks import require


@dataclass(frozen=True)
class KernelConfig:
    """Fused kernels. None uses a kernel wherever it can run; True is an error before the start if it cannot run; False disables it.

    They change results only by rounding. docs/performance.md says what each needs and what it gained where it was measured.
    """

    weight_gradients: bool | None = None
    """Transformer Engine's layers add weight gradients to the gradient buffers within the matrix products that compute them."""
    cross_entropy: bool | None = None
    """Transformer Engine's loss: one kernel that overwrites the logits with their gradient, without a float32 copy."""
    token_permutation: bool | None = None
    """Transformer Engine's kernels that gather tokens for experts and put them back, one kernel for each direction."""
    router: bool | None = None
    """Transformer Engine's kernel that chooses the experts of each token and computes their weights."""
    eva_tower: bool | None = None
    """EVA towers apply rotary positions with Transformer Engine's kernel, and compute their SwiGLU with a compiled one, in rows padded to a
    multiple of 64 numbers if the width is not a multiple of 8."""
    tower_graph: int | None = None
    """Images per replay of CUDA graphs that run the image tower during training; None runs it without graphs. The images of a micro-batch
    are filled up with blank ones to this number, or to a multiple of it if the tower is frozen. It helps for few images
    (docs/performance.md)."""
    router_graph: bool = False
    """During training, the routers of sparse layers run as CUDA graphs, except for their matrix products. Micro-batches may have different
    numbers of tokens."""

    def __post_init__(self) -> None:
        require(self.tower_graph is None or self.tower_graph > 0, f"kernels.tower_graph is {self.tower_graph}, but must be positive")

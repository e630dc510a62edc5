"""Which kernels do the work of several."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelConfig:
    """Fused kernels. None takes one wherever it can run; True is an error, before the start, where it cannot; False does without.

    None of them changes what is computed beyond rounding. docs/performance.md says what each needs and what it gave where it was measured.
    """

    weight_gradients: bool | None = None
    """Transformer Engine's layers add weight gradients to the gradient buffers inside the matrix products that compute them."""
    cross_entropy: bool | None = None
    """Transformer Engine's loss: one kernel that writes the gradient over the logits, and no float32 copy of them."""
    token_permutation: bool | None = None
    """Transformer Engine gathers tokens for experts, and puts them back, by one kernel each."""
    router: bool | None = None
    """Transformer Engine chooses each token's experts and weighs them by one kernel."""
    eva_tower: bool | None = None
    """EVA towers turn queries and keys by Transformer Engine's rotary kernel, and compute their SwiGLU by a compiled one."""

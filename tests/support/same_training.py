"""Training a plain PyTorch reference beside our model, and how far their weights may be apart afterwards.

Adam divides a gradient by its own size, so it turns the rounding of a gradient near zero into an update of a full learning rate: which
elements those are depends on the processor's kernels. With `EPSILON` as large as a typical gradient the update is a smooth function of
the gradient: its slope is at most lr / EPSILON, so that a gradient's rounding of 1e-7 moves a weight by 1e-4 learning rates and a mistake
still shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_mm.config import Experiment, OptimizerConfig

EPSILON = 1e-3
"""Of Adam on both sides. Gradients are clipped to norm 1, about 3e-3 for each of 1e5 elements."""
LOSS_TOLERANCE = 1e-6
"""Relative, fp32. Sums of some 100 losses in another order differ by about 1e-7."""
WEIGHT_TOLERANCE = 1e-3
"""Largest difference of a weight, in units of the sum of the learning rates so far: what Adam can move it by.

Seen with the kernels of SSE4, AVX2 and AVX-512: 1e-4, which is the spacing of float32 at 1 after five steps at 3e-4."""


def with_smooth_adam(experiment: Experiment) -> Experiment:
    """The experiment with `EPSILON`."""
    return replace(experiment, optimizer=replace(experiment.optimizer, epsilon=EPSILON))


def reference_adam(parameters: Sequence[torch.nn.Parameter], optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """torch's own AdamW with our settings: vectors have no weight decay. The learning rate is set by `reference_update`."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon)


def reference_update(adam: torch.optim.AdamW, optimizer: OptimizerConfig, *, lr: float) -> None:
    """Clip the gradients together and step."""
    torch.nn.utils.clip_grad_norm_([p for group in adam.param_groups for p in group["params"]], optimizer.clip_grad_norm)
    for group in adam.param_groups:
        group["lr"] = lr
    adam.step()


def assert_same_weights(found: dict[str, torch.Tensor], reference: torch.nn.Module, *, learning_rates: Sequence[float]) -> None:
    """Every weight within `WEIGHT_TOLERANCE` of the reference's parameter of that name."""
    tolerance = WEIGHT_TOLERANCE * sum(learning_rates)
    for name, tensor in found.items():
        expected = reference.get_parameter(name).detach()
        distance = float((tensor - expected).abs().max())
        assert distance <= tolerance, f"{name} is {distance:.2e} away, but {tolerance:.2e} is allowed"

"""Train a plain PyTorch reference like our model, and bound the difference of their weights afterwards.

Adam divides a gradient by its own size, so it turns the rounding of a gradient near zero into an update of a full learning rate; which
elements are affected depends on the processor's kernels. With `EPSILON` as large as a typical gradient, the update is a smooth function of
the gradient: its slope is at most lr / EPSILON. A gradient's rounding of 1e-7 then moves a weight by only 1e-4 learning rates, and real
errors still show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_mm.config import Experiment, OptimizerConfig

EPSILON = 1e-3
"""Epsilon of Adam in both models. Gradients are clipped to norm 1, about 3e-3 for each of 1e5 elements."""
LOSS_TOLERANCE = 1e-6
"""Relative, fp32. Summing about 100 losses in another order changes the result by about 1e-7."""
WEIGHT_TOLERANCE = 1e-3
"""Largest difference of a weight, in units of the sum of the learning rates so far, which is the most that Adam can move it.

Observed with the kernels of SSE4, AVX2 and AVX-512: 1e-4, which is the spacing of float32 at 1 after five steps at 3e-4."""


def with_smooth_adam(experiment: Experiment) -> Experiment:
    """Return the experiment with Adam's epsilon set to `EPSILON`."""
    return replace(experiment, optimizer=replace(experiment.optimizer, epsilon=EPSILON))


def reference_adam(parameters: Sequence[torch.nn.Parameter], optimizer: OptimizerConfig) -> torch.optim.AdamW:
    """Return torch's own AdamW with our settings: no weight decay for vectors. `reference_update` sets the learning rate."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.epsilon)


def reference_update(adam: torch.optim.AdamW, optimizer: OptimizerConfig, *, lr: float) -> None:
    """Clip all gradients by their joint norm and step."""
    torch.nn.utils.clip_grad_norm_([p for group in adam.param_groups for p in group["params"]], optimizer.clip_grad_norm)
    for group in adam.param_groups:
        group["lr"] = lr
    adam.step()


def assert_same_weights(found: dict[str, torch.Tensor], reference: torch.nn.Module, *, learning_rates: Sequence[float]) -> None:
    """Check that every weight is within `WEIGHT_TOLERANCE` of the reference's parameter of that name."""
    tolerance = WEIGHT_TOLERANCE * sum(learning_rates)
    for name, tensor in found.items():
        expected = reference.get_parameter(name).detach()
        distance = float((tensor - expected).abs().max())
        assert distance <= tolerance, f"{name} is {distance:.2e} away, but {tolerance:.2e} is allowed"

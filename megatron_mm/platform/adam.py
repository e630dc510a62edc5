"""AdamW for machines without Transformer Engine and apex: torch's fused kernel behind apex's interface.

megatron-core uses FusedAdam from Transformer Engine, or else from apex, or else torch's AdamW. The first two have one step counter per
parameter group; torch's has one per parameter, in a tensor. megatron-core's distributed optimizer restores that tensor as ONE object shared
by all parameters. After a resume, each step therefore counts once for every parameter, and the run silently diverges. Also, a checkpoint
written with one kind of optimizer cannot be read with the other. This class counts as the first two do, which solves both problems:
checkpoints are the same everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch


class FusedAdamW(torch.optim.Optimizer):
    """Adam with bias correction and decoupled weight decay (arXiv 1711.05101); steps are counted in the parameter groups."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode, "weight decay is decoupled here"
        assert not capturable, "not written for CUDA graphs"  # an option since megatron-core 0.17
        # Bias correction is always on; it is named because Transformer Engine's Adam looks it up in a checkpoint's groups.
        super().__init__(params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            step = torch.full([], float(group["step"]), device=params[0].device)  # read by the kernel, never written
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def complete_groups(optimizer: Any) -> None:
    """Add the fields that this optimizer reads to parameter groups that lack them, because another kind of Adam wrote them to a
    checkpoint."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for name, value in part.optimizer.defaults.items():
                group.setdefault(name, value)


def install() -> None:
    """Give megatron-core `FusedAdamW` if it found no FusedAdam, or found one whose kernels need a GPU when there is none. Otherwise, or
    when called again, do nothing.

    What upstream lacks: see above. `tests/platform/test_adam.py` fails when upstream no longer needs it.
    """
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    needs_gpu = optimizer.Adam.__module__.split(".")[0] in ("transformer_engine", "apex")
    if not optimizer.USING_PYTORCH_OPTIMIZER and (torch.cuda.is_available() or not needs_gpu):
        return
    optimizer.Adam = distributed.Adam = FusedAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True

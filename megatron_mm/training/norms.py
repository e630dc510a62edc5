"""Norms of gradients, parameters and updates by part of the model: tower, connector, decoder, experts.

Each process adds up the squares of its elements, and over all processes each element counts once: replicas under tensor parallelism and
tied embeddings are left out, as in the norm of the whole gradient (`training.optimizer.squared_grad_norm`). So the sums are the same in
every layout; they are part of the step's single message. Nothing here waits for the device. Many small parameters are processed at a time,
because on a GPU the number of kernels determines the cost.

The update of a step is not stored: it is computed from the parameters after the step and Adam's moments. With parameters p and direction u,

    p_after = p_before - lr * decay * p_before - lr * u    so    p_before = (p_after + lr * u) / (1 - lr * decay)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_mm.training.spread_encoder import wrapped_modules

NORMS = ("grad_norms", "param_norms", "updates")
"""The measured quantities, in the order of the sums."""


@dataclass(frozen=True)
class _Counted:
    """A parameter of the optimizer (or its shard) that this process counts."""

    parameter: torch.Tensor
    part: int
    share: float
    """1, or less if several processes have the same parameter and each counts a share."""
    optimizer: Any
    """torch optimizer, or an object with the same interface."""
    group: dict[str, Any]


_TOGETHER = 1 << 26
"""Maximum number of elements measured at a time, unless a single parameter has more: updates need memory for several copies of them."""


class PartNorms:
    """Measures the parts of this process's model."""

    def __init__(
        self, model: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, parts: list[str], part_of: Callable[[str], str]
    ):
        """
        Args:
            parts: names of all parts, the same on every process.
            part_of: maps a parameter's name to its part.
        """
        self.parts = parts
        names = _names(model, optimizer)
        counted = [
            _Counted(parameter, parts.index(part_of(names[id(parameter)])), share, inner, group)
            for part, share in _parts_of(optimizer)
            for inner in [part.optimizer]
            if inner is not None
            for group in inner.param_groups
            for parameter in group["params"]
            if parameter.numel()
            and param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter, getattr(part, "tp_group", None))
        ]
        self._together = list(_measured_together(counted))

    @torch.no_grad()
    def squares(self, *, lr: float | None, device: torch.device) -> torch.Tensor:
        """Return this process's part of the squared norms: [len(NORMS) * parts] float64 on its device.

        Called when the step's gradients are ready, before the update.

        Args:
            lr: learning rate of the previous step; None if there was none, then updates are 0.
        """
        sums = torch.zeros(len(NORMS), len(self.parts), dtype=torch.float64, device=device)
        for some in self._together:
            parameters = [one.parameter for one in some]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            for row, tensors in enumerate((gradients, parameters, [] if lr is None else _updates(some, lr=lr))):
                if tensors:
                    norms = torch.stack(torch._foreach_norm([tensor.float() for tensor in tensors]))
                    sums[row, some[0].part] += norms.double().square().sum() * some[0].share
        return sums.flatten()

    def from_sums(self, sums: tuple[float, ...]) -> dict[str, dict[str, float]]:
        """Return norms by part (of gradients, parameters, and updates relative to parameters) from the sum of all processes' `squares`."""
        count = len(self.parts)
        grads, params, updates = (
            {name: value**0.5 for name, value in zip(self.parts, sums[row * count : (row + 1) * count], strict=True)}
            for row in range(len(NORMS))
        )
        trainable = [name for name in self.parts if params[name] > 0]
        return {
            "grad_norms": {name: grads[name] for name in trainable},
            "param_norms": {name: params[name] for name in trainable},
            "update_ratios": {name: updates[name] / params[name] for name in trainable if updates[name] > 0},
        }


def _measured_together(counted: list[_Counted]) -> Iterator[list[_Counted]]:
    """Group neighbours of the same part, share and parameter group into lists of at most `_TOGETHER` elements."""
    for _, alike in itertools.groupby(counted, key=lambda one: (one.part, one.share, id(one.group))):
        some: list[_Counted] = []
        for one in alike:
            if some and sum(other.parameter.numel() for other in some) + one.parameter.numel() > _TOGETHER:
                yield some
                some = []
            some.append(one)
        yield some


def _parts_of(optimizer: MegatronOptimizer) -> list[tuple[Any, float]]:
    """Return megatron-core's optimizers, each with the share that a process counts of its parameters (`squared_grad_norm`)."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [(part, part.get_grad_stats_parallel_group().size() / dist.get_world_size()) for part in parts]


def _names(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[int, str]:
    """Map the `id` of each tensor that the optimizer holds (the parameter, its fp32 copy, or a shard of that) to the parameter's name."""
    names: dict[int, str] = {}
    of_model = {parameter: name for chunk in wrapped_modules(model) for name, parameter in chunk.module.named_parameters()}
    for parameter, name in of_model.items():
        names[id(parameter)] = name
        main = getattr(parameter, "main_param", None)
        if main is not None:
            names[id(main)] = name
    for part, _ in _parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            for parameter, (group, place) in part.model_param_group_index_map.items():
                names[id(part.optimizer.param_groups[group]["params"][place])] = of_model[parameter]
    return names


def _updates(some: list[_Counted], *, lr: float) -> list[torch.Tensor]:
    """Return the last updates by Adam of the parameters of one group, with the opposite sign; parameters without an update are left out."""
    group = some[0].group
    step = group.get("step", 0)
    states = [(one.parameter, state) for one in some if "exp_avg" in (state := one.optimizer.state.get(one.parameter, {}))]
    if not step or not states:
        return []
    beta1, beta2 = group["betas"]
    directions = list(torch._foreach_div([state["exp_avg"].float() for _, state in states], 1.0 - beta1**step))
    spreads = list(torch._foreach_div([state["exp_avg_sq"].float() for _, state in states], 1.0 - beta2**step))
    torch._foreach_sqrt_(spreads)
    torch._foreach_add_(spreads, group["eps"])
    torch._foreach_div_(directions, spreads)
    after = [parameter.float() for parameter, _ in states]
    before = list(torch._foreach_add(after, directions, alpha=lr))
    torch._foreach_div_(before, 1.0 - lr * group["weight_decay"])
    torch._foreach_sub_(before, after)
    return before

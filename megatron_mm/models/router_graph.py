"""Runs a router's operations on logits, all but its matrix product, as replays of CUDA graphs (`kernels.router_graph`).

They are some sixty small kernels in each sparse layer and micro-batch: the choice of experts, their weights, losses, and statistics. A
graph has a fixed number of rows, that of the largest micro-batch. The logits of a smaller one are filled up with rows of padding,
which are neither routed nor counted. Every operation but the sums of the statistics works on each row by itself, so weights, choices and
gradients are those of the router without a graph. No parameter is inside, so gradients of weights and their reduction are as without it.

The backward pass needs what the forward pass computed. So there is a copy of both passes for each micro-batch that waits for its backward
pass. A micro-batch that finds no free copy, or has more tokens, runs without a graph.

Shape legend: t tokens of this process, n rows of the graph, e experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_mm.models.graph_copy import GraphCopy


@dataclass
class Inputs:
    """What each replay of a copy reads, in memory of its own."""

    logits: torch.Tensor
    """[n, e] float32, a leaf that requires a gradient."""
    real: torch.Tensor
    """[n] bool, False for padding."""
    limit: torch.Tensor
    """[] int64: the limit of choices (`Router.choose`)."""
    gradient: torch.Tensor
    """[n, e] float32, of the weights."""
    loss_scale: torch.Tensor
    """[] float32, the gradient of the losses."""

    @staticmethod
    def empty(*, rows: int, experts: int, device: torch.device) -> Inputs:
        """Inputs of padding only."""
        logits, gradient = (torch.zeros(rows, experts, device=device) for _ in range(2))
        real, limit = torch.zeros(rows, dtype=torch.bool, device=device), torch.zeros((), dtype=torch.int64, device=device)
        return Inputs(logits.requires_grad_(), real, limit, gradient, torch.ones((), device=device))


@dataclass(frozen=True)
class Outputs:
    """What each replay of a copy writes, without a graph of autograd; the next replay of the same pass overwrites it."""

    weights: torch.Tensor
    """[n, e] float32."""
    kept: torch.Tensor
    """[n, e] bool."""
    row: torch.Tensor
    """A row of the routing record."""
    gradient: torch.Tensor
    """[n, e] float32, of the logits."""


@dataclass
class Copy(GraphCopy):
    """A capture of both passes, in use from its forward to its backward pass."""

    inputs: Inputs
    outputs: Outputs
    forward: Callable[[], Any]
    backward: Callable[[], Any]
    filled: int = 0
    """Rows of the inputs that may differ from padding."""

    def fill(self, logits_te: torch.Tensor, real_t: torch.Tensor, *, most_choices: Callable[[int], int] | None) -> None:
        """Set the inputs of the forward pass."""
        tokens = len(logits_te)
        with torch.no_grad():
            self.inputs.logits[:tokens].copy_(logits_te)
            self.inputs.real[:tokens].copy_(real_t)
            if tokens < self.filled:
                self.inputs.logits[tokens : self.filled].zero_()  # a number that is not finite would spread, even from a row of padding
                self.inputs.real[tokens : self.filled].zero_()
            if tokens != self.filled and most_choices is not None:
                self.inputs.limit.fill_(most_choices(tokens))
        self.filled = tokens


class GraphedRouting:
    """Logits [t, e] -> weights and choices, as `models.moe.Graphed` says."""

    def __init__(self, copies: Sequence[Copy], *, token_weight: torch.Tensor, most_choices: Callable[[int], int] | None) -> None:
        """
        Args:
            copies: at least one.
            token_weight: [] float32, read by all of them.
            most_choices: `Router.most_choices`; None without a limit.
        """
        self.copies, self.most_choices = copies, most_choices
        self.replays = 0
        """Forward passes that ran as replays."""
        self._token_weight = token_weight
        self._set_to: torch.Tensor | float | None = None

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch for which the graphs have room."""
        return len(self.copies[0].inputs.logits)

    def __call__(
        self, logits_te: torch.Tensor, real_t: torch.Tensor, *, token_weight: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        copy = next((copy for copy in self.copies if copy.is_free), None)
        if copy is None or len(logits_te) > self.rows or not logits_te.requires_grad:
            return None
        if token_weight is not self._set_to:  # once per step
            self._set_to = token_weight
            self._token_weight.copy_(torch.as_tensor(token_weight))
        self.replays += 1
        copy.fill(logits_te, real_t, most_choices=self.most_choices)
        weights_te, kept_te = _Replayed.apply(logits_te, copy)
        return weights_te, kept_te, copy.outputs.row


class _Replayed(torch.autograd.Function):
    """Replays a copy's forward pass, and in the backward pass its backward pass."""

    @staticmethod
    def forward(ctx: Any, logits_te: torch.Tensor, copy: Copy) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.user, ctx.copy = copy.begin(), copy
        copy.forward()
        weights_te, kept_te = (output[: len(logits_te)].detach() for output in (copy.outputs.weights, copy.outputs.kept))
        ctx.mark_non_differentiable(kept_te)
        return weights_te, kept_te

    @staticmethod
    def backward(ctx: Any, gradient_te: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
        copy: Copy = ctx.copy
        copy.check(ctx.user)
        # Rows after these keep the gradients of another micro-batch. No other row's gradient depends on theirs.
        copy.inputs.gradient[: len(gradient_te)].copy_(gradient_te)
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is not None:
            copy.inputs.loss_scale.copy_(scale.view(()))
        copy.backward()
        copy.end()
        return copy.outputs.gradient[: len(gradient_te)], None

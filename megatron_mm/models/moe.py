"""Mixture-of-experts feed-forward layers: megatron-core's dispatch and experts, with our own router.

The router does not route padding tokens, and its losses are computed over the whole global batch: they depend only on its real tokens, and
not on which of them share a micro-batch or a process, on their order, or on padding. For one layer and a global batch of N real tokens,
with E experts, k choices per token, p_te the softmax over all experts and s_e the fraction of all choices that fell on expert e (before any
was dropped; these shares add up to 1),

    load balance = E / N * sum over tokens and experts of s_e * p_te     GShard, Switch; 1 if all experts get equal shares
    z            = 1 / N * sum over tokens of logsumexp(logits)^2        ST-MoE, equation (5)

The objective is the language model's loss per supervised token, plus coefficient * loss for both losses and every sparse layer. All
gradients are divided once, at the end of the step, by the number C of supervised tokens; therefore a token's contribution here has the
weight C / N (`Router.token_weight`).

Shares have no gradient, but they weight the gradient of p, and those of this batch are known only after the forward pass of its last
micro-batch. So the gradient uses the shares of the previous step (`Router.shares`, saved in checkpoints; equal at first, which has no
effect). Using each micro-batch's own shares, as is common, would not need to store them. But the result would depend on how documents are
packed into micro-batches, every micro-batch would be balanced separately, and tensor parallelism would need a reduction for each of them.

Shape legend: t tokens of this process, e experts, h width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig


class RoutingRecord:
    """Sums over the tokens that a router has processed on this process since the last `take`, in float64."""

    FIELDS = ("tokens", "z", "entropy")
    """Number of real tokens; sum of their z-losses; sum of the entropies of their probabilities, in nats."""
    TABLES = ("chosen", "kept", "mass")
    """For each expert: tokens that chose it; how many of them were kept; sum of the probabilities that tokens assigned to it."""

    def __init__(self, num_experts: int) -> None:
        self.size = len(self.FIELDS) + len(self.TABLES) * num_experts
        self.sums: torch.Tensor | None = None

    @staticmethod
    def row(*values: torch.Tensor) -> torch.Tensor:
        """Return values to add, [size] float64: first the fields, then the tables."""
        return torch.cat([value.detach().double().reshape(-1) for value in values])

    def add(self, row: torch.Tensor) -> None:
        """Add a `row`, whose memory may be overwritten afterwards."""
        self.sums = row.clone() if self.sums is None else self.sums + row

    def take(self, device: torch.device) -> torch.Tensor:
        """Return the sums, [fields + tables * experts] float64, and reset them."""
        sums, self.sums = self.sums, None
        return torch.zeros(self.size, dtype=torch.float64, device=device) if sums is None else sums


def within_load(
    weights_te: torch.Tensor, chosen_te: torch.Tensor, *, groups: int, most: int, limit: torch.Tensor | None = None
) -> torch.Tensor:
    """Keep at most `most` choices, those with the largest weights, for each of `groups` equal runs of experts; return them as [t, e] bool.

    Worked example: 4 experts on 2 processes, and at most 1 choice each. One token chooses experts 0 and 1 (weights 0.7, 0.3), the other 1
    and 2 (0.6, 0.4). The first process has three choices, of which 0.7 is kept; the second process has one, which is kept.

    Args:
        limit: [] int64, keep only so many of the `most` choices, a number that the host does not read; None for all.
    """
    rows, experts = chosen_te.shape
    by_group = torch.where(chosen_te, weights_te.detach(), -1.0).view(rows, groups, experts // groups).transpose(0, 1).flatten(1)
    if most >= by_group.shape[1]:
        return chosen_te
    largest = by_group.topk(most, dim=1, sorted=limit is not None).indices
    kept = torch.zeros_like(by_group, dtype=torch.bool)
    if limit is None:
        kept.scatter_(1, largest, True)
    else:
        kept.scatter_(1, largest, (torch.arange(most, device=largest.device) < limit).expand_as(largest))
    return kept.view(groups, rows, experts // groups).transpose(0, 1).flatten(1) & chosen_te


class Graphed(Protocol):
    """What runs a router's operations on logits as replays of a graph (`models.router_graph`)."""

    def __call__(
        self, logits_te: torch.Tensor, real_t: torch.Tensor, *, token_weight: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return weights and kept choices, [t, e] each, and a row of the record; None if the router must run without a graph.

        Args:
            real_t: [t] bool, False for padding.
            token_weight: `Router.token_weight`.
        """
        ...


class Router(TopKRouter):
    """Top-k softmax routing in float32; padding is not routed."""

    max_load: float | None = None
    """`ParallelConfig.max_expert_load`. Each process applies the limit to its own tokens, without communication; then no process receives
    more than this multiple of an equal share of all choices."""

    graphed: Graphed | None = None
    """Set if the router runs as a CUDA graph in training (`kernels.router_graph`)."""

    padding: torch.Tensor | None = None
    """Padding mask for `forward` when it is called without one (`models.expert_overlap`)."""

    shares: torch.Tensor
    """[e] float32: the share of all choices that fell on each expert in the previous step."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, **options: Any) -> None:
        super().__init__(config, pg_collection, **options)
        num_experts = config.num_moe_experts
        assert num_experts is not None
        self.record = RoutingRecord(num_experts)
        self.register_buffer("shares", torch.full((num_experts,), 1.0 / num_experts, dtype=torch.float32))
        self.shares.init_value = 1.0 / num_experts  # type: ignore[attr-defined]  # for writing a checkpoint without allocating the model
        self.token_weight: torch.Tensor | float = 1.0
        """Ratio of supervised to real tokens in the global batch; the same for all of its micro-batches."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits [..., e] in float32."""
        return F.linear(input.float(), self.weight.float())

    def forward(self, input: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            input: [t, 1, h].
            padding_mask: [t, 1] bool, True for padding; None uses `padding` instead, and if that is None, too, there is no padding.

        Returns:
            (weights of the chosen experts, which experts are chosen), both [t, e].
        """
        logits_te = self.gating(input).flatten(0, 1)
        padding_mask = self.padding if padding_mask is None else padding_mask
        real_t = torch.ones_like(logits_te[:, 0], dtype=torch.bool) if padding_mask is None else ~padding_mask.flatten()
        # Under recompute the first pass has no gradients: only the second adds losses and records.
        if not (self.training and torch.is_grad_enabled()):
            weights_te, _, kept_te = self.choose(logits_te, real_t)
            return weights_te, kept_te
        found = None if self.graphed is None else self.graphed(logits_te, real_t, token_weight=self.token_weight)
        if found is not None:
            weights_te, kept_te, row = found
        else:
            weights_te, chosen_te, kept_te = self.choose(logits_te, real_t)
            loss, row = self.losses(logits_te, real_t, chosen_te, kept_te, token_weight=self.token_weight)
            weights_te = MoEAuxLossAutoScaler.apply(weights_te, loss)
        self.record.add(row)
        return weights_te, kept_te

    def choose(
        self, logits_te: torch.Tensor, real_t: torch.Tensor, *, limit: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose the experts of each token.

        Args:
            real_t: [t] bool, False for padding.
            limit: [] int64, at most `most_choices` of all rows: the limit of fewer rows, if the others are padding.

        Returns:
            (weights of the kept choices, all choices, kept choices), [t, e] each.
        """
        weights_te, chosen_te = topk_routing_with_score_function(
            logits_te, self.topk, use_pre_softmax=False, score_function="softmax", fused=self.config.moe_router_fusion
        )
        weights_te, chosen_te = weights_te * real_t[:, None], chosen_te & real_t[:, None]
        kept_te = chosen_te
        if self.config.moe_expert_capacity_factor is not None:
            weights_te, kept_te = apply_router_token_dropping(
                weights_te, chosen_te, router_topk=self.topk, capacity_factor=self.config.moe_expert_capacity_factor, drop_policy="probs"
            )
        if self.max_load is not None:
            groups, most = self.config.expert_model_parallel_size, self.most_choices(len(logits_te))
            kept_te = within_load(weights_te, kept_te, groups=groups, most=most, limit=limit)
            weights_te = weights_te * kept_te
        return weights_te, chosen_te, kept_te

    def most_choices(self, tokens: int) -> int:
        """Return how many choices of so many tokens, padding included, the experts of one process may get under `max_load`."""
        assert self.max_load is not None
        return math.ceil(self.max_load * self.topk * tokens / self.config.expert_model_parallel_size)

    def losses(
        self,
        logits_te: torch.Tensor,
        real_t: torch.Tensor,
        chosen_te: torch.Tensor,
        kept_te: torch.Tensor,
        *,
        token_weight: torch.Tensor | float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the router's losses times their coefficients, [], and a row of the record."""
        log_probs_te, counted_t = F.log_softmax(logits_te, dim=-1), real_t.float()
        probs_te = log_probs_te.exp()
        mass_e = counted_t @ probs_te
        z = counted_t @ logits_te.logsumexp(dim=-1).square()
        entropy = -(counted_t @ (probs_te * log_probs_te).detach().sum(dim=-1))
        row = self.record.row(real_t.sum(), z, entropy, chosen_te.sum(dim=0), kept_te.sum(dim=0), mass_e)
        balance = self.shares.numel() * (self.shares @ mass_e)
        return token_weight * (self.config.moe_aux_loss_coeff * balance + self.config.moe_z_loss_coeff * z), row


def routers(chunks: list[torch.nn.Module]) -> Iterator[tuple[int, Router]]:
    """Yield the routers of this process's chunks, each with its layer's index in the whole model, from 0."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                assert isinstance(module.router, Router) and module.layer_number is not None
                yield module.layer_number - 1, module.router


def take_records(chunks: list[torch.nn.Module], *, layers: tuple[int, ...], num_experts: int, device: torch.device) -> torch.Tensor:
    """Return the records of this process's routers since the last call, [sparse layers, fields + tables * experts], to sum over processes.

    Args:
        layers: indices of the sparse layers in the whole model, from 0.
    """
    total = torch.zeros(len(layers), RoutingRecord(num_experts).size, dtype=torch.float64, device=device)
    for layer, router in routers(chunks):
        total[layers.index(layer)] += router.record.take(device)
    return total

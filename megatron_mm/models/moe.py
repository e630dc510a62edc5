"""Mixture-of-experts feed-forward layers: megatron-core's dispatch and experts, with a router of our own.

The router routes tokens that are not padding, and its losses are sums over real tokens: they do not depend on how tokens are laid
out over processes, nor on padding. For a layer and a micro-batch of n real tokens, of which c count in the language-model loss, with E
experts and k choices a token,

    load balance = E / (k n^2) * sum over experts of (tokens that chose it) * (sum of its probabilities)     GShard, Switch; 1 at best
    z            = 1 / n * sum over tokens of logsumexp(logits)^2                                            ST-MoE, equation (5)

The objective is the mean over the global batch's counted tokens: each micro-batch's losses weigh c. So, as everything else, they are summed
over micro-batches and processes and divided once.

Shape legend: t tokens of this process, e experts, h width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
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

PADDING, TOKEN, COUNTED_TOKEN = 0, 1, 2
"""Kinds of tokens, as the router is told: padding; real; real, and its label counts in the loss."""


class RoutingRecord:
    """Sums over what a router saw since `take`: on this process, in float64."""

    FIELDS = ("tokens", "counted", "load_balance", "z", "entropy", "dropped")
    """Real tokens; counted tokens; the two losses, weighted with counted tokens; entropies of tokens' probabilities, nats; choices
    that an expert had no room for."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.sums: torch.Tensor | None = None

    def add(self, values: torch.Tensor, routed: torch.Tensor) -> None:
        """Add the fields and the tokens that each expert got."""
        row = torch.cat([values.detach().double(), routed.detach().double()])
        self.sums = row if self.sums is None else self.sums + row

    def take(self, device: torch.device) -> torch.Tensor:
        """[fields + experts] float64, and begin anew."""
        sums, self.sums = self.sums, None
        return torch.zeros(len(self.FIELDS) + self.num_experts, dtype=torch.float64, device=device) if sums is None else sums


class Router(TopKRouter):
    """Top-k softmax routing in float32; padding goes nowhere."""

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config, pg_collection)
        self.record = RoutingRecord(config.num_moe_experts)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [..., e] in float32."""
        return F.linear(input.float(), self.weight.float())

    def forward(self, input: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens.

        Args:
            input: [t, 1, h].
            padding_mask: kinds of this process's tokens [t, 1]; None where all are real and counted.

        Returns:
            (probabilities of the chosen experts, which experts are chosen), both [t, e].
        """
        logits_te = self.gating(input).flatten(0, 1)
        kinds = torch.full(logits_te.shape[:1], COUNTED_TOKEN, device=logits_te.device) if padding_mask is None else padding_mask.flatten()
        real = kinds > PADDING
        probs_te, chosen_te = topk_routing_with_score_function(logits_te, self.topk, use_pre_softmax=False, score_function="softmax")
        probs_te, chosen_te = probs_te * real[:, None], chosen_te & real[:, None]
        kept_te = chosen_te
        if self.config.moe_expert_capacity_factor is not None:
            probs_te, kept_te = apply_router_token_dropping(
                probs_te, chosen_te, router_topk=self.topk, capacity_factor=self.config.moe_expert_capacity_factor, drop_policy="probs"
            )
        # Under recompute the first pass has no gradients: losses and records belong to the second alone.
        if self.training and torch.is_grad_enabled():
            probs_te = self._with_losses(probs_te, logits_te, chosen_te, kept_te, kinds)
        return probs_te, kept_te

    def _with_losses(
        self, probs_te: torch.Tensor, logits_te: torch.Tensor, chosen_te: torch.Tensor, kept_te: torch.Tensor, kinds: torch.Tensor
    ) -> torch.Tensor:
        """The same probabilities; in the backward pass the losses' gradients join theirs."""
        real = (kinds > PADDING).float()
        log_probs_te = F.log_softmax(logits_te, dim=-1)
        everywhere = torch.cat([chosen_te.sum(dim=0).float(), real.sum()[None], (kinds == COUNTED_TOKEN).sum()[None].float()])
        if self.tp_cp_group.size() > 1:  # the micro-batch's tokens are spread over this group
            dist.all_reduce(everywhere, group=self.tp_cp_group)
        chosen_e, (n, counted) = everywhere[:-2], everywhere[-2:].clamp(min=1).unbind()
        mass_e = (log_probs_te.exp() * real[:, None]).sum(dim=0)
        load_balance = counted * self.num_experts / (self.topk * n * n) * (chosen_e * mass_e).sum()
        z = counted / n * (logits_te.logsumexp(dim=-1).square() * real).sum()
        loss = self.config.moe_aux_loss_coeff * load_balance + self.config.moe_z_loss_coeff * z
        entropy = -(log_probs_te.exp() * log_probs_te).sum(dim=-1) @ real
        dropped = (chosen_te.sum() - kept_te.sum()).float()
        values = torch.stack([real.sum(), (kinds == COUNTED_TOKEN).sum().float(), load_balance, z, entropy, dropped])
        self.record.add(values, kept_te.sum(dim=0))
        return MoEAuxLossAutoScaler.apply(probs_te, loss)


class ExpertLayer(MoELayer):
    """megatron-core's layer with our router, to which it hands the kinds of tokens as they are."""

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: None = None, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """[t, 1, h] -> [t, 1, h]; `padding_mask` has the kinds [1, t] of this process's tokens. Padding comes out as zeros."""
        kinds = None if padding_mask is None else padding_mask.transpose(0, 1)
        probs, routing_map = self.router(hidden_states, kinds)
        hidden_states, probs = self.preprocess(hidden_states, probs, routing_map)
        dispatched, probs = self.dispatch(hidden_states, probs)
        output, _ = self.routed_experts_compute(dispatched, probs)
        return self.postprocess(self.combine(output), None), None


def take_records(chunks: list[torch.nn.Module], *, layers: tuple[int, ...], num_experts: int, device: torch.device) -> torch.Tensor:
    """What the routers of all processes recorded since the last call: [sparse layers, fields + experts], the same everywhere.

    Args:
        layers: indices of the sparse layers in the whole model, from 0.
    """
    total = torch.zeros(len(layers), len(RoutingRecord.FIELDS) + num_experts, dtype=torch.float64, device=device)
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ExpertLayer):
                total[layers.index(module.layer_number - 1)] += module.router.record.take(device)
    dist.all_reduce(total)
    return total

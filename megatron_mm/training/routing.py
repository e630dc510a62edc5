"""Statistics of the routers of sparse layers over the global batch of a step, and the expert shares that routers need for the next step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import DecoderConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.models.moe import RoutingRecord, routers, take_records
from megatron_mm.platform.device import send


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of each sparse layer, in the order of the layers; the same on every process and in every layout."""

    layers: tuple[int, ...]
    """Indices of the sparse layers, from 0."""
    load_balance: np.ndarray
    """[layers] load-balance loss before its coefficient; 1 if experts get equal shares."""
    z: np.ndarray
    """[layers] z-loss before its coefficient."""
    entropy: np.ndarray
    """[layers] mean entropy of a token's probabilities, in nats; log(experts) if the router has no preference."""
    chosen_per_expert: np.ndarray
    """[layers, experts] tokens that chose each expert."""
    tokens_per_expert: np.ndarray
    """[layers, experts] tokens that each expert processed: all that chose it, up to its capacity."""

    @property
    def dropped(self) -> np.ndarray:
        """[layers] choices dropped for lack of capacity."""
        return (self.chosen_per_expert - self.tokens_per_expert).sum(axis=1)

    @property
    def imbalance(self) -> np.ndarray:
        """[layers] ratio of the busiest expert's tokens to the mean."""
        mean = self.tokens_per_expert.mean(axis=1)
        return np.divide(self.tokens_per_expert.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)

    def summary(self) -> dict[str, float]:
        """Return the logged values of a step: means over layers, the worst imbalance of any layer, and the total of dropped choices."""
        return {
            "load_balance_loss": float(self.load_balance.mean()),
            "z_loss": float(self.z.mean()),
            "load_imbalance": float(self.imbalance.mean()),
            "worst_load_imbalance": float(self.imbalance.max()),
            "router_entropy": float(self.entropy.mean()),
            "dropped_tokens": float(self.dropped.sum()),
        }


def weigh_tokens(
    decoder: DecoderConfig, model: list[DistributedDataParallel], micro_batches: list[PackedBatch], *, device: torch.device
) -> None:
    """Before a step, set the weight of a real token in all routers. Called by all processes together; does nothing for a dense model."""
    if decoder.moe is None:
        return
    counted = sum(float(batch.loss_mask.sum()) for batch in micro_batches)
    real = sum(float(batch.is_token.sum()) for batch in micro_batches)
    totals = send(torch.tensor([counted, real], dtype=torch.float64), device)
    dist.all_reduce(totals)  # the processes of one data-parallel copy count the same tokens, which does not change the ratio
    weight = (totals[0] / totals[1].clamp(min=1)).float()
    for _, router in routers(model):
        router.token_weight = weight


def own_records(decoder: DecoderConfig, model: list[DistributedDataParallel], *, device: torch.device) -> torch.Tensor:
    """Return the routing records of this process after a step's passes, [sparse layers, values] float64; empty for a dense model."""
    if decoder.moe is None:
        return torch.zeros(0, 0, dtype=torch.float64, device=device)
    return take_records(model, layers=decoder.sparse_layers, num_experts=decoder.moe.num_experts, device=device)


def routing_stats(decoder: DecoderConfig, model: list[DistributedDataParallel], sums: np.ndarray) -> RoutingStats | None:
    """Return the statistics of all routers, and set the routers' shares for the next step. None for a dense model.

    Args:
        sums: [sparse layers, values], `own_records` summed over all processes.
    """
    if decoder.moe is None:
        return None
    layers, experts = decoder.sparse_layers, decoder.moe.num_experts
    fields = dict(zip(RoutingRecord.FIELDS, sums.T, strict=False))
    tables = dict(zip(RoutingRecord.TABLES, sums[:, len(fields) :].reshape(len(layers), -1, experts).swapaxes(0, 1), strict=True))
    tokens = np.maximum(fields["tokens"], 1)
    choices = np.maximum(tables["chosen"].sum(axis=1, keepdims=True), 1)
    shares = tables["chosen"] / choices
    for layer, router in routers(model):
        router.shares.copy_(torch.from_numpy(shares[layers.index(layer)]))
    return RoutingStats(
        layers=layers,
        load_balance=experts * (shares * tables["mass"]).sum(axis=1) / tokens,
        z=fields["z"] / tokens,
        entropy=fields["entropy"] / tokens,
        chosen_per_expert=tables["chosen"],
        tokens_per_expert=tables["kept"],
    )


def draw_expert_load(tokens_per_expert: np.ndarray, layers: tuple[int, ...], out: Path, *, title: str) -> Path:
    """Draw a heat map: each expert's tokens relative to an equal share, layer by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    share = tokens_per_expert / np.maximum(tokens_per_expert.mean(axis=1, keepdims=True), 1)
    figure, axes = pyplot.subplots(figsize=(max(4.0, 0.14 * share.shape[1] + 2), max(2.5, 0.25 * len(layers) + 1.5)))
    image = axes.imshow(share, aspect="auto", cmap="coolwarm", vmin=0.0, vmax=2.0, interpolation="nearest")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set(xlabel="expert", ylabel="layer", title=title)
    figure.colorbar(image, label="tokens / equal share")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out

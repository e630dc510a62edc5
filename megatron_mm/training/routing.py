"""What the routers of sparse layers did in a step, over the whole global batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config import DecoderConfig
from megatron_mm.models.moe import RoutingRecord, take_records


@dataclass(frozen=True)
class RoutingStats:
    """Of each sparse layer, in the order of the layers; the same on every process and in every layout."""

    layers: tuple[int, ...]
    """Indices of the sparse layers, from 0."""
    load_balance: np.ndarray
    """[layers] load-balance loss before its coefficient; 1 where experts get equal shares."""
    z: np.ndarray
    """[layers] z-loss before its coefficient."""
    entropy: np.ndarray
    """[layers] mean entropy of a token's probabilities, nats; log(experts) where the router does not care."""
    dropped: np.ndarray
    """[layers] choices that an expert had no room for."""
    tokens_per_expert: np.ndarray
    """[layers, experts] tokens that each expert worked on."""

    @property
    def imbalance(self) -> np.ndarray:
        """[layers] tokens of the busiest expert over the mean."""
        mean = self.tokens_per_expert.mean(axis=1)
        return np.divide(self.tokens_per_expert.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)

    def summary(self) -> dict[str, float]:
        """What is logged of a step: means over layers, and the busiest expert of all."""
        return {
            "load_balance_loss": float(self.load_balance.mean()),
            "z_loss": float(self.z.mean()),
            "load_imbalance": float(self.imbalance.mean()),
            "worst_load_imbalance": float(self.imbalance.max()),
            "router_entropy": float(self.entropy.mean()),
            "dropped_tokens": float(self.dropped.sum()),
        }


def collect(decoder: DecoderConfig, model: list[DistributedDataParallel], *, device: torch.device) -> RoutingStats | None:
    """Add up what all routers recorded since the last call; None for a dense model. Called by all processes together."""
    if decoder.moe is None:
        return None
    layers = decoder.sparse_layers
    sums = take_records(model, layers=layers, num_experts=decoder.moe.num_experts, device=device).cpu().numpy()  # type: ignore[arg-type]
    field = {name: sums[:, column] for column, name in enumerate(RoutingRecord.FIELDS)}
    tokens, counted = np.maximum(field["tokens"], 1), np.maximum(field["counted"], 1)
    return RoutingStats(
        layers=layers,
        load_balance=field["load_balance"] / counted,
        z=field["z"] / counted,
        entropy=field["entropy"] / tokens,
        dropped=field["dropped"],
        tokens_per_expert=sums[:, len(RoutingRecord.FIELDS) :],
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

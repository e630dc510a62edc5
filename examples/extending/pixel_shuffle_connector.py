"""A connector that is not in the package: squares of patches become one token by an MLP, as in InternVL.

megatron-mm train examples/extending/pixel_shuffle_connector.py:debug_pixel_shuffle --run-dir runs/shuffle --data.path data/demo
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config import ConnectorConfig, Experiment, VisionConfig
from megatron_mm.config.checks import require
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import get_recipe
from megatron_mm.models.connectors import register_connector
from megatron_mm.models.connectors.base import Connector
from megatron_mm.models.connectors.pooling import to_grid
from megatron_mm.models.plain import linear, norm


@dataclass(frozen=True)
class PixelShuffleConfig(ConnectorConfig):
    """What a connector has beside `ConnectorConfig`'s fields."""

    merge: int = 2
    """Patches along the side of the square that becomes one token."""


class PixelShuffle(nn.Module):
    """Features [n, p, v] -> tokens [n, k, h]."""

    def __init__(self, config: ConnectorConfig, vision: VisionConfig, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(config, PixelShuffleConfig)
        side, tokens = vision.grid_size, (vision.grid_size // config.merge) ** 2
        require(
            tokens == config.num_tokens,
            f"{side}x{side} patches and merge {config.merge} make {tokens} tokens, but connector.num_tokens is {config.num_tokens}",
        )
        self.merge = config.merge
        width = vision.hidden_size * config.merge**2
        self.norm = norm(width, dtype=dtype)
        self.hidden = linear(width, output_size, dtype=dtype)
        self.output = linear(output_size, output_size, dtype=dtype)

    def forward(self, features_npv: torch.Tensor) -> torch.Tensor:
        grid_nggv = to_grid(features_npv)
        rows = grid_nggv.unflatten(1, (-1, self.merge)).unflatten(3, (-1, self.merge))  # [n, r, merge, r, merge, v]
        squares = rows.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.output(F.gelu(self.hidden(self.norm(squares))))


def forward_flops(config: ConnectorConfig, vision: VisionConfig, output_size: int) -> Mapping[str, float]:
    """Of one image, by the weight that is multiplied with."""
    return {
        "hidden.weight": 2.0 * vision.num_patches * vision.hidden_size * output_size,
        "output.weight": 2.0 * config.num_tokens * output_size**2,
    }


register_connector("pixel_shuffle", Connector(build=PixelShuffle, forward_flops=forward_flops, config=PixelShuffleConfig))


def debug_pixel_shuffle() -> Experiment:
    """`debug_mm1` with 8x8 patches merged to 16 tokens."""
    base = get_recipe("debug_mm1")
    assert isinstance(base.model, MM1Config)
    connector = PixelShuffleConfig(kind="pixel_shuffle", num_tokens=16, merge=2)
    return replace(base, recipe="debug_pixel_shuffle", model=replace(base.model, connector=connector))

"""The average connector: pooling and a linear layer (MM1, section 3.2).

Shape legend: n images, g patches along one side, p = g * g patches, v tower width, k tokens of an image, r tokens along one
side (k = r * r), c inner width, h decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from megatron_mm.config import ConnectorConfig, VisionConfig
from megatron_mm.models.connectors.base import Connector
from megatron_mm.models.connectors.pooling import GridPool, to_grid
from megatron_mm.models.plain import linear


class AverageConnector(nn.Module):
    """Average pooling to a grid of r x r, then a linear layer."""

    def __init__(self, config: ConnectorConfig, vision: VisionConfig, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.pool = GridPool(vision.grid_size, math.isqrt(config.num_tokens))
        self.output = linear(vision.hidden_size, output_size, dtype=dtype)

    def forward(self, features_npv: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, k, h]."""
        return self.output(self.pool(to_grid(features_npv)).flatten(1, 2))


def _flops(config: ConnectorConfig, vision: VisionConfig, output_size: int) -> Mapping[str, float]:
    return {"output.weight": 2.0 * config.num_tokens * vision.hidden_size * output_size}


AVERAGE = Connector(build=AverageConnector, forward_flops=_flops)

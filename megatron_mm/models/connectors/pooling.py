"""Pools the patches of an image to a smaller square grid.

Shape legend: n images, g patches along one side, p = g * g patches, v tower width, k tokens of an image, r tokens along one
side (k = r * r), c inner width, h decoder width.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def to_grid(features_npv: torch.Tensor) -> torch.Tensor:
    """[n, p, v] -> [n, g, g, v]."""
    side = math.isqrt(features_npv.shape[1])
    return features_npv.unflatten(1, (side, side))


class GridPool(nn.Module):
    """Adaptive average pooling [n, g, g, c] -> [n, r, r, c], with the windows of torch.nn.AdaptiveAvgPool2d.

    Written as two products with a constant matrix, rows first: on a GPU torch's own pooling sums its gradient in no fixed order, whereas
    this one gives the same result in every run.
    """

    def __init__(self, input_side: int, output_side: int) -> None:
        super().__init__()
        self.register_buffer("weights", pooling_weights(input_side, output_side), persistent=False)

    def forward(self, grid_nggc: torch.Tensor) -> torch.Tensor:
        pooled = torch.einsum("rg,sf,ngfc->nrsc", self.weights, self.weights, grid_nggc.float())
        return pooled.to(grid_nggc.dtype)


def pooling_weights(input_side: int, output_side: int) -> torch.Tensor:
    """[output_side, input_side] float32: row i averages the columns floor(i * in / out) to ceil((i + 1) * in / out).

    Worked example, 5 -> 2: windows 0..2 and 2..4, rows [1/3 1/3 1/3 0 0] and [0 0 1/3 1/3 1/3].
    """
    rows = []
    for i in range(output_side):
        first, last = i * input_side // output_side, -(-(i + 1) * input_side // output_side)
        rows.append([1 / (last - first) if first <= column < last else 0.0 for column in range(input_side)])
    return torch.tensor(rows)

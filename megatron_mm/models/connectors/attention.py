"""The attention connector: learned queries attend to the patches (MM1, section 3.2).

Shape legend: n images, g patches along one side, p = g * g patches, v tower width, k tokens of an image, r tokens along one
side (k = r * r), c inner width, h decoder width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config import ConnectorConfig, VisionConfig
from megatron_mm.models.connectors.base import ACTIVATIONS, Connector
from megatron_mm.models.plain import linear, norm


class AttentionConnector(nn.Module):
    """k learned queries attend to the patches; then a linear layer.

    The MM1 paper gives no further details. Our choices: one cross-attention with LayerNorms on queries and patches, an output projection,
    and the queries added to its result, so that tokens differ even if their attention is the same.
    """

    def __init__(self, config: ConnectorConfig, vision: VisionConfig, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.queries = nn.Parameter(torch.empty(config.num_tokens, width, dtype=dtype))
        self.queries.init_std = 0.02  # type: ignore[attr-defined]
        self.query_norm = norm(width, dtype=dtype)
        self.feature_norm = norm(vision.hidden_size, dtype=dtype)
        self.query = linear(width, width, bias=False, dtype=dtype)
        self.key = linear(vision.hidden_size, width, bias=False, dtype=dtype)
        self.value = linear(vision.hidden_size, width, bias=False, dtype=dtype)
        self.projection = linear(width, width, dtype=dtype)
        self.output = linear(width, output_size, dtype=dtype)

    def forward(self, features_npv: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, k, h]."""
        features = self.feature_norm(features_npv)
        query_nkc = self.query(self.query_norm(self.queries)).expand(features.shape[0], -1, -1)
        query, key, value = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query_nkc, self.key(features), self.value(features))
        )
        attended_nkc = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.output(self.queries + self.projection(attended_nkc))


def _flops(config: ConnectorConfig, vision: VisionConfig, output_size: int) -> Mapping[str, float]:
    width, inner, patches, tokens = vision.hidden_size, config.hidden_size, vision.num_patches, config.num_tokens
    return {
        "query.weight": 2.0 * tokens * inner * inner,
        "key.weight": 2.0 * patches * width * inner,
        "value.weight": 2.0 * patches * width * inner,
        ACTIVATIONS: 2.0 * 2 * tokens * patches * inner,
        "projection.weight": 2.0 * tokens * inner * inner,
        "output.weight": 2.0 * tokens * inner * output_size,
    }


ATTENTION = Connector(build=AttentionConnector, forward_flops=_flops)

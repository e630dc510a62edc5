"""Connectors: the patch features of an image -> the tokens that it takes in the decoder's sequence (MM1, section 3.2).

MM1 found that the number of tokens and the image size matter more than the kind of connector. All three kinds of its
comparison are here; the C-Abstractor is that of the final models, after Honeybee (arXiv 2312.06742). They are plain torch
modules, whole on every process. Weights are allocated and marked with their initial scale: 1 / sqrt(fan-in) for matrices and
convolutions, so that the features, which leave the tower with a final LayerNorm, keep about unit scale on the way and enter
the decoder at 0.2 to 1.

Features stay channels-last: a 1x1 convolution is then a linear layer, and a norm over channels is the ordinary LayerNorm.

Shape legend: n images, g patches along one side, p = g * g patches, v tower width, k tokens of an image, r tokens along one
side (k = r * r), c inner width, h decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config import ConnectorConfig, VisionConfig
from megatron_mm.models.plain import linear, norm


def build_connector(config: ConnectorConfig, *, vision: VisionConfig, output_size: int, dtype: torch.dtype) -> nn.Module:
    """A connector module: features [n, p, v] -> tokens [n, k, h]; n may be 0.

    Args:
        vision: the tower whose features it takes.
        output_size: width of the decoder.
        dtype: of the parameters.
    """
    return _CONNECTORS[config.kind](config, vision, output_size, dtype)


class AverageConnector(nn.Module):
    """Average pooling to a grid of r x r, then a linear layer."""

    def __init__(self, config: ConnectorConfig, vision: VisionConfig, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.pool = GridPool(vision.grid_size, math.isqrt(config.num_tokens))
        self.output = linear(vision.hidden_size, output_size, dtype=dtype)

    def forward(self, features_npv: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, k, h]."""
        return self.output(self.pool(_to_grid(features_npv)).flatten(1, 2))


class AttentionConnector(nn.Module):
    """k learned queries attend to the patches; then a linear layer.

    MM1 says no more than that. Ours: one cross-attention with LayerNorms on queries and patches, an output projection, and
    the queries added to its result, which tells the tokens apart even where they attend alike.
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


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor: convolutions before and after pooling, which keep what stands beside what.

    Learned positions; `depth` RegNet blocks v -> c; average pooling to r x r; `depth` blocks c -> c; linear, SiLU, linear.
    With c = 1024, depth 3, the 729 patches and 1280 channels of ViT-H at 378 px it has 31,056,704 / 39,447,360 / 69,599,040
    parameters for decoder widths of 3072 / 4096 / 6656.
    """

    def __init__(self, config: ConnectorConfig, vision: VisionConfig, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.hidden_size
        self.position_embedding = nn.Parameter(torch.empty(vision.num_patches, vision.hidden_size, dtype=dtype))
        self.position_embedding.init_std = 0.02  # type: ignore[attr-defined]
        self.before = _reg_stage(vision.hidden_size, width, depth=config.depth, dtype=dtype)
        self.pool = GridPool(vision.grid_size, math.isqrt(config.num_tokens))
        self.after = _reg_stage(width, width, depth=config.depth, dtype=dtype)
        self.hidden = linear(width, output_size, dtype=dtype)
        self.output = linear(output_size, output_size, dtype=dtype)

    def forward(self, features_npv: torch.Tensor) -> torch.Tensor:
        """[n, p, v] -> [n, k, h]."""
        grid_nggv = _to_grid(features_npv + self.position_embedding)
        tokens_nkc = self.after(self.pool(self.before(grid_nggv))).flatten(1, 2)
        return self.output(F.silu(self.hidden(tokens_nkc)))


class RegBlock(nn.Module):
    """RegNet's bottleneck block (arXiv 2003.13678, with squeeze-and-excitation), stride 1, channels last.

    1x1 -> depthwise 3x3 -> squeeze-and-excite -> 1x1, each convolution without bias and followed by a LayerNorm over
    channels; SiLU after the first two norms and after the sum with the input. Where widths differ the input passes a 1x1
    convolution and a norm first. Nothing is narrowed (bottleneck ratio 1), except in squeeze-and-excite, to a quarter of
    the block's input channels.
    """

    def __init__(self, input_size: int, output_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.enter = linear(input_size, output_size, bias=False, dtype=dtype)
        self.enter_norm = norm(output_size, dtype=dtype)
        self.depthwise = _depthwise(output_size, dtype=dtype)
        self.depthwise_norm = norm(output_size, dtype=dtype)
        squeezed_size = round(input_size / 4)
        self.squeeze = linear(output_size, squeezed_size, dtype=dtype)
        self.excite = linear(squeezed_size, output_size, dtype=dtype)
        self.leave = linear(output_size, output_size, bias=False, dtype=dtype)
        self.leave_norm = norm(output_size, dtype=dtype)
        self.shortcut: nn.Module = nn.Identity()
        self.shortcut_norm: nn.Module = nn.Identity()
        if input_size != output_size:
            self.shortcut = linear(input_size, output_size, bias=False, dtype=dtype)
            self.shortcut_norm = norm(output_size, dtype=dtype)

    def forward(self, grid_nggc: torch.Tensor) -> torch.Tensor:
        """[n, g, g, input_size] -> [n, g, g, output_size]."""
        x = F.silu(self.enter_norm(self.enter(grid_nggc)))
        x = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.silu(self.depthwise_norm(x))
        gate = self.excite(F.silu(self.squeeze(x.mean(dim=(1, 2), keepdim=True))))
        x = self.leave_norm(self.leave(x * gate.sigmoid()))
        return F.silu(x + self.shortcut_norm(self.shortcut(grid_nggc)))


class GridPool(nn.Module):
    """Adaptive average pooling [n, g, g, c] -> [n, r, r, c], with the windows of torch.nn.AdaptiveAvgPool2d.

    Written as two products with a constant matrix, rows first: torch's own pooling adds up its gradient on a GPU in no fixed
    order, and this one is exact at every run.
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


def _to_grid(features_npv: torch.Tensor) -> torch.Tensor:
    side = math.isqrt(features_npv.shape[1])
    return features_npv.unflatten(1, (side, side))


def _reg_stage(input_size: int, output_size: int, *, depth: int, dtype: torch.dtype) -> nn.Sequential:
    sizes = [input_size] + [output_size] * (depth - 1)
    return nn.Sequential(*(RegBlock(size, output_size, dtype=dtype) for size in sizes))


def _depthwise(size: int, *, dtype: torch.dtype) -> nn.Conv2d:
    device = torch.get_default_device()
    layer = nn.utils.skip_init(nn.Conv2d, size, size, 3, padding=1, groups=size, bias=False, dtype=dtype, device=device)
    layer.weight.init_std = 1 / 3  # each channel sees its 3 x 3 neighbours and nothing else
    return layer


_CONNECTORS: dict[str, Callable[[ConnectorConfig, VisionConfig, int, torch.dtype], nn.Module]] = {
    "average": AverageConnector,
    "attention": AttentionConnector,
    "c_abstractor": CAbstractor,
}

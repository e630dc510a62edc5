"""Honeybee's C-Abstractor (arXiv 2312.06742), the connector of MM1's final models.

Features stay channels-last: a 1x1 convolution is then a linear layer, and a norm over channels is the ordinary LayerNorm.

Shape legend: n images, g patches along one side, p = g * g patches, v tower width, k tokens of an image, r tokens along one
side (k = r * r), c inner width, h decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.config import ConnectorConfig, VisionConfig
from megatron_mm.hf.mapping import Direct, Entry, Positions
from megatron_mm.models.connectors.base import Connector
from megatron_mm.models.connectors.pooling import GridPool, to_grid
from megatron_mm.models.plain import ImageConvolution, linear, norm


class CAbstractor(nn.Module):
    """Honeybee's C-Abstractor: convolutions before and after pooling, which preserve the spatial context of patches.

    Learned positions; `depth` RegNet blocks v -> c; average pooling to r x r; `depth` blocks c -> c; linear, SiLU, linear.
    With c = 1024, depth 3, and the 729 patches and 1280 channels of ViT-H at 378 px, it has 31,056,704 / 39,447,360 / 69,599,040
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
        grid_nggv = to_grid(features_npv + self.position_embedding)
        tokens_nkc = self.after(self.pool(self.before(grid_nggv))).flatten(1, 2)
        return self.output(F.silu(self.hidden(tokens_nkc)))


class RegBlock(nn.Module):
    """RegNet's bottleneck block (arXiv 2003.13678, with squeeze-and-excitation), stride 1, channels last.

    1x1 -> depthwise 3x3 -> squeeze-and-excite -> 1x1, each convolution without bias and followed by a LayerNorm over
    channels; SiLU after the first two norms and after the sum with the input. If input and output widths differ, the input of that sum
    passes through a 1x1 convolution and a norm. The width stays the same within the block (bottleneck ratio 1), except in
    squeeze-and-excite, which narrows it to a quarter of the block's input channels.
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


def _reg_stage(input_size: int, output_size: int, *, depth: int, dtype: torch.dtype) -> nn.Sequential:
    sizes = [input_size] + [output_size] * (depth - 1)
    return nn.Sequential(*(RegBlock(size, output_size, dtype=dtype) for size in sizes))


def _depthwise(size: int, *, dtype: torch.dtype) -> nn.Conv2d:
    device = torch.get_default_device()
    layer = nn.utils.skip_init(ImageConvolution, size, size, 3, padding=1, groups=size, bias=False, dtype=dtype, device=device)
    layer.weight.init_std = 1 / 3  # fan-in 9: each channel sees only its own 3 x 3 neighbourhood
    return layer


def _flops(config: ConnectorConfig, vision: VisionConfig, output_size: int) -> Mapping[str, float]:
    """Return FLOPs by weight; pooling, a product with a constant, is not counted."""
    inner, found = config.hidden_size, {}
    for stage, places, entering in (("before", vision.num_patches, vision.hidden_size), ("after", config.num_tokens, inner)):
        for block in range(config.depth):
            width = entering if block == 0 else inner
            found[f"{stage}.{block}.enter.weight"] = 2.0 * places * width * inner
            found[f"{stage}.{block}.depthwise.weight"] = 2.0 * places * 9 * inner
            found[f"{stage}.{block}.squeeze.weight"] = 2.0 * inner * round(width / 4)
            found[f"{stage}.{block}.excite.weight"] = 2.0 * inner * round(width / 4)
            found[f"{stage}.{block}.leave.weight"] = 2.0 * places * inner * inner
            if width != inner:
                found[f"{stage}.{block}.shortcut.weight"] = 2.0 * places * width * inner
    found["hidden.weight"] = 2.0 * config.num_tokens * inner * output_size
    found["output.weight"] = 2.0 * config.num_tokens * output_size * output_size
    return found


def _entry(name: str, vision: VisionConfig) -> Entry:
    """Return the mapping of a parameter: positions are interpolated if the other model has another grid, all else is unchanged."""
    if name == "connector.position_embedding":
        return Positions(name, name, num_patches=vision.num_patches, class_token=False)
    return Direct(name, name)


C_ABSTRACTOR = Connector(build=CAbstractor, forward_flops=_flops, entry=_entry)

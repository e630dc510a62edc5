"""Plain torch layers, allocated and marked with their initial scale, for modules that every process has in full."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_IMAGES_TOGETHER = 8
"""On a GPU, convolutions run on multiples of this number of images."""


def linear(input_size: int, output_size: int, *, bias: bool = True, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer whose weights are marked with the initial scale 1 / sqrt(fan-in)."""
    device = torch.get_default_device()  # skip_init ignores `with torch.device(...)`
    layer = nn.utils.skip_init(nn.Linear, input_size, output_size, bias=bias, dtype=dtype, device=device)
    layer.weight.init_std = input_size**-0.5
    return layer


def norm(size: int, *, dtype: torch.dtype, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Return a LayerNorm whose weight is marked with the initial value 1."""
    layer = nn.LayerNorm(size, eps=epsilon, dtype=dtype)
    layer.weight.init_value = 1.0  # type: ignore[attr-defined]
    return layer


class ImageConvolution(nn.Conv2d):
    """A convolution over [n, channels, H, W] for any n.

    cuDNN does set-up work for each new number of images, and the number differs between micro-batches: on an H200, the steps of MM1 1.2B
    with a new number took 1.2 to 1.9 s longer. So on a GPU the batch is padded with zeros to a multiple of eight images, and their outputs
    are dropped.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        number = len(images)
        if _fills_up(images) and (missing := -number % _IMAGES_TOGETHER):
            return super().forward(F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)))[:number]
        return super().forward(images)


def _fills_up(images: torch.Tensor) -> bool:
    return images.is_cuda


class PixelNormalization(nn.Module):
    """uint8 pixels [n, 3, H, W] -> (x / 255 - mean) / std, as one multiplication and one addition. Its buffers are not in checkpoints."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return normalised pixels in float32."""
        return torch.addcmul(self.shift, pixels.float(), self.scale)

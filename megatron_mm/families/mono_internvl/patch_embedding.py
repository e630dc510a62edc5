"""How Mono-InternVL turns pixels into vectors of the decoder's width (arXiv 2410.08202, section 3.1): no tower, only patches and an MLP.

The patches of a tile get learned positions; every square of 2 x 2 patches is concatenated to one vector (pixel-unshuffle), which an MLP
turns into a token: 448 px = 32 x 32 patches = 256 tokens. Released checkpoints also contain a class embedding and its position, which are
kept but unused.

Worked example of the unshuffle, patches numbered row by row:

     0  1  2  3
     4  5  6  7    ->    (0 1 4 5)    (2 3 6 7)         tokens row by row, each square's patches row by row
     8  9 10 11          (8 9 12 13)  (10 11 14 15)
    12 13 14 15

These are plain torch modules. Every process has all of them, and runs them on its own share of the tiles.

Shape legend: n tiles, g patches along one side of a tile, u patches along a square's side, v patch width, k = (g / u)^2 tokens, h decoder
width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mm.families.mono_internvl.config import PatchEmbeddingConfig
from megatron_mm.models.plain import ImageConvolution, PixelNormalization, linear, norm


class PatchEmbedding(nn.Module):
    """Pixels [n, 3, H, W] -> squares of patches [n, k, u * u * v]; n may be 0."""

    def __init__(self, config: PatchEmbeddingConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        device = torch.get_default_device()  # skip_init ignores `with torch.device(...)`
        self.projection = nn.utils.skip_init(ImageConvolution, 3, width, patch, stride=patch, dtype=dtype, device=device)
        self.projection.weight.init_std = (3 * patch**2) ** -0.5
        self.class_embedding = nn.Parameter(torch.empty(width, dtype=dtype))
        self.position_embedding = nn.Parameter(torch.empty(config.position_grid**2 + 1, width, dtype=dtype))
        for parameter in (self.class_embedding, self.position_embedding):
            parameter.init_std = 0.02  # type: ignore[attr-defined]
        self.normalize = PixelNormalization(config.mean, config.std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embed tiles.

        Args:
            pixels: [n, 3, H, W] uint8, RGB, H = W = `config.image_size`.
        """
        size = self.config.image_size
        assert pixels.shape[1:] == (3, size, size), f"pixels of shape {tuple(pixels.shape)}, but tiles are [n, 3, {size}, {size}]"
        normalised = self.normalize(pixels).to(self.position_embedding.dtype)
        patches_nggv = (self.projection(normalised) + self._positions()).permute(0, 2, 3, 1)
        return unshuffle(patches_nggv, self.config.unshuffle)

    def _positions(self) -> torch.Tensor:
        """Return the positions [v, g, g], interpolated if the tile has another grid."""
        grid = self.config.position_grid
        positions = self.position_embedding[1:].T.unflatten(1, (grid, grid))
        if grid == self.config.grid_size:
            return positions
        size = (self.config.grid_size, self.config.grid_size)
        return F.interpolate(positions[None].float(), size=size, mode="bicubic", align_corners=False)[0].to(positions.dtype)


def unshuffle(patches_nggv: torch.Tensor, side: int) -> torch.Tensor:
    """[n, g, g, v] -> [n, (g / side)^2, side * side * v]; see the module's worked example."""
    squares = patches_nggv.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [n, rows, side, columns, side, v]
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


class PatchProjector(nn.Module):
    """LayerNorm, linear, GELU, linear: [n, k, u * u * v] -> [n, k, h]. Released checkpoints call it mlp1."""

    def __init__(self, config: PatchEmbeddingConfig, *, output_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.unshuffle**2 * config.hidden_size
        self.norm = norm(width, dtype=dtype, epsilon=config.norm_epsilon)
        self.hidden = linear(width, output_size, dtype=dtype)
        self.output = linear(output_size, output_size, dtype=dtype)

    def forward(self, squares: torch.Tensor) -> torch.Tensor:
        return self.output(F.gelu(self.hidden(self.norm(squares))))

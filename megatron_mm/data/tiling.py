"""Dynamic tiling: an image becomes a grid of square tiles whose shape is close to the image's, as in Mono-InternVL (arXiv 2410.08202).

A plan needs the number of tiles of millions of images before it reads any of them. So grids are chosen from widths and heights, for whole
arrays at once. The process that decodes an image chooses the same grid again with the same code.

The grid is the one whose columns / rows is closest to width / height. If several are equally close, one with more tiles is used if the
image has more than half as many pixels as that grid. Worked example, up to 4 tiles of 448: a square image may become 1 x 1 or 2 x 2 tiles,
which are equally close, and 2 x 2 takes more than 0.5 * 4 * 448 * 448 = 401,408 pixels. So 633 x 633 (400,689) becomes one tile and 634 x
634 (401,956) four.

Shape legend: n images, k tiles of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from megatron_mm.config.checks import require, require_positive
from megatron_mm.data.image_bytes import squares


@dataclass(frozen=True)
class Tiling:
    """Number of tiles into which an image may be cut."""

    min_tiles: int
    """Minimum number of tiles in a grid."""
    max_tiles: int
    """Maximum number of tiles in a grid, not counting the thumbnail. With a thumbnail, 4 allows 5 squares per image (1280 patches of 28
    pixels at 448 pixels per tile, the limit of Mono-InternVL's first stage)."""
    thumbnail: bool = True
    """Add the whole image as one more tile if its grid has more than one tile."""

    def __post_init__(self) -> None:
        require_positive(self, "min_tiles", "max_tiles")
        require(self.min_tiles <= self.max_tiles, f"min_tiles {self.min_tiles} is more than max_tiles {self.max_tiles}")

    @cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """All grids (columns, rows) with min_tiles to max_tiles tiles: small grids first, then narrow before wide ones.

        The order of grids with equally many tiles matters only if two of them are equally close to an image and no other grid is closer.
        With min_tiles 1 there is no such image, because the shape of a smaller grid is between the two.
        """
        sides = range(1, self.max_tiles + 1)
        allowed = [(columns, rows) for columns in sides for rows in sides if self.min_tiles <= columns * rows <= self.max_tiles]
        return tuple(sorted(allowed, key=lambda grid: (grid[0] * grid[1], grid[0])))

    def count(self, grid: tuple[int, int]) -> int:
        """Return the number of tiles of an image with this grid, including the thumbnail."""
        tiles = grid[0] * grid[1]
        return tiles + (self.thumbnail and tiles > 1)

    @property
    def max_count(self) -> int:
        """Maximum number of tiles of an image, including the thumbnail."""
        return self.count((self.max_tiles, 1))


def choose_grid(width: int, height: int, tiling: Tiling, size: int) -> tuple[int, int]:
    """Return the (columns, rows) of an image's grid.

    Args:
        width, height: size of the image, in pixels.
        size: side of a tile, in pixels.
    """
    return tiling.grids[int(_choose(np.array([width]), np.array([height]), tiling, size)[0])]


def tile_counts(widths: np.ndarray, heights: np.ndarray, tiling: Tiling, size: int) -> np.ndarray:
    """Return the number of tiles of each image, including the thumbnail: [n] int64.

    Args:
        widths, heights: [n] integers, in pixels.
        size: side of a tile, in pixels.
    """
    return np.array([tiling.count(grid) for grid in tiling.grids])[_choose(widths, heights, tiling, size)]


def cut_tiles(image: Image.Image, tiling: Tiling, size: int) -> np.ndarray:
    """Return the tiles of an RGB image, row by row, followed by its thumbnail: [k, 3, size, size] uint8."""
    return squares(tile_images(image, tiling, size), size)


def tile_images(image: Image.Image, tiling: Tiling, size: int) -> list[Image.Image]:
    """Return the tiles of an RGB image as images, row by row, followed by its thumbnail."""
    assert image.mode == "RGB", f"image has mode {image.mode}, but tiles are cut from RGB images"
    columns, rows = grid = choose_grid(image.width, image.height, tiling, size)
    stretched = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [stretched.crop((left, top, left + size, top + size)) for left, top in corners]
    if tiling.count(grid) > len(tiles):
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return tiles


def _choose(widths: np.ndarray, heights: np.ndarray, tiling: Tiling, size: int) -> np.ndarray:
    """Return the index in `tiling.grids` of each image's grid: [n]."""
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    assert (widths > 0).all() and (heights > 0).all(), "an image without pixels has no grid: its index is wrong"
    shapes = widths / heights
    pixels = widths * heights
    chosen = np.zeros(len(widths), dtype=np.int64)
    least = np.full(len(widths), np.inf)
    for place, (columns, rows) in enumerate(tiling.grids):
        distance = np.abs(shapes - columns / rows)
        large = 2 * pixels > size * size * columns * rows
        chosen[(distance < least) | ((distance == least) & large)] = place
        least = np.minimum(least, distance)
    return chosen

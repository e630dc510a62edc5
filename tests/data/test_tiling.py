"""Tiling: grids against the rule written as loops, and pixels against crops of the resized image."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from megatron_mm.data.tiling import Tiling, choose_grid, cut_tiles, tile_counts
from megatron_mm.families.recipes import get_recipe
from megatron_mm.run.data import image_input

STAGES = [Tiling(1, 4), Tiling(1, 6), Tiling(1, 12), Tiling(1, 24), Tiling(3, 9), Tiling(1, 12, thumbnail=False), Tiling(1, 1)]


def reference_grid(width: int, height: int, tiling: Tiling, size: int) -> tuple[int, int]:
    """Apply the rule to one image: compare grids, from small to large, with the best one so far."""
    grids = []
    for tiles in range(tiling.min_tiles, tiling.max_tiles + 1):
        for columns in range(1, tiles + 1):
            for rows in range(1, tiles + 1):
                if columns * rows == tiles:
                    grids.append((columns, rows))
    best, least = (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        if distance < least or (distance == least and width * height > 0.5 * size * size * columns * rows):
            best, least = (columns, rows), distance
    return best


def make_sizes() -> np.ndarray:
    """Return sizes [n, 2]: random ones, many with the shape of a grid or midway between two, and extreme ones."""
    rng = np.random.default_rng(0)
    free = rng.integers(1, 4000, (1000, 2))
    of_grids = rng.integers(1, 25, (500, 2)) * rng.integers(1, 200, (500, 1))
    corners = [(1, 1), (10000, 40), (40, 10000), (65535, 1), (1, 65535), (448, 448), (633, 633), (634, 634), (3, 4), (1500, 2000)]
    return np.concatenate([free, of_grids, np.array(corners)])


@pytest.mark.parametrize("tiling", STAGES, ids=str)
def test_grids_and_counts_are_those_of_the_rule(tiling: Tiling) -> None:
    sizes = make_sizes()
    expected = [reference_grid(width, height, tiling, 448) for width, height in sizes.tolist()]
    assert [choose_grid(width, height, tiling, 448) for width, height in sizes.tolist()] == expected
    counts = [columns * rows + (tiling.thumbnail and columns * rows > 1) for columns, rows in expected]
    for kind in (np.int64, np.uint16, np.uint32):
        assert tile_counts(sizes[:, 0].astype(kind), sizes[:, 1].astype(kind), tiling, 448).tolist() == counts
    assert max(counts) == tiling.max_count


@pytest.mark.parametrize(
    ("size", "tiling", "expected"),
    [
        ((1, 1), Tiling(1, 12), (1, 1)),
        ((10000, 40), Tiling(1, 12), (12, 1)),
        ((40, 10000), Tiling(1, 12), (1, 12)),
        ((633, 633), Tiling(1, 4), (1, 1)),  # 400,689 pixels, less than the 401,408 that are half of 2 x 2 tiles
        ((634, 634), Tiling(1, 4), (2, 2)),  # 401,956
        ((634, 634), Tiling(1, 3), (1, 1)),
        ((1900, 1900), Tiling(1, 12), (3, 3)),
        ((800, 400), Tiling(1, 12), (2, 1)),  # 4 x 2 has the same shape, but needs more than 802,816 pixels
        ((1280, 640), Tiling(1, 12), (4, 2)),
        ((300, 400), Tiling(1, 2), (1, 1)),  # midway between 1 x 2 and 1 x 1: 120,000 pixels, and two tiles need more than 200,704
        ((450, 600), Tiling(1, 2), (1, 2)),  # 270,000
        ((896, 448), Tiling(3, 4), (3, 1)),  # midway between 2 x 2 and 3 x 1: exactly half of 2 x 2 tiles is not enough
        ((898, 449), Tiling(3, 4), (2, 2)),
        ((500, 400), Tiling(2, 2), (1, 2)),  # midway between 1 x 2 and 2 x 1, and too small for either
        ((1000, 800), Tiling(2, 2), (2, 1)),  # and large enough for both: the wider one
    ],
)
def test_ties_are_decided_by_area(size: tuple[int, int], tiling: Tiling, expected: tuple[int, int]) -> None:
    assert choose_grid(*size, tiling, 448) == expected


@pytest.mark.parametrize(("max_tiles", "patches"), [(4, 1280), (6, 1792), (12, 3328), (24, 6400)])
def test_patches_of_the_stages(max_tiles: int, patches: int) -> None:
    """Mono-InternVL's limits: 256 patches of 28 pixels per tile of 448, including the thumbnail."""
    assert Tiling(1, max_tiles).max_count * (448 // 28) ** 2 == patches


def test_the_order_of_grids_with_equally_many_tiles_never_matters() -> None:
    """With min_tiles 1, no two adjacent aspect ratios have grids of the same number of tiles, so no two such grids are equally close."""
    for max_tiles in range(1, 41):
        tiles_of: dict[Fraction, set[int]] = {}
        for columns, rows in Tiling(1, max_tiles).grids:
            tiles_of.setdefault(Fraction(columns, rows), set()).add(columns * rows)
        shapes = sorted(tiles_of)
        assert not any(tiles_of[a] & tiles_of[b] for a, b in itertools.pairwise(shapes))


def picture(width: int, height: int) -> Image.Image:
    """Return blocks of random colours."""
    blocks = np.random.default_rng(width).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width])


@pytest.mark.parametrize("size", [(120, 60), (60, 120), (200, 133), (7, 300), (50, 50)])
@pytest.mark.parametrize("tiling", [Tiling(1, 6), Tiling(1, 6, thumbnail=False)], ids=str)
def test_tiles_are_crops_of_the_stretched_image(size: tuple[int, int], tiling: Tiling) -> None:
    image = picture(*size)
    columns, rows = choose_grid(*size, tiling, 32)
    stretched = image.resize((columns * 32, rows * 32), Image.Resampling.BICUBIC)
    crops = [stretched.crop((column * 32, row * 32, (column + 1) * 32, (row + 1) * 32)) for row in range(rows) for column in range(columns)]
    if tiling.thumbnail and len(crops) > 1:
        crops.append(image.resize((32, 32), Image.Resampling.BICUBIC))
    tiles = cut_tiles(image, tiling, 32)
    assert tiles.dtype == np.uint8 and tiles.flags.c_contiguous
    assert (tiles == np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])).all()
    assert len(tiles) == tile_counts(np.array([size[0]]), np.array([size[1]]), tiling, 32)[0]


def test_extreme_images_are_cut() -> None:
    assert cut_tiles(picture(1, 1), Tiling(1, 12), 32).shape == (1, 3, 32, 32)
    assert cut_tiles(picture(10000, 40), Tiling(1, 12), 32).shape == (13, 3, 32, 32)


def test_no_images_have_no_counts() -> None:
    assert tile_counts(np.array([], dtype=np.uint32), np.array([], dtype=np.uint32), Tiling(1, 12), 448).shape == (0,)


def test_what_has_no_grid_is_refused() -> None:
    with pytest.raises(AssertionError, match="without pixels"):
        choose_grid(0, 10, Tiling(1, 12), 448)
    with pytest.raises(AssertionError, match="mode L"):
        cut_tiles(Image.new("L", (10, 10)), Tiling(1, 12), 448)


@pytest.mark.parametrize(
    ("least", "most", "message"), [(0, 4, "min_tiles is 0"), (1, 0, "max_tiles is 0"), (5, 4, "min_tiles 5 is more than max_tiles 4")]
)
def test_impossible_tilings_are_refused(least: int, most: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tiling(least, most)


@pytest.mark.parametrize(("stage", "grid", "tiles"), [("s1_1", (2, 1), 3), ("s1_2", (3, 2), 7), ("s1_3", (3, 2), 7), ("s2", (5, 3), 16)])
def test_a_picture_in_the_stages_of_mono_internvl(stage: str, grid: tuple[int, int], tiles: int) -> None:
    """The worked example of docs/mono_internvl.md."""
    image = image_input(get_recipe(f"mono_internvl_2b_{stage}"))
    assert image.tiling is not None
    assert choose_grid(1000, 600, image.tiling, image.size) == grid and choose_grid(448, 448, image.tiling, image.size) == (1, 1)
    assert image.num_tiles(np.array([1000]), np.array([600])).tolist() == [tiles]
    assert image.num_places(np.array([tiles])) == 256 * tiles + 2

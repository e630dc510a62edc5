"""Filling sequences respects the limits, loses nothing, and uses nearly all of the scarce resource."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mm.data.plan.filling import Limits, fill_sequences


@pytest.mark.parametrize("seed", range(5))
def test_filling_keeps_the_limits_and_places_every_piece(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limits = Limits(sequence_length=512, max_images=4)
    images = rng.integers(0, 5, 700)
    sizes = np.minimum(2 + 16 * images + rng.integers(1, 200, 700), 512)
    bins = fill_sequences(sizes, images, limits, rng=np.random.default_rng(seed))
    assert bins.min() == 0 and len(np.unique(bins)) == bins.max() + 1
    assert np.bincount(bins, sizes).max() <= 512 and np.bincount(bins, images).max() <= 4
    assert (fill_sequences(sizes, images, limits, rng=np.random.default_rng(seed)) == bins).all()


def test_filling_reaches_the_brim_where_lengths_allow_it() -> None:
    sizes = np.random.default_rng(0).choice([21, 24, 25, 26], 1024)
    bins = fill_sequences(sizes, np.ones(1024, dtype=np.int64), Limits(256, 16), rng=np.random.default_rng(0))
    full = (np.bincount(bins, sizes) == 256).mean()
    assert full > 0.85  # 3% were left empty by best fit, longest first, and no sequence was full


def test_pieces_of_one_length_that_do_not_divide_the_sequence() -> None:
    bins = fill_sequences(np.full(10, 100), np.zeros(10, dtype=np.int64), Limits(256, 16), rng=np.random.default_rng(0))
    assert sorted(np.bincount(bins)) == [2] * 5


def test_full_size_pieces_and_none_at_all() -> None:
    limits, rng = Limits(256, 16), np.random.default_rng(0)
    assert sorted(fill_sequences(np.array([256, 256, 1]), np.zeros(3, dtype=np.int64), limits, rng=rng)) == [0, 1, 2]
    assert len(fill_sequences(np.array([], dtype=np.int64), np.array([], dtype=np.int64), limits, rng=rng)) == 0


def part_of_possible(sizes: np.ndarray, images: np.ndarray, limits: Limits) -> float:
    """Return the smallest possible number of sequences over the number used."""
    bins = fill_sequences(sizes, images, limits, rng=np.random.default_rng(0))
    assert np.bincount(bins, sizes).max() <= limits.sequence_length and np.bincount(bins, images).max() <= limits.max_images
    return max(sizes.sum() / limits.sequence_length, images.sum() / limits.max_images) / (bins.max() + 1)


def test_images_and_tokens_that_are_both_scarce_run_out_together() -> None:
    """Filled by tokens alone, the first sequences reach the token limit and the last ones the image limit: only 93% of the optimum."""
    rng = np.random.default_rng(0)
    images = rng.integers(1, 9, 4096)
    sizes = np.minimum(2 + 144 * images + rng.lognormal(6, 0.9, 4096).astype(int), 4096)
    assert part_of_possible(sizes, images, Limits(4096, 16)) > 0.96


def test_captions_use_every_image_that_a_sequence_may_have() -> None:
    rng = np.random.default_rng(0)
    sizes, images = 146 + rng.integers(8, 60, 4096), np.ones(4096, dtype=np.int64)
    assert part_of_possible(sizes, images, Limits(4096, 16)) == 1
    bins = fill_sequences(sizes, images, Limits(4096, 16), rng=np.random.default_rng(0))
    assert (np.bincount(bins, images) == 16).all()


def test_captions_whose_hand_has_too_many_tokens_are_packed_otherwise() -> None:
    rng = np.random.default_rng(0)
    sizes, images = 146 + rng.integers(8, 60, 4000), np.ones(4000, dtype=np.int64)
    sizes[rng.choice(4000, 100, replace=False)] = 900
    assert part_of_possible(sizes, images, Limits(4096, 16)) > 0.98


def test_several_images_each_and_a_hand_that_does_not_use_all() -> None:
    bins = fill_sequences(np.full(10, 50), np.full(10, 3), Limits(4096, 16), rng=np.random.default_rng(0))
    assert sorted(np.bincount(bins)) == [5, 5]

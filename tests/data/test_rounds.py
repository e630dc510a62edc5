"""Each micro-batch is distributed once, in rounds of similar numbers of images, and ranks have similar total work."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_mm.data.plan.rounds import deal


@pytest.mark.parametrize(("rounds", "data_size"), [(1, 4), (4, 2), (16, 32), (7, 13), (4, 512)])
def test_every_micro_batch_is_dealt_once(rounds: int, data_size: int) -> None:
    rng = np.random.default_rng(0)
    count = rounds * data_size
    images, attention = rng.integers(0, 17, count), rng.integers(10**4, 16 * 10**6, count)
    cost = rng.integers(2000, 4097, count) + attention // 16_384
    dealt = deal(images, cost, attention, data_size=data_size)
    assert dealt.shape == (rounds, data_size) and sorted(dealt.flatten().tolist()) == list(range(count))
    assert (deal(images, cost, attention, data_size=data_size) == dealt).all()


def test_attention_and_cost_are_level_over_32_ranks() -> None:
    """With typical squared lengths of captions, long texts and documents, and 16 micro-batches per rank."""
    rng = np.random.default_rng(0)
    attention = np.concatenate(
        [rng.integers(10**6, 2 * 10**6, 230), rng.integers(2 * 10**6, 9 * 10**6, 230), rng.integers(4 * 10**6, 16 * 10**6, 52)]
    )
    images = np.concatenate([np.full(230, 16), rng.integers(3, 17, 230), np.zeros(52, int)])
    tokens = np.concatenate([rng.integers(2600, 2900, 230), np.full(282, 4090)])
    cost = tokens + attention // 26_368
    dealt = deal(images, cost, attention, data_size=32)
    assert (cost[dealt].max(axis=1) / cost[dealt].mean(axis=1)).mean() < 1.05
    by_cost = images[np.argsort(-cost, kind="stable").reshape(-1, 32)]
    assert images[dealt].max(axis=1).sum() < 0.95 * by_cost.max(axis=1).sum()
    for work in (attention, cost, images):
        over_ranks = work[dealt].sum(axis=0)
        assert over_ranks.max() < 1.05 * over_ranks.mean()
    unaware = attention[np.argsort(-images, kind="stable").reshape(-1, 32)].sum(axis=0)
    assert unaware.max() > 1.2 * unaware.mean()


def test_no_work_at_all_is_dealt_too() -> None:
    nothing = np.zeros(8, dtype=np.int64)
    assert sorted(deal(nothing, nothing, nothing, data_size=4).flatten().tolist()) == list(range(8))


def test_rounds_within_a_band_have_like_images() -> None:
    """The worked example."""
    cost, images = np.array([100, 98, 97, 95, 60, 55]), np.array([1, 9, 2, 8, 0, 0])
    dealt = deal(images, cost, cost * 0, data_size=2)
    assert [sorted(row) for row in images[dealt].tolist()] == [[8, 9], [1, 2], [0, 0]]

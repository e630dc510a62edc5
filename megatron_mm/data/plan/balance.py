"""Deals the micro-batches of a global batch to data-parallel ranks, so that no rank waits long for another.

Two things make a rank wait. In every round (the k-th micro-batches of all ranks, which run at the same time) the first pipeline stage waits
for the rank with the most images; so micro-batches are sorted by images, and by their cost in the decoder where they have as many, and
each round takes the next `data_size` of them. No other rounds have a smaller sum of their largest image counts. At the end of the step all
wait for the rank with the most work; so within the rounds micro-batches change ranks until the sums of the decoder's cost and of its
attention's part alone are level over the ranks.

All of it is done in integers: processes on different processors must come to the same result.
"""

from __future__ import annotations

import numpy as np

_LEVEL = 1 << 16
"""The mean of what is balanced; sums are scaled to it, so that their squares fit into 64 bits."""
_GOOD = _LEVEL + _LEVEL // 100
_MOST_SWAPS = 400


def deal(images: np.ndarray, cost: np.ndarray, attention: np.ndarray, *, data_size: int) -> np.ndarray:
    """The micro-batch of each rank in each round: [rounds, data_size] int64.

    Args:
        images, cost, attention: [micro-batches] int64 images, cost in the decoder, and the part of attention in it, each in its own unit.
        data_size: data-parallel ranks; divides the number of micro-batches.
    """
    rounds = np.lexsort((np.arange(len(images)), -cost, -images)).reshape(-1, data_size)
    # Costliest first to the rank that has least so far: for all rounds, those whose costs differ most come first.
    total = np.zeros(data_size, dtype=np.int64)
    dealt = np.empty_like(rounds)
    for number in np.argsort(-np.ptp(attention[rounds], axis=1), kind="stable"):
        micro_batches = rounds[number]
        dealt[number, np.argsort(total, kind="stable")] = micro_batches[np.argsort(-attention[micro_batches], kind="stable")]
        total += attention[dealt[number]]
    loads = np.stack([_scaled(load, data_size)[dealt] for load in (attention, cost)])
    _level(dealt, loads)
    return dealt


def _scaled(load: np.ndarray, data_size: int) -> np.ndarray:
    return load * (_LEVEL * data_size // max(1, int(load.sum()))) if load.sum() < _LEVEL else load * _LEVEL // (load.sum() // data_size)


def _level(dealt: np.ndarray, loads_lkd: np.ndarray) -> None:
    """Swap micro-batches of a round between the rank with most work and another, as long as that brings the sums closer to each other.

    Args:
        dealt: [rounds, data_size], changed in place.
        loads_lkd: [2, rounds, data_size] of those, changed likewise.
    """
    sums_ld = loads_lkd.sum(axis=1)
    for _ in range(_MOST_SWAPS):
        most = sums_ld.max(axis=0)
        rank = int(most.argmax())
        if most[rank] <= _GOOD:
            return
        moved_lkd = loads_lkd - loads_lkd[:, :, rank : rank + 1]
        # Of (a + m)^2 + (b - m)^2 - a^2 - b^2 half: m (a - b + m).
        change_kd = (moved_lkd * (sums_ld[:, rank, None, None] - sums_ld[:, None, :] + moved_lkd)).sum(axis=0)
        number, other = divmod(int(change_kd.argmin()), change_kd.shape[1])
        if change_kd[number, other] >= 0:
            return
        pair = [rank, other]
        sums_ld[:, pair] += moved_lkd[:, number, other, None] * np.array([1, -1])
        dealt[number, pair] = dealt[number, pair[::-1]]
        loads_lkd[:, number, pair] = loads_lkd[:, number, pair[::-1]]

"""Assigns the micro-batches of a global batch to data-parallel ranks, so that no rank waits long for another.

There are two reasons to wait. In every round (the k-th micro-batches of all ranks, which run at the same time) the decoder's stages wait
for the costliest micro-batch, and the first stage waits for the one with the most images. Therefore micro-batches are sorted by cost and
divided into bands of similar cost; those of a band are sorted by their number of images, and each round takes the next `data_size` of them.
At the end of the step, all ranks wait for the one with the most work. Therefore micro-batches within a round are exchanged between ranks
until the sums of attention cost, of total cost and of images are balanced over the ranks.

Worked example, two ranks: micro-batches of cost 100 98 97 95 | 60 55 and images 1 9 2 8 | 0 0 are two bands. Rounds by cost alone would
combine 9 images with 1, and 8 with 2; rounds within the first band are 9 8 and 2 1.

Only integers are used, because processes on different processors must get the same result.
"""

from __future__ import annotations

import numpy as np

_BAND = 0.8
"""Lowest cost in a band, as a fraction of its highest. On MM1's mixture (mm1_30b, 32 ranks), values from 0.78 to 0.82 balance images as
well as if cost were ignored (the largest of each round is 1.045 times the mean) and keep cost within 1.02; 0.95 leaves images at 1.12."""
_LEVEL = 1 << 16
"""Mean over ranks to which each load is scaled, so that squares of its sums fit into 64 bits."""
_GOOD = _LEVEL + _LEVEL // 100
_MOST_SWAPS = 100


def deal(images: np.ndarray, cost: np.ndarray, attention: np.ndarray, *, data_size: int) -> np.ndarray:
    """Return the micro-batch of each rank in each round: [rounds, data_size] int64. The costliest come first.

    Args:
        images, cost, attention: [micro-batches] int64: images, total cost, and cost of attention, each in its own unit.
        data_size: number of data-parallel ranks; divides the number of micro-batches.
    """
    rounds = _rounds(images, cost, data_size)
    # First balance attention alone: the costliest goes to the rank with the least so far. Rounds in which it differs most are dealt first.
    total = np.zeros(data_size, dtype=np.int64)
    dealt = np.empty_like(rounds)
    for number in np.argsort(-np.ptp(attention[rounds], axis=1), kind="stable"):
        micro_batches = rounds[number]
        dealt[number, np.argsort(total, kind="stable")] = micro_batches[np.argsort(-attention[micro_batches], kind="stable")]
        total += attention[dealt[number]]
    _level(dealt, np.stack([_scaled(load, data_size)[dealt] for load in (attention, cost, images)]))
    return dealt


def _rounds(images: np.ndarray, cost: np.ndarray, data_size: int) -> np.ndarray:
    """Group micro-batches of similar cost and images into rounds: [rounds, data_size]."""
    order = np.lexsort((-images, -cost))
    rounds, first = [], 0
    while first < len(order):
        last = first + data_size
        least = int(_BAND * int(cost[order[first]]))
        while last < len(order) and cost[order[last + data_size - 1]] >= least:
            last += data_size
        band = order[first:last]
        rounds.append(band[np.lexsort((-cost[band], -images[band]))].reshape(-1, data_size))
        first = last
    return np.concatenate(rounds)


def _scaled(load: np.ndarray, data_size: int) -> np.ndarray:
    unit = int(load.sum()) // (_LEVEL * data_size)
    return load // unit if unit else load * (_LEVEL * data_size // max(1, int(load.sum())))


def _level(dealt: np.ndarray, loads_lkd: np.ndarray) -> None:
    """Swap micro-batches of a round between the rank with the most work and another, as long as that brings the ranks' sums closer.

    Args:
        dealt: [rounds, data_size] micro-batches; changed in place.
        loads_lkd: [loads, rounds, data_size] their loads; changed in place.
    """
    sums_ld = loads_lkd.sum(axis=1)
    for _ in range(_MOST_SWAPS):
        most = sums_ld.max(axis=0)
        rank = int(most.argmax())
        if most[rank] <= _GOOD:
            return
        moved_lkd = loads_lkd - loads_lkd[:, :, rank : rank + 1]
        # Half of (a + m)^2 + (b - m)^2 - a^2 - b^2 is m (a - b + m).
        change_kd = (moved_lkd * (sums_ld[:, rank, None, None] - sums_ld[:, None, :] + moved_lkd)).sum(axis=0)
        number, other = divmod(int(change_kd.argmin()), change_kd.shape[1])
        if change_kd[number, other] >= 0:
            return
        pair = [rank, other]
        sums_ld[:, pair] += moved_lkd[:, number, other, None] * np.array([1, -1])
        dealt[number, pair] = dealt[number, pair[::-1]]
        loads_lkd[:, number, pair] = loads_lkd[:, number, pair[::-1]]

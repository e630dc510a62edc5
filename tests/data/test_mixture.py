"""Which source and which sample come next."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_mm.data.plan.mixture import choose_sources, stream_samples


def test_the_mixture_holds_at_every_moment() -> None:
    weights = [0.45, 0.45, 0.1]
    counts = Counter(choose_sources(weights, [0, 0, 0], 997))
    assert all(abs(counts[s] - 997 * w) <= 1 for s, w in enumerate(weights))
    again = [0, 0, 0]
    chosen = []
    for _ in range(997):  # one at a time is the same as all at once
        (source,) = choose_sources(weights, again, 1)
        again[source] += 1
        chosen.append(source)
    assert chosen == choose_sources(weights, [0, 0, 0], 997)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 100, 1025])
def test_every_epoch_has_every_sample_once_in_another_order(num_samples: int) -> None:
    stream = stream_samples(0, 3 * num_samples, num_samples=num_samples, seed=5).reshape(3, num_samples)
    assert (np.sort(stream, axis=1) == np.arange(num_samples)).all()
    if num_samples >= 100:
        assert (stream[0] != stream[1]).mean() > 0.9 and (stream[0] != np.arange(num_samples)).mean() > 0.9
    pieces = [stream_samples(first, 1, num_samples=num_samples, seed=5)[0] for first in range(3 * num_samples)]
    assert pieces == stream.flatten().tolist()

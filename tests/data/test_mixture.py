"""Choice of the next source and the next sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megatron_mm.data.plan.mixture import choose_sources, permute, stream_keys


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


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1025])
def test_a_permutation_has_every_place_once_and_keys_make_others(size: int) -> None:
    places = np.arange(size)
    found = [permute(places, size=size, keys=np.full(size, stream_keys(5, epoch))) for epoch in range(3)]
    assert all((np.sort(one) == places).all() for one in found)
    if size >= 100:
        assert (found[0] != found[1]).mean() > 0.9 and (found[0] != places).mean() > 0.9
    one_by_one = [permute(places[place : place + 1], size=size, keys=np.full(1, stream_keys(5, 0)))[0] for place in range(size)]
    assert one_by_one == found[0].tolist()

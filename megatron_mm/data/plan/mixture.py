"""The source of each sequence, and the next sample of each source: pure functions of a few integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 4
_MIX = np.uint64(0x9E3779B97F4A7C15)


def choose_sources(weights: Sequence[float], drawn: Sequence[int], count: int) -> list[int]:
    """Choose the sources of the next `count` sequences: each time the source that is furthest behind its share.

    After any number of sequences, the count of every source is therefore within one of its share.

    >>> choose_sources([0.5, 0.25, 0.25], [0, 0, 0], 8)
    [0, 1, 2, 0, 0, 1, 2, 0]
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    counts = list(drawn)
    number = sum(counts)
    chosen = []
    for _ in range(count):
        number += 1
        source = max(range(len(shares)), key=lambda s: shares[s] * number - counts[s])
        counts[source] += 1
        chosen.append(source)
    return chosen


def stream_keys(seed: int, epoch: int, *, block: int | None = None) -> np.uint64:
    """Return the key of an epoch's order, or of the order within one of its blocks."""
    key = mix(np.array([epoch], dtype=np.uint64) + np.uint64(seed * int(_MIX) % 2**64))
    if block is not None:
        key = mix(key ^ mix(np.array([block], dtype=np.uint64)))
    return np.uint64(key[0])


def permute(places: np.ndarray, *, size: int, keys: np.ndarray) -> np.ndarray:
    """Apply a pseudorandom permutation of range(size) to some places: [places] int64.

    No table is stored: a Feistel network over the next power of four is applied repeatedly until the result is below `size` (cycle walking:
    Black and Rogaway, 2002).

    Args:
        places: [places] int64 below `size`.
        keys: [places] uint64; each key selects a permutation.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(places.astype(np.uint64), keys, half_bits)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], keys[outside], half_bits)
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (mix(right + keys + np.uint64(number)) & mask)
    return (left << shift) | right


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers bijectively (SplitMix64's finaliser)."""
    with np.errstate(over="ignore"):
        values = (values + _MIX) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))

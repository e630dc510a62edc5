"""Several ranges of numbers as one array."""

from __future__ import annotations

import numpy as np


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the numbers of several ranges, one range after another: [sum of counts] int64.

    Worked example: 3 numbers from 5 on and 2 numbers from 20 on: 5 6 7 20 21.
    """
    counts = counts.astype(np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(first.astype(np.int64) - before, counts) + np.arange(counts.sum())

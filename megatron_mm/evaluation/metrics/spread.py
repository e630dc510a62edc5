"""Standard errors of scores: how far a score would move if the benchmark had drawn other items of the same kind.

A score function returns the standard error of its main score as "stderr", in the score's unit, and leaves it out if there are too few items
to tell. A mean over units (items; in MMBench, questions with all orders of their choices) has the standard error of a sample's mean. Other
scores are computed again on bootstrap samples of the units, drawn with a fixed seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
NUM_SAMPLES = 1000
"""Number of bootstrap samples; a standard error from so many is itself known to about 2%."""


def of_mean(values: Sequence[float]) -> dict[str, float]:
    """{"stderr": standard error of the mean}: the sample's standard deviation / sqrt(n). Empty for fewer than two values."""
    return {"stderr": statistics.stdev(map(float, values)) / math.sqrt(len(values))} if len(values) > 1 else {}


def of_sum(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """{"stderr": standard error of the sum of the groups' means}. Empty if a group has fewer than two values."""
    each = [of_mean(values) for values in groups]
    return {"stderr": math.hypot(*(one["stderr"] for one in each))} if each and all(each) else {}


def of_counts(counts: Array, score: Callable[[Array], Array], *, num_samples: int = NUM_SAMPLES) -> dict[str, float]:
    """{"stderr": standard error of a score that depends on sums over the units}, by the bootstrap. Empty for fewer than two units.

    Args:
        counts: [units, ...]: what each unit adds to the sums.
        score: computes the scores [samples] from the sums [samples, ...].
    """
    units = len(counts)
    if units < 2:
        return {}
    times_drawn = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=num_samples)
    return {"stderr": float(np.std(score(np.tensordot(times_drawn, counts, 1)), ddof=1))}

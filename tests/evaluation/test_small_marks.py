"""Fine-tuning with sub-images learns what low resolution cannot show (MM1, arXiv 2403.09611, section 4)."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.high_resolution import ANSWERS, LOW, SIDE, compare, draw, encoded


def test_reduced_lines_are_all_alike() -> None:
    """As drawn, neighbouring pixels differ in one direction; at half the side, the kinds differ only by noise."""
    rng, seen = random.Random(0), {side: {kind: [] for kind in ANSWERS["lines"]} for side in (SIDE, LOW)}
    for _ in range(300):
        image, answer = draw(rng, "lines")
        for side, by_kind in seen.items():
            pixels = np.asarray(Image.open(io.BytesIO(encoded(image, side=side))), dtype=float)
            by_kind[answer].append(float(np.abs(np.diff(pixels, axis=0)).mean() - np.abs(np.diff(pixels, axis=1)).mean()))
    rows, columns, squares = (np.mean(seen[SIDE][kind]) for kind in ANSWERS["lines"])
    assert rows > 2 and columns < -2 and abs(squares) < 0.2
    assert max(abs(np.mean(of_kind)) for of_kind in seen[LOW].values()) < 0.2


def test_reduced_digits_are_as_grey_as_their_ground() -> None:
    """As drawn, a digit stands out; at half the side, only noise is left."""
    rng = random.Random(0)
    for _ in range(100):
        image, _ = draw(rng, "digits")
        drawn, reduced = (np.asarray(Image.open(io.BytesIO(encoded(image, side=side))), dtype=float) for side in (SIDE, LOW))
        assert np.ptp(drawn.mean(axis=2)) > 80 and np.ptp(reduced.mean(axis=2)) < 12


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_true_resolution_is_learned_from_and_low_resolution_is_not(tmp_path: Path) -> None:
    """The same scenes, tokens and steps, with scenes as drawn or reduced to the side of the tower's images; chance is one third."""
    found = compare(tmp_path, steps=140, asked=120, timeout=900)
    print(found)
    chance = 1 / len(ANSWERS["lines"])
    assert found.true > 0.9
    assert max(found.low, found.true_asked_low) < chance + 0.2

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
from benchmarks.high_resolution import ANSWERS, LOW, SIDE, Marks, compare, draw, encoded


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
@pytest.mark.parametrize(("marks", "steps", "least"), [("lines", 140, 0.9), ("digits", 200, 0.4)])
def test_fine_tuning_learns_from_true_resolution_and_not_from_low(tmp_path: Path, marks: Marks, steps: int, least: float) -> None:
    """Both runs see the same scenes, tokens and steps; one sees the scenes reduced to the side of the tower's images."""
    found = compare(tmp_path, marks=marks, steps=steps, asked=120, timeout=900)
    print(found)
    assert found.true > least
    assert max(found.low, found.true_asked_low) < min(1 / len(ANSWERS[marks]) + 0.2, least)

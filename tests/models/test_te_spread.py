"""Encoding on all pipeline ranks (`parallel.spread_encoder`) with Transformer Engine's layers, in bf16 and FP8 (runs `te_spread.py`)."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from test_te import program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

FAMILIES = ["mm1", "infimm"]


@functools.cache
def found(family: str) -> dict[str, Any]:
    return json.loads(program("te_spread.py", family, timeout=1180)[-1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_losses_are_those_of_a_tower_on_the_first_stage(family: str, precision: str) -> None:
    """The tolerance is that of bf16 sums in another order: gradients of the tower's weights are summed over all images at once."""
    runs = found(family)[precision]
    assert runs["all"]["losses"] == pytest.approx(runs["first stage"]["losses"], rel=1e-4)
    assert runs["all, resumed"]["losses"] == runs["all"]["losses"][2:]


def test_the_second_stage_encodes() -> None:
    """It runs the tower's attention in addition to its decoder layers'. (InfiMM's tower is not Transformer Engine's.)"""
    for runs in found("mm1").values():
        assert runs["all"]["attentions"][1] > runs["first stage"]["attentions"][1]

"""Generation with the key/value cache equals generation by passes over whole sequences, in every family and layout."""

from __future__ import annotations

from typing import Any

import pytest
from support.distributed import run_processes
from support.generating import FAMILIES, answers

LAYOUTS = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2 without sequence parallelism": (2, {"tensor": 2, "sequence": False}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2 virtual 2": (2, {"pipeline": 2, "virtual": 2}),
    "data 2": (2, {}),
    "tensor 2 pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
}


def _same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Check for equal tokens, and for log-likelihoods (sums over up to four tokens of about 5 nats each) equal to float32's accuracy."""
    for name in ("greedy", "ended", "beam"):
        assert found[name] == expected[name], name
    for row, wanted in zip(found["likelihoods"], expected["likelihoods"], strict=True):
        assert row == pytest.approx(wanted, abs=2e-5)


def _both() -> dict[str, list[dict[str, Any]]]:
    return {family: [answers(family, {}, cache=cache) for cache in (True, False)] for family in FAMILIES[1:]}


@pytest.fixture(scope="module")
def without_cache() -> dict[str, dict[str, Any]]:
    return {family: run_processes(answers, 1, family, {}, False)[0] for family in FAMILIES}


def test_cached_generation_equals_whole_passes() -> None:
    """`test_generation.py` tests dense MM1."""
    (found,) = run_processes(_both, 1)
    for cached, whole in found.values():
        _same(cached, whole)
        assert len({tuple(row) for row in cached["greedy"]}) > 1, "all prompts give the same answer, so nothing would be compared"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [  # experts need sequence parallelism
        (family, layout)
        for family in FAMILIES
        for layout, (_, parallel) in LAYOUTS.items()
        if family != "mm1_moe" or parallel.get("sequence") is not False
    ],
)
def test_every_layout_generates_the_same(without_cache: dict[str, dict[str, Any]], family: str, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    for found in run_processes(answers, world_size, family, parallel):
        _same(found, without_cache[family])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"expert": 2}, {"expert": 2, "tensor": 2}, {"expert": 2, "pipeline": 2}], ids=str)
def test_experts_on_other_processes_generate_the_same(without_cache: dict[str, dict[str, Any]], parallel: dict[str, Any]) -> None:
    for found in run_processes(answers, 4 if len(parallel) > 1 else 2, "mm1_moe", parallel):
        _same(found, without_cache["mm1_moe"])

"""The search against an exhaustive one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning import search as searching
from megatron_mm.planning.hardware import GPUS


@pytest.mark.slow
def test_search_finds_what_trying_everything_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "MICRO_BATCHES", (1, 2))
    monkeypatch.setattr(searching, "VIRTUAL", (1, 2))
    experiment = get_recipe("mm1_3b")
    experiment = replace(experiment, train=replace(experiment.train, global_batch_size=64))
    quick = searching.search(experiment, GPUS["a100-80g"], 32)
    thorough = searching.search(experiment, GPUS["a100-80g"], 32, exhaustive=True)
    assert quick.simulated < thorough.simulated == quick.considered
    assert quick.best[0].seconds <= 1.02 * thorough.best[0].seconds
    assert [found.seconds for found in quick.best] == sorted(found.seconds for found in quick.best)


def test_nothing_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layout of mm1_30b fits 1 "):
        searching.search(get_recipe("mm1_30b"), GPUS["a100-80g"], 1)

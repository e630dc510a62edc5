"""The search against an exhaustive one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_mm.families.recipes import get_recipe
from megatron_mm.planning import search as searching
from megatron_mm.planning.hardware import GPUS
from megatron_mm.planning.recipe_job import plan_recipe, with_stages
from megatron_mm.planning.step import StepModel
from megatron_mm.planning.workload import Workloads


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


@pytest.mark.parametrize("recipe", ["mm1_3b", "mm1_3b_moe", "infimm_zephyr_7b_pt", "mono_internvl_2b_s1_2"])
def test_layouts_share_blocks_and_memory_is_judged_before_simulating(recipe: str) -> None:
    experiment, gpu, made, known = get_recipe(recipe), GPUS["h100-sxm"], {}, {}
    experiment = replace(experiment, train=replace(experiment.train, global_batch_size=64, micro_batch_size=1))
    work = Workloads(experiment).of(data_size=4)
    base = replace(experiment.parallel, tensor=2, pipeline=4, expert=1, virtual=1, stage_layers=None)
    even = plan_recipe(replace(experiment, parallel=base), gpu, 32, work=work, made=made)
    layers = experiment.model.decoder.num_layers
    for virtual, split in ((1, (0, 2, layers - 3, 1)), (2, (1, 0, 2, 3, layers - 9, 1, 1, 1))):
        one = replace(experiment, parallel=replace(base, virtual=virtual, stage_layers=split))
        shared, alone = with_stages(even, one), plan_recipe(one, gpu, 32, work=work)
        assert shared == alone
        model = StepModel(shared.job, known=known)
        prediction = model.predict()
        assert prediction == StepModel(alone.job).predict()
        assert 0.9 * prediction.peak_bytes <= model.least_bytes() <= prediction.peak_bytes * (1 + 1e-9)

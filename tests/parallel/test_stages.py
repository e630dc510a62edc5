"""Contents and sizes of pipeline stages; models are built on the meta device, so that a 30B model needs no memory."""

from dataclasses import replace

import pytest

from megatron_mm.config import ParallelConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel.stages import layers_per_stage, pipeline_layout
from megatron_mm.run.dry_run import stage_parameters


def test_layers_left_over_go_to_the_middle() -> None:
    parallel = ParallelConfig(pipeline=5, virtual=2)
    assert layers_per_stage(parallel, num_layers=56) == (5, 6, 6, 6, 6, 6, 6, 5, 5, 5)


def test_layout_names_embedding_and_loss_once() -> None:
    assert pipeline_layout(ParallelConfig(pipeline=2), num_layers=3) == [["embedding", "decoder"], ["decoder", "decoder", "loss"]]


def test_stage_layers_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 7 layers, but the decoder has 8"):
        layers_per_stage(ParallelConfig(pipeline=2, stage_layers=(3, 4)), num_layers=8)


@pytest.mark.parametrize(("recipe", "decoder"), [("mm1_1b", 1.296e9), ("mm1_3b", 3.065e9), ("mm1_7b", 7.047e9), ("mm1_30b", 30.29e9)])
def test_decoder_sizes(recipe: str, decoder: float) -> None:
    """Without parallelism, the decoder has about the size that its recipe names; tower and connector have exact sizes."""
    experiment = get_recipe(recipe)
    whole = replace(experiment, parallel=ParallelConfig())
    (parts,) = stage_parameters(whole)
    assert parts.held["language"] == pytest.approx(decoder, rel=0.01)
    assert parts.held["vision"] == 631_371_520
    exact_connectors = {"mm1_3b": 31_056_704, "mm1_7b": 39_447_360, "mm1_30b": 69_599_040}
    assert parts.held["connector"] == exact_connectors.get(recipe, parts.held["connector"])


def test_stages_of_the_30b_layout_hold_the_whole_decoder() -> None:
    """With tensor 4 a process holds a quarter of every matrix; the tied table is on the first and the last stage."""
    experiment = get_recipe("mm1_30b")
    (whole,) = stage_parameters(replace(experiment, parallel=ParallelConfig()))
    stages = stage_parameters(experiment)
    table = 49152 * 6656
    norms = (2 * 56 + 1) * 6656
    cut = sum(stage.held["language"] for stage in stages) * 4 - 3 * norms - table
    assert cut == whole.held["language"]

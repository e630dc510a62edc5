"""Number of nodes that an expert-parallel group spans, and the traffic between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_mm.config import ParallelConfig
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel.nodes import expert_traffic, nodes_of_expert_group


@pytest.mark.parametrize(("expert", "expert_tensor", "pipeline"), [(8, 1, 1), (16, 1, 2), (4, 2, 1), (32, 1, 4), (6, 1, 1), (1, 1, 2)])
def test_groups_are_those_of_megatron_core(expert: int, expert_tensor: int, pipeline: int) -> None:
    world_size = expert * expert_tensor * pipeline * 4
    ranks = RankGenerator(
        tp=expert_tensor, ep=expert, dp=world_size // (expert * expert_tensor * pipeline), pp=pipeline, cp=1, order="tp-cp-ep-dp-pp"
    )
    spans = [len({rank // 8 for rank in group}) for group in ranks.get_ranks("tp-ep")]
    parallel = ParallelConfig(expert=expert, expert_tensor=expert_tensor, tensor=expert_tensor, pipeline=pipeline)
    assert nodes_of_expert_group(parallel, world_size=world_size, gpus=8) == max(spans)


def test_what_experts_send_and_hold() -> None:
    """MM1 3B-MoE on 128 GPUs sends 2,097,152 tokens of 3072 channels to 2 experts in 13 layers; an expert has 3 x 3072 x 8064 weights."""
    experiment = get_recipe("mm1_3b_moe")
    far, near = (expert_traffic(experiment, expert=degree, world_size=128, gpus=8) for degree in (32, 8))
    assert far.tokens == pytest.approx(4 * 2 * (2_097_152 * 13 / 128) * 3072 * 2 * 24 / 32) and near.tokens == 0
    parameters = 13 * 2 * 3 * 3072 * 8064
    assert far.held == pytest.approx(6 * parameters) and near.held == pytest.approx(4 * far.held)
    assert far.weights == pytest.approx(6 * parameters * 3 / 4)
    short = replace(experiment, precision=replace(experiment.precision, gradients="bf16"))
    assert expert_traffic(short, expert=32, world_size=128, gpus=8).held == pytest.approx(4 * parameters)

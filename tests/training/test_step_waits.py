"""A step waits for its device once. Counted are reads of a tensor's values, and tensors that are made on the device from values on the
processor, for which the processor waits, too."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import MoEConfig
from megatron_mm.families.registry import family_of
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_chunks, build_model
from megatron_mm.training.norms import PartNorms
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")
"""Methods that wait until a GPU's values are on the processor."""
ON_THE_PROCESSOR = {
    ("megatron_mm.parallel.images", "gather"): "who encodes which image",
    ("megatron.core.tensor_parallel.random", "fork"): "whether the processor's own generator has moved",
    ("megatron_mm.models.chunk", "image_token_rows"): "where images lie",
    ("megatron_mm.training.spread_encoder", "encode"): "how many images each pipeline rank encodes, of the plan",
    # Replacements for Transformer Engine's kernels, which read the same values on the device:
    ("megatron_mm.models.layers", "<genexpr>"): "document lengths, in PyTorch's attention",
    ("megatron.core.models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_thd"): "document lengths, in rotary positions",
    ("megatron.core.utils", "local_multi_tensor_l2_norm"): "norms of gradients, one by one",
    ("megatron_mm.platform.cpu", "made"): "the same norms, put together",
    ("megatron_mm.training.routing", "weigh_tokens"): "masks, before they are copied to the device",
    ("megatron_mm.training.routing", "routing_stats"): "what the one message brought",
    ("megatron_mm.parallel.sums", "sum_over_processes"): "the values of the message, once it is here",
}
"""Functions that read tensors that are on the processor by design. Reading the message itself (`cpu`) is counted."""


def reads_of_a_step(parallel: dict[str, Any], decoder: dict[str, Any]) -> tuple[dict[str, int], int]:
    """Return the counted reads of tensors (and tensors made on the device from values) during the second step of a run, and the number of
    sums over all processes in it."""
    experiment = small_experiment(parallel=parallel, decoder=decoder)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build_model(experiment, topology)
    optimizer = build_optimizer(experiment, model)
    step = TrainingStep(experiment, topology, model, optimizer, num_sources=2)
    family = family_of(experiment.model)
    norms = PartNorms(model, optimizer, parts=[*family.parts, "rest"], part_of=family.part_of)
    step.run(random_step(experiment, topology, step=1), step=1)
    found: Counter[str] = Counter()
    world_messages = 0

    def counting(name: str, original: Any) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            where = caller.f_globals.get("__name__", ""), caller.f_code.co_name
            if where[0].startswith("megatron") and (where not in ON_THE_PROCESSOR or (where[1] == "sum_over_processes" and name == "cpu")):
                found[f"{'.'.join(where)}: {name}"] += 1
            return original(self, *args, **kwargs)

        return read

    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal world_messages
        world_messages += tensor.dtype is torch.float64
        return all_reduce(tensor, *args, **kwargs)

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        caller = sys._getframe(1)
        where = caller.f_globals.get("__name__", ""), caller.f_code.co_name
        if kwargs.get("device") is not None and where[0].startswith("megatron_mm"):
            found[f"{'.'.join(where)}: tensor"] += 1
        return make(*args, **kwargs)

    originals, make = {name: getattr(torch.Tensor, name) for name in READS}, torch.tensor
    try:
        dist.all_reduce, torch.tensor = counted, made
        for name, original in originals.items():
            setattr(torch.Tensor, name, counting(name, original))
        step.run(random_step(experiment, topology, step=2), step=2, tell=lambda: norms.squares(lr=1e-3, device=topology.device))
    finally:
        dist.all_reduce, torch.tensor = all_reduce, make
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
    return dict(found), world_messages


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        pytest.param(4, {"tensor": 2, "pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, {"pipeline": 2, "spread_encoder": True}, marks=pytest.mark.slow),
    ],
)
def test_a_step_reads_one_message(world_size: int, parallel: dict[str, Any]) -> None:
    for found, messages in run_processes(reads_of_a_step, world_size, parallel, {}):
        assert found == {"megatron_mm.parallel.sums.sum_over_processes: cpu": 1}
        assert messages == 1


def test_a_step_with_experts_makes_no_tensor_on_the_device_from_values() -> None:
    """Apart from that, it reads how many tokens go to each expert, in every sparse layer."""
    ((found, _),) = run_processes(reads_of_a_step, 1, {}, {"moe": MoEConfig(num_experts=4, every_n_layers=2)})
    assert not [place for place in found if place.endswith(": tensor")]


def test_stages_do_not_wait_for_the_device_after_each_message() -> None:
    """On GPUs, where messages of 1F1B go in batches, megatron-core would by default."""
    experiment = small_experiment(parallel={"pipeline": 2})
    with topologies.pretend(experiment.parallel, pipeline_rank=0) as topology:
        (chunk,) = build_chunks(experiment, topology)
        assert get_model_config(chunk).batch_p2p_sync is False

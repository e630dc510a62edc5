"""Settings of messages that are used only on GPUs, on CPUs: they change when messages are sent, not what arrives."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.models import decoder
from megatron_mm.parallel import topology as topologies
from megatron_mm.training import build
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

AS_ON_GPUS: tuple[tuple[int, dict[str, Any], dict[str, Any]], ...] = (
    (2, {"pipeline": 2}, {"batch_p2p_comm": True}),
    (2, {"pipeline": 2, "virtual": 2}, {"overlap_p2p_comm": True}),
    (4, {"pipeline": 2, "virtual": 2}, {"overlap_p2p_comm": True}),
)


def losses(parallel: dict[str, Any], settings: dict[str, Any]) -> list[float]:
    """Train three steps and evaluate once between them, with settings of megatron-core's messages and weights gathered late."""

    def config(**options: Any) -> TransformerConfig:
        # Not freed once it is sent, because gloo may still be reading it. NCCL's messages keep the memory (`record_stream`).
        return TransformerConfig(**{**options, **settings, "deallocate_pipeline_outputs": False})

    def gathering_late(**options: Any) -> DistributedDataParallelConfig:
        return DistributedDataParallelConfig(**{**options, "overlap_param_gather": bool(settings) and parallel.get("virtual", 1) > 1})

    decoder.TransformerConfig = config  # type: ignore[misc, assignment]
    build.DistributedDataParallelConfig = gathering_late  # type: ignore[misc, assignment]
    experiment = small_experiment(parallel=parallel, decoder={"num_layers": 4}, global_batch_size=8)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build.build_model(experiment, topology)
    if model[0].ddp_config.overlap_param_gather:
        get_model_config(model[0]).param_sync_func = [chunk.start_param_sync for chunk in model]
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    found = []
    for number in (1, 2, 3):
        found.append(step.run(random_step(experiment, topology, step=number), step=number).losses.mean)
        if number == 1:
            found.append(step.evaluate(random_step(experiment, topology, step=2)).mean)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel", "settings"), AS_ON_GPUS)
def test_losses_are_the_same(world_size: int, parallel: dict[str, Any], settings: dict[str, Any]) -> None:
    plain, as_on_gpus = (run_processes(losses, world_size, parallel, how)[0] for how in ({}, settings))
    assert as_on_gpus == plain

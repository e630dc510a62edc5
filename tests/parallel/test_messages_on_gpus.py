"""Settings of messages that are used only on GPUs, on CPUs: they change when messages are sent, not what arrives."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import MoEConfig
from megatron_mm.models import decoder
from megatron_mm.parallel import topology as topologies
from megatron_mm.training import build
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

EXPERTS = {"moe": MoEConfig(num_experts=4, every_n_layers=2)}
AS_ON_GPUS: tuple[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]], ...] = (
    (2, {"pipeline": 2}, {}, {"batch_p2p_comm": True}),
    (2, {"pipeline": 2, "virtual": 2}, {}, {"overlap_p2p_comm": True}),
    (4, {"pipeline": 2, "virtual": 2}, {}, {"overlap_p2p_comm": True}),
    (4, {"expert": 2}, EXPERTS, {}),
)


def losses(parallel: dict[str, Any], layers: dict[str, Any], settings: dict[str, Any], as_on_gpus: bool) -> list[float]:
    """Train three steps and evaluate once between them.

    Args:
        layers: fields of the decoder.
        as_on_gpus: use these settings of megatron-core, and gather weights during the next forward pass where GPUs do.
    """
    late = as_on_gpus and (parallel.get("pipeline", 1) == 1 or "virtual" in parallel)

    def config(**options: Any) -> TransformerConfig:
        # Not freed once it is sent, because gloo may still be reading it. NCCL's messages keep the memory (`record_stream`).
        return TransformerConfig(**{**options, **(settings if as_on_gpus else {}), "deallocate_pipeline_outputs": False})

    def gathering_late(**options: Any) -> DistributedDataParallelConfig:
        return DistributedDataParallelConfig(**{**options, "overlap_param_gather": late})

    decoder.TransformerConfig = config  # type: ignore[misc, assignment]
    build.DistributedDataParallelConfig = gathering_late  # type: ignore[misc, assignment]
    experiment = small_experiment(parallel=parallel, decoder={"num_layers": 4, **layers}, global_batch_size=8)
    topology = topologies.initialize(experiment.parallel, seed=experiment.train.seed)
    model = build.build_model(experiment, topology)
    if late and len(model) > 1:
        get_model_config(model[0]).param_sync_func = [chunk.start_param_sync for chunk in model]
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    found = []
    for number in (1, 2, 3):
        found.append(step.run(random_step(experiment, topology, step=number), step=number).losses.mean)
        if number == 1:
            found.append(step.evaluate(random_step(experiment, topology, step=2)).mean)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel", "layers", "settings"), AS_ON_GPUS)
def test_losses_are_the_same(world_size: int, parallel: dict[str, Any], layers: dict[str, Any], settings: dict[str, Any]) -> None:
    plain, as_on_gpus = (run_processes(losses, world_size, parallel, layers, settings, how)[0] for how in (False, True))
    assert as_on_gpus == plain

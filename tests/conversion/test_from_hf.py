"""Checkpoints that training begins with, made of Hugging Face weights: loaded by megatron-core on any layout, the same outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_processes
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from transformers import AutoModelForCausalLM, CLIPVisionModel

from megatron_mm.config import Experiment, ParallelConfig
from megatron_mm.conversion.from_hf import convert_from_hf
from megatron_mm.data.batch import PackedBatch
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.build import build_model
from megatron_mm.training.checkpoint import find_checkpoint, load_weights
from tests.conversion.hf_models import VOCABULARY, experiment, make_language, make_vision, save


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_language(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_vision(), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def imported(llama: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoint."""
    run_dir = tmp_path_factory.mktemp("imported") / "run"
    convert_from_hf(experiment(), run_dir, language=llama, vision=clip)
    return run_dir


IDS = torch.arange(64).mul(37).remainder(VOCABULARY)
PIXELS = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@dataclass(frozen=True)
class Computed:
    """What a process of a layout computes with a checkpoint's weights."""

    logits: torch.Tensor | None
    """[tokens, vocabulary] of `IDS`, on the last stage."""
    features: torch.Tensor | None
    """[images, patches, width] of `PIXELS`, on the first stage."""
    weights: dict[str, torch.Tensor]


def compute(settings: Experiment, run_dir: Path) -> Computed:
    """Load as training does, on all processes of the settings' layout."""
    topology = topologies.initialize(settings.parallel, seed=3)
    model = build_model(settings, topology)
    load_weights(settings, topology, model, find_checkpoint(run_dir))
    batch = PackedBatch(
        token_ids=IDS,
        labels=IDS,
        loss_mask=torch.ones(64),
        is_token=torch.ones(64, dtype=torch.bool),
        position_ids=torch.arange(64),
        source_ids=torch.zeros_like(IDS),
        cu_seqlens=torch.tensor([0, 64], dtype=torch.int32),
        max_seqlen=64,
        image_starts=torch.zeros(0, dtype=torch.int64),
        image_owners=torch.zeros(0, dtype=torch.int64),
        image_documents=torch.zeros(0, dtype=torch.int64),
        pixels=PIXELS[:0] if topology.is_first_stage else None,
    )
    chunk = model[0].module
    with torch.no_grad():
        logits = _logits(model, batch)
        features = chunk.vision(PIXELS) if topology.is_first_stage else None
    weights = {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}
    topologies.shutdown()
    return Computed(logits, features, weights)


def _logits(model: list, batch: PackedBatch) -> torch.Tensor | None:
    copies = parallel_state.get_pipeline_model_parallel_world_size() if len(model) > 1 else 1
    batches = [iter([batch] * copies) for _ in model]
    found = get_forward_backward_func()(
        forward_step_func=lambda batches, chunk: (chunk(next(batches), with_loss=False), lambda logits, non_loss_data=True: logits),
        data_iterator=batches if len(model) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=copies,
        seq_length=batch.num_tokens,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(found[0]) for _ in range(group.size())]
    dist.all_gather(parts, found[0].contiguous(), group=group)
    return torch.cat(parts, dim=-1)[0]


def hf_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS[None]).logits[0]


def hf_features(folder: Path, settings: Experiment) -> torch.Tensor:
    """The tower's last layer after its final norm, without the class token: what connectors take."""
    model = CLIPVisionModel.from_pretrained(folder)
    tower = getattr(model, "vision_model", model)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.model.vision.mean, settings.model.vision.std))
    with torch.no_grad():
        return tower.post_layernorm(tower((PIXELS / 255 - mean) / std).last_hidden_state)[:, 1:]


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (4, {"tensor": 2, "pipeline": 2}),
    (2, {"pipeline": 2, "virtual": 2}),
]


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=str)
def test_outputs_are_those_of_transformers_on_every_layout(
    imported: Path, llama: Path, clip: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    """fp32 rounding on logits of about 1."""
    settings = replace(experiment(), parallel=ParallelConfig(**parallel))
    found = run_processes(compute, world_size, settings, imported)
    torch.testing.assert_close(found[-1].logits[:, :VOCABULARY], hf_logits(llama), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0].features, hf_features(clip, settings), atol=1e-4, rtol=1e-4)
    assert found[-1].logits.std() > 0.1 and found[0].features.std() > 0.1

"""Generation gives the same tokens in every training layout, equal to those of a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import IMAGE_ID, IMAGE_TOKENS, random_step, small_experiment

from megatron_mm.data.batch import PackedBatch
from megatron_mm.evaluation.generation import Prompt, generate
from megatron_mm.parallel import topology as topologies
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

NEW_TOKENS = 6


def _prompts(size: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    image = [IMAGE_ID] * IMAGE_TOKENS
    return [
        Prompt(ids=[1, *image, 20, 21], image_starts=[1], pixels=pictures[:1]),
        Prompt(ids=[1, 30], image_starts=[], pixels=pictures[:0]),
        Prompt(ids=[1, *image, 9, *image], image_starts=[1, 2 + IMAGE_TOKENS], pixels=pictures[1:]),
    ]


def _generated(parallel: dict[str, Any], *, naive: bool = False) -> list[list[int]]:
    experiment = small_experiment(parallel=parallel, decoder={"num_layers": 4})
    topology = topologies.initialize(experiment.parallel, seed=1)
    model = build_model(experiment, topology)
    step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
    for number in (1, 2, 3):  # untrained weights repeat their input
        step.run(random_step(experiment, topology, step=number), step=number)
    prompts = _prompts(experiment.model.vision.image_size)
    if naive:
        return [_plain_loop(model[0], prompt) for prompt in prompts]
    return generate(experiment, model, topology, prompts, max_new_tokens=NEW_TOKENS, eos_id=-1, pad_id=0)


@torch.no_grad()
def _plain_loop(model: torch.nn.Module, prompt: Prompt) -> list[int]:
    """Generate for one prompt with one forward pass per token, without packing."""
    ids = list(prompt.ids)
    for _ in range(NEW_TOKENS):
        row = torch.tensor(ids)
        batch = PackedBatch(
            token_ids=row,
            labels=row,
            loss_mask=torch.zeros(len(ids)),
            is_token=torch.ones(len(ids), dtype=torch.bool),
            position_ids=torch.arange(len(ids)),
            source_ids=torch.zeros_like(row),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            max_seqlen=len(ids),
            image_starts=torch.tensor(prompt.image_starts, dtype=torch.int64),
            image_owners=torch.zeros(len(prompt.image_starts), dtype=torch.int64),
            image_documents=torch.tensor([[0, len(ids)]] * len(prompt.image_starts), dtype=torch.int64).reshape(-1, 2),
            pixels=prompt.pixels,
        )
        ids.append(int(model(batch, with_loss=False)[0, -1].argmax()))
    return ids[len(prompt.ids) :]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    (tokens,) = run_processes(_naive, 1)
    assert len({tuple(row) for row in tokens}) > 1, "all prompts give the same answer, so nothing would be compared"
    return tokens


def _naive() -> list[list[int]]:
    return _generated({}, naive=True)


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"pipeline": 2, "virtual": 2}), (2, {})],
    ids=["one process", "tensor 2", "pipeline 2", "pipeline 2 virtual 2", "data 2"],
)
def test_every_layout_generates_the_same_tokens(expected: list[list[int]], world_size: int, parallel: dict[str, Any]) -> None:
    assert run_processes(_generated, world_size, parallel) == [expected] * world_size

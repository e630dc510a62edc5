"""A small MM1 checkpoint, written by the trainer's own code, and its model's outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mm.config import CheckpointConfig, Experiment, MoEConfig, ParallelConfig
from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.data.text.tokenizer import Tokenizer
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.mm1.model import MM1Model
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel import topology
from megatron_mm.training.build import build_model
from megatron_mm.training.checkpoint import Checkpointer, TrainState, completed_checkpoints
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "triangle")


TEXTS = [f"a {c} {s} left of the {d} {t}." for c in COLOURS for s in SHAPES for d in COLOURS for t in SHAPES]


TEXTS += [f"question: how many {s}s? answer: {n}." for s in SHAPES for n in range(100)]


# For each document, the number of images that it begins with, and its text.
DOCUMENTS = ((1, "a red circle left of the blue star."), (0, "question: how many stars? answer: 3."), (2, "a blue star"))


@dataclass(frozen=True)
class Trained:
    """A checkpoint with its model's configuration, weights and outputs."""

    experiment: Experiment
    config: MM1Config
    checkpoint: Path
    tokenizer: Tokenizer
    weights: dict[str, torch.Tensor]
    batch: PackedBatch
    logits: list[torch.Tensor]
    """Logits [tokens, vocabulary] of each of `batch`'s documents."""


def train_one_step(
    tokenizer_path: Path,
    run_dir: Path,
    *,
    recipe: str = "debug_mm1",
    moe: MoEConfig | None = None,
    variant: str = "llama",
    change: Callable[[torch.nn.Module], None] = lambda module: None,
) -> Trained:
    """Randomize all weights, including norms and biases, so that swapped tensors never agree by chance; train one step and save.

    Args:
        variant: decoder variant.
        change: changes the model before it is saved.

    The process groups are shut down on return, so that other tests can create theirs.
    """
    base = get_recipe(recipe)
    assert isinstance(base.model, MM1Config)
    config = replace(base.model, decoder=replace(base.model.decoder, num_layers=3, num_query_groups=2, moe=moe, variant=variant))
    experiment = replace(
        base, model=config, data=replace(base.data, tokenizer=tokenizer_path), checkpoint=CheckpointConfig(asynchronous=False)
    )
    tokenizer = Tokenizer.open(tokenizer_path)
    batch = make_batch(config, tokenizer)
    process = topology.initialize(ParallelConfig(), seed=1)
    try:
        chunks = build_model(experiment, process)
        scramble(chunks[0])
        optimizer = build_optimizer(experiment, chunks)
        TrainingStep(experiment, process, chunks, optimizer, num_sources=1).run([batch], step=1)
        change(chunks[0].module)
        Checkpointer(experiment, process, run_dir, chunks, optimizer).save(TrainState(step=1))
        model = chunks[0].module
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        logits = training_logits(model, batch)
    finally:
        topology.shutdown()
    (checkpoint,) = completed_checkpoints(run_dir)
    return Trained(experiment, config, checkpoint, tokenizer, weights, batch, logits)


@torch.no_grad()
def scramble(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make_images(*, num_images: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_images, 3, size, size), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def make_batch(config: MM1Config, tokenizer: Tokenizer) -> PackedBatch:
    """Return all documents in one row, packed as the data loader does."""
    k = config.connector.num_tokens
    ids, starts, boundaries = [], [], [0]
    for num_images, text in DOCUMENTS:
        starts += [boundaries[-1] + 1 + k * i for i in range(num_images)]
        ids += [tokenizer.bos_id, *[tokenizer.image_id] * (k * num_images), *tokenizer.encode(text), tokenizer.eos_id]
        boundaries.append(len(ids))
    tokens = torch.tensor(ids)
    return PackedBatch(
        token_ids=tokens,
        labels=tokens.roll(-1),
        loss_mask=torch.ones(len(ids)),
        is_token=torch.ones(len(ids), dtype=torch.bool),
        position_ids=torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(boundaries)]),
        source_ids=torch.zeros_like(tokens),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(boundaries)),
        image_starts=torch.tensor(starts),
        image_owners=torch.zeros(len(starts), dtype=torch.int64),
        image_documents=documents_of_images(torch.tensor(starts), cu_seqlens=torch.tensor(boundaries)),
        pixels=make_images(num_images=len(starts), size=config.vision.image_size),
    )


def training_logits(model: MM1Model, batch: PackedBatch) -> list[torch.Tensor]:
    """Return the logits [tokens, vocabulary] of each document."""
    with torch.no_grad():
        logits = model(batch, with_loss=False)[0]
    return list(logits.split(batch.cu_seqlens.diff().tolist()))

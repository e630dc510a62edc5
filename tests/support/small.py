"""A model that is small and has every part of a large one, and batches for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import ConnectorConfig, DecoderConfig, Experiment, ParallelConfig
from megatron_mm.config.towers import VIT_TINY
from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.data.plan.plan import encoding_stages
from megatron_mm.families.mm1.config import MM1Config
from megatron_mm.families.recipes import get_recipe
from megatron_mm.parallel.topology import Topology

IMAGE_ID = 4
IMAGE_TOKENS = 9
IMAGES_OF_MICRO_BATCHES = (0, 1, 4)
"""Images of successive micro-batches: none, one (so that one of two tensor-parallel processes has none), many."""


def small_experiment(
    *, decoder: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, policy: str = "all", **train: Any
) -> Experiment:
    """Return a smaller debug_mm1: 2 layers of width 64 with 8 heads on 4 key/value heads, 4 micro-batches of 96 tokens.

    Args:
        decoder, parallel, train: fields to change.
        policy: `train.freeze_policy`.
    """
    fields: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "head_dim": 8,
        "vocab_size": 128,
        **(decoder or {}),
    }
    recipe = get_recipe("debug_mm1")
    model = MM1Config(
        decoder=DecoderConfig(**fields),
        vision=replace(VIT_TINY, hidden_size=32, ffn_hidden_size=64, image_size=16),
        connector=ConnectorConfig(kind="c_abstractor", num_tokens=IMAGE_TOKENS, hidden_size=32, depth=1),
    )
    return replace(
        recipe,
        model=model,
        data=replace(recipe.data, sequence_length=96),
        parallel=ParallelConfig(**(parallel or {})),
        train=replace(recipe.train, **{"global_batch_size": 4, "micro_batch_size": 1, "freeze_policy": policy, **train}),
    )


def tokens_of(experiment: Experiment, *, number: int) -> int:
    """Return the tokens of micro-batch `number`: a third less in every other one; tensor parallelism and FP8 can split both counts."""
    full = experiment.train.micro_batch_size * experiment.data.sequence_length
    return full - 32 * (number % 2) if full == 96 else full


def random_batch(experiment: Experiment, topology: Topology, *, number: int) -> PackedBatch:
    """Return micro-batch `number` of a run, the same in every layout: random words and pictures."""
    generator = torch.Generator().manual_seed(number)
    total = tokens_of(experiment, number=number)
    ids = torch.randint(5, experiment.model.decoder.num_tokens, (total,), generator=generator)
    bounds = [0]
    while bounds[-1] < total:
        bounds.append(min(total, bounds[-1] + int(torch.randint(IMAGE_TOKENS + 3, 30, (1,), generator=generator))))
    wanted, starts = IMAGES_OF_MICRO_BATCHES[number % len(IMAGES_OF_MICRO_BATCHES)], []
    for begin, end in itertools.pairwise(bounds):
        if len(starts) < wanted and end - begin > IMAGE_TOKENS + 2:
            starts.append(begin + 1)
            ids[begin + 1 : begin + 1 + IMAGE_TOKENS] = IMAGE_ID
    size = experiment.model.vision.image_size
    pixels = torch.randint(0, 256, (len(starts), 3, size, size), generator=generator, dtype=torch.uint8)
    return packed_batch(ids, bounds=bounds, starts=starts, masked_id=IMAGE_ID, pixels=pixels, topology=topology, source=number % 2)


def packed_batch(
    ids: torch.Tensor,
    *,
    bounds: Sequence[int],
    starts: Sequence[int],
    masked_id: int,
    pixels: torch.Tensor,
    topology: Topology | None = None,
    source: int = 0,
    num_real: int | None = None,
) -> PackedBatch:
    """Return a micro-batch as this process holds it; without a topology, as a single process does.

    Args:
        ids: [t]; each token's label is the next token.
        bounds: boundaries of the documents, from 0 to t.
        starts: position of each image's first feature token.
        masked_id: the token that the loss mask excludes as a label.
        pixels: pixels of all images.
        num_real: number of tokens that are not padding; None for all.
    """
    total, cu_seqlens = len(ids), torch.tensor(bounds, dtype=torch.int32)
    real = torch.arange(total) < (total if num_real is None else num_real)
    labels, mask = ids.roll(-1), real.float()
    mask[cu_seqlens[1:].long() - 1] = 0
    mask[labels == masked_id] = 0
    image_starts = torch.tensor(starts, dtype=torch.int64)
    owners = torch.arange(len(starts)) % (topology.tensor_size if topology else 1)
    mine = owners == (topology.tensor_rank if topology else 0)
    return PackedBatch(
        token_ids=ids,
        labels=labels,
        loss_mask=mask,
        is_token=real,
        position_ids=torch.cat([torch.arange(length) for length in cu_seqlens.diff().tolist()]),
        source_ids=torch.full((total,), source),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        image_starts=image_starts,
        image_owners=owners,
        image_documents=documents_of_images(image_starts, cu_seqlens=cu_seqlens),
        pixels=pixels[mine] if topology is None or topology.is_first_stage else None,
    )


def random_step(experiment: Experiment, topology: Topology, *, step: int) -> list[PackedBatch]:
    """This process's micro-batches of a step."""
    return step_of(random_batch, experiment, topology, step=step)


def step_of(batch: Callable[..., PackedBatch], experiment: Experiment, topology: Topology, *, step: int) -> list[PackedBatch]:
    """This process's micro-batches of a step.

    Args:
        batch: (experiment, topology, number=...) -> micro-batch `number` of a run.
    """
    count = experiment.num_micro_batches(topology.data_size)
    first = 1000 * step + topology.data_rank
    spread = experiment.parallel.spread_encoder
    with_pixels = replace(topology, pipeline_rank=0) if spread else topology
    batches = [batch(experiment, with_pixels, number=first + index * topology.data_size) for index in range(count)]
    return _spread_pixels(batches, topology) if spread else batches


def _spread_pixels(batches: list[PackedBatch], topology: Topology) -> list[PackedBatch]:
    """Turn a first stage's micro-batches into those of this pipeline rank if all ranks encode (`parallel.spread_encoder`)."""
    stages = encoding_stages([batch.image_owners.numpy() for batch in batches], stages=topology.pipeline_size)
    spread = []
    for batch, stage in zip(batches, map(torch.from_numpy, stages), strict=True):
        assert batch.pixels is not None
        mine = stage[batch.image_owners == topology.tensor_rank] == topology.pipeline_rank
        spread.append(replace(batch, image_stages=stage, pixels=batch.pixels[mine]))
    return spread


def small_run(data: Path, *, parallel: dict[str, Any] | None = None, **train: Any) -> Experiment:
    """Return `small_experiment` on demo data, without evaluation or W&B."""
    experiment = small_experiment(decoder={"vocab_size": 512, "num_layers": 4}, parallel=parallel, **{"global_batch_size": 2, **train})
    return replace(
        experiment,
        data=replace(experiment.data, path=data, packing_window=64),
        eval=replace(experiment.eval, interval=0),
        monitor=replace(experiment.monitor, wandb="disabled"),
        checkpoint=replace(experiment.checkpoint, interval=1000),
    )

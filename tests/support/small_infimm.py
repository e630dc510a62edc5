"""A small InfiMM that has every part of a large one, and batches for it: documents with several images, with one, and with none."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import DecoderConfig, Experiment, ParallelConfig, ResamplerConfig
from megatron_mm.config.towers import EVA_TINY
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.infimm.config import GatedConfig, InfiMMConfig
from megatron_mm.parallel.topology import Topology
from support.small import packed_batch, small_experiment, step_of, tokens_of

END_OF_CHUNK_ID, IMAGE_ID = 3, 4
IMAGES_OF_MICRO_BATCHES = (0, 1, 6)
"""Images of successive micro-batches: none, one (so that one of two tensor-parallel processes has none), six."""


def small_infimm(
    *,
    decoder: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    policy: str = "ift",
    **train: Any,
) -> Experiment:
    """Return 4 layers of width 64, a gated block per 2 layers; 2 resampler layers, 8 latents per image; 4 micro-batches of 96 tokens.

    Args:
        decoder, parallel, model, train: fields to change.
    """
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "head_dim": 8,
        "vocab_size": 128,
        "tied_embeddings": False,
        **(decoder or {}),
    }
    base = small_experiment(parallel=parallel, freeze_policy=policy, **train)
    parts = {
        "decoder": DecoderConfig(**fields),
        "vision": replace(EVA_TINY, hidden_size=32, num_attention_heads=4, ffn_hidden_size=40, image_size=16),
        "resampler": ResamplerConfig(num_latents=8, num_layers=2, num_attention_heads=4, head_dim=8),
        "gated": GatedConfig(every_n_layers=2, num_attention_heads=4, head_dim=8),
        **(model or {}),
    }
    return replace(base, model=InfiMMConfig(**parts), parallel=ParallelConfig(**(parallel or {})))


def infimm_batch(experiment: Experiment, topology: Topology, *, number: int, num_images: int | None = None) -> PackedBatch:
    """Return micro-batch `number` of a run, the same in every layout: random words and pictures, up to three images per document."""
    generator = torch.Generator().manual_seed(number)
    total = tokens_of(experiment, number=number)
    ids = torch.randint(5, experiment.model.decoder.vocab_size, (total,), generator=generator)
    bounds = [0]
    while bounds[-1] < total:
        bounds.append(min(total, bounds[-1] + int(torch.randint(12, 30, (1,), generator=generator))))
    wanted = IMAGES_OF_MICRO_BATCHES[number % len(IMAGES_OF_MICRO_BATCHES)] if num_images is None else num_images
    starts: list[int] = []
    for begin, end in itertools.pairwise(bounds):
        places = range(begin + 4, end - 3, 6)[:3]
        if begin == 0 and wanted < 6:
            continue  # the first document has no image
        starts += list(places)[: wanted - len(starts)]
    for start in starts:
        ids[start - 1], ids[start] = END_OF_CHUNK_ID, IMAGE_ID
    size = experiment.model.vision.image_size  # type: ignore[attr-defined]
    pixels = torch.randint(0, 256, (len(starts), 3, size, size), generator=generator, dtype=torch.uint8)
    return packed_batch(ids, bounds=bounds, starts=starts, masked_id=IMAGE_ID, pixels=pixels, topology=topology, source=number % 2)


def infimm_step(experiment: Experiment, topology: Topology, *, step: int) -> list[PackedBatch]:
    """This process's micro-batches of a step."""
    return step_of(infimm_batch, experiment, topology, step=step)


def infimm_run(data: Path, *, parallel: dict[str, Any] | None = None, policy: str = "ift", **train: Any) -> Experiment:
    """Return `small_infimm` on demo data, without evaluation or W&B."""
    experiment = small_infimm(decoder={"vocab_size": 520}, parallel=parallel, policy=policy, **{"global_batch_size": 2, **train})
    return replace(
        experiment,
        data=replace(experiment.data, path=data, packing_window=64, max_images_per_document=6),
        eval=replace(experiment.eval, interval=0),
        monitor=replace(experiment.monitor, wandb="disabled"),
        checkpoint=replace(experiment.checkpoint, interval=1000),
    )

"""A small Mono-InternVL that has every part of a large one, and batches for it: without tiles, with some, and of tiles alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_mm.config import DecoderConfig, Experiment, ParallelConfig
from megatron_mm.data.batch import PackedBatch
from megatron_mm.families.mono_internvl.config import MonoInternVLConfig, PatchEmbeddingConfig
from megatron_mm.parallel.topology import Topology
from support.small import packed_batch, small_experiment, tokens_of

IMG_ID, END_IMG_ID, CONTEXT_ID = 2, 3, 4
TILE_TOKENS = 16
TILES_OF_MICRO_BATCHES = (0, 1, 4, None)
"""Tiles of successive micro-batches: none, one, several; None fills the micro-batch with tiles alone."""


def small_mono(
    *, decoder: dict[str, Any] | None = None, parallel: dict[str, Any] | None = None, policy: str = "s2", **train: Any
) -> Experiment:
    """Return 4 layers of width 64; tiles of 32 px are 8 x 8 patches and 16 tokens; 4 micro-batches of 96 tokens.

    Args:
        decoder, parallel, train: fields to change.
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
        "rotary_base": 1e6,
        **(decoder or {}),
    }
    base = small_experiment(parallel=parallel, freeze_policy=policy, **train)
    model = MonoInternVLConfig(
        decoder=DecoderConfig(**fields), patches=PatchEmbeddingConfig(image_size=32, patch_size=4, hidden_size=24, position_grid=8)
    )
    return replace(base, model=model, parallel=ParallelConfig(**(parallel or {})))


def mono_run(data: Path, *, parallel: dict[str, Any] | None = None, **train: Any) -> Experiment:
    """Return `small_mono` on demo data, without evaluation or W&B."""
    experiment = small_mono(decoder={"vocab_size": 528}, parallel=parallel, **{"global_batch_size": 2, **train})
    return replace(
        experiment,
        data=replace(experiment.data, path=data, packing_window=64),
        eval=replace(experiment.eval, interval=0),
        monitor=replace(experiment.monitor, wandb="disabled"),
        checkpoint=replace(experiment.checkpoint, interval=1000),
    )


def mono_batch(experiment: Experiment, topology: Topology, *, number: int) -> PackedBatch:
    """Return micro-batch `number` of a run, the same in every layout: random words and tiles."""
    generator = torch.Generator().manual_seed(number)
    total = tokens_of(experiment, number=number)
    ids = torch.randint(5, experiment.model.decoder.vocab_size, (total,), generator=generator)
    wanted = TILES_OF_MICRO_BATCHES[number % len(TILES_OF_MICRO_BATCHES)]
    if wanted is None:
        bounds, starts = [0, total], list(range(0, total, TILE_TOKENS))
    else:
        bounds, starts = _documents(total, wanted, generator)
    for start in starts:
        ids[start : start + TILE_TOKENS] = CONTEXT_ID
        if wanted is not None:
            ids[start - 1], ids[start + TILE_TOKENS] = IMG_ID, END_IMG_ID
    size = experiment.model.patches.image_size  # type: ignore[attr-defined]
    pixels = torch.randint(0, 256, (len(starts), 3, size, size), generator=generator, dtype=torch.uint8)
    return packed_batch(ids, bounds=bounds, starts=starts, masked_id=CONTEXT_ID, pixels=pixels, topology=topology, source=number % 2)


def _documents(total: int, wanted: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Return the boundaries of documents and the starts of tiles, at most one per document."""
    bounds = [0]
    while bounds[-1] < total:
        bounds.append(min(total, bounds[-1] + int(torch.randint(TILE_TOKENS + 4, 30, (1,), generator=generator))))
    fitting = [begin + 2 for begin, end in itertools.pairwise(bounds) if end - begin > TILE_TOKENS + 3]
    return bounds, fitting[:wanted]


def mono_step(experiment: Experiment, topology: Topology, *, step: int) -> list[PackedBatch]:
    """This process's micro-batches of a step."""
    count = experiment.num_micro_batches(topology.data_size)
    first = 1000 * step + topology.data_rank
    return [mono_batch(experiment, topology, number=first + index * topology.data_size) for index in range(count)]

"""Greedy generation in the training layout, for a few captions now and then.

The prompts go through megatron-core's pipeline schedule as the documents of one packed micro-batch, forward only and without a
key/value cache: every new token costs a whole forward pass, in exchange for running under every layout that trains. For
serious generation export the model (`megatron-mm convert to-hf`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_mm.config import FP8_MULTIPLE, Experiment
from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.data.plan.plan import image_owners
from megatron_mm.families.registry import pipeline_rows
from megatron_mm.parallel.topology import Topology


@dataclass(frozen=True)
class Prompt:
    """What to continue."""

    ids: list[int]
    """Token ids, image places included."""
    image_starts: list[int]
    """Place of the first token of each image's features in ids."""
    pixels: torch.Tensor
    """[images, 3, H, W] uint8."""


@torch.no_grad()
def generate(
    experiment: Experiment,
    chunks: list[torch.nn.Module],
    topology: Topology,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
) -> list[list[int]]:
    """Continue prompts by the likeliest token until eos_id or max_new_tokens; every process calls it with the same prompts.

    Returns the new ids of each prompt, without eos_id, on every process.
    """
    generated: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for chunk in chunks:
        chunk.eval()
    try:
        for _ in range(max_new_tokens):
            batch = _pack([[*p.ids, *new] for p, new in zip(prompts, generated, strict=True)], prompts, topology, pad_id=pad_id)
            last_places = batch.cu_seqlens[1 : len(prompts) + 1].long() - 1
            tokens = _next_tokens(experiment, chunks, topology, batch, last_places)
            for index, token in enumerate(tokens):
                finished[index] = finished[index] or token == eos_id
                if not finished[index]:
                    generated[index].append(token)
            if all(finished):
                break
    finally:
        for chunk in chunks:
            chunk.train()
    return generated


def _pack(documents: list[list[int]], prompts: list[Prompt], topology: Topology, *, pad_id: int) -> PackedBatch:
    """All documents in one row, padded to a multiple of the tensor-parallel size, and of what FP8 products take."""
    total = sum(len(document) for document in documents)
    padding = -total % (FP8_MULTIPLE * topology.tensor_size)
    ids = torch.tensor([token for document in documents for token in document] + [pad_id] * padding)
    lengths = [len(document) for document in documents] + [padding] * bool(padding)
    starts, offset = [], 0
    for document, prompt in zip(documents, prompts, strict=True):
        starts += [offset + start for start in prompt.image_starts]
        offset += len(document)
    image_starts = torch.tensor(starts, dtype=torch.int64)
    owners = torch.from_numpy(image_owners(len(starts), topology.tensor_size))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    pixels = torch.cat([prompt.pixels for prompt in prompts])
    return PackedBatch(
        token_ids=ids,
        labels=ids,
        loss_mask=torch.zeros(len(ids)),
        is_token=torch.arange(len(ids)) < total,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        source_ids=torch.zeros_like(ids),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        image_starts=image_starts,
        image_owners=owners,
        image_documents=documents_of_images(image_starts, cu_seqlens=cu_seqlens),
        pixels=pixels[owners == topology.tensor_rank] if topology.is_first_stage else None,
    ).to(topology.device)


def _next_tokens(
    experiment: Experiment, chunks: list[torch.nn.Module], topology: Topology, batch: PackedBatch, places: torch.Tensor
) -> list[int]:
    """The likeliest token after each place, known to every process."""
    rows = pipeline_rows(experiment, batch)

    def forward_step(batches: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[Any, ...]:
        return chunk(next(batches), pipeline_rows=rows, with_loss=False), lambda logits, non_loss_data=True: _likeliest(logits, places)

    # The interleaved schedule wants as many micro-batches as stages; all but the first repeat it.
    copies = topology.pipeline_size if topology.virtual_size > 1 else 1
    iterators = [iter([batch] * copies) for _ in chunks]
    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=copies,
        seq_length=rows,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    tokens = torch.zeros(len(places), dtype=torch.int64, device=topology.device)
    if topology.reports_loss and topology.data_rank == 0:
        tokens += found[0]
    dist.all_reduce(tokens)
    return tokens.tolist()


def _likeliest(logits_1tv: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[places] ids, from the logits [1, t, vocabulary / tensor] that each tensor-parallel process has."""
    group = parallel_state.get_tensor_model_parallel_group()
    best, ids = logits_1tv[0, places.to(logits_1tv.device)].float().max(dim=-1)
    ids = ids + group.rank() * logits_1tv.shape[-1]
    all_best = [torch.empty_like(best) for _ in range(group.size())]
    all_ids = [torch.empty_like(ids) for _ in range(group.size())]
    dist.all_gather(all_best, best, group=group)
    dist.all_gather(all_ids, ids, group=group)
    winner = torch.stack(all_best).argmax(dim=0)
    return torch.stack(all_ids).gather(0, winner[None])[0]

"""Micro-batches like the loader's, made from the planner's workload, with document bounds, image positions, owners and pixels. All token
ids are equal."""

from __future__ import annotations

import torch

from megatron_mm.config import Experiment
from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.families.registry import family_of
from megatron_mm.parallel.topology import Topology
from megatron_mm.planning.workload import MicroBatch


def packed_batch(experiment: Experiment, micro: MicroBatch, topology: Topology, *, device: torch.device) -> PackedBatch:
    """Make a micro-batch of documents of equal length. Images are distributed over them and placed one after another from a document's
    start."""
    image = family_of(experiment.model).image_input(experiment.model)
    total = micro.tokens
    documents = max(1, round(total * total / max(1, micro.sum_squared_lengths)))
    room = max(1, (total // documents - 2) // (image.tokens + 1))
    if micro.images:
        documents = max(1, min(documents, total // (image.tokens + 3)))
        while documents > 1 and documents * max(1, (total // documents - 2) // (image.tokens + 1)) < micro.images:
            documents -= 1
        room = max(1, (total // documents - 2) // (image.tokens + 1))
    bounds = [total * number // documents for number in range(documents + 1)]
    starts = []
    for number in range(micro.images):
        document, place = divmod(number, room) if micro.images > documents else (number, 0)
        starts.append(bounds[min(document, documents - 1)] + 1 + place * (image.tokens + 1))
    image_starts = torch.tensor(sorted(starts), dtype=torch.int64)
    owners = torch.arange(len(starts)) % topology.tensor_size
    owned = int((owners == topology.tensor_rank).sum())
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    pixels = torch.zeros((owned, 3, image.size, image.size), dtype=torch.uint8, device=device) if topology.is_first_stage else None
    return PackedBatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        labels=torch.zeros(total, dtype=torch.int64),
        loss_mask=torch.ones(total),
        is_token=torch.ones(total, dtype=torch.bool),
        position_ids=torch.zeros(total, dtype=torch.int64),
        source_ids=torch.zeros(total, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        image_starts=image_starts,
        image_owners=owners,
        image_documents=documents_of_images(image_starts, cu_seqlens=cu_seqlens),
        pixels=pixels,
    )

"""Puts the data of a micro-batch at the positions in its layout: first everything except the texts, which may arrive later from another
process."""

from __future__ import annotations

import numpy as np
import torch

from megatron_mm.data.batch import PackedBatch, documents_of_images
from megatron_mm.data.plan.layout import Layout


def batch_without_texts(layout: Layout, *, pixels: torch.Tensor | None, stages: np.ndarray | None, pad_id: int) -> PackedBatch:
    """Return a micro-batch on the CPU in which all tokens are still padding.

    Args:
        pixels: pixels of the images that this process encodes; None if it does not encode images.
        stages: [images] `PackedBatch.image_stages`.
    """
    cu_seqlens, image_starts = torch.from_numpy(layout.cu_seqlens), torch.from_numpy(layout.image_starts)
    padding = torch.full((len(layout.loss_mask),), pad_id, dtype=torch.int64)
    return PackedBatch(
        token_ids=padding,
        labels=padding.clone(),
        loss_mask=torch.from_numpy(layout.loss_mask),
        is_token=torch.from_numpy(layout.is_token),
        position_ids=torch.from_numpy(layout.position_ids),
        source_ids=torch.from_numpy(layout.source_ids),
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        image_starts=image_starts,
        image_owners=torch.from_numpy(layout.image_owners),
        image_documents=documents_of_images(image_starts, cu_seqlens=cu_seqlens),
        pixels=pixels,
        image_stages=None if stages is None else torch.from_numpy(stages),
    )


def put_texts(batch: PackedBatch, layout: Layout, texts: np.ndarray, *, pad_id: int) -> None:
    """Write token ids and labels into a micro-batch. A piece whose text could not be used is masked out of the loss.

    Args:
        texts: int32: the token ids of the micro-batch, followed by a flag for each piece of its layout: 1 if its text could be used.
    """
    ids, mask, labels = batch.token_ids.numpy(), batch.loss_mask.numpy(), batch.labels.numpy()
    ids[:], usable = texts[: len(ids)], texts[len(ids) :]
    for piece, good in zip(layout.pieces, usable.tolist(), strict=True):
        if not good:
            mask[piece.place : piece.stop] = 0
    labels[:-1], labels[-1] = ids[1:], ids[0]
    labels[mask == 0] = pad_id

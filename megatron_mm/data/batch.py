"""PackedBatch: one micro-batch of one data-parallel rank, as the model sees it.

The packed sequences of a micro-batch follow each other, without padding between them, in ONE row of T tokens: the sum of their lengths,
rounded up to a multiple that sequence parallelism and FP8 need (`Experiment.token_multiple`). `cu_seqlens` contains the boundaries of
documents. A document never attends to another, so it does not matter where one sequence ends and the next begins.

    token_ids   <s>  IMG IMG IMG IMG a red ball </s> | <s> the sky </s> | PAD PAD
    labels       _    _   _   _   a red ball </s>  _ | the sky </s>  _  |  _   _
    loss_mask    0    0   0   0   1  1   1   1    0  |  1   1   1    0  |  0   0
    cu_seqlens  0                                    9                 13     15

A label is the next token of the same document. If that is an image token, a padding token, or the first token of another document, the loss
mask is 0 and the label is the padding token (`_`). Padding, if any, is the last document.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from megatron_mm.platform.device import pinned


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. Every pipeline stage gets the integers; only stages that encode images get pixels."""

    token_ids: torch.Tensor
    """[T] int64."""
    labels: torch.Tensor
    """[T] int64; the padding id where loss_mask is 0."""
    loss_mask: torch.Tensor
    """[T] float32: 1 where the label is supervised. Every pipeline stage knows it, because it follows from the plan."""
    is_token: torch.Tensor
    """[T] bool: False for padding."""
    position_ids: torch.Tensor
    """[T] int64: counted from 0 in every document."""
    source_ids: torch.Tensor
    """[T] int64: number, within the mixture, of the source of each token's sequence."""
    cu_seqlens: torch.Tensor
    """[num_documents + 1] int32: document boundaries, from 0 to T."""
    max_seqlen: int
    """Number of tokens in the longest document."""
    image_starts: torch.Tensor
    """[num_images] int64: the position in [0, T) of the first token of each image's features, in rising order. The features take
    `ImageInput.tokens` consecutive positions; the control tokens before and after them are ordinary tokens. If images are cut into
    tiles, every tile is an image here and in all other fields; the tiles of one image follow each other."""
    image_owners: torch.Tensor
    """[num_images] int64: the tensor-parallel rank that decodes and encodes each image."""
    image_documents: torch.Tensor
    """[num_images, 2] int64: begin and end of the document that contains each image (`documents_of_images`)."""
    pixels: torch.Tensor | None
    """[num_owned, 3, H, W] uint8, RGB: this rank's images, in the order of `image_starts`; num_owned may be 0. The tower
    normalises them on its device. None on a rank that does not hold the encoder."""
    image_stages: torch.Tensor | None = None
    """[num_images] int64: the pipeline rank that encodes each image, if all of them encode (`parallel.spread_encoder`); `pixels` then
    holds only this rank's images. None if the first pipeline rank encodes all images."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def num_images(self) -> int:
        return self.image_starts.numel()

    def to(self, device: torch.device) -> PackedBatch:
        """Copy the batch to a device. Fields named `image_...` stay on the CPU, where indices are computed from them."""
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self._moving().items()})  # type: ignore[arg-type]

    def pinned(self) -> PackedBatch:
        """Copy the batch to pinned memory, so that `to` does not block. Pixels that were decoded on the GPU stay there."""
        return replace(self, **{name: pinned(value) for name, value in self._moving().items()})  # type: ignore[arg-type]

    def _moving(self) -> dict[str, torch.Tensor]:
        return {
            f.name: value
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor) and not f.name.startswith("image_")
        }


def documents_of_images(image_starts: torch.Tensor, *, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Compute `PackedBatch.image_documents` from two other fields, on the CPU.

    Worked example: documents at 0..8, 9..12 and 13..14, images at 1 and 9: [[0, 9], [9, 13]].
    """
    bounds = cu_seqlens.long()
    number = torch.searchsorted(bounds, image_starts, right=True)
    return torch.stack([bounds[number - 1], bounds[number]], dim=1)

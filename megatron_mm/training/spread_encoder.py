"""Spreads the image encoder: every pipeline rank encodes a share of a step's images before the pipeline begins.

    rank 0   encode | receive features | F0 F1 B0 F2 B1 ...  | send gradients | backward of the encoder
    rank 1   encode | send features    |    F0 B0 F1 B1 ...  | receive them   | backward of the encoder

If only the first stage encodes, the other stages wait for it at every micro-batch with many images. Here all ranks encode equally many
images, many at a time. The plan tells all processes which rank encodes which image, so messages need no sizes. The encoder is replicated on
all processes of the run: its gradients are reduced over all of them, and a distributed optimizer shards its state over all of them.

Worked example: 2 pipeline ranks, and 3 images of one tensor-parallel rank in two micro-batches. Rank 0 encodes images 0 and 1 of the first
micro-batch, and rank 1 encodes image 2 of the second. Rank 1 sends the features of image 2 to rank 0, whose first stage gets [0, 1] with
the first micro-batch and [2] with the second, as leaves of the graph. After the pipeline, rank 0 sends the gradient of leaf [2] back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_mm.config.parallel import IMAGES_AT_ONCE
from megatron_mm.data.batch import PackedBatch
from megatron_mm.models.encoder import ImageEncoder
from megatron_mm.platform.device import send


@dataclass
class _Encoded:
    """The tensors of a step that are kept for the encoder's backward pass."""

    own: list[torch.Tensor]
    """This process's features, with their graphs."""
    leaves: list[torch.Tensor]
    """On the first stage, for each micro-batch: all features of this tensor-parallel rank's share."""
    order: torch.Tensor
    """On the first stage, on the device: position of each of these features in the concatenation over pipeline ranks 0, 1, ..."""
    counts: list[int]
    """Images that each pipeline rank encoded for this tensor-parallel rank."""


def spread_encoder(model: Sequence[torch.nn.Module]) -> SpreadEncoder | None:
    """Return the spread encoder of this process, or None if the encoder is part of the first stage."""
    chunk = getattr(model[0], "module", model[0])
    found: SpreadEncoder | None = getattr(chunk, "spread_encoder", None)
    return found


def wrapped_modules(model: Sequence[DistributedDataParallel]) -> list[DistributedDataParallel]:
    """Return all modules of this process that hold parameters: its pipeline chunks, and the spread encoder if there is one."""
    spread = spread_encoder(model)
    return [*model] if spread is None else [*model, spread.wrapped]


class SpreadEncoder:
    """The image encoder that every process holds, on any pipeline stage."""

    def __init__(self, wrapped: DistributedDataParallel, *, tensor_rank: int) -> None:
        """
        Args:
            wrapped: an `ImageEncoder`, wrapped for data parallelism over all processes.
        """
        self.wrapped = wrapped
        self.tensor_rank = tensor_rank
        self.trained = any(parameter.requires_grad for parameter in wrapped.module.parameters())
        """True if any parameter is trainable, so gradients must be sent back; the same on all processes."""
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
        """Context manager that times a phase (`training.phases`)."""
        self._waiting: _Encoded | None = None

    @property
    def encoder(self) -> ImageEncoder:
        encoder = self.wrapped.module
        assert isinstance(encoder, ImageEncoder)
        return encoder

    def encode(self, batches: Sequence[PackedBatch], *, device: torch.device) -> list[torch.Tensor | None]:
        """Encode this process's images of a training or validation step, and send all features to the first stage.

        Args:
            batches: the micro-batches of a step, with `image_stages`.

        Returns:
            For each micro-batch, on the first stage the features [num_owned, tokens, width] of all images that this tensor-parallel rank
            owns; on other stages None.
        """
        group = parallel_state.get_pipeline_model_parallel_group()
        with self.phase("encoder"):
            own = [self.encoder(pixels) for pixels in self._pixels(batches, device)]
        stages = [self._stages(batch) for batch in batches]
        every = torch.cat(stages)
        counts = torch.bincount(every, minlength=group.size()).tolist()
        with self.phase("p2p"):
            features = self._gather(own, counts, group, device)
        if features is None:
            self._waiting = _Encoded(own, [], every, counts) if torch.is_grad_enabled() else None
            return [None] * len(batches)
        order = torch.empty_like(every)
        order[every.argsort(stable=True)] = torch.arange(len(every))
        order = send(order, device)
        placed = features.index_select(0, order)
        needed = torch.is_grad_enabled() and self.trained
        leaves = [part.detach().clone().requires_grad_(needed) for part in placed.split([len(part) for part in stages])]
        self._waiting = _Encoded(own, leaves, order, counts) if torch.is_grad_enabled() else None
        return list(leaves)

    def backward(self) -> None:
        """After the pipeline's last backward pass, send each gradient to the rank that encoded the image, and run the encoder's backward
        pass. A second call does nothing."""
        encoded, self._waiting = self._waiting, None
        if encoded is None or not self.trained:
            return
        group = parallel_state.get_pipeline_model_parallel_group()
        with self.phase("p2p"):
            gradients = self._scatter(encoded, group)
        at = 0
        with self.phase("encoder"):
            for features in encoded.own:
                features.backward(gradients[at : at + len(features)])
                at += len(features)

    # ------------------------------------------------------------------------------------------------------------- messages

    def _pixels(self, batches: Sequence[PackedBatch], device: torch.device) -> Iterator[torch.Tensor]:
        """Yield this process's images of all micro-batches, a few at a time, on its device."""
        shares = [batch.pixels for batch in batches if batch.pixels is not None and len(batch.pixels)]
        # Each is copied from its own pinned memory: concatenated first, they would be in unpinned memory, and the copy would block.
        found = [pixels.to(device, non_blocking=True) for pixels in shares]
        yield from torch.cat(found).split(IMAGES_AT_ONCE) if found else ()

    def _stages(self, batch: PackedBatch) -> torch.Tensor:
        """Return [num_owned]: for each image of this tensor-parallel rank, the pipeline rank that encodes it."""
        assert batch.image_stages is not None, "the loader assigns images to stages"
        return batch.image_stages[batch.image_owners == self.tensor_rank]

    def _gather(self, own: list[torch.Tensor], counts: list[int], group: dist.ProcessGroup, device: torch.device) -> torch.Tensor | None:
        """Return all features [sum of counts, tokens, width], in the order of pipeline ranks, on the first stage; None elsewhere."""
        rank = group.rank()
        mine = torch.cat([features.detach() for features in own]) if own else self._empty(0, device)
        assert len(mine) == counts[rank], f"{len(mine)} images were encoded, but {counts[rank]} were planned"
        if rank:
            _run([dist.P2POp(dist.isend, mine.contiguous(), group=group, group_peer=0)] if len(mine) else [])
            return None
        parts = [mine, *(self._empty(count, device) for count in counts[1:])]
        _run([dist.P2POp(dist.irecv, part, group=group, group_peer=peer) for peer, part in enumerate(parts) if peer and len(part)])
        return torch.cat(parts)

    def _scatter(self, encoded: _Encoded, group: dist.ProcessGroup) -> torch.Tensor:
        """Send each pipeline rank its gradients, and return the gradients of this process's features."""
        rank, device = group.rank(), self._device
        if rank:
            gradients = self._empty(encoded.counts[rank], device)
            _run([dist.P2POp(dist.irecv, gradients, group=group, group_peer=0)] if len(gradients) else [])
            return gradients
        found = torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in encoded.leaves])
        ordered = torch.empty_like(found)
        ordered.index_copy_(0, encoded.order, found)
        parts = ordered.split(encoded.counts)
        _run(
            [
                dist.P2POp(dist.isend, part.contiguous(), group=group, group_peer=peer)
                for peer, part in enumerate(parts)
                if peer and len(part)
            ]
        )
        return parts[0]

    @property
    def _device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def _empty(self, count: int, device: torch.device) -> torch.Tensor:
        return torch.empty(count, self.encoder.tokens, self.encoder.width, dtype=self.encoder.dtype, device=device)


def _run(messages: list[dist.P2POp]) -> None:
    for request in dist.batch_isend_irecv(messages) if messages else ():
        request.wait()

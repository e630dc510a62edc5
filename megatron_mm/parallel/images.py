"""Images are encoded once: the processes of a tensor-parallel group each encode a share and gather the features.

The encoder is not split: every process of the group has all of it and runs it on its own images. The gradient of an encoder weight is
therefore the sum of the gradients of all processes of the group (`parallel.gradients` computes it).

Worked example: tensor parallel 2, owners = [0, 1, 0]. Process 0 holds features [A, C], process 1 holds [B]. Both are padded
to two rows, gathered to [A, C, B, -], and row owner * 2 + (how many earlier images the owner has) = [0, 2, 1] puts them in
order: [A, B, C]. In the backward pass each process gets the gradients of its own rows back.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_mm.platform.device import send


class TensorParallelImages:
    """`models.context.ImageSharing` over a tensor-parallel group."""

    def __init__(self, group: dist.ProcessGroup, *, sequence_parallel: bool) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel

    def gather(self, owned: torch.Tensor, *, owners: torch.Tensor) -> torch.Tensor:
        """See `ImageSharing.gather`."""
        size = self.group.size()
        counts = torch.bincount(owners, minlength=size)
        rows = max(1, int(counts.max()))
        order = torch.zeros_like(owners)
        for rank in range(size):
            mine = owners == rank
            order[mine] = rank * rows + torch.arange(int(counts[rank]))
        padded = F.pad(owned, (0, 0, 0, 0, 0, rows - owned.shape[0]))
        if size > 1:
            # Under sequence parallelism each process uses the features only for its own tokens, so the gradient of a feature
            # is the sum over the group; otherwise every process already has the whole of it.
            padded = gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=self.sequence_parallel, group=self.group)
        return padded.index_select(0, send(order, owned.device))

    def local_tokens(self, num_tokens: int) -> range:
        """See `ImageSharing.local_tokens`."""
        if not self.sequence_parallel:
            return range(num_tokens)
        share = num_tokens // self.group.size()
        return range(self.group.rank() * share, (self.group.rank() + 1) * share)

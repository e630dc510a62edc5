"""The end of the backward pass: reductions between processes, and one division by the number of tokens in the global batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed import finalize_model_grads as megatron_finalize

_BUCKET_ELEMENTS = 1 << 25
"""Number of gradient elements that are added up in one message: 128 MiB of float32."""


class Beside(Protocol):
    """A module outside the pipeline, whose backward pass follows the pipeline's (`training.spread_encoder`)."""

    wrapped: DistributedDataParallel

    def backward(self) -> None: ...


def finalize_model_grads(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, *, beside: Beside | None = None, **kwargs: object
) -> None:
    """megatron-core's reductions, then the division by the number of tokens, then the sum of the encoder's gradients over the tensor group.

    The order does not affect the result (a sum of quotients is the quotient of the sum); this one keeps megatron-core's own work together.
    """
    if beside is not None:
        beside.backward()
    megatron_finalize(model, None, **kwargs)
    if beside is not None:
        beside.wrapped.finish_grad_sync()
    if num_tokens is not None:
        _divide(model if beside is None else [*model, beside.wrapped], num_tokens)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        encoder = (p for chunk in model for p in chunk.parameters() if getattr(p, "encodes_shares", False) and p.requires_grad)
        for bucket in _buckets(p.main_grad for p in encoder):  # type: ignore[attr-defined]
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat, group=group)
            for grad, summed in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(summed.view_as(grad))


def _divide(model: list[torch.nn.Module], num_tokens: torch.Tensor) -> None:
    """Divide all gradients by the number of tokens in the global batch. The last pipeline stage of each data-parallel copy knows its share.

    megatron-core could do so, too, but it first checks whether there are any tokens (0.16.1), which makes the host wait for the device.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(num_tokens, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))  # type: ignore[operator]


def _buckets(grads: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for grad in grads:
        bucket.append(grad)
        if sum(g.numel() for g in bucket) >= _BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket

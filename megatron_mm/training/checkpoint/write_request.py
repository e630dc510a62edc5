"""What is added to megatron-core's request to write a checkpoint in the background."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_mm.platform import writer_locks
from megatron_mm.training.checkpoint import integrity

logger = logging.getLogger(__name__)


def with_checksums(request: AsyncRequest, partial: Path, *, rank: int) -> AsyncRequest:
    """Return the same request, but let the writing process (not the training process) also write checksums of the files it wrote."""
    write = request.async_fn
    if no_locks := writer_locks.problem():
        logger.warning(
            "rank %d: /dev/shm does not support locks (%s), so a single process writes its checkpoint files: free some space there",
            rank,
            no_locks,
        )

    def write_and_sum(*args: Any, **kwargs: Any) -> None:
        if write is not None:
            with writer_locks.threads_where_there_are_no_locks():
                write(*args, **kwargs)
        try:
            integrity.write_checksums(partial, rank=rank)
        except OSError as error:  # the first process finds the checksums missing and abandons the save
            logger.error("rank %d: the checksums of its checkpoint files cannot be written: %s", rank, error)

    return request._replace(async_fn=write_and_sum, finalize_fns=list(request.finalize_fns))

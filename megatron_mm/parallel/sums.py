"""One message for all sums of a step."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


def sum_over_processes(*values: torch.Tensor) -> list[np.ndarray]:
    """Add up tensors over all processes in one message, and wait for the result: arrays of the same shapes, equal on all processes.

    Args:
        values: float64, on the device of this process, of the same shapes on all.
    """
    message = torch.cat([value.flatten() for value in values])
    dist.all_reduce(message)
    parts = np.split(message.cpu().numpy(), np.cumsum([value.numel() for value in values])[:-1])
    return [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]

"""The device of this process and the communication backend that goes with it: the one place that asks for CUDA."""

from __future__ import annotations

import os

import torch


def local_device() -> torch.device:
    """The GPU of this process (by LOCAL_RANK) where CUDA is available, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """NCCL between GPUs, with gloo beside it for CPU tensors; gloo alone otherwise."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device, without waiting for what the device still does: by way of pinned memory on a GPU."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

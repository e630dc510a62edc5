"""Host memory that a save's tensors are copied to from a GPU, and from which a forked process writes them.

megatron-core allocates pinned memory for this in every save, at 1.4 GB/s in one thread on the machine of docs/gpu.md; the copies themselves
take 55 GB/s. Here the memory is kept from one save to the next, so only the first save waits for it, and several threads touch it first.

It is shared, not private: a fork copies pinned pages that are private at once. The writer reads it until it has ended, and a save starts
only after that.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

logger = logging.getLogger(__name__)

_ALIGNMENT = 256
_THREADS = 8

Bucket = tuple[Any, Any, tuple[Any, Sequence[tuple[Any, torch.Tensor]]]]
"""megatron-core's `WriteBucket`: path and name of a file, and its contents: (objects, (write item, tensor) pairs)."""


class Staging:
    """Stages tensors of a device; others stay where they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: mmap.mmap | None = None
        self._unpin: weakref.finalize[..., Staging] | None = None
        """Set while the memory is pinned. It is called at the latest when this object is dropped, before the memory is."""

    def of(self, request: AsyncRequest) -> AsyncRequest:
        """Return the same request, but stage its tensors here. The request of a process without files to write is returned as it is."""
        if request.preload_fn is None:
            return request
        buckets: Sequence[Bucket] = request.async_fn_args[1]  # megatron-core replaces them with what `preload_fn` returns
        anew = request.preload_fn

        def stage() -> Any:
            try:
                return self.stage(buckets)
            except OSError as error:  # `mmap` found no room
                logger.warning("host memory for saves cannot be kept (%s): each save allocates it anew", error)
                return anew()

        return request._replace(preload_fn=stage)

    def stage(self, buckets: Sequence[Bucket]) -> list[Bucket]:
        """Return the same buckets with copies in host memory of all tensors that are on the device. They are valid until the next call."""
        tensors = [tensor for _, _, (_, pairs) in buckets for _, tensor in pairs if self._takes(tensor)]
        places, total = [], 0
        for tensor in tensors:
            places.append(total)
            total += math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT) * _ALIGNMENT
        memory = self._room(total)
        copies = iter([_copy(tensor, memory, place) for tensor, place in zip(tensors, places, strict=True)])
        staged: list[Bucket] = [
            (path, name, (objects, [(item, next(copies) if self._takes(tensor) else tensor.cpu()) for item, tensor in pairs]))
            for path, name, (objects, pairs) in buckets
        ]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return staged

    def release(self) -> None:
        """Unpin the memory, and give it back once no staged tensor is left."""
        if self._unpin is not None:
            self._unpin()
        self._memory = self._unpin = None

    def _takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is staged; quantized ones are not simple arrays."""
        return tensor.device.type == self.device.type and type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.numel() > 0

    def _room(self, size: int) -> mmap.mmap:
        if self._memory is None or len(self._memory) < size:
            self.release()
            self._memory = mmap.mmap(-1, max(size, mmap.PAGESIZE))
            _touch(self._memory)
            if self.device.type == "cuda" and _pin(self._memory):
                self._unpin = weakref.finalize(self, _unpin, _address(self._memory), os.getpid())
                self._unpin.atexit = False  # the process's end unpins it
        return self._memory


def _copy(tensor: torch.Tensor, memory: mmap.mmap, place: int) -> torch.Tensor:
    """Start a copy to a place in the memory. The copy has a storage of its own: `torch.save` writes whole storages."""
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=place).view(tensor.shape)
    return copy.copy_(tensor.detach(), non_blocking=True)


def _touch(memory: mmap.mmap) -> None:
    """Make the system provide all pages of new memory: one write to each."""
    pages = np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE]
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(lambda part: part.fill(0), np.array_split(pages, _THREADS)))


def _pin(memory: mmap.mmap) -> bool:
    """Let the GPU write into the memory directly. If it cannot, copies are slower. Return whether it can."""
    register: Callable[[int, int, int], Any] = torch.cuda.cudart().cudaHostRegister
    problem = register(_address(memory), len(memory), 0)
    if int(problem) != 0:
        logger.warning(
            "%.1f GB of host memory for saves cannot be pinned (CUDA error %d): saves take longer", len(memory) / 1e9, int(problem)
        )
        with contextlib.suppress(RuntimeError):  # the next operation reports the error once more
            torch.ones(1, device="cuda")
    return int(problem) == 0


def _unpin(address: int, owner: int) -> None:
    """Undo `_pin`. Memory that is unmapped while it is pinned would be dangerous: the GPU would write what is later copied to the same
    addresses into the old pages."""
    if os.getpid() == owner:  # a forked writer cannot use the GPU
        torch.cuda.cudart().cudaHostUnregister(address)


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)

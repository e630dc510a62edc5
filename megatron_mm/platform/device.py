"""The device of this process and its communication backend: the only module that checks for CUDA."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import Any

import torch

from megatron_mm.platform import engines

PACKED_ATTENTION_CAPABILITY = (9, 0)
"""CUDA compute capability of the first GPUs on which cuDNN keeps packed documents apart (Hopper); an A100 has 8.0."""
WITHOUT_PACKED_ATTENTION = (12, 0)
"""Compute capability (of workstation GPUs of the Blackwell generation) for which earlier versions have no such kernels."""


def local_device() -> torch.device:
    """The GPU of this process (by LOCAL_RANK) if CUDA is available, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def communication_backend(device: torch.device) -> str:
    """NCCL between GPUs and gloo for CPU tensors; without GPUs, only gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables that configure the allocator of GPU memory."""


def grow_segments() -> None:
    """Let segments of GPU memory grow (`expandable_segments`), unless the environment configures the allocator. Called before the first
    allocation. Sequences hold different numbers of images, so block sizes vary, which fragments segments of fixed size."""
    if any(os.environ.get(name) for name in ALLOCATOR_SETTINGS):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch have another name for it, which older ones lack
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def be_deterministic() -> None:
    """Use deterministic algorithms from here on. Called before the first matrix product, when cuBLAS chooses its workspace."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # By default each new tensor is filled, which takes a kernel more. Nothing reads these values.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_flash_attention() -> bool:
    """Whether flash-attn is installed, which Transformer Engine uses where cuDNN has no fitting kernel."""
    return importlib.util.find_spec("flash_attn") is not None


def packed_attention_missing() -> str:
    """Why Transformer Engine has no attention over packed documents on this GPU; empty if it has. It would otherwise compute attention
    without a fused kernel, and store the weights of every token for every token."""
    capability = torch.cuda.get_device_capability()
    here = ".".join(map(str, capability))
    if has_flash_attention():
        return ""
    if capability < PACKED_ATTENTION_CAPABILITY:
        needed = ".".join(map(str, PACKED_ATTENTION_CAPABILITY))
        why = f"this GPU has compute capability {here}, cuDNN's attention over packed documents needs {needed}"
    elif capability == WITHOUT_PACKED_ATTENTION and not _has_packed_attention_there():
        why = (
            f"this GPU has compute capability {here}, for which attention over packed documents needs cuDNN 9.18.1 and Transformer Engine "
            f"2.20 (found: {torch.backends.cudnn.version()}, {engines.installed('transformer-engine')})"
        )
    else:
        return ""
    return f"{why}, and the package flash-attn, which Transformer Engine would use instead, is not installed"


def _has_packed_attention_there() -> bool:
    transformer_engine = engines.installed("transformer-engine") or "0.0"
    return engines.numbers(transformer_engine) >= (2, 20) and (torch.backends.cudnn.version() or 0) >= 91801


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device without waiting for the device's pending work; from the CPU to a GPU through pinned memory."""
    return (pinned(tensor) if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor in pinned memory, which a GPU can read directly; a tensor that is already pinned, or on a device, is returned as it
    is."""
    if tensor.device.type != "cpu" or tensor.is_pinned():
        return tensor
    return tensor.contiguous().pin_memory()  # it keeps strides, and fails if elements share memory, as those of an expanded tensor do


def fp8_recipe_missing(recipe: str) -> str:
    """Why this GPU and Transformer Engine have no FP8 products with scales of this kind (`PrecisionConfig.fp8_recipe`); empty if they
    have."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    ask = {"blockwise": engine.is_fp8_block_scaling_available, "mxfp8": engine.is_mxfp8_available}.get(recipe, engine.is_fp8_available)
    available, reason = ask(return_reason=True)
    return "" if available else f"Transformer Engine reports: {reason} Use --precision.fp8-recipe tensorwise"


def dispatch_missing(name: str) -> str:
    """Why tokens cannot be sent to experts by DeepEP or HybridEP here (`ParallelConfig.expert_dispatch`); empty if they can."""
    if not torch.cuda.is_available():
        return "its kernels need GPUs: use --parallel.expert-dispatch alltoall"
    if importlib.util.find_spec("deep_ep") is None:
        return "the package deep_ep is not installed: install it, or use --parallel.expert-dispatch alltoall"
    if name == "hybridep" and not hasattr(importlib.import_module("deep_ep"), "HybridEPBuffer"):
        return "the installed deep_ep has no HybridEPBuffer: install its hybrid-ep branch, or use --parallel.expert-dispatch deepep"
    return ""


def user_buffers_missing() -> str:
    """Why Transformer Engine cannot overlap tensor-parallel exchanges with products here (`ParallelConfig.overlap_tensor`); empty if it
    can."""
    importlib.import_module("transformer_engine.pytorch")  # loads its extension
    extension: Any = importlib.import_module("transformer_engine_torch")
    if extension.device_supports_multicast() or os.environ.get("UB_SKIPMC") == "1":
        return ""
    return "this GPU or its driver has no multicast over NVLink: leave it out, or set UB_SKIPMC=1 to try without"

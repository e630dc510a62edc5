"""Forward passes on fake tensors, which claim to be on a GPU and have no values: operations that mix devices are refused.

    python te_fake_cuda.py

torch's fake tensors know shapes, types and devices. Queries of CUDA's state are answered as by one Hopper GPU; kernels of `support.te` that
read values return results of the right shape instead. It is a separate program because it changes torch. Prints one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensors
import torch.distributed as dist
from support import te
from support.te import fp8, kernels
from support.te.install import HOPPER
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mm.platform import cpu

GPU = torch.device("cuda", 0)


class _Stream(cpu._Nothing):
    device, cuda_stream = GPU, 0


ANSWERS: dict[str, Any] = {
    "is_available": lambda: True,
    "current_device": lambda: GPU,
    "device_count": lambda: 1,
    "get_device_properties": lambda device=None: HOPPER,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: HOPPER.name,
    "is_current_stream_capturing": lambda: False,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "current_stream": lambda device=None: _Stream(),
    "default_stream": lambda device=None: _Stream(),
    "stream": lambda stream: nullcontext(),
    "Stream": _Stream,
    "Event": _Stream,
    **{
        name: lambda *a, **k: None
        for name in ("set_device", "set_rng_state", "manual_seed", "manual_seed_all", "synchronize", "empty_cache")
    },
    "_lazy_init": lambda: None,
}
"""Replacements for functions of torch.cuda."""


def on_gpu(*tensors: torch.Tensor) -> None:
    assert all(tensor.device == GPU for tensor in tensors), [tensor.device for tensor in tensors]


def attention(cu_seqlens_q: torch.Tensor, cu_seqlens_kv: torch.Tensor, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> list[Any]:
    on_gpu(Q, K, V, *(bounds for bounds in (cu_seqlens_q, cu_seqlens_kv) if bounds is not None))
    return [torch.empty_like(Q, memory_format=torch.contiguous_format), torch.empty_like(Q), torch.empty_like(Q)]


def rotary(input: torch.Tensor, freqs: torch.Tensor, cu_seqlens: Any) -> torch.Tensor:
    on_gpu(input, freqs, *([] if cu_seqlens is None else [cu_seqlens]))
    return torch.empty_like(input)


def empty(quantizer: Any, shape: list[int], dtype: Any) -> Any:
    return fp8.quantize(torch.zeros(*shape, dtype=fp8.dtype_of(dtype), device=GPU), quantizer)


class OnlyFakes(TorchDispatchMode):
    """Keeps real CPU tensors (the plan's integers) real: the fake mode handles only operations with a fake tensor or a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        fakes = any(isinstance(leaf, fake_tensors.FakeTensor) for leaf in tree_leaves((args, kwargs)))
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if func is torch.ops.aten._to_copy.default and to_gpu and not fakes:
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=GPU)
        if fakes or to_gpu:
            return func(*args, **kwargs)
        with fake_tensors.unset_fake_temporarily():
            return func(*args, **kwargs)


class WithoutDriver(TorchFunctionMode):
    """Replaces `x[...]` with operations and `device=0` with the device's name: torch's own implementations need the GPU's driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and isinstance(args[0], fake_tensors.FakeTensor):
            return part_of(*args)
        if func is torch.Tensor.__setitem__ and isinstance(args[0], fake_tensors.FakeTensor):
            part, value = part_of(*args[:2]), args[2]
            return part.copy_(value) if isinstance(value, torch.Tensor) else part.fill_(value)
        if func is torch.Tensor.contiguous and isinstance(args[0], fake_tensors.FakeTensor):
            return torch.ops.aten.contiguous(args[0])
        kwargs = kwargs or {}
        if isinstance(kwargs.get("device"), int):
            kwargs = {**kwargs, "device": torch.device("cuda", kwargs["device"])}
        return func(*args, **kwargs)


def part_of(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None for part in parts) - 1
        parts[place : place + 1] = [slice(None)] * (tensor.dim() - taken)
    dimension = 0
    for part in parts:
        if part is None:
            tensor = torch.ops.aten.unsqueeze(tensor, dimension)
        elif isinstance(part, int):
            tensor, dimension = torch.ops.aten.select.int(tensor, dimension, part), dimension - 1
        elif isinstance(part, slice):
            end = sys.maxsize if part.stop is None else part.stop
            tensor = torch.ops.aten.slice.Tensor(tensor, dimension, part.start or 0, end, part.step or 1)
        else:
            indexes = [None] * dimension + [part if isinstance(part, torch.Tensor) else torch.tensor(part)]
            tensor = torch.ops.aten.index.Tensor(tensor, indexes)
        dimension += 1
    return tensor


def pretend() -> None:
    """Install the answers, and replacements for functions that do not work on fakes; call before importing megatron-core."""
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *a, **k: None  # type: ignore[assignment]
    fake_tensors.init_gpu_context = lambda device: None
    made = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """Make a tensor of known values on the CPU, then move it."""
        wanted = torch.device(device if device is not None else torch.get_default_device())
        with fake_tensors.unset_fake_temporarily(), torch.device("cpu"):
            here = made(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})
        return here.to(GPU) if wanted.type == "cuda" else here

    torch.tensor = tensor
    torch.Tensor.cuda = lambda self, *a, **k: self.to(GPU)  # type: ignore[assignment, method-assign]
    torch.Tensor.pin_memory = lambda self, *a, **k: self  # type: ignore[assignment, method-assign]
    kernels.KERNELS.update(fused_attn_fwd=attention, fused_rope_forward=rotary)
    fp8.KERNELS["create_empty_quantized_tensor"] = empty


def choose_attention_for_tensors() -> None:
    """Present fake tensors as plain tensors to Transformer Engine, which would otherwise not choose fused attention."""
    utils = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
    choose = utils.get_attention_backend

    def chosen(asked: Any, *args: Any, **kwargs: Any) -> Any:
        asked.qkv_type = torch.Tensor
        return choose(asked, *args, **kwargs)

    utils.get_attention_backend = chosen


def mixed() -> str:
    """Return the error that an operation on tensors of two devices raises."""
    with fake_tensors.FakeTensorMode(allow_non_fake_inputs=True), OnlyFakes(), WithoutDriver():
        try:
            torch.zeros(2, device=GPU) + torch.zeros(2)
        except Exception as error:
            return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    pretend()
    te.install(on_cpu=False)
    te.install = lambda: None  # type: ignore[assignment]
    choose_attention_for_tensors()
    import te_program
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda *a, **k: None
    random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    topologies, build = te_program.topologies, te_program.build
    topologies.local_device = lambda: GPU
    topologies.communication_backend = lambda device: "fake"
    dist.HashStore = FakeStore
    groups = topologies.parallel_state.initialize_model_parallel
    topologies.parallel_state.initialize_model_parallel = partial(groups, create_gloo_process_groups=False)
    found: dict[str, Any] = {"mixed devices": mixed()}
    for family, subject in te_program.SUBJECTS.items():
        for precision in ("bf16", "fp8"):  # (not plain PyTorch: its attention reads document lengths, which are values)
            experiment = subject.experiment(precision=precision)
            te_program.use_backend("te")
            topology = topologies.initialize(experiment.parallel, seed=1)
            with fake_tensors.FakeTensorMode(allow_non_fake_inputs=True), OnlyFakes(), WithoutDriver(), torch.no_grad():
                chunk = build.build_chunks(experiment, topology)[0].requires_grad_(False)  # an autograd graph would need streams
                devices = {str(tensor.device) for tensor in (*chunk.parameters(), *chunk.buffers())}
                outs = [chunk(batch.to(topology.device), with_loss=False) for batch in subject.batches(experiment, topology, step=3)]
                found[f"{family} {precision}"] = [sorted(devices), [f"{list(out.shape)} on {out.device}" for out in outs]]
            topologies.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())

"""Run megatron-core without CUDA.

megatron-core writes `device="cuda"` and `torch.cuda.current_device()` into its schedules, optimizers and communication. `install()` gives
megatron-core's modules a view of torch in which those mean the CPU: in each loaded `megatron.core` module the name `torch` is rebound to a
`_TorchOnCpu`, which forwards everything to torch except `cuda` and the few factory functions that megatron-core calls with a device. torch
itself and all other packages are unchanged, so nothing outside megatron-core is affected (except that two methods of tensors are replaced,
which check their caller). There is no cost per operation: an attribute is looked up once and then found in the view's own dict. (A
TorchFunctionMode that rewrites devices costs a Python call for every torch call of the process; patching torch.cuda itself changes what all
other libraries see.)

Each patch has a comment that says what upstream lacks; `tests/platform/test_cpu.py` fails when a patch is no longer needed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
from typing import Any

import torch

_CPU = torch.device("cpu")
_INSTALLED = False


class _Nothing:
    """A stream, an event or a graph: accepts every call and does nothing, because CPU work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def record_event(self, event: object = None) -> _Nothing:
        return _Nothing()

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _CpuRandom:
    """`torch.cuda.random`, with the CPU generator in place of the device's."""

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()


class _CudaOnCpu:
    """`torch.cuda` as megatron-core uses it, on the CPU. All other attributes come from torch.cuda."""

    Stream = Event = _Nothing
    random = _CpuRandom

    @staticmethod
    def is_available() -> bool:
        return False

    @staticmethod
    def current_device() -> torch.device:
        return _CPU

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def set_device(device: object) -> None:
        pass

    @staticmethod
    def synchronize(device: object = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def current_stream(device: object = None) -> _Nothing:
        return _Nothing()

    default_stream = current_stream

    class nvtx:
        """Ranges for CUDA's profiler, which do nothing."""

        @staticmethod
        def range_push(message: str) -> None:
            pass

        range_pop = staticmethod(lambda: None)
        range = staticmethod(lambda message: contextlib.nullcontext())

    @staticmethod
    def stream(stream: object) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def _on_cpu(factory: Any) -> Any:
    """Wrap a factory function so that it makes its tensor on the CPU when called with a CUDA device."""

    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


FACTORIES = ("tensor", "zeros", "ones", "empty", "arange", "empty_like")
"""Functions that megatron-core calls with a CUDA device."""


class _TorchOnCpu(types.ModuleType):
    """What the name `torch` refers to inside megatron-core."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaOnCpu()
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        setattr(self, name, value)
        return value


def _for_megatron(replacement: Any, original: Any) -> Any:
    """A method that calls `replacement` if its caller is in megatron-core, and `original` otherwise."""

    @functools.wraps(original)
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return (replacement if caller.startswith("megatron.core") else original)(self, *args, **kwargs)

    return method


def _parameter_type(self: torch.nn.Parameter, *args: Any, **kwargs: Any) -> Any:
    """`Parameter.type()`: the optimizers sort parameters by the name of their CUDA tensor type and do not know CPU types."""
    name = torch.Tensor.type(self, *args, **kwargs)
    return name.replace("torch.", "torch.cuda.") if isinstance(name, str) and not name.startswith("torch.cuda.") else name


def _stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.cuda()`, with which megatron-core moves a few tensors to the GPU: here they stay on the CPU."""
    return self


def _on_stream(self: torch.Tensor, stream: object) -> None:
    """`Tensor.record_stream()`: CPU memory belongs to no stream, so there is nothing to record."""


def _set_rng_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    """`tensor_parallel.random._set_cuda_rng_state`: the original accesses CUDA's generators through torch._C."""
    torch.set_rng_state(new_state)


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """`moe_utils.maybe_move_tensor_to_cpu`: the original converts split sizes to plain numbers only if they come from a GPU, but gloo's
    all-to-all needs plain numbers, too."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _run_eagerly(module: types.ModuleType) -> None:
    """Undo torch.compile on a module's functions: megatron-core compiles its activations when it is imported, and the
    first call of each would start a C++ compiler."""
    for name, value in list(vars(module).items()):
        if isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable"):
            setattr(module, name, value._torchdynamo_orig_callable)


def _without_kernels() -> None:
    """Norms and scales of many tensors at once: if Transformer Engine or apex is installed, their kernels are used, which need a GPU. Use
    megatron-core's own functions instead."""
    utils: Any = importlib.import_module("megatron.core.utils")
    local = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
        "multi_tensor_scale_tensor_impl": None,
    }
    for name in ("optimizer.clip_grads", "optimizer.optimizer"):
        module = importlib.import_module(f"megatron.core.{name}")
        vars(module).update({key: value for key, value in local.items() if key in vars(module)})


# Modules that are imported inside megatron-core's functions, listed so that they are rebound before they are used.
_MODULES = (
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.fully_parallel",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed",
    "models.common.model_chunk_schedule_plan",
    "models.gpt.fine_grained_callables",
    "models.gpt.gpt_model",
    "optimizer",
    "optimizer.distrib_optimizer",
    "pipeline_parallel.combined_1f1b",
    "pipeline_parallel.schedules",
    "tensor_parallel.random",
    "transformer.moe.moe_layer",
    "transformer.moe.token_dispatcher",
    "transformer.transformer_layer",
)


def install() -> None:
    """Rebind `torch` in every megatron-core module; does nothing if CUDA is available or when called again."""
    global _INSTALLED
    if _INSTALLED or torch.cuda.is_available():
        return
    importlib.import_module("megatron.core.jit").disable_jit_fuser()
    for name in _MODULES:
        importlib.import_module(f"megatron.core.{name}")
    _without_kernels()
    view = _TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron"):
            _run_eagerly(module)
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    random: Any = sys.modules["megatron.core.tensor_parallel.random"]
    random._set_cuda_rng_state = _set_rng_state
    sys.modules["megatron.core.transformer.moe.token_dispatcher"].maybe_move_tensor_to_cpu = _split_sizes  # type: ignore[attr-defined]
    torch.nn.Parameter.type = _for_megatron(_parameter_type, torch.Tensor.type)  # type: ignore[method-assign]
    torch.Tensor.record_stream = _for_megatron(_on_stream, torch.Tensor.record_stream)  # type: ignore[method-assign]
    torch.Tensor.cuda = _for_megatron(_stay, torch.Tensor.cuda)  # type: ignore[method-assign]
    _INSTALLED = True

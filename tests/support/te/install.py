"""Install the extension, and redirect GPU requests of Transformer Engine's layers to the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

from megatron_mm.platform import cpu, engines
from support.te import extension

HOPPER = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="NVIDIA H100 80GB HBM3", total_memory=80 << 30)
FOLDER = Path(__file__).parents[3] / "build" / "transformer_engine"
"""Folder in which `make` installs the package, in a subfolder per version, so that nothing else in the environment finds it."""


DECORATORS = {"triton": ("triton.language", "triton.language.core", "triton.language.standard"), "onnx": ("onnx.defs",), "onnxscript": ()}
"""Packages that Transformer Engine takes decorators from, for Triton kernels and the ONNX export. Neither runs here, so mocks replace the
packages that are missing."""


class _Cuda(cpu._CudaOnCpu):
    """`torch.cuda` as Transformer Engine's layers use it: a Hopper GPU."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def get_device_properties(device: object = None) -> SimpleNamespace:
        return HOPPER

    @staticmethod
    def get_device_capability(device: object = None) -> tuple[int, int]:
        return HOPPER.major, HOPPER.minor

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False


class _Torch(cpu._TorchOnCpu):
    """The name `torch` inside Transformer Engine."""

    def __init__(self) -> None:
        super().__init__()
        self.cuda = _Cuda()
        self.version = SimpleNamespace(**{**vars(torch.version), "cuda": "13.0"})
        for name in ("full", "rand", "randn"):
            setattr(self, name, cpu._on_cpu(getattr(torch, name)))


def python_of_transformer_engine() -> str | None:
    """Return the version of Transformer Engine's Python package in this interpreter, else the newest one in `FOLDER` that goes with the
    installed megatron-core, or None. The environment variable TE_VERSION overrides both with a version of the folder."""
    if asked := os.environ.get("TE_VERSION"):
        return asked
    if importlib.util.find_spec("transformer_engine") is not None:
        return importlib.metadata.version("transformer-engine")
    core = importlib.metadata.version("megatron-core")
    fitting = [
        folder.name
        for folder in sorted(FOLDER.glob("*.*"), key=lambda folder: engines.numbers(folder.name))
        if engines.goes_with(core, folder.name)
    ]
    return fitting[-1] if fitting else None


def install(*, on_cpu: bool = True) -> types.ModuleType:
    """Import Transformer Engine with the kernels written in PyTorch; return the extension that it calls.

    Args:
        on_cpu: redirect GPU requests to the CPU; if False, the caller needs a GPU, or tensors that claim to be on one.
    """
    assert not any(name.startswith("megatron.core") for name in sys.modules), "megatron-core looked for Transformer Engine already"
    version = python_of_transformer_engine()
    assert version is not None, "no transformer-engine here: run `make test-te`, or pip install --no-deps transformer-engine"
    if "TE_VERSION" in os.environ or importlib.util.find_spec("transformer_engine") is None:
        sys.path.insert(0, str(FOLDER / version))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # leaves out the search for compiled libraries
    module = sys.modules["transformer_engine_torch"] = extension.extension(version)
    with warnings.catch_warnings(), _anything_for_decorators():
        warnings.simplefilter("ignore")
        importlib.import_module("transformer_engine.common").load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
        importlib.import_module("transformer_engine.pytorch")
    if on_cpu:
        to_cpu()
    return module


@contextlib.contextmanager
def _anything_for_decorators() -> Iterator[None]:
    importlib.import_module("torch._inductor")  # looks for Triton, too, and must not find the mocks
    absent = {package: parts for package, parts in DECORATORS.items() if importlib.util.find_spec(package) is None}
    names = [name for package, parts in absent.items() for name in (package, *parts)]
    sys.modules.update({name: MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None), __version__="3.5.0") for name in names})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def to_cpu() -> None:
    """Rebind `torch` in every module of Transformer Engine that is loaded."""
    view = _Torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    generators: Any = sys.modules["transformer_engine.pytorch.distributed"]
    generators._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    generators._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    quantized: Any = importlib.import_module("transformer_engine.pytorch.tensor").QuantizedTensor
    quantized.type = cpu._for_megatron(cpu._parameter_type, torch.Tensor.type)  # FP8 weights are parameters of this class
    torch.Tensor.is_cuda = property(lambda self: _asked_by_te(sys._getframe(1)))  # type: ignore[assignment, method-assign]
    for name in ("cuda", "to"):
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name), name))


def _asked_by_te(frame: Any) -> bool:
    if frame.f_globals.get("__name__") == cpu.__name__:  # its wrapper for megatron-core is between the two
        frame = frame.f_back
    return frame.f_globals.get("__name__", "").startswith("transformer_engine")


def _on_cpu(original: Any, name: str) -> Any:
    """A method that leaves a tensor where it is, or moves it to the CPU, when Transformer Engine calls it with a GPU."""

    @functools.wraps(original)
    def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _asked_by_te(sys._getframe(1)):
            return original(self, *args, **kwargs)
        if name == "cuda":
            return self
        args = tuple("cpu" if isinstance(value, str) and value.startswith("cuda") else value for value in args)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return method

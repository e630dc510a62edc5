"""megatron-core on a machine without CUDA: what platform.cpu changes, that it is needed, and that nothing else is changed."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from megatron_mm.platform import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform does nothing where CUDA is")


def _fails(program: str) -> str:
    """The last line of what a fresh Python without the CPU platform says of a program; it must fail."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0, "megatron-core does this without CUDA now: remove the patch"
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("from megatron.core.optimizer import optimizer as o; o._zero_grad_group_helper; o.torch.tensor([0.0], device='cuda')", "CUDA"),
        ("from megatron.core.tensor_parallel.random import CudaRNGStatesTracker as T; t = T(); t.add('a', 1)", "CUDA"),
        ("from megatron.core.pipeline_parallel import schedules; schedules.torch.cuda.current_stream()", "CUDA"),
        ("import torch; torch.zeros(1).cuda()", "CUDA"),
    ],
    ids=["device literals", "generator states", "streams", "Tensor.cuda"],
)
def test_megatron_core_still_needs_cuda_without_the_platform(program: str, reason: str) -> None:
    assert reason in _fails(program)


def test_optimizers_still_sort_parameters_by_cuda_type_names() -> None:
    source = importlib.import_module("inspect").getsource(importlib.import_module("megatron.core.optimizer.optimizer"))
    assert "'torch.cuda.FloatTensor'" in source, "upstream sorts otherwise now: remove the patch of Parameter.type"


def test_inside_megatron_core_cuda_means_the_cpu() -> None:
    cpu.install()
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert schedules.torch is not torch
    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch.nn is torch.nn and schedules.torch.Tensor is torch.Tensor
    with schedules.torch.cuda.stream(schedules.torch.cuda.Stream()):
        schedules.torch.cuda.synchronize()


def test_torch_itself_is_left_alone() -> None:
    cpu.install()
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_stream()


def test_nothing_is_compiled_inside_megatron_core() -> None:
    """Its activations are compiled when they are imported, and the first call of each would start a C++ compiler."""
    cpu.install()
    activations = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")
    compiled = [name for name, value in vars(activations).items() if hasattr(value, "_torchdynamo_orig_callable")]
    assert not compiled


def test_installing_twice_changes_nothing() -> None:
    cpu.install()
    before = importlib.import_module("megatron.core.optimizer").torch
    cpu.install()
    assert importlib.import_module("megatron.core.optimizer").torch is before

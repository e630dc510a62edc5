"""megatron-core on a machine without CUDA: what platform.cpu changes, that it is needed, and that nothing else is changed."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from distributed import run_processes

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


def _all_to_all(split_sizes_as: str) -> list[float]:
    """What the second process gets when it is sent 1 of 3 rows, with split sizes in the form that the token dispatcher has them."""
    rank = dist.get_rank() if dist.is_initialized() else -1
    if rank < 0:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    sizes = {"tensor": torch.tensor([2, 1]), "numbers": cpu._split_sizes(torch.tensor([2, 1]), as_numpy=True)}[split_sizes_as]
    received = torch.zeros(4 if rank == 0 else 2)
    expected = {"tensor": torch.tensor([2, 2] if rank == 0 else [1, 1])}.get(split_sizes_as, [2, 2] if rank == 0 else [1, 1])
    dist.all_to_all_single(received, torch.arange(3.0) + 10 * rank, expected, sizes)
    dist.destroy_process_group()
    return received.tolist()


def test_gloos_all_to_all_wants_split_sizes_as_numbers() -> None:
    assert run_processes(_all_to_all, 2, "numbers") == [[0.0, 1.0, 10.0, 11.0], [2.0, 12.0]]
    with pytest.raises(AssertionError, match="TypeError"):
        run_processes(_all_to_all, 2, "tensor")


def test_the_token_dispatcher_still_leaves_split_sizes_on_a_cpu_as_tensors() -> None:
    upstream = importlib.import_module("megatron.core.transformer.moe.moe_utils").maybe_move_tensor_to_cpu
    assert torch.is_tensor(upstream(torch.tensor([2, 1]), as_numpy=True)), "upstream makes numbers of them now: remove the patch"
    cpu.install()
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    assert not torch.is_tensor(dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 1]), as_numpy=True))


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

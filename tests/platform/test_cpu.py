"""megatron-core on a machine without CUDA: each change of platform.cpu is needed, and nothing else is changed."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_processes
from support.small import random_step, small_experiment

from megatron_mm.config import MoEConfig
from megatron_mm.parallel import topology as topologies
from megatron_mm.platform import cpu
from megatron_mm.training.build import build_model
from megatron_mm.training.optimizer import build_optimizer
from megatron_mm.training.step import TrainingStep

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU platform does nothing where CUDA is")


# ------------------------------------------------------------------------------------------------- megatron-core still needs it

_CUDA_DEVICE = r"""device\s*=\s*(?:["']cuda|torch\.cuda)"""
_ARGUMENTS = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"


@functools.cache
def _sources() -> str:
    """Return the source of all megatron-core modules loaded for training."""
    importlib.import_module("megatron_mm.training.trainer")
    cpu.install()
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith("megatron.core") and ".inference" not in name]
    return "\n".join(Path(file).read_text() for file in files if file is not None)


@pytest.mark.parametrize("name", sorted(name for name in vars(cpu._CudaOnCpu) if not name.startswith("_")))
def test_megatron_core_still_uses_cuda(name: str) -> None:
    assert re.search(rf"torch\.cuda\.{name}\b", _sources()), f"megatron-core has no use for torch.cuda.{name} any more: drop it"


@pytest.mark.parametrize("name", cpu.FACTORIES)
def test_megatron_core_still_makes_tensors_on_cuda(name: str) -> None:
    assert re.search(rf"torch\.{name}\({_ARGUMENTS}{_CUDA_DEVICE}", _sources()), f"megatron-core makes none with torch.{name}: drop it"


PATCHED = {
    "split sizes": "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
    "Parameter.type": "torch.nn:Parameter.type",
    "Tensor.cuda": "torch:Tensor.cuda",
}
"""Replacements of `install` besides the name `torch`, without which a step fails."""


def _step_without(patch: str | None) -> str:
    """Train one step of a sparse model with a patch undone; return the name of the error, empty if there was none.

    On two processes: expert parallelism, or a pipeline whose ends share the embedding table.
    """
    undo: Any = None
    if patch is not None:
        place, _, name = PATCHED[patch].partition(":")
        owner: Any = importlib.import_module(place)
        *parents, name = name.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        undo = functools.partial(setattr, owner, name, getattr(owner, name))
    cpu.install()
    if undo is not None:
        undo()
    experiment = small_experiment(
        decoder={"moe": MoEConfig(num_experts=4, every_n_layers=2, top_k=2), "tied_embeddings": True},
        parallel={"pipeline": 2, "recompute": "full"} if patch == "Tensor.cuda" else {"expert": 2, "recompute": "full"},
        precision="fp32",
    )
    try:
        topology = topologies.initialize(experiment.parallel, seed=1)
        model = build_model(experiment, topology)
        step = TrainingStep(experiment, topology, model, build_optimizer(experiment, model), num_sources=2)
        step.run(random_step(experiment, topology, step=1), step=1)
    except Exception as error:
        return type(error).__name__
    return ""


def test_a_step_needs_nothing_more() -> None:
    assert run_processes(_step_without, 2, None) == ["", ""]


@pytest.mark.parametrize("patch", PATCHED)
def test_a_step_needs_each_patch(patch: str) -> None:
    assert any(run_processes(_step_without, 2, patch)), f"megatron-core trains on a CPU without it now: remove the patch of {patch}"


def _restores_generators() -> tuple[bool, bool]:
    """Return True if megatron-core restores a generator's state, before and after `install`."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")

    def restores() -> bool:
        state = torch.get_rng_state()
        first = torch.rand(1)
        random._set_cuda_rng_state(state)
        return torch.equal(torch.rand(1), first)

    before = restores()
    cpu.install()
    return before, restores()


def test_generators_are_restored() -> None:
    """Recomputation must draw the same numbers again. Without the patch nothing fails, but nothing is restored."""
    ((before, after),) = run_processes(_restores_generators, 1)
    assert not before, "megatron-core restores generators on a CPU now: remove the patch of _set_cuda_rng_state"
    assert after


def _compiled_before_and_after() -> tuple[int, int]:
    activations = importlib.import_module("megatron.core.fusions.fused_bias_swiglu")

    def count() -> int:
        return sum(hasattr(value, "_torchdynamo_orig_callable") for value in vars(activations).values())

    before = count()
    cpu.install()
    return before, count()


def test_nothing_is_compiled_inside_megatron_core() -> None:
    """Its activations are wrapped with torch.compile on import, and the first call of each would start a C++ compiler."""
    ((before, after),) = run_processes(_compiled_before_and_after, 1)
    assert before > 0, "megatron-core compiles nothing on import any more: remove _run_eagerly"
    assert after == 0


# ------------------------------------------------------------------------------------------------------- and nothing else sees it


def test_inside_megatron_core_cuda_means_the_cpu() -> None:
    cpu.install()
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    assert schedules.torch is not torch
    for name in cpu.FACTORIES:
        argument = torch.ones(2) if name.endswith("_like") else [2] if name == "tensor" else 2
        assert getattr(schedules.torch, name)(argument, device="cuda").device.type == "cpu"
    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    assert schedules.torch.nn is torch.nn and schedules.torch.Tensor is torch.Tensor
    with schedules.torch.cuda.stream(schedules.torch.cuda.Stream()):
        schedules.torch.cuda.synchronize()


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.zeros(1).cuda(),
        lambda: torch.nn.Parameter(torch.zeros(1)).cuda(),
        torch.cuda.current_stream,
    ],
)
def test_outside_cuda_is_missing_as_ever(call: Any) -> None:
    cpu.install()
    with pytest.raises((AssertionError, RuntimeError)):
        call()


def test_outside_a_parameter_says_its_own_type() -> None:
    cpu.install()
    assert torch.nn.Parameter(torch.zeros(1)).type() == "torch.FloatTensor"
    assert torch.nn.Parameter(torch.zeros(1)).type(torch.float64).dtype == torch.float64
    assert not torch.cuda.is_available()


def test_installing_twice_changes_nothing() -> None:
    cpu.install()
    before = importlib.import_module("megatron.core.optimizer").torch
    cpu.install()
    assert importlib.import_module("megatron.core.optimizer").torch is before

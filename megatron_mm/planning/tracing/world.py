"""Simulates one process of a layout of any size, without the other processes and without devices: process groups are fake, and meta tensors
take the place of CUDA tensors.

Everything here changes modules of the running process permanently, so each trace runs in a separate process (`trace.trace_rank`).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_mm.config import Experiment
from megatron_mm.parallel import topology as topologies
from megatron_mm.parallel.topology import Topology
from megatron_mm.planning.tracing.recorder import Recorder
from megatron_mm.platform import cpu

META = torch.device("meta")


def stand_in_world(experiment: Experiment, *, rank: int, world_size: int) -> Topology:
    """Turn this process into the given rank. From then on "cuda" means meta in megatron-core."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu._CPU = META
    cpu._parameter_type = _cuda_type
    cpu.install()
    parallel = experiment.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    topologies.make_groups(parallel)
    topologies.seed_everything(1)
    return topologies._current(parallel, device=META)


def _cuda_type(self: torch.nn.Parameter, *args: Any, **kwargs: Any) -> Any:
    names = {torch.bfloat16: "BFloat16Tensor", torch.float32: "FloatTensor", torch.float16: "HalfTensor"}
    return f"torch.cuda.{names[self.dtype]}"


def answer_without_data(experiment: Experiment, recorder: Recorder) -> None:
    """Replace functions that need values, which meta tensors do not have, and that the recorder cannot intercept."""
    from megatron_mm.training import build, step

    build.initialize_weights = _draw_nothing
    build.check_patterns = _believe  # a single process knows only the names of its own stage
    clip: Any = sys.modules["megatron.core.optimizer.clip_grads"]
    applier = clip.multi_tensor_applier

    def apply(operation: Any, flag: Any, lists: Any, *rest: Any) -> Any:
        if operation is clip.l2_norm_impl:  # makes a tensor from a list of scalars, which the recorder does not see
            return torch.zeros(1, device=META), None
        return applier(operation, flag, lists, *rest)

    clip.multi_tensor_applier = apply

    def sum_over_processes(*values: torch.Tensor) -> list[np.ndarray]:
        dist.all_reduce(torch.cat([value.flatten() for value in values]))
        return [np.ones(tuple(value.shape)) for value in values]

    step.sum_over_processes = sum_over_processes

    def gather_objects(out: list[Any], value: Any, group: Any = None) -> None:
        out[:] = [value] * len(out)  # the original unpickles bytes that a fake group never fills

    dist.all_gather_object = gather_objects  # type: ignore[assignment]
    if experiment.model.decoder.moe is not None:
        _route_evenly(experiment, recorder)


def _believe(experiment: Experiment, names: Any) -> None:
    """Check nothing: a pattern of the freeze policy may match only on another stage."""


def _draw_nothing(chunks: list[Any], *, seed: int) -> None:
    """Do nothing: weights on meta have no values."""


def _route_evenly(experiment: Experiment, recorder: Recorder) -> None:
    """Give every expert the same number of tokens, so that a process receives as many rows as it sends."""
    dispatcher: Any = sys.modules["megatron.core.transformer.moe.token_dispatcher"]

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if not torch.is_tensor(tensor) or tensor.device.type != "meta":
            return tensor
        routed = recorder.routed_rows
        if tensor.ndim == 0:
            value = torch.tensor(routed)
        else:
            number = tensor.numel()
            value = torch.full(tuple(tensor.shape), routed // number if number > 1 else routed, dtype=torch.int64)
            if number > 1:
                value.view(-1)[-1] += routed - int(value.sum())
        return value.numpy() if as_numpy else value

    dispatcher.maybe_move_tensor_to_cpu = to_host

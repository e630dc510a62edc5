"""Refuses a model that the memory of this machine cannot hold, before it is built there.

Without a GPU nothing else would say so: once memory is full, the system ends a process without a word. On a GPU, the planner predicts
memory before the start, and an allocation that fails is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.config import Experiment
from megatron_mm.parallel.topology import Topology
from megatron_mm.training.freezing import is_trainable, trainable_patterns


def check_memory(modules: Sequence[torch.nn.Module], experiment: Experiment, topology: Topology, *, optimizer: bool) -> None:
    """Raise ValueError, on all processes, if weights, gradients and (`optimizer`) Adam's state are larger than the machine's memory.

    Activations and everything else come on top, so a model that passes may still be too large.

    Args:
        modules: what this process holds of the model; may be on the meta device.
    """
    needed = torch.tensor(float(state_bytes(modules, experiment, data_size=topology.data_size, optimizer=optimizer)), dtype=torch.float64)
    if topology.world_size > 1:
        dist.all_reduce(needed)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # a launcher that does not say it may have started the others on other machines
    needed_here, memory = needed.item() * here / topology.world_size, machine_memory()
    if needed_here > memory:
        what = "weights, gradients and optimizer state" if optimizer else "weights and gradients"
        raise ValueError(
            f"{what} take {needed_here / 1e9:.1f} GB on this machine (processes: {here}), which has {memory / 1e9:.1f} GB of memory: "
            "use a smaller recipe (debug_...), a machine with more memory, or more machines"
        )


def state_bytes(modules: Sequence[torch.nn.Module], experiment: Experiment, *, data_size: int, optimizer: bool) -> float:
    """Bytes of this process's weights, of their gradients and of its share of Adam's state."""
    sizes, patterns = {"fp32": 4, "bf16": 2}, trainable_patterns(experiment)
    formats = experiment.precision
    state = sizes[formats.exp_avg] + sizes[formats.exp_avg_sq] + (0 if experiment.train.precision == "fp32" else 4)
    share = data_size if experiment.parallel.distributed_optimizer else 1
    trained = sizes[formats.gradients] + (state / share if optimizer else 0)
    return sum(
        p.numel() * (p.element_size() + trained * is_trainable(name, patterns))
        for module in modules
        for name, p in module.named_parameters()
    )


def machine_memory(*, meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory and swap that all processes of this machine, or of this container, can use together; infinite if unknown."""
    if not meminfo.is_file():
        return float("inf")
    kib = {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+) kB", meminfo.read_text(), re.MULTILINE)}
    memory, swap = 1024.0 * kib.get("MemTotal", 0), 1024.0 * kib.get("SwapTotal", 0)
    own = re.search(r"^0::/(.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE)
    group = groups / (own[1] if own else "")
    for folder in (group, *group.parents):
        limit = _text(folder / "memory.max").strip() if folder.is_relative_to(groups) else ""
        memory = min(memory, float(limit)) if limit.isdecimal() else memory
    return memory + swap if memory else float("inf")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

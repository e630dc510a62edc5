"""Records the last collective of this process, for a thread that watches over it.

NCCL's flight recorder knows only NCCL's collectives, and gloo has none. So torch.distributed's functions are wrapped to record their name,
a count and the group's size before they run, which takes less than a microsecond. megatron-core has imported some of them under its own
names; these are replaced as well.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

NAMES = (
    *("all_reduce", "broadcast", "barrier", "send", "recv", "isend", "irecv", "batch_isend_irecv", "broadcast_object_list"),
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single"),
    *("all_to_all", "gather", "scatter", "reduce", "_all_gather_base", "_reduce_scatter_base"),
)
"""Functions of torch.distributed whose calls are recorded."""


@dataclass
class Noted:
    """The last recorded call."""

    name: str = "none"
    count: int = 0
    """Number of calls so far, including this one."""
    group: Any = None
    """Process group; None for all processes."""
    running: bool = False
    """Whether the call has not returned yet; an asynchronous collective may take longer than its call."""

    def __str__(self) -> str:
        if not self.count:
            return "none"
        try:
            size = f" of {dist.get_world_size(self.group)} processes"
        except (ValueError, RuntimeError):  # the group is gone
            size = ""
        return f"{self.name}{size}, number {self.count}{'' if self.running else ' (returned)'}"


LAST = Noted()
"""Last recorded call of this process."""


def install() -> None:
    """Record calls from here on; does nothing when called again."""
    if hasattr(dist.all_reduce, "noted"):
        return
    replaced: dict[Any, Callable[..., Any]] = {}
    for name in NAMES:
        function = getattr(dist, name, None) or getattr(distributed_c10d, name, None)
        if function is not None:
            replaced[function] = _noting(function, name)
    for module in [module for name, module in sys.modules.items() if name.startswith(("torch.distributed", "megatron.core"))]:
        for name, value in list(vars(module).items()):
            if callable(value) and _hashable(value) and value in replaced:
                setattr(module, name, replaced[value])


def _noting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def noting(*arguments: Any, **named: Any) -> Any:
        LAST.name, LAST.group, LAST.running = name, named.get("group"), True
        LAST.count += 1
        try:
            return function(*arguments, **named)
        finally:
            LAST.running = False

    noting.noted = True  # type: ignore[attr-defined]
    return noting


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

"""The time that a process spends in messages inside its layers, where it may wait for others (tensor and expert parallelism).

What upstream lacks: megatron-core's timers include these messages in the passes. In a group whose members wait for each other in every
layer, all passes therefore take as long as the slowest one. For the duration of one step, the functions of `torch.distributed` are replaced
with ones that run a timer (also where megatron-core has imported them under its own names). An asynchronous message counts while it is
waited for.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch.distributed as dist

_FUNCTIONS = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "broadcast",
)  # fmt: skip
_BOUND = ("dist_all_gather_func", "dist_reduce_scatter_func")
"""Names under which modules of megatron-core imported such functions."""


class StartStop(Protocol):
    """A timer."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


@contextlib.contextmanager
def timed(timer: StartStop) -> Iterator[None]:
    """Run a timer whenever this process is in a collective, as long as the context lasts."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("megatron.core.") and module is not None]
    places: list[tuple[Any, str]] = [(dist, name) for name in _FUNCTIONS]
    places += [(module, name) for module in modules for name in _BOUND if name in vars(module)]
    originals = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name, original in originals:
            setattr(module, name, _with_timer(original, timer))
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _with_timer(function: Any, timer: StartStop) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        timer.start()
        try:
            work = function(*args, **kwargs)
        finally:
            timer.stop()
        return _Work(work, timer) if kwargs.get("async_op") and work is not None else work

    return run


class _Work:
    """An asynchronous message whose wait is timed."""

    def __init__(self, work: Any, timer: StartStop) -> None:
        self._work, self._timer = work, timer

    def wait(self, *args: Any) -> Any:
        self._timer.start()
        try:
            return self._work.wait(*args)
        finally:
            self._timer.stop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

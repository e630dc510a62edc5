"""CUDA graphs without a GPU: a capture records aten operations with their tensors, and a replay runs them again in the same memory.

As on a GPU, a replay reads its inputs at the addresses that they had, overwrites the results of the previous replay, and runs no Python
(hooks, flags and branches happen once, in the capture). A capture refuses what needs the device's answer, such as `item()`. Two things
differ: operations also run while they are recorded, and memory is never used twice within a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

NOT_PERMITTED = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""Operations whose result's value or shape the host must know."""


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    made: list[RecordedGraph]
    """All graphs, in the order of their creation, since `recorded_graphs` began."""
    recording: RecordedGraph | None = None

    def __init__(self, keep_graph: bool = False) -> None:
        super().__init__()
        self.operations: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self.replays = 0
        RecordedGraph.made.append(self)

    def pool(self) -> RecordedGraph:
        return self

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        assert not self.operations, "a graph is captured once"
        RecordedGraph.recording = self
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        RecordedGraph.recording = None

    def reset(self) -> None:
        self.operations.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.overloadpacket.__name__ in NOT_PERMITTED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        return self.record(func, *args, **(kwargs or {}))

    def record(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function, and record it with its tensors."""
        result = func(*args, **kwargs)
        self.operations.append((func, *tree_map_only(torch.Tensor, _memory, (args, kwargs)), [_memory(one) for one in _tensors(result)]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.operations:
            for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # a view, or a result in place, is in its memory already
                    old.copy_(new)


def as_one(kernel: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function that stands in for one kernel of a GPU; a capture records it as one operation, whatever it does inside."""
    if (graph := RecordedGraph.recording) is None:
        return kernel(**arguments)
    with _disable_current_modes():
        return graph.record(kernel, **arguments)


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor of its own: the original one may be given other memory (`tensor.data = ...`)."""
    return tensor.detach()


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def _graph(graph: RecordedGraph, pool: object = None, stream: object = None, capture_error_mode: str = "global") -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


@contextlib.contextmanager
def recorded_graphs() -> Iterator[type[RecordedGraph]]:
    """Context in which the calls of torch.cuda that a capture makes record and replay on the CPU."""
    RecordedGraph.made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", _graph)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        yield RecordedGraph

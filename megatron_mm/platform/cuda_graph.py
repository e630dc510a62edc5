"""Captures a forward pass of fixed shapes, with or without its backward pass, as CUDA graphs.

The helpers of torch (`make_graphed_callables`) and Transformer Engine return weight gradients of each replay to autograd, in memory that
the next replay overwrites; here a captured backward pass adds them to buffers itself. And they capture in mode `global`, in which an
allocation of pinned memory by another thread makes the capture fail; here the mode is `thread_local`, so that only this thread's calls
matter.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Forward = Callable[[torch.Tensor], torch.Tensor]
Backward = Callable[[torch.Tensor, torch.Tensor], None]
"""Runs the backward pass of a result with its gradient, and adds the gradients of weights to buffers."""
Result = TypeVar("Result")

WARM_UPS = 3
"""Passes before the capture: they load kernels, choose algorithms, compile functions and fill caches, which a capture must not do."""

_FLAGS = (
    ("megatron.core.transformer.cuda_graphs", "_set_capture_start", "_set_capture_end"),
    ("transformer_engine.pytorch.graph", "set_capture_start", "set_capture_end"),
)
"""Modules with a flag that is set during a capture, and the functions that set and clear it. Layers read these flags, for example to leave
recomputation and hooks of gathered weights out."""


@torch.no_grad()
def capture(forward: Forward, example: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Capture `forward(example)` and return a function that replays it on the current stream.

    The function reads the values that `example` has at that time, and those of the weights, at the addresses they have now. It returns the
    same tensor at every call. Called on the current CUDA device, outside of any other capture.

    Raises RuntimeError if the pass cannot be captured, for example because it waits for the device.
    """
    with _prepared(lambda: forward(example)) as stream:
        graph, result = _captured(lambda: forward(example), stream)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


@dataclass(frozen=True)
class Passes:
    """A captured forward pass and its backward pass, with one set of activations: a replay of one follows a replay of the other."""

    forward: Callable[[], torch.Tensor]
    """Replays the forward pass on the current stream; returns the same tensor, without a graph of autograd, at every call."""
    gradient: torch.Tensor
    """Gradient of that tensor, the input of every replay of the backward pass."""
    backward: Callable[[], None]
    """Replays the backward pass of the latest forward pass on the current stream."""


@torch.enable_grad()
def capture_passes(forward: Forward, backward: Backward, example: torch.Tensor, *, stream: torch.cuda.Stream | None = None) -> Passes:
    """Capture `forward(example)` and `backward(result, gradient)`.

    As for `capture`. The backward pass also runs before the capture, so what it adds to gradient buffers must be removed afterwards.

    Args:
        stream: to capture on; None for a new one. Many captures should share one: torch keeps a workspace of products for each stream.

    Raises RuntimeError if a pass cannot be captured.
    """
    with torch.no_grad():
        gradient = torch.zeros_like(forward(example))
    with _prepared(lambda: backward(forward(example), gradient), stream) as stream:
        ahead, result = _captured(lambda: forward(example), stream)
        back, _ = _captured(lambda: backward(result, gradient), stream, pool=ahead.pool())
    result = result.detach()

    def replay() -> torch.Tensor:
        ahead.replay()
        return result

    return Passes(replay, gradient, back.replay)


@contextlib.contextmanager
def _prepared(run: Callable[[], object], stream: torch.cuda.Stream | None = None) -> Iterator[torch.cuda.Stream]:
    """Context for captures on the stream that it returns, on which `run` was called a few times before. The current stream waits for it."""
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with _announced():  # warm-ups, too: Transformer Engine chooses its attention by the flag, and remembers the choice
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


def _captured(run: Callable[[], Result], stream: torch.cuda.Stream, *, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture what `run` launches, with memory of its own or from another graph's pool; return the graph and what `run` returned."""
    graph = torch.cuda.CUDAGraph()
    with _no_garbage_collection(), torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = run()
    return graph, result


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Context in which megatron-core and Transformer Engine, as far as they are installed and have a flag for it, know of a capture."""
    with contextlib.ExitStack() as ends:
        for name, start, end in _FLAGS:
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            if hasattr(module, start) and hasattr(module, end):
                ends.callback(getattr(module, end))
                getattr(module, start)()
        yield


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Context in which no unrelated object is freed in the middle of a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

"""Captures a forward pass of fixed shapes as a CUDA graph.

The helpers of torch (`make_graphed_callables`) and Transformer Engine also capture a backward pass, and keep one set of activations for it;
they capture in mode `global`, in which an allocation of pinned memory by another thread makes the capture fail. Here the mode is
`thread_local`, so that only this thread's calls matter.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator

import torch

WARM_UPS = 3
"""Passes before the capture: they load kernels, choose algorithms, compile functions and fill caches, which a capture must not do."""

_FLAGS = (
    ("megatron.core.transformer.cuda_graphs", "_set_capture_start", "_set_capture_end"),
    ("transformer_engine.pytorch.graph", "set_capture_start", "set_capture_end"),
)
"""Modules with a flag that is set during a capture, and the functions that set and clear it. Layers read these flags, for example to leave
recomputation and hooks of gathered weights out."""


@torch.no_grad()
def capture(forward: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Capture `forward(example)` and return a function that replays it on the current stream.

    The function reads the values that `example` has at that time, and those of the weights, at the addresses they have now. It returns the
    same tensor at every call. Called on the current CUDA device, outside of any other capture.

    Raises RuntimeError if the pass cannot be captured, for example because it waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with _announced():  # warm-ups, too: Transformer Engine chooses its attention by the flag, and remembers the choice
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                forward(example)
        with _no_garbage_collection(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = forward(example)
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


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

"""The calls of a capture, without a GPU: in which order they come, and that the engines know of it, and no longer afterwards."""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import cuda_graphs

from megatron_mm.platform.cuda_graph import _announced, capture


def test_the_engines_know_of_a_capture_and_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    flag = SimpleNamespace(set_capture_start=lambda: said.append("start"), set_capture_end=lambda: said.append("end"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.graph", flag)
    with pytest.raises(RuntimeError, match="no capture"), _announced():
        assert cuda_graphs.is_graph_capturing() and said == ["start"]
        raise RuntimeError("no capture")
    assert not cuda_graphs.is_graph_capturing() and said == ["start", "end"]


def test_an_engine_without_a_flag_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.graph", SimpleNamespace())
    monkeypatch.delattr(cuda_graphs, "_set_capture_end")
    with _announced():
        assert not cuda_graphs.is_graph_capturing()


class Stream:
    """Stands in for CUDA streams, and notes what waits for what."""

    notes: list[str]

    def wait_stream(self, other: Stream) -> None:
        self.notes.append("wait")


def test_a_pass_is_warmed_up_and_captured_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Stream.notes = []
    inside: list[bool] = []

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        notes.append("warm-up")
        yield

    @contextlib.contextmanager
    def graph(*arguments: Any, **options: Any) -> Iterator[None]:
        real.bind(None, *arguments, **options)
        assert options["capture_error_mode"] == "thread_local" and not gc.isenabled()
        notes.append("capture")
        yield

    real = inspect.signature(torch.cuda.graph.__init__)
    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": on,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: notes.append("replay")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        notes.append("pass")
        inside.append(cuda_graphs.is_graph_capturing() and not torch.is_grad_enabled())
        return pixels + 1

    replay = capture(forward, torch.zeros(2))
    assert replay() is replay() and torch.equal(replay(), torch.ones(2))
    assert notes == ["wait", "warm-up", "pass", "pass", "pass", "capture", "pass", "wait", "replay", "replay", "replay"]
    assert inside == [True] * 4 and not cuda_graphs.is_graph_capturing() and gc.isenabled()

"""What a capture says to the engines, without a GPU: they know of it, and no longer afterwards."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from megatron.core.transformer import cuda_graphs

from megatron_mm.platform.cuda_graph import _announced


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

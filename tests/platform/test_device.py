"""What a run sets for its device."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_mm.platform import engines
from megatron_mm.platform.device import ALLOCATOR_SETTINGS, be_deterministic, grow_segments, packed_attention_missing


def test_deterministic_algorithms_include_those_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS is deterministic only with a fixed workspace, which torch does not choose by itself."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        be_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.parametrize(
    ("capability", "transformer_engine", "cudnn", "missing"),
    [
        ((9, 0), "2.11.0", 91002, ""),
        ((10, 0), "2.11.0", 91002, ""),
        ((12, 0), "2.11.0", 91900, "needs cuDNN 9.18.1 and Transformer Engine 2.20 (found: 91900, 2.11.0)"),
        ((12, 0), "2.20.2", 91002, "(found: 91002, 2.20.2), and the package flash-attn"),
        ((12, 0), "2.20.2", 91801, ""),
    ],
)
def test_which_gpus_keep_packed_documents_apart(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], transformer_engine: str, cudnn: int, missing: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(engines, "installed", lambda package: transformer_engine)
    found = packed_attention_missing()
    assert missing in found and bool(missing) == bool(found)


@pytest.mark.parametrize(("given", "expected"), [({}, ["expandable_segments:True"]), ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, [])])
def test_segments_of_memory_grow_unless_the_environment_decides(
    given: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", settings.append)
    grow_segments()
    assert settings == expected

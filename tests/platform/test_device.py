"""What a run sets for its device."""

from __future__ import annotations

import os

import pytest
import torch

from megatron_mm.platform.device import be_deterministic


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

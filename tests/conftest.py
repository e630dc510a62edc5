"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mm.data.prepare.demo import prepare_demo


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set (240 training samples) with tokenizer and index. Read-only: all tests share it."""
    path = tmp_path_factory.mktemp("demo") / "data"
    prepare_demo(path, samples=240)
    return path

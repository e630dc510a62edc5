"""Fixtures for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mm.data.prepare.demo import prepare_demo


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo data set (240 training samples), tokenizer and index included. Not to be written to."""
    path = tmp_path_factory.mktemp("demo") / "data"
    prepare_demo(path, samples=240)
    return path

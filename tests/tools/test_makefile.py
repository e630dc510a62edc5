"""The Makefile: what a target runs, seen without running it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def commands(*arguments: str) -> list[str]:
    """Return the lines that make would run, and what it says."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON312", "VENV312"))}
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=REPOSITORY, env=alone, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_the_night_has_the_newest_engine_or_says_that_it_has_not(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch(mode=0o755)
    newest = f"PYTHONPATH=. {python} -m pytest"
    lines = commands("nightly", "PYTHON312=", f"VENV312={tmp_path}")
    assert sum(line.startswith(newest) for line in lines) == 1 and not any(line.startswith("no python3.12") for line in lines)
    lines = commands("nightly", "PYTHON312=", f"VENV312={tmp_path / 'none'}")
    assert any(line.startswith("no python3.12 here: megatron-core 0.19") for line in lines)
    lines = commands("test-matrix", f"VENV312={tmp_path}")
    assert any("/bin/python -m pytest" in line and line.endswith("tests") and not line.startswith("PYTHONPATH") for line in lines)
    assert lines[-1].startswith(newest)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_the_gpu_benchmark_is_one_command_that_ends_in_time() -> None:
    (line,) = (line for line in commands("gpu-bench", "GPU_PYTHON=python3"))
    assert line.endswith("python3 benchmarks/gpu_bench.py")

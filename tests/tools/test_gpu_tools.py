"""The GPU check and benchmark on a machine without a GPU: what needs none runs, and the rest says so."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def run(program: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / program), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", REPOSITORY / "tools" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@NO_GPU
@pytest.mark.parametrize("program", ["tools/gpu_check.py", "benchmarks/gpu_bench.py"])
def test_without_a_gpu_one_line_says_so(program: str) -> None:
    done = run(program)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == [
        f"{Path(program).stem}: error: torch finds no GPU here: run it on a machine with one, or with --device cpu"
    ]


def test_a_difference_is_relative_to_each_tensor(gpu_check: ModuleType) -> None:
    exact = {"large": torch.full((4,), 100.0), "small": torch.tensor([1.0])}
    found = {"large": torch.full((4,), 101.0), "small": torch.tensor([1.5])}
    assert gpu_check.farthest(found, exact) == pytest.approx(0.5)
    assert gpu_check.together(found, exact) == pytest.approx(math.sqrt(4 * 1 + 0.25) / math.sqrt(4 * 100**2 + 1))


def test_what_is_not_a_number_never_holds(gpu_check: ModuleType) -> None:
    exact = {"a": torch.ones(3), "b": torch.ones(3)}
    broken = {"a": torch.tensor([1.0, math.nan, 1.0]), "b": torch.ones(3)}
    assert not gpu_check.Checked("loss", found=math.nan, allowed=1.0).holds
    assert not gpu_check.Checked("layers", found=gpu_check.farthest(broken, exact), allowed=1.0).holds
    assert gpu_check.Checked("layers", found=1.0, allowed=1.0).holds


def test_layers_of_other_names_are_not_compared(gpu_check: ModuleType) -> None:
    with pytest.raises(AssertionError, match="not the same names"):
        gpu_check.farthest({"a": torch.ones(1)}, {"b": torch.ones(1)})


@pytest.mark.slow
def test_the_check_passes_on_a_cpu() -> None:
    done = run("tools/gpu_check.py", "--device", "cpu", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not checked: needs a GPU" in done.stdout and "FAILED" not in done.stdout
    assert "torch bf16: gradient" in done.stdout and "through a checkpoint: loss" in done.stdout


@pytest.mark.slow
def test_the_benchmark_writes_its_table(tmp_path: Path) -> None:
    done = run("benchmarks/gpu_bench.py", "--device", "cpu", "--steps", "1", "--out", str(tmp_path), timeout=280)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("gpu_bench_CPU_*.md")
    rows = [line for line in table.read_text().splitlines() if line.startswith("| torch fp32")]
    assert len(rows) == 3
    losses = {row.split("|")[-2].strip() for row in rows}
    assert len(losses) == 1, f"recompute changes the loss: {losses}"
